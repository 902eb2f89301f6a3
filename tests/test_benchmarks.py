"""Benchmarks at reduced sizes: they run, and compare what gives the same answers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "networks.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.peers("spikingjelly"),
    pytest.mark.skipif(not SCRIPT.is_file(), reason="needs a clone: benchmarks are not packed"),
]


def run(*options: str, script: Path = SCRIPT) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_networks(tmp_path: Path) -> None:
    done = run("--small", "--only", "MLP,CIFAR10Net", "--seconds", "300", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "networks.json").read_text())
    rows = {(r["network"], r["dtype"], r["whose"]): r for r in found["rows"]}
    for name in ("MLP", "CIFAR10Net"):
        for dtype in ("float32", "bfloat16"):
            for whose in ("spikingjelly", "neuronjit", "none"):
                assert rows[name, dtype, whose]["ms"] > 0
        losses = rows[name, "float32", "neuronjit"]["losses"]
        assert losses == pytest.approx(rows[name, "float32", "spikingjelly"]["losses"], rel=1e-3)
        assert len({round(loss, 4) for loss in losses}) == 3  # it learns, so it can differ
    text = (tmp_path / "networks.md").read_text()
    assert "| CIFAR10Net, float32 NCHW |" in text and "failed" not in text
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "networks.png").read_bytes().startswith(b"\x89PNG")


def test_packed_spikes(tmp_path: Path) -> None:
    done = run("--small", "--out", str(tmp_path), script=SCRIPT.with_name("packed.py"))
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "packed.json").read_text()).values()
    assert not found["notes"]
    for name in ("SEW-ResNet-18", "CIFAR10Net"):
        rows = {row["whose"]: row for row in found["rows"] if row["network"] == name}
        for row in rows.values():
            assert row["losses"] == pytest.approx(rows["spikingjelly"]["losses"], rel=1e-3)
        peaks = [rows[w]["peak_MB"] for w in ("spikingjelly", "neuronjit", "packed")]
        assert sorted(peaks, reverse=True) == peaks
        assert rows["fused, packed"]["peak_MB"] < rows["packed"]["peak_MB"]


@pytest.mark.peers("snntorch")
def test_networks_of_other_libraries(tmp_path: Path) -> None:
    only = "speech (snnTorch),MLP (Norse)"
    done = run("--small", "--only", only, "--seconds", "300", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "networks.json").read_text())
    losses = {
        (r["network"], r["whose"]): r["losses"] for r in found["rows"] if r["dtype"] == "float32"
    }
    compared = [("speech (snnTorch)", "snntorch", whose) for whose in ("stepped", "neuronjit")]
    if importlib.util.find_spec("norse"):
        compared.append(("MLP (Norse)", "norse", "neuronjit"))
    else:
        assert "MLP (Norse) left out: norse is not installed" in found["notes"]
    for name, theirs, ours in compared:
        assert losses[name, ours] == pytest.approx(losses[name, theirs], rel=1e-3)
        assert len({round(loss, 4) for loss in losses[name, ours]}) == 3
        assert losses[name, "none"] != pytest.approx(losses[name, theirs], rel=1e-3)
    assert "failed" not in (tmp_path / "networks.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--small"),
        (("--small", "--modes", "graph"), "modes of CUDA devices"),
        (("--small", "--modes", "egaer"), "unknown: egaer. Known: eager"),
        (("--small", "--only", "VGG"), "unknown: VGG. Known: SEW-ResNet-18"),
    ],
)
def test_what_cannot_be_measured_is_a_clear_error(options: tuple[str, ...], said: str) -> None:
    done = run(*options)
    assert done.returncode == 2 and said in done.stderr, done.stderr
