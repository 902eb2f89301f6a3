"""The built-in neuron models: the seed's here, all others in zoo.py, which is read when needed.

`neuronjit.neurons.KLIF` and `neuronjit.neurons.by_name("klif")` are one model; `dir()` lists all.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from .errors import InputTypeError, SpecError, known
from .language.parse import nearest
from .models.model import NeuronModel

if TYPE_CHECKING:
    from .zoo import *  # noqa: F403

# --- the six models of SpikingJelly's CuPy kernels, in their order of operations -----------------
# With soft reset, v_reset is 0.

IF = NeuronModel(
    "if",
    "h = v + x",
    state=dict(v=0.0),
    about="Integrate and fire, without a leak. SpikingJelly's IFNode.",
)
LIF = NeuronModel(
    "lif",
    "h = v + (x - (v - v_reset)) / tau",
    state=dict(v=0.0),
    params=dict(tau=2.0),
    positive=["tau"],
    about="Leaky integrate and fire. SpikingJelly's LIFNode.",
)
LIF_NO_DECAY = NeuronModel(
    "lif_no_decay",
    "h = v - (v - v_reset) / tau + x",
    state=dict(v=0.0),
    params=dict(tau=2.0),
    positive=["tau"],
    about="LIF whose input is not divided by tau. SpikingJelly's LIFNode(decay_input=False).",
)
PLIF = NeuronModel(
    "plif",
    "h = v + (x - (v - v_reset)) * reciprocal_tau",
    state=dict(v=0.0),
    params=dict(reciprocal_tau=0.5),
    about="LIF with a learnable 1 / tau. Fang et al. 2021, arXiv:2007.05785; SpikingJelly's"
    " ParametricLIFNode.",
)
PLIF_NO_DECAY = NeuronModel(
    "plif_no_decay",
    "h = v - (v - v_reset) * reciprocal_tau + x",
    state=dict(v=0.0),
    params=dict(reciprocal_tau=0.5),
    about="PLIF whose input is not multiplied by 1 / tau. SpikingJelly's"
    " ParametricLIFNode(decay_input=False).",
)
QIF = NeuronModel(
    "qif",
    "h = v + (x + a0 * (v - v_rest) * (v - v_c)) / tau",
    state=dict(v=0.0),
    params=dict(tau=2.0, v_c=0.8, a0=1.0, v_rest=0.0, v_reset=-0.1),
    positive=["tau", "a0"],
    about="Quadratic integrate and fire. Gerstner et al. 2014, Neuronal Dynamics, section 5.3;"
    " SpikingJelly's QIFNode.",
)
EIF = NeuronModel(
    "eif",
    "h = v + (x - (v - v_rest) + delta_T * exp((v - theta_rh) / delta_T)) / tau",
    state=dict(v=0.0),
    params=dict(tau=2.0, delta_T=1.0, theta_rh=0.8, v_rest=0.0, v_reset=-0.1),
    positive=["tau", "delta_T"],
    about="Exponential integrate and fire. Fourcaud-Trocme et al. 2003; Neuronal Dynamics, section"
    " 5.2; SpikingJelly's EIFNode.",
)
IZHIKEVICH = NeuronModel(
    "izhikevich",
    """
    h = v + (x + a0 * (v - v_rest) * (v - v_c) - w) / tau
    w = w + (a * (h - v_rest) - w) / tau_w + b * s
    """,
    state=dict(v=0.0, w=0.0),
    params=dict(tau=2.0, v_c=0.8, a0=1.0, v_rest=-0.1, tau_w=2.0, a=0.0, b=0.0),
    positive=["tau", "a0", "tau_w"],
    about="QIF with an adaptation w: Izhikevich 2003 in SpikingJelly's form, its IzhikevichNode."
    " IZHIKEVICH_2003 has the paper's own numbers.",
)
Izhikevich = IZHIKEVICH

_SEED = {m.name: m for m in list(globals().values()) if isinstance(m, NeuronModel)}


def _zoo() -> dict[str, NeuronModel]:
    from . import zoo

    return {name: m for name, m in vars(zoo).items() if isinstance(m, NeuronModel)}


def __getattr__(name: str) -> NeuronModel:
    if name.startswith("_") or (found := _zoo().get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_zoo()])


@cache
def built_in() -> dict[str, NeuronModel]:
    """All built-in models by name."""
    return {**_SEED, **{model.name: model for model in _zoo().values()}}


def by_name(name: str) -> NeuronModel:
    """A built-in model by its name, in any case: `by_name("lif")`. Raises SpecError."""
    key = str(name).lower()
    if found := _SEED.get(key) or built_in().get(key):
        return found
    meant = nearest(key[:80], built_in()) or "."
    others = f"and {len(built_in()) - len(_SEED)} more: docs/neurons.md"
    raise SpecError(f"unknown neuron {ascii(name)[:80]}{meant} {known(_SEED)}, {others}")


def as_model(given: Any) -> NeuronModel:
    """Our model for `given`: a NeuronModel or the name of a built-in one."""
    if isinstance(given, NeuronModel):
        return given
    if isinstance(given, str):
        return by_name(given)
    raise InputTypeError(
        f"model must be a neuronjit.NeuronModel or the name of one, got {type(given).__name__}"
    )
