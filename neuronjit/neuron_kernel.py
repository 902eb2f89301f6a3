"""SpikingJelly's CuPy neuron kernels (dropped there in 2.0.0): same names, order and returns.

`x_seq` is `[T, N, *]`, `v_init` `[N, *]` (or a number); returned sequences are `[T, N, *]` in
x_seq's dtype. `v_reset=None` is soft reset. Surrogates are neuronjit's or SpikingJelly's. Errors:
as for `multistep`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import neurons
from .export import save_cuda_codes as save_cuda_codes  # part of the seed's interface
from .models.model import NeuronModel
from .run.autograd import Output, multistep

Number = float | Tensor


def _run(
    model: NeuronModel,
    x_seq: Tensor,
    record: tuple[str, ...],
    detach_reset: bool,
    surrogate_function: Any,
    state: dict[str, Number],
    params: dict[str, Any],
) -> Output:
    return multistep(
        model, x_seq, state, surrogate=surrogate_function, detach_reset=detach_reset,
        record=record, **params,
    )  # fmt: skip


def multistep_if_ptt(
    x_seq: Tensor,
    v_init: Number,
    v_threshold: Number,
    v_reset: Number | None,
    detach_reset: bool,
    surrogate_function: Any,
) -> tuple[Tensor, Tensor]:
    """Integrate-and-fire. Returns (spike_seq, v_seq)."""
    out = _run(
        neurons.IF, x_seq, ("v",), detach_reset, surrogate_function, dict(v=v_init),
        dict(v_threshold=v_threshold, v_reset=v_reset),
    )  # fmt: skip
    return out.spikes, out.record["v"]


def multistep_lif_ptt(
    x_seq: Tensor,
    v_init: Number,
    decay_input: bool,
    tau: Number,
    v_threshold: Number,
    v_reset: Number | None,
    detach_reset: bool,
    surrogate_function: Any,
) -> tuple[Tensor, Tensor]:
    """Leaky integrate-and-fire. Returns (spike_seq, v_seq)."""
    model = neurons.LIF if decay_input else neurons.LIF_NO_DECAY
    out = _run(
        model, x_seq, ("v",), detach_reset, surrogate_function, dict(v=v_init),
        dict(tau=tau, v_threshold=v_threshold, v_reset=v_reset),
    )  # fmt: skip
    return out.spikes, out.record["v"]


def multistep_plif_ptt(
    x_seq: Tensor,
    v_init: Number,
    reciprocal_tau: Tensor,
    decay_input: bool,
    v_threshold: Number,
    v_reset: Number | None,
    detach_reset: bool,
    surrogate_function: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parametric LIF. Returns (spike_seq, v_seq, reciprocal_tau), the last as it was passed."""
    model = neurons.PLIF if decay_input else neurons.PLIF_NO_DECAY
    out = _run(
        model, x_seq, ("v",), detach_reset, surrogate_function, dict(v=v_init),
        dict(reciprocal_tau=reciprocal_tau, v_threshold=v_threshold, v_reset=v_reset),
    )  # fmt: skip
    return out.spikes, out.record["v"], reciprocal_tau


def multistep_qif_ptt(
    x_seq: Tensor,
    v_init: Number,
    tau: Number,
    v_threshold: Number,
    v_reset: Number | None,
    v_rest: Number,
    v_c: Number,
    a0: Number,
    detach_reset: bool,
    surrogate_function: Any,
) -> tuple[Tensor, Tensor]:
    """Quadratic integrate-and-fire. Returns (spike_seq, v_seq)."""
    out = _run(
        neurons.QIF, x_seq, ("v",), detach_reset, surrogate_function, dict(v=v_init),
        dict(tau=tau, v_c=v_c, a0=a0, v_threshold=v_threshold, v_rest=v_rest, v_reset=v_reset),
    )  # fmt: skip
    return out.spikes, out.record["v"]


def multistep_izhikevich_ptt(
    x_seq: Tensor,
    v_init: Number,
    w_init: Number,
    tau: Number,
    v_threshold: Number,
    v_reset: Number | None,
    v_rest: Number,
    a: Number,
    b: Number,
    tau_w: Number,
    v_c: Number,
    a0: Number,
    detach_reset: bool,
    surrogate_function: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Izhikevich. Returns (spike_seq, v_seq, w_seq)."""
    out = _run(
        neurons.IZHIKEVICH, x_seq, ("v", "w"), detach_reset, surrogate_function,
        dict(v=v_init, w=w_init),
        dict(tau=tau, v_c=v_c, a0=a0, v_threshold=v_threshold, v_reset=v_reset, v_rest=v_rest,
             tau_w=tau_w, a=a, b=b),
    )  # fmt: skip
    return out.spikes, out.record["v"], out.record["w"]


def multistep_eif_ptt(
    x_seq: Tensor,
    v_init: Number,
    tau: Number,
    v_threshold: Number,
    v_reset: Number | None,
    v_rest: Number,
    theta_rh: Number,
    delta_T: Number,
    detach_reset: bool,
    surrogate_function: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exponential integrate-and-fire. Returns (spike_seq, vv, h_seq); vv starts with v_init."""
    out = _run(
        neurons.EIF, x_seq, ("v", "h"), detach_reset, surrogate_function, dict(v=v_init),
        dict(tau=tau, delta_T=delta_T, theta_rh=theta_rh, v_threshold=v_threshold,
             v_rest=v_rest, v_reset=v_reset),
    )  # fmt: skip
    first = v_init.to(x_seq.dtype) if isinstance(v_init, Tensor) else x_seq.new_tensor(v_init)
    vv = torch.cat([first.expand(x_seq.shape[1:])[None], out.record["v"]])
    return out.spikes, vv, out.record["h"]
