"""Spiking-neuron kernels, rendered, compiled and cached on demand, behind PyTorch autograd."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import neuron_kernel, neurons, nn, surrogates
from .errors import (
    AccelerationError,
    BackendError,
    BundleError,
    CompileError,
    DifferentiationError,
    EquationError,
    InputTypeError,
    MissingKernelError,
    NeuronJitError,
    SpecError,
)
from .export import render, save_cuda_codes
from .kernels.build import stats
from .models.model import NeuronModel
from .models.surrogate import Surrogate
from .neuron_kernel import (
    multistep_eif_ptt,
    multistep_if_ptt,
    multistep_izhikevich_ptt,
    multistep_lif_ptt,
    multistep_plif_ptt,
    multistep_qif_ptt,
)
from .run.autograd import Output, multistep
from .run.packed import packed_spikes

if TYPE_CHECKING:
    from .explanation import Explanation, explain
    from .integrations.accelerate import accelerate, restore
    from .plotting import plot

# what a training run may never ask for is imported when it is asked for
_LATER = {
    "Explanation": "explanation",
    "accelerate": "integrations.accelerate",
    "explain": "explanation",
    "plot": "plotting",
    "restore": "integrations.accelerate",
}

__version__ = "0.1.0"

__all__ = [
    "AccelerationError",
    "BackendError",
    "BundleError",
    "CompileError",
    "DifferentiationError",
    "EquationError",
    "Explanation",
    "InputTypeError",
    "MissingKernelError",
    "NeuronJitError",
    "NeuronModel",
    "Output",
    "SpecError",
    "Surrogate",
    "accelerate",
    "explain",
    "multistep",
    "multistep_eif_ptt",
    "multistep_if_ptt",
    "multistep_izhikevich_ptt",
    "multistep_lif_ptt",
    "multistep_plif_ptt",
    "multistep_qif_ptt",
    "neuron_kernel",
    "neurons",
    "nn",
    "packed_spikes",
    "plot",
    "render",
    "restore",
    "save_cuda_codes",
    "stats",
    "surrogates",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    return globals().setdefault(name, found)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
