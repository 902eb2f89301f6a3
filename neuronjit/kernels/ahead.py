"""Building kernels ahead of time, for any architecture: needs compilers, but no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

import torch

from .. import neurons
from ..cache import store
from ..errors import NeuronJitError, SpecError
from ..surrogates import as_surrogate
from . import build, targets
from .helpers import HelperSpec, Spec
from .spec import DIRECTIONS, DTYPES, KernelSpec, in_order
from .targets import TARGETS

Job = tuple[Spec, str]  # with the architecture to compile for


def jobs(
    wanted: Iterable[Job],
    chosen: Callable[[str], Sequence[KernelSpec]],
    only: Sequence[str] = (),
    archs: Sequence[str] = (),
) -> list[Job]:
    """What to build, each once.

    Args:
        wanted: kernels of a manifest. For their own target they are built as they are, on the
            architectures of `archs` or else their own; for another one in every shape.
        chosen: the kernels for a target that are wanted besides.
        only: targets to build for; else those of `archs`, else that of each kernel of `wanted`, and
            for `chosen` the one that this machine would run.
        archs: architectures to build for; for a target of which none is named, this machine's.

    Raises:
        SpecError: an unknown architecture, or none is named and there is no GPU.
    """
    named: dict[str, list[str]] = {target: [] for target in TARGETS}
    for arch in archs:
        target = "cuda" if arch.startswith("sm_") else "cpu"
        named[target].append(targets.by_name(target).check_arch(arch))
        if only and target not in only:
            raise SpecError(f"architecture {arch} is one of target {target}")
    asked = list(only) or [target for target in TARGETS if named[target]]
    found: dict[Job, None] = {}
    for spec, arch in wanted:
        for target in asked or [spec.target]:
            same = target == spec.target
            places = named[target] or ([arch] if same else here(target))
            if isinstance(spec, HelperSpec):  # other targets have none
                specs: Sequence[Spec] = [spec] if same else []
            else:
                specs = [spec] if same else every_shape(spec, target)
            found.update(dict.fromkeys(itertools.product(specs, places)))
    for target in asked or ["cuda" if torch.cuda.is_available() else "cpu"]:
        if specs := list(chosen(target)):
            found.update(dict.fromkeys(itertools.product(specs, named[target] or here(target))))
    return list(found)


def here(target: str) -> list[str]:
    """The architectures of this machine. Raises SpecError where there is no GPU."""
    module = targets.by_name(target)
    if target == "cpu":
        return [module.arch()]
    if not torch.cuda.is_available():
        raise SpecError("torch finds no GPU here: name the --arch to build for, e.g. sm_80 sm_90")
    return sorted({module.arch(index) for index in range(torch.cuda.device_count())})


def prebuild(
    work: Sequence[Job], workers: int, advance: Callable[[], None] = lambda: None
) -> tuple[list[store.Entry], list[tuple[Job, NeuronJitError]]]:
    """The kernels that could be built, and those that could not. `advance` is told of each.

    Threads will do: g++ is a process of its own, and NVRTC runs without the interpreter's lock.
    """
    for target, arch in dict.fromkeys((spec.target, arch) for spec, arch in work):
        targets.by_name(target).fingerprint(arch)  # no compiler: said once, before anything starts
    built, failed = [], []
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        waiting = {pool.submit(build.entry, *job): job for job in work}
        for future in as_completed(waiting):
            try:
                built.append(future.result())
            except NeuronJitError as error:
                failed.append((waiting[future], error))
            advance()
    finally:  # after Ctrl-C too: what has begun is finished, and published whole or not at all
        pool.shutdown(cancel_futures=True)
    return built, failed


def choices(
    models: Iterable[Any],
    target: str,
    *,
    surrogates: Iterable[Any] = ("atan", "sigmoid"),  # the defaults of multistep and of the layers
    resets: Iterable[str] = ("hard",),
    dtypes: Iterable[str] = ("float32",),
    detach_reset: bool = False,
    smooth: bool = False,
    record: Sequence[str] = (),
    learn: Sequence[str] = (),
    per_neuron: Sequence[str] = (),
    per_step: Sequence[str] = (),
) -> list[KernelSpec]:
    """All kernels that training with these choices may look up, whatever the sizes.

    Forward without and with `record`; backward of gradients that arrive at the spikes (and last
    states), and with `record` at both. Each model takes of `record`, `learn`, `per_neuron` and
    `per_step` the names that it has; PLIF's reciprocal_tau is always learned.
    """
    chosen: dict[KernelSpec, None] = {}
    models = [neurons.as_model(model) for model in models]
    params = dict.fromkeys(itertools.chain(*(m.params for m in models)))
    recordable = dict.fromkeys(itertools.chain(*(m.recordable for m in models)))
    inputs = dict.fromkeys(itertools.chain(*(m.inputs[1:] for m in models)))
    for what, names, allowed in (
        ("learn", learn, params),
        ("per-neuron", per_neuron, params),
        ("per-step", per_step, inputs),
        ("record", record, recordable),
    ):
        in_order(names, allowed, what)
    replaced = [as_surrogate(given) for given in surrogates]
    replaced = [given(spiking=False) for given in replaced] if smooth else replaced
    for model, surrogate, reset, dtype in itertools.product(
        models, replaced, list(resets), list(dtypes)
    ):
        wide = tuple(p for p in model.params if p in per_neuron)
        shared = tuple(n for n in model.inputs if n in per_step)
        learned = tuple(p for p in model.params if p in learn or p == "reciprocal_tau")
        recorded = tuple(n for n in model.recordable if n in record)
        for direction, names in itertools.product(DIRECTIONS, ((), recorded)):
            spec = KernelSpec.of(
                model, target, direction, surrogate, reset, detach_reset, dtype,
                record=names, arriving=("s", *names), per_neuron=wide, per_step=shared,
                learned=learned,
            )  # fmt: skip
            ways = (False, True) if wide and target == "cuda" else (False,)
            ends = (True, False) if spec.learned else (True,)
            for way, end in itertools.product(ways, ends):
                each = replace(spec, by_channel=way, to_inputs=end)
                chosen.update(dict.fromkeys(every_shape(each, target)))
    return list(chosen)


def every_shape(spec: KernelSpec, target: str) -> list[KernelSpec]:
    """The same kernel for `target`, in each shape that some size of input may ask for."""
    size = DTYPES[spec.dtype].tensor.itemsize
    shapes = targets.shapes(target, spec.direction, size, spec.model, len(spec.sequences))
    return [replace(spec, target=target, **shape._asdict()) for shape in shapes]
