"""The built-in neuron models: data, one entry each. A new neuron is one more `NeuronModel`."""

from __future__ import annotations

from typing import Any

from .errors import InputTypeError, SpecError, known
from .models.model import NeuronModel

# The six models of SpikingJelly's CuPy kernels, in their order of operations. With soft reset,
# v_reset is 0.
IF = NeuronModel("if", "h = v + x", state=dict(v=0.0))
LIF = NeuronModel(
    "lif",
    "h = v + (x - (v - v_reset)) / tau",
    state=dict(v=0.0),
    params=dict(tau=2.0),
    positive=["tau"],
)
LIF_NO_DECAY = NeuronModel(  # decay_input=False: the input is not divided by tau
    "lif_no_decay",
    "h = v - (v - v_reset) / tau + x",
    state=dict(v=0.0),
    params=dict(tau=2.0),
    positive=["tau"],
)
PLIF = NeuronModel(  # Fang et al. 2021, arXiv:2007.05785: LIF with a learnable 1 / tau
    "plif",
    "h = v + (x - (v - v_reset)) * reciprocal_tau",
    state=dict(v=0.0),
    params=dict(reciprocal_tau=0.5),
)
PLIF_NO_DECAY = NeuronModel(
    "plif_no_decay",
    "h = v - (v - v_reset) * reciprocal_tau + x",
    state=dict(v=0.0),
    params=dict(reciprocal_tau=0.5),
)
QIF = NeuronModel(  # Gerstner et al. 2014, Neuronal Dynamics, section 5.3
    "qif",
    "h = v + (x + a0 * (v - v_rest) * (v - v_c)) / tau",
    state=dict(v=0.0),
    params=dict(tau=2.0, v_c=0.8, a0=1.0, v_rest=0.0, v_reset=-0.1),
    positive=["tau", "a0"],
)
EIF = NeuronModel(  # Fourcaud-Trocme et al. 2003; Neuronal Dynamics, section 5.2
    "eif",
    "h = v + (x - (v - v_rest) + delta_T * exp((v - theta_rh) / delta_T)) / tau",
    state=dict(v=0.0),
    params=dict(tau=2.0, delta_T=1.0, theta_rh=0.8, v_rest=0.0, v_reset=-0.1),
    positive=["tau", "delta_T"],
)
IZHIKEVICH = NeuronModel(  # Izhikevich 2003 in SpikingJelly's form: QIF with an adaptation w
    "izhikevich",
    """
    h = v + (x + a0 * (v - v_rest) * (v - v_c) - w) / tau
    w = w + (a * (h - v_rest) - w) / tau_w + b * s
    """,
    state=dict(v=0.0, w=0.0),
    params=dict(tau=2.0, v_c=0.8, a0=1.0, v_rest=-0.1, tau_w=2.0, a=0.0, b=0.0),
    positive=["tau", "a0", "tau_w"],
)
Izhikevich = IZHIKEVICH

_BUILT_IN = {m.name: m for m in list(globals().values()) if isinstance(m, NeuronModel)}


def by_name(name: str) -> NeuronModel:
    """A built-in model by its name, in any case: `by_name("lif")`. Raises SpecError."""
    try:
        return _BUILT_IN[str(name).lower()]
    except KeyError:
        raise SpecError(f"unknown neuron {ascii(name)[:80]}. {known(_BUILT_IN)}") from None


def as_model(given: Any) -> NeuronModel:
    """Our model for `given`: a NeuronModel or the name of a built-in one."""
    if isinstance(given, NeuronModel):
        return given
    if isinstance(given, str):
        return by_name(given)
    raise InputTypeError(
        f"model must be a neuronjit.NeuronModel or the name of one, got {type(given).__name__}"
    )
