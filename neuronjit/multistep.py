"""The front end: find the plan for a call, run it, and differentiate it for autograd."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, reference
from .errors import BackendError, DifferentiationError, SpecError, known
from .neurons import NeuronModel, as_model
from .plan import Plan
from .source import TARGETS
from .surrogates import ATan, Surrogate, as_surrogate

BACKENDS = ("auto", *TARGETS, "eager")
_PLANS_KEPT = 4096  # shapes that never come back must not fill the memory
_plans: dict[tuple[Any, ...], Plan] = {}


class Output(NamedTuple):
    """What `multistep` returns."""

    spikes: Tensor  # [T, N, *], dtype of x_seq
    state: dict[str, Tensor]  # each [N, *], arithmetic dtype
    record: dict[str, Tensor]  # each [T, N, *], dtype of x_seq


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
        x_seq: input `[T, N, *]`, time first; float32, float16, bfloat16 or float64. Arithmetic is in
            float32 (float64 for float64).
        state: initial states by name, each a number or a floating tensor `[N, *]`; the model's own where
            missing. Pass the `state` of an earlier output to go on from there.
        surrogate: replaces the derivative of the step function; `spiking=False` gives its smooth primitive.
        reset: "hard" (v becomes v_reset) or "soft" (v_threshold is subtracted; v_reset is then 0 unless
            given). A model that assigns v itself keeps its own.
        detach_reset: cut the gradient through the spike in the reset.
        record: names of sequences to return as well: any state, or "h", the charged membrane potential.
        final_state: False leaves `state` empty, which saves writing it (a ninth of the traffic at T = 4).
        backend: "cuda", "cpu", "eager", or "auto" (the default; also NEURONJIT_BACKEND): the kernel for
            x_seq's device, else eager PyTorch with one warning.
        **params: the model's parameters: a number, a one-element tensor, or a tensor that broadcasts to
            `[N, *]`. Tensors that require grad get their gradient.

    Returns:
        `Output(spikes, state, record)`.

    Raises:
        SpecError (a ValueError): unknown names, wrong shapes or devices, numbers out of range.
        InputTypeError (a TypeError): wrong types or dtypes.
        BackendError, CompileError, MissingKernelError: no kernel can be had; see `neuronjit.errors`.
    """
    forced = backend or os.environ.get("NEURONJIT_BACKEND") or "auto"
    if type(surrogate) is not Surrogate:
        surrogate = as_surrogate(surrogate)  # others may change: they are read at every call
    tensors: list[Tensor] = []
    try:
        key = (
            model, surrogate, reset, detach_reset, tuple(record), final_state, forced, _signature(x_seq),
            _split(state, tensors) if state else None, _split(params, tensors),
        )  # fmt: skip
        plan = _plans.get(key)
    except (
        TypeError,
        AttributeError,
        RuntimeError,
    ):  # no tensor, or nothing to look up: an error below
        key, plan = None, None
    if plan is None:
        ready = _prepare(
            model, x_seq, state, surrogate, reset, detach_reset, record, final_state, forced, params
        )
        if not isinstance(ready[0], Plan):
            return _eager(*ready)
        plan, tensors = ready
        if key is not None:
            if len(_plans) >= _PLANS_KEPT:
                _plans.clear()
            _plans[key] = plan
    try:
        outputs = _run(plan, x_seq, tensors)
    except BackendError as error:
        if forced != "auto":
            raise
        _warn_once(f"neuronjit runs in eager PyTorch, which is slow: {error}")
        return _eager(
            plan.model, x_seq, plan.numbers | dict(zip(plan.given, tensors, strict=True)),
            plan.surrogate, plan.reset, plan.detach_reset, plan.record, bool(plan.final),
        )  # fmt: skip
    last = 1 + len(plan.final)
    return Output(
        outputs[0],
        dict(zip(plan.final, outputs[1:last], strict=True)),
        dict(zip(plan.record, outputs[last:], strict=True)) if plan.record else {},
    )


def _run(plan: Plan, x: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    x, tensors = plan.prepare(x, tensors)
    if torch.is_grad_enabled() and (x.requires_grad or any([t.requires_grad for t in tensors])):
        return _Multistep.apply(plan, x, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    return plan.forward(x, tensors, save=False)[0]


class _Multistep(torch.autograd.Function):
    """Forward saves x, the initial states and a checkpoint every K steps; backward runs the steps again."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, checkpoints = plan.forward(x, tensors, save=True)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, checkpoints, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, checkpoints, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if all(grad is None for grad in grads):
            return (None, *(None for _ in wanted))
        results = ctx.plan.backward(x, checkpoints, tensors, grads, wanted)
        if (
            torch.is_grad_enabled()
        ):  # create_graph=True: an error only if somebody differentiates again
            arrived = [grad for grad in grads if grad is not None]
            results = [r if r is None else _Once.apply(r, x, *arrived, *tensors) for r in results]  # type: ignore[no-untyped-call]
        return (None, *results)


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


# --- from the arguments of a call to its plan ----------------------------------------------------


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    """All of a tensor that a plan depends on."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_neg()


def _split(values: Mapping[str, Any], tensors: list[Tensor]) -> tuple[Any, ...]:
    """The values by name with signatures in place of tensors, which are collected in `tensors`."""
    for value in values.values():
        if isinstance(value, Tensor):
            break
    else:
        return tuple(values.items())
    found: list[Any] = []
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensors.append(value)
            value = _signature(value)
        found.append((name, value))
    return tuple(found)


def _prepare(
    model: Any,
    x: Any,
    state: Any,
    surrogate: Any,
    reset: Any,
    detach_reset: Any,
    record: Any,
    final_state: bool,
    backend: str,
    params: dict[str, Any],
) -> tuple[Any, ...]:
    """The plan and its tensors, everything checked; or the arguments of `_eager` where no kernel serves."""
    model = as_model(model)
    checks.check_input(x)
    checks.check_names(model, reset, state, params)
    record = checks.check_record(model, record)
    if "v_reset" in params and params["v_reset"] is None:
        reset, params = "soft", {**params, "v_reset": 0.0}
    elif reset == "soft":
        params = {"v_reset": 0.0, **params}
    reset = "own" if model.own_reset else reset
    given: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    # in the order of the call, which is the order in which `multistep` collects the tensors
    for name, value in {**(state or {}), **params, **model.state, **model.params}.items():
        value = (state or {}).get(name, params.get(name, value))
        if isinstance(value, Tensor):
            checks.check_tensor(model, name, value, x)
            given[name] = value
        else:
            numbers[name] = checks.check_number(model, name, value, x.dtype)
    checks.check_reset(reset, numbers)
    target = _target(backend, x)
    if target == "eager" or not x.numel():
        return (
            model, x, numbers | given, surrogate, reset, bool(detach_reset), record, final_state
        )  # fmt: skip
    plan = Plan(
        model,
        surrogate,
        reset,
        bool(detach_reset),
        record,
        bool(final_state),
        target,
        x,
        given,
        numbers,
    )
    return plan, list(given.values())


def _target(backend: str, x: Tensor) -> str:
    """The target that serves x: "cuda", "cpu", or "eager"."""
    device = x.device.type
    if backend not in BACKENDS:
        raise SpecError(f"unknown backend {ascii(backend)[:80]}. {known(BACKENDS)}")
    if backend == "auto":
        if device not in TARGETS:
            where = " and ".join(TARGETS)
            _warn_once(
                f"neuronjit runs in eager PyTorch on {device}; there are kernels for {where}"
            )
            return "eager"
        return device
    if backend not in ("eager", device):
        raise BackendError(
            f"backend='{backend}' was asked for, but x_seq is on {x.device}; move it, or use backend='auto'"
        )
    return backend


def _eager(*arguments: Any) -> Output:
    *arguments, final_state = arguments  # type: ignore[assignment]
    spikes, state, recorded = reference.run(*arguments)
    return Output(spikes, state if final_state else {}, recorded)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
