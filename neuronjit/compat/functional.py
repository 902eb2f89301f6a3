"""`functional` of SpikingJelly 0.0.0.0.12 and 0.0.0.0.14, as far as training scripts use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputTypeError, SpecError, expect_known, known
from ..nn import detach_net, reset_net
from ..nn.neuron import STEP_MODES

__all__ = [
    "detach_net", "multi_step_forward", "reset_net", "seq_to_ann_forward", "set_backend",
    "set_step_mode", "temporal_efficient_training_cross_entropy",
]  # fmt: skip

Modules = Callable[[Tensor], Tensor] | list[torch.nn.Module] | tuple[torch.nn.Module, ...]


def set_step_mode(net: torch.nn.Module, step_mode: str) -> None:
    """Set `step_mode` of every module that has one, but not of those inside of a container.

    A `MultiStepContainer` or `SeqToANNContainer` gives its modules what they take, so they stay as
    they are. Raises SpecError for a step_mode that is not "s" or "m".
    """
    expect_known(step_mode, STEP_MODES, "step_mode")
    if hasattr(net, "step_mode"):
        net.step_mode = step_mode  # type: ignore[assignment]
    if not getattr(net, "takes_sequences", False):
        for child in net.children():
            set_step_mode(child, step_mode)


def set_backend(
    net: torch.nn.Module, backend: str, instance: type | tuple[type, ...] = torch.nn.Module
) -> None:
    """Set `backend` of every module of these classes that supports it; the others keep theirs.

    Raises SpecError where none in `net` supports it.
    """
    having: list[Any] = [
        module
        for module in net.modules()
        if isinstance(module, instance) and hasattr(module, "supported_backends")
    ]
    fitting = [module for module in having if backend in module.supported_backends]
    if having and not fitting:
        allowed = {str(name) for module in having for name in module.supported_backends}
        raise SpecError(f"no module supports the backend {ascii(backend)[:80]}. {known(allowed)}")
    for module in fitting:
        module.backend = backend


def multi_step_forward(x_seq: Tensor, single_step_module: Modules) -> Tensor:
    """`[T, N, *]` through modules for one step `[N, *]`, step by step."""
    _check(x_seq, "multi_step_forward")
    return torch.stack([_through(x, single_step_module) for x in x_seq])


def seq_to_ann_forward(x_seq: Tensor, stateless_module: Modules) -> Tensor:
    """`[T, N, *]` through modules without state, as one batch `[T * N, *]`."""
    _check(x_seq, "seq_to_ann_forward")
    y_seq: Tensor = _through(x_seq.flatten(0, 1), stateless_module).unflatten(0, x_seq.shape[:2])
    return y_seq


def temporal_efficient_training_cross_entropy(x_seq: Tensor, target: Tensor) -> Tensor:
    """The mean over the steps of the cross entropies of `[T, N, C, *]` with `[N, *]`.

    Deng et al. 2022, Temporal Efficient Training, arXiv:2202.11946, equation 10.
    """
    _check(x_seq, "temporal_efficient_training_cross_entropy")
    steps = [torch.nn.functional.cross_entropy(x, target) for x in x_seq]
    return torch.stack(steps).mean()


def _through(x: Tensor, modules: Modules) -> Tensor:
    if isinstance(modules, list | tuple):
        for module in modules:
            x = module(x)
        return x
    if callable(modules):
        return modules(x)
    raise InputTypeError(f"expected a module, or a list of them, got {type(modules).__name__}")


def _check(x_seq: Tensor, name: str) -> None:
    if not isinstance(x_seq, Tensor) or x_seq.dim() < 2 or not len(x_seq):
        given = list(x_seq.shape) if isinstance(x_seq, Tensor) else type(x_seq).__name__
        raise SpecError(f"{name} takes a sequence [T, N, *] with T > 0, got {given}")
