"""The front end: find the plan of a call, run it, and differentiate it for autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import settings
from ..errors import BackendError, CompileError, NeuronJitError
from ..models.model import NeuronModel
from ..models.surrogate import Surrogate
from ..neurons import as_model
from ..surrogates import ATan, as_surrogate
from ..torch_private import direct_apply, has_tangents, tracing, transformed
from . import checks, front_end, packed
from .call import Output, as_names, as_state, glance, key_of, settle, signature, tensors_of
from .plan import (
    EagerPlan,
    KernelPlan,
    fall_back,
    gradients,
    is_gone,
    keep,
    output,
    plan_for,
    plans,
)

__all__ = ["Output", "multistep"]


def multistep(
    model: NeuronModel | str,
    x_seq: Tensor,
    state: Mapping[str, Tensor | float] | None = None,
    *,
    surrogate: Surrogate | Any = ATan,
    reset: str = "hard",
    detach_reset: bool = False,
    record: Sequence[str] = (),
    final_state: bool = True,
    backend: str | None = None,
    **params: Any,
) -> Output:
    """Run `model` over all time steps of `x_seq` in one kernel, differentiably.

    Args:
        model: a `NeuronModel`, e.g. `neuronjit.neurons.LIF`, or the name of a built-in one.
        x_seq: input `[T, N, *]`, time first; float32, float16, bfloat16 or float64. Arithmetic is
            in float32 (float64 for float64).
        state: initial states by name, each a number or a floating tensor `[N, *]`; the model's own
            where missing. Pass the `state` of an earlier output to go on from there.
        surrogate: replaces the derivative of the step function; `spiking=False` gives its smooth
            primitive.
        reset: "hard" (v becomes v_reset) or "soft" (v_threshold is subtracted; v_reset is then 0
            unless given). A model that assigns v itself keeps its own.
        detach_reset: cut the gradient through the spike in the reset.
        record: names of sequences to return as well: any state, "h" (the charged membrane
            potential), or whatever else the model assigns.
        final_state: False returns no `state`, which saves writing it (a ninth of the traffic at
            T = 4).
        backend: "cuda", "cpu", "eager", or "auto" (the default; also NEURONJIT_BACKEND): the kernel
            for x_seq's device, else eager PyTorch with one warning.
        **params: the model's parameters: a number, a one-element tensor, or a tensor that
            broadcasts to `[N, *]`. And its inputs besides x: tensors that broadcast to `[T, N, *]`,
            used in x_seq's dtype (in the arithmetic dtype, and read once a step, where all neurons
            share them: `[T, 1]`). All that require grad get their gradient.

    Returns:
        `Output(spikes, state, record)`.

    Raises:
        SpecError (a ValueError): unknown names, wrong shapes or devices, numbers out of range.
        InputTypeError (a TypeError): wrong types or dtypes.
        BackendError, CompileError, MissingKernelError: no kernel can be had.
    """
    if is_compiling():
        return _in_a_graph(
            model, x_seq, state, surrogate, reset, detach_reset, record, final_state, backend,
            params,
        )  # fmt: skip
    # Normalised before anything is looked up: what is equal from here on means the same.
    if type(model) is not NeuronModel:
        model = as_model(model)
    if type(surrogate) is not Surrogate:
        surrogate = as_surrogate(surrogate)  # others may change: they are read at every call
    if type(record) is not tuple:
        record = as_names(record)
    if type(state) is not dict:
        state = as_state(state)
    if backend is None:
        backend = settings.backend()
    plan, tensors = find(
        model, x_seq, state, surrogate, reset, detach_reset, record, final_state, backend, params
    )
    if plan is None:  # FakeTensor and its like: shapes without numbers
        return _in_a_graph(
            model, x_seq, state, surrogate, reset, detach_reset, record, final_state, backend,
            params,
        )  # fmt: skip
    return run(plan, x_seq, tensors)


def find(
    model: NeuronModel,
    x_seq: Tensor,
    state: dict[str, Any],
    surrogate: Surrogate,
    reset: str,
    detach_reset: bool,
    record: tuple[Any, ...],
    final_state: bool,
    backend: str,
    params: dict[str, Any],
) -> tuple[Any, Sequence[Tensor]]:
    """The plan of a call and its tensors; the plan is None for tensors without numbers.

    Raises what `multistep` says it raises.
    """
    tensors: list[Tensor] = []
    key: tuple[Any, ...]
    try:
        key = (
            model, surrogate, reset, detach_reset, record, final_state, backend, signature(x_seq),
            glance(model.state, state, tensors), glance(model.keywords, params, tensors),
        )  # fmt: skip
        plan = plans.get(key)
    except (
        TypeError,
        AttributeError,
        RuntimeError,
    ):  # `settle` says what is wrong
        key, plan = (), None
    if plan is not None:
        return plan, tensors
    if checks.is_traced(x_seq, *tensors):
        return None, tensors
    if tracing():
        raise BackendError("torch.jit.trace sees no kernel; use torch.export or torch.compile")
    call, values = settle(
        model, x_seq, state, surrogate, reset, detach_reset, record, final_state, backend, params
    )
    own = key_of(call, x_seq, values)
    plan = plans.get(own) or keep(plans, own, plan_for(call, x_seq, values))
    if key:
        keep(plans, key, plan)
    return plan, tensors_of(values)


def run(plan: KernelPlan | EagerPlan, x: Tensor, tensors: Sequence[Tensor]) -> Output:
    """Run a plan; in eager PyTorch where its kernel cannot be had (see `fall_back`)."""
    if isinstance(plan, EagerPlan):
        out = plan.run(x, tensors)
    else:
        try:
            out = output(plan.call, apply(plan, x, tensors))
        except (BackendError, CompileError) as error:
            out = fall_back(plan, error).run(x, tensors)
        except RuntimeError as error:
            _explain(error)
    if packed.here.contexts:
        packed.note(plan.call, out.spikes)
    return out


def _in_a_graph(*asked: Any) -> Output:
    from . import graph  # registers operators: eager calls need none

    return graph.multistep(*asked)


def _explain(error: RuntimeError) -> NoReturn:
    """Raise what stopped a kernel; in our words where it was a transform of torch.func."""
    if transformed() and not isinstance(error, NeuronJitError):
        raise checks.no_transforms(str(error)) from None
    raise error


def apply(plan: Any, x: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The outputs of a KernelPlan, or of what has its methods, with its backward for autograd."""
    if has_tangents():
        checks.check_no_tangents(x, *tensors)
    x, tensors = plan.prepare(x, tensors)
    if plan.compiled is not None and not (transformed() or tracing()):
        outputs = plan.compiled.call(plan, x, tensors)
        if outputs is not None:
            return outputs  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and (
        x.requires_grad or any([t.requires_grad for t in tensors])  # noqa: C419 a list is faster
    ):
        if transformed():  # torch.func refuses, and says so
            return _Multistep.apply(plan, x, *tensors)  # type: ignore[no-any-return, no-untyped-call]
        return _apply(plan, x, *tensors)  # type: ignore[no-any-return]
    return plan.forward(x, tensors, save=False)[0]  # type: ignore[no-any-return]


class _Multistep(torch.autograd.Function):
    """Forward saves x, the initial states and a checkpoint every K steps; backward runs again."""

    @staticmethod
    def forward(ctx: Any, plan: KernelPlan, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, checkpoints = plan.forward(x, tensors, save=True)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, checkpoints, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        try:
            x, checkpoints, *tensors = ctx.saved_tensors
        except RuntimeError as error:  # freed by an earlier backward, perhaps
            if layer := getattr(ctx, "carried_by", ""):
                is_gone(ctx.plan, layer, grads, str(error))
            raise
        wanted = ctx.needs_input_grad[1:]
        if all(grad is None for grad in grads):
            return (None, *(None for _ in wanted))
        return (None, *gradients(ctx.plan, x, checkpoints, tensors, grads, wanted))


def carried(state: Tensor, layer: str) -> Tensor:
    """A state that `layer` kept from its last call, as the next one takes it.

    The call that made it remembers who passes it on, to explain a graph that is gone.
    """
    if is_compiling():  # Dynamo breaks its graph at is_inference()
        return state
    if state.is_inference() and not torch.is_inference_mode_enabled():
        return state.clone()  # autograd cannot save it: training after an evaluation
    if state.requires_grad:
        node: Any = state.grad_fn
        if getattr(node, "_forward_cls", None) is _Multistep:
            node.carried_by = layer
        else:
            front_end.note_carried(state, layer)
    return state


# outside of torch.func; within it, the usual apply says what is wrong
_apply: Any = direct_apply(_Multistep)
