"""The two custom operators that graphs of torch.compile and torch.export hold.

Under an operator is what is under an eager call: a plan, or the eager reference. An operator costs
twice what an `autograd.Function` does, so eager calls stay with that.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .calls import choose_target, eager_arguments, keep, plan_for, run_eager, signature, warn_slow
from .errors import BackendError, DifferentiationError, SpecError
from .neurons import NeuronModel
from .plan import Plan
from .surrogates import Surrogate
from .targets.common import steps_between_checkpoints

# the first line of `call`, to be changed with the outputs: compilers keep graphs on disk
FORMAT = "neuronjit 1"


class _Call(NamedTuple):
    """All of a call but tensors and numbers."""

    model: NeuronModel
    surrogate: Surrogate  # its form: the numbers come with each call
    reset: str
    detach_reset: bool
    record: tuple[str, ...]
    final_state: bool
    backend: str
    names: tuple[str, ...]  # of the states and parameters that are tensors
    changing: tuple[str, ...]  # parameters of the surrogate that come as tensors, after those


@cache
def _read(call: str) -> _Call:
    version, model, surrogate, spiking, reset, detach, record, final, backend, names, *more = (
        call.split("\n")
    )
    if version != FORMAT:
        raise SpecError(f"this graph is of another version of neuronjit ({version}); make it again")
    name, derivative, primitive, numbers = json.loads(surrogate)
    form = Surrogate(name, derivative, primitive, dict.fromkeys(numbers, 1.0))
    return _Call(
        NeuronModel(**json.loads(model)), form(spiking=bool(spiking)), reset, bool(detach),
        _names(record), bool(final), backend, _names(names), _names(*more),
    )  # fmt: skip


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()


def _backend(call: _Call) -> str:
    return call.backend or os.environ.get("NEURONJIT_BACKEND") or "auto"


_plans: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def _split(call: _Call, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The model's tensors, and the surrogate's numbers."""
    return tensors[: len(call.names)], tensors[len(call.names) :]


def _find(
    call: str, x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float]
) -> tuple[Any, ...]:
    """What `plan_for` gives, kept for the next call where it is a plan."""
    own = _read(call)
    backend = _backend(own)
    tensors, changing = _split(own, tensors)
    alphas = [t.item() for t in changing]
    key = (call, backend, *numbers, *alphas, signature(x), *[signature(t) for t in tensors])
    found = _plans.get(key)
    if found is None:
        rest = iter(numbers)
        given = dict(zip(own.names, tensors, strict=True))
        state = {z: given[z] if z in given else next(rest) for z in own.model.state}
        params = {p: given[p] if p in given else next(rest) for p in own.model.params}
        values: dict[str, Any] = dict(zip(own.changing, alphas, strict=True))
        values |= {p: next(rest) for p in own.surrogate.params if p not in values}
        surrogate = own.surrogate(**values)
        found = plan_for(
            own.model, x, state, surrogate, own.reset, own.detach_reset, own.record,
            own.final_state, backend, params,
        )  # fmt: skip
        if isinstance(found[0], Plan):
            keep(_plans, key, found[:1])
    return found


def _checkpoints(x: Tensor, model: NeuronModel, save: bool) -> Tensor:
    """Zeros of the checkpoints' size, as `Plan.forward` makes them.

    The number of steps between them depends on T only while one piece holds all steps, so the
    size is one formula whatever T, which may be a symbol here. Two more, because graphs are made
    anew where a size becomes 0 or 1.
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


def _promised(x: Tensor, outputs: Sequence[Tensor], states: int) -> list[Tensor]:
    plain = torch.empty_like(x, device="meta")
    state = _state_like(plain)
    return [_restride(t, state if 1 <= i <= states else plain) for i, t in enumerate(outputs)]


@torch.library.custom_op("neuronjit::forward", mutates_args=())
def _forward(
    x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float], save: bool, call: str
) -> list[Tensor]:
    found = _find(call, x, tensors, numbers)
    own = _read(call)
    tensors, _ = _split(own, tensors)
    states = len(own.model.state)
    finals = states if own.final_state else 0
    if isinstance(found[0], Plan):
        plan = found[0]
        try:
            outputs, checkpoints = plan.forward(*plan.prepare(x, tensors), save=save)
        except BackendError as error:
            if _backend(own) != "auto":
                raise
            warn_slow(error)
            found = eager_arguments(plan, x, tensors)
        else:
            if plan.copies:
                outputs = _promised(x, outputs, finals)
            if checkpoints is None:
                checkpoints = _checkpoints(x, own.model, save)
            else:
                checkpoints[-2:] = 0  # nothing random in a graph
            return [*outputs, checkpoints]
    out = run_eager(*found)
    outputs = [out.spikes, *out.state.values(), *[out.record[n] for n in own.record]]
    return [*_promised(x, outputs, finals), _checkpoints(x, own.model, save)]


@_forward.register_fake
def _(
    x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float], save: bool, call: str
) -> list[Tensor]:
    own = _read(call)
    choose_target(_backend(own), x)
    states = [_state_like(x) for _ in own.model.state]
    sequences = [torch.empty_like(x) for _ in own.record]
    ends = states if own.final_state else []
    return [torch.empty_like(x), *ends, *sequences, _checkpoints(x, own.model, save)]


@torch.library.custom_op("neuronjit::backward", mutates_args=())
def _backward(
    x: Tensor,
    checkpoints: Tensor,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    numbers: Sequence[float],
    wanted: Sequence[bool],
    call: str,
) -> list[Tensor]:
    found = _find(call, x, tensors, numbers)
    results: Sequence[Tensor | None] | None = None
    every = tensors
    tensors, changing = _split(_read(call), tensors)
    asked = tuple(wanted[: 1 + len(tensors)])
    if isinstance(found[0], Plan):
        plan = found[0]
        held = checkpoints if len(checkpoints) > 2 else None
        ready, others = plan.prepare(x, tensors)
        try:
            results = plan.backward(ready, held, others, grads, asked)
        except BackendError:
            if _backend(_read(call)) != "auto":
                raise
            found = eager_arguments(plan, x, tensors)
    if results is None:
        results = _differentiate(found, x, tensors, grads, asked)
    return _promised_gradients(x, every, [*results, *[None for _ in changing]], wanted)


def _promised_gradients(
    x: Tensor, tensors: Sequence[Tensor], results: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor]:
    """One of each input's shape, and an empty tensor for what nobody wants."""
    given: list[Tensor] = []
    for t, grad, want in zip((x, *tensors), results, wanted, strict=True):
        if not want:
            given.append(t.new_empty(0))
        elif grad is None:
            given.append(torch.zeros_like(t))
        else:
            given.append(grad.sum_to_size(t.shape).to(t.dtype))
    if wanted[0]:
        given[0] = _restride(given[0], torch.empty_like(x, device="meta"))
    return [given[0], *[g.contiguous() for g in given[1:]]]


def _differentiate(
    found: tuple[Any, ...],
    x: Tensor,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Backward in eager PyTorch, where no kernel serves."""
    model, _, values, *rest = found
    # operators run below autograd, which is to come back for the reference's own operations
    autograd = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():
        leaves = [t.detach().requires_grad_(w) for t, w in zip((x, *tensors), wanted, strict=True)]
        names = [n for n in (*model.state, *model.params) if isinstance(values[n], Tensor)]
        out = run_eager(model, leaves[0], values | dict(zip(names, leaves[1:], strict=True)), *rest)
        outputs = [out.spikes, *out.state.values(), *out.record.values()]
        arrived = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        arrived = [(o, g) for o, g in arrived if o.requires_grad]
        asked = [leaf for leaf in leaves if leaf.requires_grad]
        if not arrived:
            return [None] * len(leaves)
        ends, gradients = zip(*arrived, strict=True)
        found_grads = torch.autograd.grad(ends, asked, gradients, allow_unused=True)
    each = iter([None if g is None else g.clone() for g in found_grads])
    return [next(each) if leaf.requires_grad else None for leaf in leaves]


@_backward.register_fake
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


# --- gradients ------------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, tensors, ctx.numbers, ctx.save, ctx.call = inputs
    ctx.save_for_backward(x, output[-1], *tensors)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    if not ctx.save:
        raise DifferentiationError(
            "this graph was made for inference: no input or parameter required grad; export or"
            " compile it with one that does"
        )
    x, checkpoints, *tensors = ctx.saved_tensors
    none: Any = None if ctx.numbers else []  # torch takes an empty list for one of tensors
    wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    if all(grad is None for grad in grads[:-1]):
        return None, [None] * len(tensors), none, None, None
    results = torch.ops.neuronjit.backward(
        x, checkpoints, tensors, grads[:-1], ctx.numbers, wanted, ctx.call
    )
    given = [grad if want else None for grad, want in zip(results, wanted, strict=True)]
    return given[0], given[1:], none, None, None


def _no_second(ctx: Any, grads: list[Tensor | None]) -> Any:
    raise DifferentiationError(
        "the kernels have first derivatives only; use backend='eager' for a second derivative"
    )


_forward.register_autograd(_gradient, setup_context=_keep)
_backward.register_autograd(_no_second)
