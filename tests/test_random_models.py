"""Random models against an evaluator of their own: values, gradients, warm calls, NaN included.

One seed alone: pytest tests/test_random_models.py -k seed17-
More of them: RANDOM_MODELS=2000 pytest tests/test_random_models.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import random_models
import torch
from random_models import Case
from support import each_device
from torch import Tensor

import neuronjit as nj
from neuronjit.kernels.targets import cpu

# most of the time would be the compiler's
QUICKLY = tuple("-O1" if flag == "-O3" else flag for flag in cpu.FLAGS)
ORDINARY, ALL = 30, int(os.environ.get("RANDOM_MODELS", "360"))
VALUES, GRADIENTS = 1e-9, 1e-7
# a potential this near to the threshold may fall on either side
NEAR = {torch.float64: 1e-9, torch.float32: 1e-3}


def leaves(case: Case, device: str) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """x, initial states and parameters that collect their own gradients, in the same layout."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if device == "cpu":
            return value.detach().requires_grad_(value.requires_grad)
        apart = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=device
        )  # `to` closes the gaps of a view
        return apart.copy_(value.detach()).requires_grad_(value.requires_grad)

    initial, given = ({k: copy(v) for k, v in d.items()} for d in (case.initial, case.given))
    return copy(case.x), initial, given


def gradients(
    case: Case, outputs: dict[str, Tensor], given: tuple[Any, ...], kept: Tensor
) -> dict[str, Tensor]:
    """By name, of all that requires one; from random gradients of the outputs in `arriving`."""
    x, initial, params = given
    wanted = {
        name: value
        for name, value in {"x": x, **initial, **params}.items()
        if isinstance(value, Tensor) and value.requires_grad
    }
    generator = torch.Generator().manual_seed(case.seed)
    arriving = {}
    for name in sorted(case.arriving):
        weight = torch.randn(outputs[name].shape, generator=generator, dtype=torch.float64)
        if outputs[name].requires_grad:
            arriving[name] = weight.to(outputs[name]) * kept.to(outputs[name].device)
    if not wanted or not arriving:
        return {}
    found = torch.autograd.grad(
        [outputs[name] for name in arriving], list(wanted.values()), list(arriving.values()),
        materialize_grads=True,
    )  # fmt: skip
    return dict(zip(wanted, found, strict=True))


def library(
    case: Case, model: nj.NeuronModel, backwards: bool, device: str
) -> tuple[Any, dict[str, Tensor]]:
    x, initial, given = leaves(case, device)
    order = reversed(given.items()) if backwards else given.items()
    out = nj.multistep(
        model, x, initial or None, surrogate=nj.surrogates.ATan(spiking=case.spiking),
        reset=case.reset, detach_reset=case.detach_reset, record=tuple(case.record), **dict(order),
    )  # fmt: skip
    outputs = {"s": out.spikes} | {f"{z}_last": out.state[z] for z in case.state}
    return (x, initial, given), outputs | {f"{n}_seq": out.record[n] for n in case.record}


def check(seed: int, device: str) -> None:
    case = random_models.case(seed)
    model = nj.NeuronModel(
        f"random{seed}", case.text, state=case.state, params=case.params, strict=case.strict,
        inputs=("x", *case.inputs),
    )  # fmt: skip
    theirs = leaves(case, "cpu")
    want = random_models.run(case, *theirs)
    distance = want.pop("u")
    kept = torch.ones(case.x.shape[1:], dtype=torch.bool)
    if case.spiking:
        kept = ~(distance.abs() < NEAR[case.dtype]).any(0)
    slopes = gradients(case, want, theirs, kept)
    runs = []
    for backwards in (False, False, True):
        mine, got = library(case, model, backwards, device)
        found = got, gradients(case, got, mine, kept)
        runs.append(tuple({n: t.cpu() for n, t in each.items()} for each in found))
    shown = f"seed {seed}: {case}"
    for what, index in (("output", 0), ("gradient", 1)):
        first, *others = (run[index] for run in runs)
        for other in others:
            for name, value in first.items():
                same = torch.equal(value.nan_to_num(7e7), other[name].nan_to_num(7e7))
                assert same, f"{what} {name} of a warm call differs; {shown}"
    got, got_slopes = runs[0]
    for name, value in want.items():
        mask = kept.expand(value.shape)
        if case.dtype == torch.float64:
            compare(got[name][mask], value[mask], VALUES, f"output {name}; {shown}")
        elif name == "s" and case.spiking and "y = " not in case.text:
            assert torch.equal(got["s"][mask], value[mask]), f"spikes; {shown}"
    if case.dtype == torch.float64:
        for name in slopes.keys() | got_slopes.keys():  # with no step, no graph may be left
            got_slope, slope = got_slopes.get(name), slopes.get(name)
            got_slope = torch.zeros_like(slope) if got_slope is None else got_slope
            slope = torch.zeros_like(got_slope) if slope is None else slope
            compare(got_slope, slope, GRADIENTS, f"gradient of {name}; {shown}")


def compare(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    got, want = got.detach(), want.detach()
    # which of two zeros `maximum` gives is not fixed (torch's own loops differ): so is the sign of
    # the infinite slope of a square root there
    got, want = (torch.where(t.isinf(), t.abs(), t) for t in (got, want))
    finite = want[want.isfinite()]
    largest = max(1.0, finite.abs().max().item() if finite.numel() else 0.0)
    near = torch.isclose(got, want, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
    # an infinite gradient times (1 - s): torch adds it and it times -s, which is NaN for s = 0
    near |= want.isnan() & got.isinf()
    assert near.all(), f"{got[~near][:4].tolist()}, not {want[~near][:4].tolist()}: {what}"


@each_device
@pytest.mark.parametrize("seed", range(ORDINARY), ids="seed{}-".format)
def test_a_random_model(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FLAGS", QUICKLY)
    check(seed, device)


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("seed", range(ORDINARY, ALL), ids="seed{}-".format)
def test_another_random_model(seed: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FLAGS", QUICKLY)
    check(seed, device)
