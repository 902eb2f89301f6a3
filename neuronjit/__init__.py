"""Spiking-neuron kernels, rendered, compiled and cached on demand, behind PyTorch autograd."""

from __future__ import annotations

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
from .explanation import Explanation, explain
from .export import render, save_cuda_codes
from .integrations.accelerate import accelerate, restore
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
from .plotting import plot
from .run.autograd import Output, multistep

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
    "plot",
    "render",
    "restore",
    "save_cuda_codes",
    "stats",
    "surrogates",
]
