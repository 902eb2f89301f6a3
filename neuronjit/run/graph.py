"""`multistep` in a graph of torch.compile or torch.export: one operator each way, no graph break.

A graph holds tensors, numbers and text, so all of a call that is neither goes into one text, which
says everything: a graph that was saved runs in another process. Under an operator is what is under
an eager call: a plan.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

from ..errors import BackendError, CompileError, DifferentiationError, SpecError
from ..kernels.targets.base import steps_between_checkpoints
from ..models.model import NeuronModel
from ..models.surrogate import Surrogate
from ..neurons import as_model
from ..surrogates import as_surrogate
from ..torch_private import below_autograd
from . import checks
from .call import Call, Output, Values, as_backend, as_state, exact, settle, signature
from .plan import (
    EagerPlan,
    KernelPlan,
    backward,
    choose_target,
    fall_back,
    keep,
    once,
    output,
    plan_for,
    plans,
)
from .statistics import Running, batch_statistics, by_channel
from .two_passes import two_passes

# older versions of torch cannot tell: there, a new number makes a new graph
has_static_value = getattr(symbolic_shapes, "has_static_value", lambda number: True)
VERSION = 5  # of the text and of what the operators return: compilers keep graphs on disk


# --- making a graph: traced by Dynamo, so plain Python on names, numbers and tensors --------------
# (and no `isinstance(value, int | float)`, which torch 2.6's Dynamo does not know)


def multistep(
    model: Any,
    x: Tensor,
    state: Mapping[str, Any] | None,
    surrogate: Any,
    reset: str,
    detach_reset: bool,
    record: Sequence[str],
    final_state: bool,
    backend: str | None,
    params: dict[str, Any],
    twice: bool = False,
) -> Output:
    """`neuronjit.multistep`, by operators alone; `twice`: backward is that of `two_passes`."""
    model, surrogate = as_model(model), as_surrogate(surrogate)
    state = {name: _constant(value, x) for name, value in as_state(state).items()}
    params = {name: _constant(value, x) for name, value in params.items()}
    call, values = settle(
        model, x, state, surrogate, reset, detach_reset, record, final_state, backend or "auto",
        params,
    )  # fmt: skip
    names = [name for name, value in values.items() if isinstance(value, Tensor)]
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    numbers = [value for value in values.values() if not isinstance(value, Tensor)]
    changing = []
    for name, number in zip(surrogate.names, surrogate.values, strict=True):
        if has_static_value(number):
            numbers.append(number)
        else:  # on the CPU: it becomes an argument of the kernel, whose code reads no tensor for it
            changing.append(name)
            tensors.append(torch.zeros((), dtype=torch.float64) + number)
    text = to_text(call, backend, names, changing, twice)
    save = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))
    # Inductor takes any four dimensions for an image. Of [T, N, C, L], kept for backward, it makes
    # channels_last: a copy each way, and in torch 2.13 on a CPU an error where N is a symbol.
    lifted = x.dim() == 4
    if lifted:
        x, *tensors = [t.unsqueeze(-1) if t.dim() else t for t in (x, *tensors)]
    outputs = torch.ops.neuronjit.forward(x, tensors, numbers, save, text)[:-1]
    return output(call, [t.squeeze(-1) for t in outputs] if lifted else outputs)


def statistics(
    x: Tensor, eps: float, running: Running, backend: str | None
) -> tuple[Tensor, Tensor]:
    """`batch_statistics`, by an operator."""
    found: tuple[Tensor, Tensor]
    found = torch.ops.neuronjit.statistics(x.detach(), eps, *running, backend)
    return found


def _constant(value: Any, x: Tensor) -> Any:
    """A number that changes from call to call as a tensor, so that it is no part of the graph."""
    if isinstance(value, (int, float)) and not has_static_value(value):
        return x.new_zeros((), dtype=checks.arithmetic(x.dtype)) + value
    return value


def to_text(
    call: Call, backend: str | None, names: list[str], changing: list[str], twice: bool = False
) -> str:
    """All of a call but tensors and numbers, on one line.

    Compilers copy it into comments of the code that they write. So its letters are few: no line
    ends, no backslash.
    """
    rest = ", ".join(
        (
            f'"reset": "{call.reset}"',
            f'"detach_reset": {"true" if call.detach_reset else "false"}',
            f'"spiking": {"true" if call.surrogate.spiking else "false"}',
            f'"final_state": {"true" if call.final_state else "false"}',
            f'"backend": {_quoted(backend)}',
            f'"record": {_listed(call.record)}',
            f'"tensors": {_listed(names)}',
            f'"changing": {_listed(changing)}',
            f'"twice": {"true" if twice else "false"}',
        )
    )
    described = f'"model": {call.model.token}, "surrogate": {call.surrogate.token}'
    return f'{{"neuronjit": {VERSION}, {described}, {rest}}}'


def _quoted(text: str | None) -> str:
    return "null" if text is None else f'"{text}"'


def _listed(names: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


# --- running one ----------------------------------------------------------------------------------


class _Told(NamedTuple):
    """What the text of a graph says."""

    call: Call  # of the surrogate's form: its numbers come with each call, as does the backend
    backend: str | None
    names: tuple[str, ...]  # of the model's arguments that are tensors
    changing: tuple[str, ...]  # parameters of the surrogate that come as tensors, after those
    twice: bool  # backward goes twice over the sequence


@cache
def _read(text: str) -> _Told:
    try:
        said = json.loads(text)
        version = said["neuronjit"]
    except (ValueError, KeyError, TypeError):
        version = "an older one"
    if version != VERSION:
        raise SpecError(f"this graph is of another version of neuronjit ({version}); make it again")
    name, derivative, primitive, numbers = said["surrogate"]
    smooth = primitive and _joined(primitive)
    form = Surrogate(name, _joined(derivative), smooth, dict.fromkeys(numbers, 1.0))
    model = said["model"]
    call = Call(
        NeuronModel.from_dict({**model, "equations": _joined(model["equations"])}),
        form(spiking=said["spiking"]),
        said["reset"],
        said["detach_reset"],
        tuple(said["record"]),
        said["final_state"],
        "auto",
    )
    backend = None if said["backend"] is None else as_backend(said["backend"])
    names, changing = tuple(said["tensors"]), tuple(said["changing"])
    return _Told(call, backend, names, changing, said["twice"])


def _joined(lines: list[str]) -> str:
    return "\n".join(lines)


def _find(
    text: str, x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float]
) -> tuple[KernelPlan | EagerPlan, Sequence[Tensor]]:
    """The plan of what a graph asks for, and the tensors without the surrogate's numbers."""
    told = _read(text)
    own = tensors[: len(told.names)]
    alphas = [t.item() for t in tensors[len(told.names) :]]
    backend = told.backend or as_backend(None)
    key = (
        text, backend, *map(exact, numbers), *map(exact, alphas), signature(x),
        *map(signature, own),
    )  # fmt: skip
    plan = plans.get(key)
    if plan is None:
        given, rest = dict(zip(told.names, own, strict=True)), iter(numbers)
        model, form = told.call.model, told.call.surrogate
        values: Values = {
            name: given[name] if name in given else next(rest) for name in model.arguments
        }
        changed = dict(zip(told.changing, alphas, strict=True))
        alpha: Any = {p: changed[p] if p in changed else next(rest) for p in form.names}
        surrogate = form(**alpha)
        call = told.call._replace(surrogate=surrogate, backend=backend)
        checks.check_input(x)
        for name, value in values.items():
            checks.check_value(model, name, value, x)
        plan = keep(plans, key, plan_for(call, x, values))
    return plan, own


def _checkpoints(x: Tensor, model: NeuronModel, save: bool) -> Tensor:
    """Zeros of the checkpoints' size, as a `KernelPlan` makes them.

    K depends on T only while one piece holds all steps, so the size is one formula whatever T,
    which may be a symbol here. + 2, so that it is never 0 or 1, for which torch.compile would
    specialise the graph.
    """
    real = checks.arithmetic(x.dtype)
    if not save:
        return x.new_empty(0, dtype=real)
    size = x.shape[0] - 1 if x.shape[0] > 1 else 0
    size = size // steps_between_checkpoints(sys.maxsize, model) * len(model.state)
    for neurons in x.shape[1:]:
        size = size * neurons
    return x.new_zeros(size + 2, dtype=real)


def _state_like(x: Tensor) -> Tensor:
    """An empty state, in the layout of one step of x."""
    real = checks.arithmetic(x.dtype)
    if isinstance(x.shape[0], int) and not x.shape[0]:
        return x.new_empty(x.shape[1:], dtype=real)
    return torch.empty_like(x[0], dtype=real)


def _restride(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the layout that was promised to the graph."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _promised(x: Tensor, outputs: Sequence[Tensor], finals: int) -> list[Tensor]:
    plain = torch.empty_like(x, device="meta")
    state = _state_like(plain)
    return [_restride(t, state if 1 <= i <= finals else plain) for i, t in enumerate(outputs)]


# Defined, and differentiated, one step below torch.library.custom_op and register_autograd: those
# take 35 microseconds a call for what is below in a few lines.
_operators = torch.library.Library("neuronjit", "DEF")
_operators.define(
    "forward(Tensor x, Tensor[] tensors, float[] numbers, bool save, str call) -> Tensor[]"
)
_operators.define(
    "backward(Tensor x, Tensor checkpoints, Tensor[] tensors, Tensor?[] grads, float[] numbers,"
    " bool[] wanted, str call) -> Tensor[]"
)
_operators.define(
    "statistics(Tensor x, float eps, Tensor(a!)? mean, Tensor(b!)? var, Tensor(c!)? batches,"
    " float? momentum, str? backend) -> (Tensor, Tensor)"
)


@torch.library.impl(_operators, "forward", "CompositeExplicitAutograd")
def _forward(
    x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float], save: bool, call: str
) -> list[Tensor]:
    plan, own = _find(call, x, tensors, numbers)
    finals = len(plan.call.model.state) if plan.call.final_state else 0
    if isinstance(plan, KernelPlan):
        try:
            outputs, checkpoints = plan.forward(*plan.prepare(x, own), save=save)
        except (BackendError, CompileError) as error:
            plan = fall_back(plan, error)
        else:
            if plan.copies:
                outputs = _promised(x, outputs, finals)
            if checkpoints is None:
                checkpoints = _checkpoints(x, plan.call.model, save)
            else:
                checkpoints[-2:] = 0  # nothing random in a graph
            return [*outputs, checkpoints]
    outputs, _ = plan.forward(x, own, save=save)
    return [*_promised(x, outputs, finals), _checkpoints(x, plan.call.model, save)]


@torch.library.register_fake("neuronjit::forward")  # type: ignore[untyped-decorator]
def _(
    x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float], save: bool, call: str
) -> list[Tensor]:
    told = _read(call)
    choose_target(as_backend(told.backend), x)
    states = [_state_like(x) for _ in told.call.model.state]
    sequences = [torch.empty_like(x) for _ in told.call.record]
    ends = states if told.call.final_state else []
    return [torch.empty_like(x), *ends, *sequences, _checkpoints(x, told.call.model, save)]


@torch.library.impl(_operators, "backward", "CompositeExplicitAutograd")
def _backward(
    x: Tensor,
    checkpoints: Tensor,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    numbers: Sequence[float],
    wanted: Sequence[bool],
    call: str,
) -> list[Tensor]:
    plan, own = _find(call, x, tensors, numbers)
    asked = tuple(wanted[: 1 + len(own)])
    held = checkpoints if len(checkpoints) > 2 else None
    ready, others = plan.prepare(x, own)
    told = _read(call)
    if told.twice:
        results = two_passes(plan, told.names).backward(ready, held, others, grads, asked)
    else:
        results = backward(plan, ready, held, others, grads, asked)
    results += [None] * (len(tensors) - len(own))
    inputs = zip((x, *tensors), results, wanted, strict=True)
    given = [_promised_gradient(*of_one) for of_one in inputs]
    if wanted[0] and not (isinstance(plan, KernelPlan) and not plan.copies):
        given[0] = _restride(given[0], torch.empty_like(x, device="meta"))
    return [given[0], *map(_alone, given[1:])]


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, contiguous in memory of its own: compilers take results for apart and aligned.

    Sums over neurons are rows of one tensor.
    """
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _promised_gradient(t: Tensor, grad: Tensor | None, wanted: bool) -> Tensor:
    """The gradient in its input's shape and dtype; an empty tensor where nobody wants it."""
    if not wanted:
        return t.new_empty(0)
    if grad is None:
        return torch.zeros_like(t)
    grad = grad if grad.shape == t.shape else grad.sum_to_size(t.shape)
    return grad if grad.dtype is t.dtype else grad.to(t.dtype)


@torch.library.register_fake("neuronjit::backward")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    checkpoints: Tensor,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    numbers: Sequence[float],
    wanted: Sequence[bool],
    call: str,
) -> list[Tensor]:
    shapes = [torch.empty_like(x), *[t.new_empty(t.shape) for t in tensors]]
    return [s if w else s.new_empty(0) for s, w in zip(shapes, wanted, strict=True)]


@torch.library.impl(_operators, "statistics", "CompositeExplicitAutograd")
def _statistics(
    x: Tensor,
    eps: float,
    mean: Tensor | None,
    var: Tensor | None,
    batches: Tensor | None,
    momentum: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return batch_statistics(x, eps, Running(mean, var, batches, momentum), backend)


@torch.library.register_fake("neuronjit::statistics")  # type: ignore[untyped-decorator]
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    found = x.new_empty(by_channel(x), dtype=checks.arithmetic(x.dtype))
    return found, torch.empty_like(found)


# --- gradients ------------------------------------------------------------------------------------


class _Differentiable(torch.autograd.Function):
    """The operator `forward`, with `backward` as its derivative."""

    @staticmethod
    def forward(
        ctx: Any, numbers: list[float], save: bool, call: str, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        with below_autograd():
            outputs = torch.ops.neuronjit.forward(x, tensors, numbers, save, call)
        ctx.numbers, ctx.save, ctx.call = numbers, save, call
        ctx.save_for_backward(x, outputs[-1], *tensors)
        ctx.mark_non_differentiable(outputs[-1])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.save:
            raise DifferentiationError(
                "this graph was made for inference: no input or parameter required grad; export or"
                " compile it with one that does"
            )
        x, checkpoints, *tensors = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[3:])
        given: list[Tensor | None] = [None for _ in wanted]
        if any(grad is not None for grad in grads[:-1]):
            results = torch.ops.neuronjit.backward(
                x, checkpoints, tensors, grads[:-1], ctx.numbers, wanted, ctx.call
            )
            given = [grad if want else None for grad, want in zip(results, wanted, strict=True)]
        return None, None, None, *given


def _want_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@torch.library.impl(_operators, "forward", "Autograd")
def _(x: Tensor, tensors: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    if _want_grad(x, *tensors):
        return [*_Differentiable.apply(*rest, x, *tensors)]  # type: ignore[no-untyped-call]
    with below_autograd():
        return torch.ops.neuronjit.forward(x, tensors, *rest)  # type: ignore[no-any-return]


@torch.library.impl(_operators, "backward", "Autograd")
def _(
    x: Tensor,
    checkpoints: Tensor,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    *rest: Any,
) -> list[Tensor]:
    with below_autograd():
        results: list[Tensor] = torch.ops.neuronjit.backward(x, checkpoints, tensors, grads, *rest)
    given = [grad for grad in grads if grad is not None]
    return once(results, [x, *given, *tensors]) if _want_grad(x, *given, *tensors) else results
