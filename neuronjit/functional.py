"""One function for each built-in model: `multistep` with the model's parameters spelled out.

Every function takes `x_seq` `[T, N, *]` and initial states (a number, a tensor `[N, *]`, or None
for the model's own), parameters as numbers or broadcasting tensors, and returns `Output(spikes,
state, record)`. `v_reset=None` is soft reset. Further keywords go to `multistep`: surrogate,
detach_reset, record, backend.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import neurons
from .autograd import Output, multistep

Number = float | Tensor


def _run(
    model: neurons.NeuronModel, x_seq: Tensor, state: dict[str, Any], **options: Any
) -> Output:
    return multistep(model, x_seq, {k: v for k, v in state.items() if v is not None}, **options)


def if_(
    x_seq: Tensor,
    v: Number | None = None,
    *,
    v_threshold: Number = 1.0,
    v_reset: Number | None = 0.0,
    **options: Any,
) -> Output:
    """Integrate-and-fire: h = v + x."""
    return _run(neurons.IF, x_seq, {"v": v}, v_threshold=v_threshold, v_reset=v_reset, **options)


def lif(
    x_seq: Tensor,
    v: Number | None = None,
    *,
    tau: Number = 2.0,
    decay_input: bool = True,
    v_threshold: Number = 1.0,
    v_reset: Number | None = 0.0,
    **options: Any,
) -> Output:
    """Leaky integrate-and-fire: h = v + (x - (v - v_reset)) / tau.

    Without `decay_input`, the input is not divided by tau.
    """
    model = neurons.LIF if decay_input else neurons.LIF_NO_DECAY
    options |= dict(tau=tau, v_threshold=v_threshold, v_reset=v_reset)
    return _run(model, x_seq, {"v": v}, **options)


def plif(
    x_seq: Tensor,
    v: Number | None = None,
    *,
    reciprocal_tau: Number = 0.5,
    decay_input: bool = True,
    v_threshold: Number = 1.0,
    v_reset: Number | None = 0.0,
    **options: Any,
) -> Output:
    """LIF with 1 / tau as a (learnable) factor (Fang et al. 2021, arXiv:2007.05785)."""
    model = neurons.PLIF if decay_input else neurons.PLIF_NO_DECAY
    options |= dict(reciprocal_tau=reciprocal_tau, v_threshold=v_threshold, v_reset=v_reset)
    return _run(model, x_seq, {"v": v}, **options)


def qif(
    x_seq: Tensor,
    v: Number | None = None,
    *,
    tau: Number = 2.0,
    v_c: Number = 0.8,
    a0: Number = 1.0,
    v_threshold: Number = 1.0,
    v_rest: Number = 0.0,
    v_reset: Number | None = -0.1,
    **options: Any,
) -> Output:
    """Quadratic integrate-and-fire: h = v + (x + a0 (v - v_rest)(v - v_c)) / tau."""
    options |= dict(tau=tau, v_c=v_c, a0=a0, v_rest=v_rest)
    return _run(neurons.QIF, x_seq, {"v": v}, v_threshold=v_threshold, v_reset=v_reset, **options)


def eif(
    x_seq: Tensor,
    v: Number | None = None,
    *,
    tau: Number = 2.0,
    delta_T: Number = 1.0,
    theta_rh: Number = 0.8,
    v_threshold: Number = 1.0,
    v_rest: Number = 0.0,
    v_reset: Number | None = -0.1,
    **options: Any,
) -> Output:
    """Exponential integrate-and-fire.

    h = v + (x - (v - v_rest) + delta_T exp((v - theta_rh) / delta_T)) / tau.
    """
    options |= dict(tau=tau, delta_T=delta_T, theta_rh=theta_rh, v_rest=v_rest)
    return _run(neurons.EIF, x_seq, {"v": v}, v_threshold=v_threshold, v_reset=v_reset, **options)


def izhikevich(
    x_seq: Tensor,
    v: Number | None = None,
    w: Number | None = None,
    *,
    tau: Number = 2.0,
    v_c: Number = 0.8,
    a0: Number = 1.0,
    v_threshold: Number = 1.0,
    v_reset: Number | None = 0.0,
    v_rest: Number = -0.1,
    tau_w: Number = 2.0,
    a: Number = 0.0,
    b: Number = 0.0,
    **options: Any,
) -> Output:
    """Izhikevich's adaptive quadratic neuron: QIF of x - w, where w relaxes to a (h - v_rest).

    After the charge, w + (a (h - v_rest) - w) / tau_w + b s.
    """
    options |= dict(tau=tau, v_c=v_c, a0=a0, v_rest=v_rest, tau_w=tau_w, a=a, b=b)
    options |= dict(v_threshold=v_threshold, v_reset=v_reset)
    return _run(neurons.IZHIKEVICH, x_seq, {"v": v, "w": w}, **options)
