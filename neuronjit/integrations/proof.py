"""A training step of the user's own model before and after, compared: copies run, never the model.

What is compared is what a step computes: every spike, the outputs, all gradients. Then both are
timed.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..errors import AccelerationError

# relative to the largest value: rounding of the coarsest dtype that went through a neuron
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_EXACT = 2e-5
_FUSED = 1e-7  # where batch norms are fused, in float64
_IN_FLOAT64 = " in float64 (as fused batch norms are compared)"
_HALF = tuple(_TOLERANCE)
_SECONDS = 0.5  # to spend on timing each of the two


@dataclass(frozen=True)
class Proof:
    """What one batch showed; all differences are relative to the largest value."""

    spikes: int  # values that came out of the accelerated neurons
    fired: float  # the part of them that is not 0
    differing: int  # of them, those that are not equal
    first: str | None  # the first neuron whose spikes differ, in the order in which they ran
    outputs: float  # largest difference of an output of the model
    gradients: float | None  # largest of a gradient; None where the outputs have none
    worst: str | None  # the parameter or input where it is
    tolerance: float  # of the last three
    half: bool  # neurons got half precision: they were compared with the peer's in float32
    ms: tuple[float, float]  # a training step before and after
    mb: tuple[float, float] | None  # peak CUDA memory of a step, before and after, over the model's
    # where batch norms are fused, the above is of float64, and this how many of the spikes differ
    # in the model's own dtype
    rounded: int | None = None

    @property
    def same(self) -> bool:
        """Whether all spikes are equal, and outputs and gradients within the tolerance."""
        differences = (self.outputs, self.gradients or 0.0)
        return not self.differing and all(d <= self.tolerance for d in differences)

    def __str__(self) -> str:
        ran = f"{self.spikes:,} spikes, {self.fired:.1%} not 0"
        if not self.spikes:
            ran = "no accelerated neuron ran"
        equal = "all equal" if not self.differing else f"{self.differing:,} differ, first in"
        said = [f"{ran}: {equal}{'' if self.first is None else f' {self.first}'}"]
        said.append(f"outputs within {self.outputs:.1e}")
        if self.gradients is None:
            said.append("no gradients")
        else:
            worst = f" ({self.worst})" if self.worst else ""
            said.append(f"gradients within {self.gradients:.1e}{worst}")
        verdict = "the same" if self.same else f"DIFFERENT, tolerance {self.tolerance:.1e}"
        lines = [f"sample: {verdict}; {'; '.join(said)}"]
        if self.half:
            lines.append("half precision: compared with neurons in float32, as ours compute")
        if self.rounded is not None:
            lines.append(
                "compared in float64: a fused batch norm rounds otherwise, which decides whether a"
                f" neuron near its threshold fires. In the model's own dtype {self.rounded:,} of"
                f" {self.spikes:,} spikes differ ({self.rounded / max(self.spikes, 1):.2%})"
            )
        before, after = self.ms
        lines.append(f"a training step: {before:.2f} ms before, {after:.2f} ms after")
        lines[-1] += f" ({before / after:.2f} times)"
        if self.mb is not None:
            lines.append(f"its peak memory: {self.mb[0]:.1f} MB before, {self.mb[1]:.1f} MB after")
        return "\n".join(lines)


def prove(
    model: Module,
    paths: Sequence[str],
    swap: Callable[[Module, Iterable[str]], None],
    sample: Any,
    fused: bool = False,
) -> Proof:
    """Compare a copy of the model with one whose neurons at `paths` are swapped.

    With `fused`, in float64: batch norms in neurons' kernels add up in another order, and one spike
    that rounding decides changes all that follows.

    Raises AccelerationError if the model cannot be copied, or does not run on the sample.
    """
    args, kwargs = _arguments(sample)

    def copies() -> tuple[Module, Module]:
        before, after = _copy(model), _copy(model)
        swap(after, paths)
        return before, after

    before, after = copies()
    shown = _compared(before, after, paths, args, kwargs)
    if fused:
        first, second = (copied.double() for copied in copies())
        exact = _compared(first, second, paths, _wide(args), _wide(kwargs), _IN_FLOAT64)
        shown = {**exact, "tolerance": _FUSED, "rounded": shown["differing"]}
        del first, second
    costs = []
    for copied in (before, after):
        with _random_state(copied), _listed(copied):
            costs.append(_cost(copied, args, kwargs))
    (ms_before, mb_before), (ms_after, mb_after) = costs
    mb = None if mb_before is None or mb_after is None else (mb_before, mb_after)
    return Proof(**shown, ms=(ms_before, ms_after), mb=mb)


def _compared(
    before: Module, after: Module, paths: Sequence[str], args: Any, kwargs: Any, where: str = ""
) -> dict[str, Any]:
    """What a step of both shows, but for the time: fields of a Proof."""
    with _random_state(before), _exactly(), _listed(before):
        theirs = _guarded(before, paths, args, kwargs, f"the model{where}")
    with _random_state(after), _exactly(), _listed(after):
        ours = _guarded(after, paths, args, kwargs, f"the accelerated model{where}")
    dtypes = {*theirs.dtypes, *(out.dtype for out in theirs.outputs)}
    different = [(path, n) for path, n in _differing(theirs.spikes, ours.spikes) if n]
    worst, gradients = _worst(theirs.gradients, ours.gradients)
    pairs = zip(theirs.outputs, ours.outputs, strict=True)
    spikes = sum(out.numel() for _, out in theirs.spikes)
    return dict(
        spikes=spikes,
        fired=sum(int(out.count_nonzero()) for _, out in theirs.spikes) / max(spikes, 1),
        differing=sum(n for _, n in different),
        first=different[0][0] if different else None,
        outputs=max((_difference(b, a) for b, a in pairs), default=0.0),
        gradients=gradients,
        worst=worst,
        tolerance=max([_EXACT, *(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)]),
        half=any(dtype in _HALF for dtype in theirs.dtypes),
    )


def _wide(value: Any) -> Any:
    """The floating tensors of a sample in float64."""
    if isinstance(value, dict):
        return {key: _wide(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_wide, value)] if isinstance(value, list) else (*map(_wide, value),)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _arguments(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(sample, dict):
        return (), sample
    return (tuple(sample), {}) if isinstance(sample, tuple | list) else ((sample,), {})


def _copy(model: Module) -> Module:
    """A copy with memory of its own; states keep their numbers and lose their history."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            for held in value.values() if isinstance(value, dict) else (value,):
                if isinstance(held, Tensor) and held.grad_fn is not None:
                    memo[id(held)] = held.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise AccelerationError(
            "the sample is run on copies of the model, and copy.deepcopy cannot copy it"
            f" ({type(error).__name__}: {error}); call accelerate(model) without a sample"
        ) from error


@contextmanager
def _random_state(model: Module) -> Iterator[None]:
    """Every generator of random numbers as it was, at the end."""
    tensors = [*model.parameters(), *model.buffers()]
    cuda = {t.device.index for t in tensors if t.is_cuda}
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=sorted(cuda)):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(state)


@contextmanager
def _listed(copied: Module) -> Iterator[None]:
    """Let snnTorch's `utils.reset` reset this copy, and not the model that it was copied from.

    It resets the neurons of a list, which a neuron joins when it is made, and not when it is
    copied.
    """
    neuron: Any = getattr(sys.modules.get("snntorch"), "SpikingNeuron", None)
    if neuron is None:
        yield
        return
    held = neuron.instances
    neuron.instances = [module for module in copied.modules() if isinstance(module, neuron)]
    try:
        yield
    finally:
        neuron.instances = held


@contextmanager
def _exactly() -> Iterator[None]:
    """Convolutions and products in whole float32 and in one order: neurons are compared, not they.

    In TF32 a gradient's last bit decides how 13 more are rounded.
    """
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = dict(benchmark=False, deterministic=True, allow_tf32=False)
    before = products.allow_tf32
    with cudnn.flags(enabled=cudnn.enabled, **flags):
        products.allow_tf32 = False
        try:
            yield
        finally:
            products.allow_tf32 = before


# --- one step, recorded ---------------------------------------------------------------------------


@dataclass
class _Step:
    spikes: list[tuple[str, Tensor]]  # in the order in which the neurons ran
    dtypes: set[torch.dtype]  # of what came in
    outputs: list[Tensor]
    gradients: dict[str, Tensor] | None


def _guarded(model: Module, paths: Sequence[str], args: Any, kwargs: Any, whose: str) -> _Step:
    try:
        return _recorded(model, paths, args, kwargs)
    except Exception as error:
        shapes = ", ".join(
            f"{t.dtype} {list(t.shape)} on {t.device}" for t in _tensors([args, kwargs])
        )
        raise AccelerationError(
            f"{whose} does not run on the sample ({type(error).__name__}: {error}); the sample was"
            f" {shapes or 'without tensors'}. Give one batch as the model takes it: a tensor, or a"
            " tuple or dict of arguments"
        ) from error


def _recorded(model: Module, paths: Sequence[str], args: Any, kwargs: Any) -> _Step:
    step = _Step([], set(), [], None)

    def widen(module: Module, given: tuple[Any, ...]) -> Any:
        # the peer would round every operation to half precision, which our kernels never do: both
        # get the same numbers in float32
        if not given:  # called with keywords, which no library does itself
            return None
        first = given[0]
        step.dtypes.add(first.dtype)
        return (first.float(), *given[1:]) if first.dtype in _HALF else None

    handles = []
    for path in paths:

        def keep(module: Module, given: Any, out: Any, path: str = path) -> None:
            spikes = out[0] if isinstance(out, tuple) else out  # snnTorch's: states follow
            step.spikes.append((path, spikes.detach().cpu()))

        module = model.get_submodule(path)
        handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(keep)]
    try:
        step.outputs, step.gradients = _train(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return step


def _train(model: Module, args: Any, kwargs: Any) -> tuple[list[Tensor], dict[str, Tensor] | None]:
    """Outputs and gradients, by name, of a loss that weighs each output by a number of its own."""
    inputs: dict[str, Tensor] = {}

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().clone().requires_grad_()
            inputs[f"input {len(inputs)}"] = value
        return value

    args, kwargs = [leaf(a) for a in args], {name: leaf(a) for name, a in kwargs.items()}
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        found = [t for t in _tensors(model(*args, **kwargs)) if t.is_floating_point()]
        outputs = [t for t in found if t.requires_grad]
        generator = torch.Generator().manual_seed(0)
        losses = [
            (out.float() * torch.randn(out.shape, generator=generator).to(out.device)).mean()
            for out in outputs
        ]
        if not losses:
            return [t.detach() for t in found], None
        torch.stack([loss.to(losses[0].device) for loss in losses]).sum().backward()
    named = {**dict(model.named_parameters()), **inputs}
    return [t.detach() for t in found], {n: t.grad for n, t in named.items() if t.grad is not None}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for held in value.values() if isinstance(value, dict) else value:
            yield from _tensors(held)


# --- comparing ------------------------------------------------------------------------------------


def _differing(
    theirs: Sequence[tuple[str, Tensor]], ours: Sequence[tuple[str, Tensor]]
) -> Iterator[tuple[str, int]]:
    """Of each call of a neuron: its path, and how many spikes are not equal."""
    for (path, a), (_, b) in zip(theirs, ours, strict=True):
        a, b = (t.float() if t.dtype in _HALF else t for t in (a, b))
        yield path, int(((a != b) & ~(a.isnan() & b.isnan())).sum())


def _difference(theirs: Tensor, ours: Tensor, least: float = 0.0) -> float:
    """The largest difference, relative to the largest value (or to `least`); NaN equals NaN."""
    a, b = theirs.double(), ours.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if a.shape != b.shape or same.all():
        return 0.0 if a.shape == b.shape else float("inf")
    finite = a[a.isfinite()].abs()
    largest = max(finite.max().item() if finite.numel() else 0.0, least)
    apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf")).max().item()
    return apart / largest if largest else float("inf")


def _worst(
    theirs: dict[str, Tensor] | None, ours: dict[str, Tensor] | None
) -> tuple[str | None, float | None]:
    """The name and size of the largest difference of a gradient.

    A gradient that is zero but for rounding, as that of a bias before a batch norm, is compared
    with a hundredth of the largest.
    """
    if theirs is None or ours is None:
        return (None, None) if theirs is ours else ("(all)", float("inf"))
    largest = max((g.abs().max().item() for g in theirs.values() if g.numel()), default=0.0)
    found = {name: float("inf") for name in theirs.keys() ^ ours.keys()}
    for name in theirs.keys() & ours.keys():
        found[name] = _difference(theirs[name], ours[name], largest / 100)
    worst = max(found, key=lambda name: found[name], default=None)
    return (None, 0.0) if worst is None or not found[worst] else (worst, found[worst])


# --- costs ----------------------------------------------------------------------------------------


def _cost(model: Module, args: Any, kwargs: Any) -> tuple[float, float | None]:
    """Milliseconds of a training step (the median), and its peak of CUDA memory in MB."""
    cuda = sorted({t.device.index for t in model.parameters() if t.is_cuda})
    times: list[float] = []
    peak = None
    end = time.perf_counter() + _SECONDS
    while len(times) < 4 or (time.perf_counter() < end and len(times) < 50):
        for module in model.modules():
            for name in ("reset", "reset_mem"):
                if callable(reset := getattr(module, name, None)):
                    reset()
        model.zero_grad(set_to_none=True)
        for device in cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        held = sum(torch.cuda.memory_allocated(device) for device in cuda)
        start = time.perf_counter()
        _train(model, args, kwargs)
        for device in cuda:
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
        if cuda:
            peak = (sum(torch.cuda.max_memory_allocated(d) for d in cuda) - held) / 1e6
    return median(times[1:]), peak
