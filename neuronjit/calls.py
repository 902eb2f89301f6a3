"""From the arguments of a call to its plan, all of them checked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, reference
from .errors import BackendError, SpecError, known
from .neurons import as_model
from .plan import Plan
from .source import TARGETS

BACKENDS = ("auto", *TARGETS, "eager")


_PLANS_KEPT = 4096  # shapes that never come back must not fill the memory


def keep(plans: dict[tuple[Any, ...], Any], key: tuple[Any, ...], plan: Any) -> None:
    """Remember a plan; where there are too many, forget the others."""
    if len(plans) >= _PLANS_KEPT:
        plans.clear()
    plans[key] = plan


class Output(NamedTuple):
    """What `multistep` returns."""

    spikes: Tensor  # [T, N, *], dtype of x_seq
    state: dict[str, Tensor]  # each [N, *], arithmetic dtype
    record: dict[str, Tensor]  # each [T, N, *], dtype of x_seq


def signature(tensor: Tensor) -> tuple[Any, ...]:
    """All of a tensor that a plan depends on."""
    return (
        type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_neg(),
    )  # fmt: skip


def split(values: Mapping[str, Any], tensors: list[Tensor]) -> tuple[Any, ...]:
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
            value = signature(value)
        found.append((name, value))
    return tuple(found)


def plan_for(
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
    """The plan and its tensors, everything checked; or the arguments of `run_eager`."""
    if torch._C._get_tracing_state():
        raise BackendError("torch.jit.trace sees no kernel; use torch.export or torch.compile")
    model = as_model(model)
    reset, record, params = checks.settle(model, x, state, reset, record, params)
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
    target = choose_target(backend, x)
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


def choose_target(backend: str, x: Tensor) -> str:
    """The target that serves x: "cuda", "cpu", or "eager"."""
    device = x.device.type
    if backend not in BACKENDS:
        raise SpecError(f"unknown backend {ascii(backend)[:80]}. {known(BACKENDS)}")
    if backend == "auto":
        if device not in TARGETS:
            where = " and ".join(TARGETS)
            warn_once(f"neuronjit runs in eager PyTorch on {device}; there are kernels for {where}")
            return "eager"
        return device
    if backend not in ("eager", device):
        raise BackendError(
            f"backend='{backend}' was asked for, but x_seq is on {x.device}; move it, or use"
            " backend='auto'"
        )
    return backend


def eager_arguments(plan: Plan, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The arguments of `run_eager` for a call that has a plan, but whose kernel cannot be had."""
    return (
        plan.model, x, plan.numbers | dict(zip(plan.given, tensors, strict=True)),
        plan.surrogate, plan.reset, plan.detach_reset, plan.record, bool(plan.final),
    )  # fmt: skip


def run_eager(*arguments: Any) -> Output:
    """What the arguments of `plan_for` give in eager PyTorch."""
    *arguments, final_state = arguments  # type: ignore[assignment]
    spikes, state, recorded = reference.run(*arguments)
    return Output(spikes, state if final_state else {}, recorded)


_warned: set[str] = set()


def warn_slow(error: Exception) -> None:
    """One warning for all kernels that cannot be had for the same reason."""
    why = str(error).partition("\n")[0]  # the rest names the kernel
    warn_once(f"neuronjit runs in eager PyTorch, which is slow: {why}")


def warn_once(message: str) -> None:
    """Warn, unless the same was said before."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)
