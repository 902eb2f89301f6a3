"""The front end: find the plan for a call, run it, and differentiate it for autograd."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import checks
from .calls import (
    Output,
    eager_arguments,
    keep,
    plan_for,
    run_eager,
    signature,
    split,
    warn_slow,
)  # fmt: skip
from .errors import BackendError, DifferentiationError, NeuronJitError
from .neurons import NeuronModel
from .plan import Plan
from .surrogates import ATan, Surrogate, as_surrogate

__all__ = ["Output", "multistep"]

_plans: dict[tuple[Any, ...], Plan] = {}


def multistep(
    model: NeuronModel,
    x_seq: Tensor,
    state: Mapping[str, Tensor | float] | None = None,
    *,
    surrogate: Surrogate = ATan,
    reset: str = "hard",
    detach_reset: bool = False,
    record: Sequence[str] = (),
    final_state: bool = True,
    backend: str | None = None,
    **params: Any,
) -> Output:
    """Run `model` over all time steps of `x_seq` in one kernel, differentiably.

    Args:
        model: a `NeuronModel`, e.g. `neuronjit.neurons.LIF`.
        x_seq: input `[T, N, *]`, time first; float32, float16, bfloat16 or float64. Arithmetic is
            in float32 (float64 for float64).
        state: initial states by name, each a number or a floating tensor `[N, *]`; the model's own
            where missing. Pass the `state` of an earlier output to go on from there.
        surrogate: replaces the derivative of the step function; `spiking=False` gives its smooth
            primitive.
        reset: "hard" (v becomes v_reset) or "soft" (v_threshold is subtracted; v_reset is then 0
            unless given). A model that assigns v itself keeps its own.
        detach_reset: cut the gradient through the spike in the reset.
        record: names of sequences to return as well: any state, or "h", the charged membrane
            potential.
        final_state: False leaves `state` empty, which saves writing it (a ninth of the traffic at
            T = 4).
        backend: "cuda", "cpu", "eager", or "auto" (the default; also NEURONJIT_BACKEND): the kernel
            for x_seq's device, else eager PyTorch with one warning.
        **params: the model's parameters: a number, a one-element tensor, or a tensor that
            broadcasts to `[N, *]`. Tensors that require grad get their gradient.

    Returns:
        `Output(spikes, state, record)`.

    Raises:
        SpecError (a ValueError): unknown names, wrong shapes or devices, numbers out of range.
        InputTypeError (a TypeError): wrong types or dtypes.
        BackendError, CompileError, MissingKernelError: no kernel can be had.
    """
    if is_compiling():
        return _by_operators(
            model, x_seq, state, surrogate, reset, detach_reset, record, final_state, backend,
            params,
        )  # fmt: skip
    forced = backend or os.environ.get("NEURONJIT_BACKEND") or "auto"
    if type(surrogate) is not Surrogate:
        surrogate = as_surrogate(surrogate)  # others may change: they are read at every call
    tensors: list[Tensor] = []
    try:
        key = (
            model, surrogate, reset, detach_reset, tuple(record), final_state, forced,
            signature(x_seq), split(state, tensors) if state else None, split(params, tensors),
        )  # fmt: skip
        plan = _plans.get(key)
    except (TypeError, AttributeError, RuntimeError):  # no tensor, or nothing to look up: see below
        key, plan = None, None
    if plan is None:
        if checks.is_traced(x_seq, *tensors):  # FakeTensor and its like: shapes without numbers
            return _by_operators(
                model, x_seq, state, surrogate, reset, detach_reset, record, final_state, forced,
                params,
            )  # fmt: skip
        ready = plan_for(
            model, x_seq, state, surrogate, reset, detach_reset, record, final_state, forced, params
        )
        if not isinstance(ready[0], Plan):
            return run_eager(*ready)
        plan, tensors = ready
        if key is not None:
            keep(_plans, key, plan)
    try:
        outputs = _run(plan, x_seq, tensors)
    except BackendError as error:
        if forced != "auto":
            raise
        warn_slow(error)
        return run_eager(*eager_arguments(plan, x_seq, tensors))
    except RuntimeError as error:
        _explain(error)
    last = 1 + len(plan.final)
    return Output(
        outputs[0],
        dict(zip(plan.final, outputs[1:last], strict=True)),
        dict(zip(plan.record, outputs[last:], strict=True)) if plan.record else {},
    )


def _by_operators(*arguments: Any) -> Output:
    from . import compiled  # registers operators: eager calls need none

    return compiled.multistep(*arguments)


def _explain(error: RuntimeError) -> NoReturn:
    """Raise what stopped a kernel; in our words where it was a transform of torch.func."""
    if isinstance(error, NeuronJitError) or not _transformed():
        raise error
    raise _no_transforms(str(error)) from None


def _no_transforms(reason: str) -> DifferentiationError:
    return DifferentiationError(
        "the kernels have no rules for torch.func (vmap, grad, jvp, ...) and batched gradients;"
        f" use backend='eager', or torch.autograd.grad ({reason[:80]})"
    )


def _run(plan: Plan, x: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    if forward_ad._current_level >= 0:
        checks.check_no_tangents(x, *tensors)
    x, tensors = plan.prepare(x, tensors)
    if torch.is_grad_enabled() and (
        x.requires_grad or any([t.requires_grad for t in tensors])  # noqa: C419 a list is faster
    ):
        if _transformed():  # torch.func refuses, and says so
            return _Multistep.apply(plan, x, *tensors)  # type: ignore[no-any-return, no-untyped-call]
        return _apply(plan, x, *tensors)  # type: ignore[no-any-return]
    return plan.forward(x, tensors, save=False)[0]


class _Multistep(torch.autograd.Function):
    """Forward saves x, the initial states and a checkpoint every K steps; backward runs again."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, checkpoints = plan.forward(x, tensors, save=True)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, checkpoints, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        try:
            x, checkpoints, *tensors = ctx.saved_tensors
        except RuntimeError as error:  # freed by an earlier backward
            raise _graph_is_gone(ctx, grads, error) from None
        wanted = ctx.needs_input_grad[1:]
        if all(grad is None for grad in grads):
            return (None, *(None for _ in wanted))
        if any([_is_batched(grad) for grad in grads if grad is not None]):  # noqa: C419 as above
            raise _no_transforms("is_grads_batched=True")
        results = ctx.plan.backward(x, checkpoints, tensors, grads, wanted)
        if torch.is_grad_enabled():  # create_graph: an error only if somebody differentiates again
            arrived = [grad for grad in grads if grad is not None]
            results = [r if r is None else _Once.apply(r, x, *arrived, *tensors) for r in results]  # type: ignore[no-untyped-call]
        return (None, *results)


def note_carried(state: Tensor, layer: str) -> None:
    """Remember in the call that made `state` that `layer` passes it on to its next call."""
    node: Any = state.grad_fn
    if getattr(node, "_forward_cls", None) is _Multistep:
        node.carried_by = layer


def _graph_is_gone(ctx: Any, grads: Sequence[Tensor | None], error: RuntimeError) -> RuntimeError:
    """The error for a state that was carried over; torch's own for any other second backward."""
    layer = getattr(ctx, "carried_by", None)
    states = grads[1 : 1 + len(ctx.plan.final)]
    others = (grads[0], *grads[1 + len(ctx.plan.final) :])
    only_states = any(g is not None for g in states) and all(g is None for g in others)
    if layer is None or not only_states:
        return error
    return RuntimeError(
        f"the state of {layer} was carried over from the last call and its graph is gone: call"
        " reset_net(net) (or detach_net(net)) between batches"
    )


# what Function.apply comes to outside of torch.func, without its two microseconds of preparation
_apply: Any = super(torch.autograd.Function, _Multistep).apply
_transformed: Any = torch._C._are_functorch_transforms_active
_is_batched: Any = torch._C._functorch.is_legacy_batchedtensor


class _Once(torch.autograd.Function):
    """The identity, whose own gradient is the error that a second derivative deserves."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *inputs: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise DifferentiationError(
            "the kernels have first derivatives only; use backend='eager' for a second derivative"
        )
