"""Kernels beside those of neurons: described, built and loaded; and a batch's statistics."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from support import each_device, slow
from torch import Tensor

import neuronjit as nj
from neuronjit import cli
from neuronjit.kernels import ahead, build, manifest
from neuronjit.kernels.helpers import HELPERS, HelperSpec
from neuronjit.kernels.render import render_helper
from neuronjit.kernels.spec import DTYPES
from neuronjit.kernels.targets import cuda
from neuronjit.run import statistics
from neuronjit.run.statistics import Running, batch_statistics

ALL = [
    HelperSpec(helper, dtype, size, lanes)
    for helper, row in HELPERS.items()
    for dtype, size, lanes in itertools.product(DTYPES, row.sizes, row.lanes)
]


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    ("arch", "dtypes"),
    [("sm_90", ("float16",)), slow("sm_90", set(DTYPES) - {"float16"}), slow("sm_75", DTYPES)],
    ids=str,
)
def test_nvrtc_compiles_them(arch: str, dtypes: Any) -> None:
    for spec in [spec for spec in ALL if spec.dtype in dtypes]:
        source = render_helper(spec)
        assert max(map(len, source.splitlines())) <= 120
        assert cuda.measure(source, spec.symbol, arch)["spilled"] == 0


def test_each_has_a_name_of_its_own() -> None:
    assert len({spec.symbol for spec in ALL}) == len({spec.request for spec in ALL}) == len(ALL)


def test_they_pass_through_manifests() -> None:
    for spec in ALL:
        assert manifest.from_json(json.loads(json.dumps(manifest.to_json(spec)))) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(helper="unlink"), "unknown helper .unlink.. Known: max_pool, max_pool_back"),
        (dict(dtype="int8"), "unknown dtype 'int8'"),
        (dict(size=3), r"pack has the sizes \[1, 2, 4, 8\] and lanes \[32\], not size=3, lanes=32"),
        (dict(lanes=True), "lanes"),
        (dict(size="1"), "size"),
        (dict(more=1), "more"),
    ],
    ids=str,
)
def test_a_manifest_from_a_stranger(change: dict[str, Any], message: str) -> None:
    data = {"helper": "pack", "dtype": "float16", "size": 1, "lanes": 32, **change}
    with pytest.raises(nj.NeuronJitError, match=message):
        manifest.from_json(data)


@pytest.mark.nvrtc
def test_they_are_built_ahead(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a manifest for their target, and for another there is nothing to build."""
    monkeypatch.setenv("NEURONJIT_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "kernels.jsonl"
    spec = HelperSpec("moments", "float16", 4, 8)
    path.write_text(json.dumps({**manifest.to_json(spec), "arch": "sm_90"}))
    assert ahead.jobs(manifest.read(str(path)), lambda target: ()) == [(spec, "sm_90")]
    assert ahead.jobs(manifest.read(str(path)), lambda target: (), ["cpu"]) == []
    assert cli.main(["prebuild", "--manifest", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compiled"] == 1
    assert cli.main(["list", "--json"]) == 0
    assert spec.symbol in capsys.readouterr().out
    monkeypatch.setenv("NEURONJIT_NO_COMPILE", "1")
    assert build.entry(spec, "sm_90").meta["dtype"] == "float16"
    with pytest.raises(nj.MissingKernelError, match=r"NEURONJIT_RECORD=.* prebuild --manifest"):
        build.entry(spec, "sm_80")


# --- statistics -----------------------------------------------------------------------------------


def compare(x: Tensor, **options: Any) -> None:
    """Three batches, against torch's batch norm in float64."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    near = dict(rtol=1e-12, atol=1e-12) if real == torch.float64 else dict(rtol=5e-5, atol=5e-5)
    norm = torch.nn.BatchNorm1d(x.shape[2], **options).double().to(x.device)
    own = Running()
    if norm.track_running_stats:
        stats = (norm.running_mean.to(real), norm.running_var.to(real))
        own = Running(*stats, norm.num_batches_tracked.clone(), norm.momentum)
    for batch in range(3):
        now = x * (batch + 1) if batch else x
        flat = now.double().movedim(2, 0).flatten(1)
        norm(flat.t())
        mean, invstd = batch_statistics(now, norm.eps, own)
        assert mean.shape == invstd.shape == (1, x.shape[2], *(1,) * (x.dim() - 3))
        assert mean.dtype == invstd.dtype == real
        var, want = torch.var_mean(flat, 1, correction=0)
        torch.testing.assert_close(mean.flatten().double(), want, **near)
        torch.testing.assert_close(invstd.flatten().double(), (var + norm.eps).rsqrt(), **near)
    for got, wanted in zip(own[:3], norm.buffers(), strict=False):
        torch.testing.assert_close(got.double(), wanted.double(), **near)


def sequence(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return (x * 2 + 3).to(device, dtype)


SHAPES = [
    (2, 2, 3, 5, 5), (1, 6, 8, 6, 6), (5, 1, 16, 4), (3, 7, 300), (4, 9, 1, 40), (2, 2, 6),
    (2, 3, 1), (4, 2, 520), (1, 2, 1, 1), (2, 2, 3, 2, 3, 4), (4, 16, 64, 28, 28),
]  # fmt: skip


@each_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_statistics(shape: tuple[int, ...], name: str, device: str) -> None:
    x = sequence(shape, device, DTYPES[name].tensor)
    for own in (x, x.movedim(2, -1).contiguous().movedim(-1, 2)):
        compare(own)
        compare(own, momentum=None)
        compare(own, track_running_stats=False)


@each_device
def test_views(device: str) -> None:
    """Not aligned, with gaps, backwards in memory, with the batch innermost."""
    flat = sequence((4 * 3 * 16 * 8 + 1,), device, torch.float16)
    compare(flat[1:].view(4, 3, 16, 8))
    compare(sequence((4, 3, 16, 9), device, torch.float32)[..., :8])
    compare(sequence((3, 4, 16, 8), device, torch.float32).transpose(0, 1))
    compare(sequence((4, 16, 8, 3), device, torch.float16).movedim(3, 1))
    compare(sequence((4, 8, 16, 3), device, torch.float16).movedim(1, 3).movedim(2, 1))
    compare(torch._neg_view(-sequence((4, 3, 16, 8), device, torch.float32)))


@each_device
def test_numbers_that_are_not(device: str) -> None:
    """A channel with a NaN or an infinity is NaN, as torch's, and no other."""
    for bad in (float("nan"), float("inf")):
        x = sequence((4, 2, 3, 5, 5), device, torch.float32)
        x[2, 1, 1, 3, 3] = bad
        own = torch.zeros(3, device=device), torch.ones(3, device=device)
        mean, invstd = batch_statistics(x, 1e-5, Running(*own, None, 0.1))
        for found in (invstd.flatten(), own[1]):
            assert found.isnan().tolist() == [False, True, False]
        assert mean.flatten().isfinite().tolist() == [True, False, True]


@pytest.mark.cuda
def test_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch's operations for numbers of other dtypes, and where there is no kernel."""
    calls: list[Any] = []
    right = statistics._moments
    monkeypatch.setattr(statistics, "_moments", lambda x: calls.append(x) or right(x))
    x = sequence((4, 2, 6, 5, 5), "cuda", torch.float16)
    batch_statistics(x, 1e-5, Running())
    assert not calls
    half = [torch.zeros(6, device="cuda", dtype=torch.float16) for _ in range(2)]
    batch_statistics(x, 1e-5, Running(*half, None, 1.0))
    torch.testing.assert_close(half[0], x.mean((0, 1, 3, 4)))
    batch_statistics(x, 1e-5, Running(), "eager")
    assert len(calls) == 2
    monkeypatch.setattr(build, "_helpers", {})

    def load_kernel(*_: object) -> None:
        raise nj.BackendError("none here")

    monkeypatch.setattr(build, "load_kernel", load_kernel)
    batch_statistics(x, 1e-5, Running())
    assert len(calls) == 3
    compare(x)


@pytest.mark.cuda
def test_captured() -> None:
    """Each replay brings the running statistics and the count on."""
    x = sequence((4, 2, 6, 5, 5), "cuda", torch.float16)
    own = [torch.zeros(6, device="cuda"), torch.ones(6, device="cuda")]
    batches = torch.tensor(0, device="cuda")
    for momentum in (0.1, None):
        running = Running(*own, batches, momentum)
        batch_statistics(x, 1e-5, running)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mean, _ = batch_statistics(x, 1e-5, running)
        own[0].zero_(), own[1].fill_(1), batches.zero_()
        norm = torch.nn.BatchNorm2d(6, momentum=momentum).cuda()
        for _ in range(3):
            x.add_(0.5)
            graph.replay()
            norm(x.float().flatten(0, 1))
        for got, want in zip((*own, batches), norm.buffers(), strict=True):
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(mean.flatten(), x.float().mean((0, 1, 3, 4)))


@pytest.mark.cuda
def test_a_storage_that_was_freed() -> None:
    x = sequence((4, 2, 6, 5, 5), "cuda", torch.float32)
    batch_statistics(x, 1e-5, Running())
    x.untyped_storage().resize_(0)
    with pytest.raises(nj.SpecError, match="x_seq has no memory of its own"):
        batch_statistics(x, 1e-5, Running())
