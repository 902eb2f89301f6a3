"""Sources to read: a model's kernels, or all of SpikingJelly's CuPy kernels as one CUDA file."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import neurons
from .errors import SpecError, known
from .kernels import targets
from .kernels.render import render_specs
from .kernels.spec import DIRECTIONS, DTYPES, KernelSpec
from .models.block import RESETS
from .models.model import NeuronModel
from .run.call import as_names
from .surrogates import ATan


def render(
    model: NeuronModel | str,
    *,
    target: str = "cuda",
    direction: str | None = None,
    surrogate: Any = ATan,
    reset: str = "hard",
    detach_reset: bool = False,
    dtype: str = "float32",
    steps: int = 16,
    neurons: int = 1 << 20,
    record: Iterable[str] = (),
    learned: Iterable[str] = (),
    per_neuron: Iterable[str] = (),
    by_channel: bool = False,
    per_step: Iterable[str] = (),
    arriving: Iterable[str] | None = None,
) -> str:
    """The source of a model's kernels, to read: what a call of this size would compile.

    Args:
        model: a `NeuronModel`, or the name of a built-in one.
        target: "cuda" or "cpu".
        direction: "forward", "backward", or None for both.
        surrogate, reset, detach_reset: as for `neuronjit.multistep`.
        dtype: of the sequences, "float32", "float64", "float16" or "bfloat16".
        steps, neurons: T and N of the call.
        record: names of sequences that forward returns besides the spikes.
        arriving: names of sequences whose gradients arrive in backward; None: the spikes and those
            of `record`.
        learned: parameters whose gradient is wanted.
        per_neuron: parameters that are tensors over neurons.
        by_channel: they are tensors over channels, as a GPU walks those.
        per_step: inputs, besides x, that all neurons share.

    Raises:
        SpecError: an unknown name, and which are known.
    """
    directions = DIRECTIONS if direction is None else (direction,)
    return render_specs(
        specs_of(
            model, target, directions, surrogate, reset, detach_reset, dtype,
            steps=steps, neurons=neurons, record=record, learned=learned, per_neuron=per_neuron,
            by_channel=by_channel, per_step=per_step, arriving=arriving,
        )
    )  # fmt: skip


def specs_of(
    model: NeuronModel | str,
    target: str,
    directions: Iterable[str],
    surrogate: Any,
    reset: str,
    detach_reset: bool,
    dtype: str,
    *,
    steps: int,
    neurons: int,
    by_channel: bool = False,
    arriving: Iterable[str] | None = None,
    **names: Iterable[str],
) -> list[KernelSpec]:
    """The kernels of `render`, one a direction, before they are rendered.

    names: its record, learned, per_neuron and per_step.
    """
    lists: dict[str, Any] = {what: as_names(given, what) for what, given in names.items()}
    if arriving is None:
        arriving = "s", *lists.get("record", ())
    lists["arriving"] = as_names(arriving, "arriving")
    specs = []
    for each in directions:
        spec = KernelSpec.of(
            model, target, each, surrogate, reset, detach_reset, dtype, by_channel=by_channel,
            **lists,
        )  # fmt: skip
        counts = DTYPES[spec.dtype].tensor.itemsize, spec.model, len(spec.sequences)
        shape = targets.by_name(target).shape(each, *counts, neurons, steps, True)
        specs.append(replace(spec, **shape._asdict()))
    return specs


SEED_NEURONS = ("if", "lif", "plif", "qif", "izhikevich", "eif")
SEED_SURROGATES = (
    "Sigmoid", "ATan", "PiecewiseLeakyReLU", "S2NN", "QPseudoSpike", "LeakyKReLU",
    "FakeNumericalGradient", "LogTailedReLU",
)  # fmt: skip


def save_cuda_codes(
    path: str | os.PathLike[str] = "./neuron_kernel_sample.cu",
    *,
    neurons: Iterable[Any] = SEED_NEURONS,
    surrogates: Iterable[Any] = SEED_SURROGATES,
    resets: Iterable[str] = tuple(RESETS),
    detach_resets: Iterable[bool] = (False, True),
    decay_inputs: Iterable[bool] = (True, False),
    dtypes: Iterable[str] = ("float32", "float16"),
    directions: Iterable[str] = DIRECTIONS,
) -> list[str]:
    """Write the CUDA source of kernels, exactly as neuronjit compiles it (NVRTC takes the file).

    Args:
        path: a `.cu` file gets all kernels behind one shared header and a list of contents; a
            directory (that exists, or a path without suffix) gets one file a kernel and
            `manifest.json`.
        neurons, surrogates: names, `NeuronModel`s, `Surrogate`s.
        resets, detach_resets, decay_inputs, dtypes, directions: what to write of each.

    Returns:
        The C symbols of the kernels, in the order of the file.

    Raises:
        SpecError: an unknown name, or nothing left to write.
    """
    specs = _chosen(neurons, surrogates, resets, detach_resets, decay_inputs, dtypes, directions)
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path.mkdir(parents=True, exist_ok=True)
        for spec in specs:
            Path(path, f"{spec.symbol}.cu").write_text(render_specs([spec]), encoding="ascii")
        kernels = [dict(symbol=s.symbol, file=f"{s.symbol}.cu", request=s.request) for s in specs]
        text = json.dumps({"kernels": kernels}, indent=1) + "\n"
        Path(path, "manifest.json").write_text(text, encoding="ascii")
    else:
        contents = "".join(f"//   {spec.symbol}\n" for spec in specs)
        text = f"// neuronjit: {len(specs)} kernels\n{contents}\n{render_specs(specs)}"
        path.write_text(text, encoding="ascii")
    return [spec.symbol for spec in specs]


def _chosen(
    models: Iterable[Any],
    surrogates: Iterable[Any],
    resets: Iterable[str],
    detach_resets: Iterable[bool],
    decay_inputs: Iterable[bool],
    dtypes: Iterable[str],
    directions: Iterable[str],
) -> list[KernelSpec]:
    decays, surrogates, detach_resets = tuple(decay_inputs), [*surrogates], [*detach_resets]
    others = [*directions], [*dtypes], [*resets]  # gone through once a model: iterators end
    specs: dict[KernelSpec, None] = {}  # choices that a kernel ignores give it again
    for given in [models] if isinstance(models, str) else models:
        model = neurons.as_model(given)
        variants = [model] if True in decays or model not in _NO_DECAY else []
        variants += [_NO_DECAY[model]] if False in decays and model in _NO_DECAY else []
        for variant, direction, dtype, reset in itertools.product(variants, *others):
            plif = "reciprocal_tau" in variant.params and direction == "backward"
            learned = ("reciprocal_tau",) if plif else ()
            for surrogate, detach in itertools.product(surrogates, detach_resets):
                choices = variant, "cuda", direction, surrogate, reset, detach, dtype
                spec = KernelSpec.of(
                    *choices, learned=learned, arriving=("s",), interval=4, loads=4
                )
                specs[spec] = None
    if not specs:
        raise SpecError(f"these choices leave no kernel to write. {known(SEED_NEURONS)}")
    symbols: dict[str, KernelSpec] = {}
    for spec in specs:
        if symbols.setdefault(spec.symbol, spec) is not spec:
            which = f"models '{spec.model.name}'"
            if spec.model == symbols[spec.symbol].model and spec.surrogate:
                which = f"surrogates '{spec.surrogate.name}'"
            raise SpecError(f"two different {which} have one name: give each its own")
    return list(specs)


_NO_DECAY = {neurons.LIF: neurons.LIF_NO_DECAY, neurons.PLIF: neurons.PLIF_NO_DECAY}
