"""Every private name of PyTorch that the library uses, and what stands in where it is gone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad


def _named(path: str, otherwise: Any) -> Any:
    """What is found at `path` inside torch, else the stand-in."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return otherwise
    return found


def _no(*_: Any) -> bool:
    return False


# the current CUDA stream as an integer and the current device: a fifth of a microsecond each, where
# torch.cuda's own take eight; builds without CUDA have neither
current_raw_stream: Any = _named("_C._cuda_getCurrentRawStream", None)
current_device: Any = _named("_C._cuda_getDevice", None)

# whether vmap, grad, jvp, functionalize, ... of torch.func are at work
transformed: Callable[[], bool] = _named("_C._are_functorch_transforms_active", _no)
# whether torch.autograd.grad(is_grads_batched=True) made this gradient
is_batched: Callable[[torch.Tensor], bool] = _named("_C._functorch.is_legacy_batchedtensor", _no)
# whether torch.jit.trace is watching
tracing: Callable[[], Any] = _named("_C._get_tracing_state", _no)
# whether a zero gradient of torch.autograd has no memory
is_zero_tensor: Callable[[torch.Tensor], bool] = _named("Tensor._is_zerotensor", _no)
# the number of the backward that this thread runs, -1 outside of one: checkpoints run forward there
current_backward: Callable[[], int] = _named("_C._current_graph_task_id", lambda: -1)


_capturing: Callable[[], bool] = _named("_C._cuda_isCurrentStreamCapturing", _no)


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream; makes no CUDA context."""
    return torch.cuda.is_initialized() and _capturing()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether anything watches the calls of this module, forward or backward."""
    return any([getattr(module, name, None) for name in _HOOKS])  # noqa: C419 a list is faster


def has_tangents() -> bool:
    """Whether derivatives may go forward through the call (torch.autograd.forward_ad)."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def direct_apply(function: Any) -> Any:
    """`function.apply` without the two microseconds in which it looks for torch.func."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


# inside an operator's own derivative: the operator itself, as if nothing required grad
below_autograd: Callable[[], AbstractContextManager[Any]] = _named(
    "_C._AutoDispatchBelowAutograd", torch.no_grad
)


def autograd_again() -> AbstractContextManager[Any]:
    """Inside an operator, which runs below autograd: record operations again."""
    guard = _named("_C._SetExcludeDispatchKeyGuard", None)
    key = _named("_C.DispatchKey.AutogradFunctionality", None)
    return nullcontext() if guard is None or key is None else guard(key, False)
