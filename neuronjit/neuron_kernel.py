"""The interface of SpikingJelly's CuPy neuron kernels (dropped there in 2.0.0): same names, order and returns.

`x_seq` is `[T, N, *]`, `v_init` `[N, *]` (or a number); returned sequences are `[T, N, *]` in x_seq's dtype.
`v_reset=None` is soft reset. Surrogates are neuronjit's or SpikingJelly's. Errors: as for `multistep`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import functional, neurons
from .errors import SpecError, known
from .source import KernelSpec, render_specs, spec_of
from .surrogates import by_name as surrogate_by_name

Number = float | Tensor


def multistep_if_ptt(
    x_seq: Tensor,
    v_init: Number,
    v_threshold: Number,
    v_reset: Number | None,
    detach_reset: bool,
    surrogate_function: Any,
) -> tuple[Tensor, Tensor]:
    """Integrate-and-fire. Returns (spike_seq, v_seq)."""
    out = functional.if_(
        x_seq, v_init, v_threshold=v_threshold, v_reset=v_reset,
        detach_reset=detach_reset, surrogate=surrogate_function, record=("v",),
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
    out = functional.lif(
        x_seq, v_init, tau=tau, decay_input=decay_input, v_threshold=v_threshold, v_reset=v_reset,
        detach_reset=detach_reset, surrogate=surrogate_function, record=("v",),
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
    out = functional.plif(
        x_seq, v_init, reciprocal_tau=reciprocal_tau, decay_input=decay_input, v_threshold=v_threshold, v_reset=v_reset,
        detach_reset=detach_reset, surrogate=surrogate_function, record=("v",),
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
    out = functional.qif(
        x_seq, v_init, tau=tau, v_c=v_c, a0=a0, v_threshold=v_threshold, v_rest=v_rest, v_reset=v_reset,
        detach_reset=detach_reset, surrogate=surrogate_function, record=("v",),
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
    out = functional.izhikevich(
        x_seq, v_init, w_init, tau=tau, v_c=v_c, a0=a0, v_threshold=v_threshold, v_reset=v_reset, v_rest=v_rest,
        tau_w=tau_w, a=a, b=b, detach_reset=detach_reset, surrogate=surrogate_function, record=("v", "w"),
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
    """Exponential integrate-and-fire. Returns (spike_seq, vv, h_seq): vv is `[T+1, N, *]`, v_init first."""
    out = functional.eif(
        x_seq, v_init, tau=tau, delta_T=delta_T, theta_rh=theta_rh, v_threshold=v_threshold, v_rest=v_rest, v_reset=v_reset,
        detach_reset=detach_reset, surrogate=surrogate_function, record=("v", "h"),
    )  # fmt: skip
    first = v_init.to(x_seq.dtype) if isinstance(v_init, Tensor) else x_seq.new_tensor(v_init)
    return (
        out.spikes,
        torch.cat([first.expand(x_seq.shape[1:])[None], out.record["v"]]),
        out.record["h"],
    )


SEED_NEURONS = ("if", "lif", "plif", "qif", "izhikevich", "eif")
SEED_SURROGATES = (
    "Sigmoid", "ATan", "PiecewiseLeakyReLU", "S2NN", "QPseudoSpike", "LeakyKReLU", "FakeNumericalGradient", "LogTailedReLU",
)  # fmt: skip


def save_cuda_codes(
    path: str | os.PathLike[str] = "./neuron_kernel_sample.cu",
    *,
    neurons: Iterable[Any] = SEED_NEURONS,
    surrogates: Iterable[Any] = SEED_SURROGATES,
    resets: Iterable[str] = ("hard", "soft"),
    detach_resets: Iterable[bool] = (False, True),
    decay_inputs: Iterable[bool] = (True, False),
    dtypes: Iterable[str] = ("float32", "float16"),
    directions: Iterable[str] = ("forward", "backward"),
) -> list[str]:
    """Write the CUDA source of kernels, exactly as neuronjit compiles it (NVRTC takes the whole file).

    Args:
        path: a `.cu` file gets all kernels behind one shared header and a list of contents; a directory (that
            exists, or a path without suffix) gets one file a kernel and `manifest.json`.
        neurons, surrogates: names, `NeuronModel`s, `Surrogate`s.
        resets, detach_resets, decay_inputs, dtypes, directions: what to write of each.

    Returns:
        The C symbols of the kernels, in the order of the file.

    Raises:
        SpecError: an unknown name, or nothing left to write.
    """
    specs = _export(neurons, surrogates, resets, detach_resets, decay_inputs, dtypes, directions)
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path.mkdir(parents=True, exist_ok=True)
        for spec in specs:
            Path(path, f"{spec.symbol}.cu").write_text(render_specs([spec]), encoding="ascii")
        listing = [
            {"symbol": s.symbol, "file": f"{s.symbol}.cu", "request": s.request} for s in specs
        ]
        Path(path, "manifest.json").write_text(
            json.dumps({"kernels": listing}, indent=1) + "\n", encoding="ascii"
        )
    else:
        contents = "".join(f"//   {spec.symbol}\n" for spec in specs)
        text = f"// neuronjit: {len(specs)} kernels\n{contents}\n{render_specs(specs)}"
        path.write_text(text, encoding="ascii")
    return [spec.symbol for spec in specs]


def _export(
    models: Iterable[Any],
    surrogates: Iterable[Any],
    resets: Iterable[str],
    detach_resets: Iterable[bool],
    decay_inputs: Iterable[bool],
    dtypes: Iterable[str],
    directions: Iterable[str],
) -> Sequence[KernelSpec]:
    decays = tuple(decay_inputs)
    if not isinstance(models, str):
        models = list(models)
    specs: dict[
        KernelSpec, None
    ] = {}  # a dictionary, because choices that a kernel ignores give it again
    for given in [models] if isinstance(models, str) else models:
        model = neurons.as_model(given)
        variants = [model] if True in decays or model not in _NO_DECAY else []
        variants += [_NO_DECAY[model]] if False in decays and model in _NO_DECAY else []
        for variant, direction, dtype, reset in itertools.product(
            variants, directions, dtypes, resets
        ):
            learned = (
                ("reciprocal_tau",)
                if "reciprocal_tau" in variant.params and direction == "backward"
                else ()
            )
            for surrogate, detach in itertools.product(surrogates, detach_resets):
                surrogate = (
                    surrogate_by_name(surrogate) if isinstance(surrogate, str) else surrogate
                )
                spec = spec_of(
                    variant,
                    "cuda",
                    direction,
                    surrogate,
                    reset,
                    detach,
                    dtype,
                    learned=learned,
                    steps=4,
                    loads=4,
                )
                specs[spec] = None
    if not specs:
        raise SpecError(f"these choices leave no kernel to write. {known(SEED_NEURONS)}")
    return list(specs)


_NO_DECAY = {neurons.LIF: neurons.LIF_NO_DECAY, neurons.PLIF: neurons.PLIF_NO_DECAY}
