"""Loops over lanes of the CPU kernels become vector instructions: g++ reports which did.

A loop that stays scalar gives the right numbers at a tenth of the speed, so nothing else tells.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from neuronjit import surrogates
from neuronjit.kernels import render
from neuronjit.kernels.spec import KernelSpec
from neuronjit.kernels.targets import cpu

# functions that compilers have as scalar calls only: their loops stay scalar
SCALAR = {"QPseudoSpike", "Tanh", "SquarewaveFourierSeries"}
STEPS = {  # what loops over lanes call, in templates/walk.h
    "forward": ("M::step(p, in, z, out, l)",),
    "backward": ("M::step(p, in, z, none, l)", "M::step_back(p, in, before[k], d, some, out, l)"),
}
SURROGATES = sorted({s.name for s in surrogates._BUILT_IN.values()} - SCALAR)
KERNELS = [
    *[("lif", "backward", "float32", surrogate, {}) for surrogate in SURROGATES],
    *[
        (model, direction, "float32", "Sigmoid", {})
        for model in ("if", "plif", "qif", "eif", "izhikevich")
        for direction in ("forward", "backward")
    ],
    ("izhikevich", "backward", "float16", "Sigmoid", {}),
    ("lif", "backward", "bfloat16", "ATan", dict(arriving=("s", "v", "h"))),
    ("lif", "backward", "float64", "ATan", dict(learned=("tau", "v_threshold"))),
    ("lif", "forward", "bfloat16", "ATan", dict(record=("v", "h"), per_neuron=("tau",))),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "-".join(map(str, k[:4])))
def test_loops_over_lanes_vectorize(tmp_path: Path, kernel: tuple) -> None:
    command = cpu.compiler()
    if "clang" in Path(command[0]).name:
        pytest.skip(f"needs g++ for its report; CXX is {command[0]}")
    model, direction, dtype, surrogate, options = kernel
    spec = KernelSpec.of(
        model, "cpu", direction, surrogate, "hard", False, dtype,
        interval=16, lanes=cpu.LANES, **options,
    )  # fmt: skip
    text = render.render_specs([spec])
    path = tmp_path / "kernel.cpp"
    path.write_text(text)
    march = ["-march=x86-64-v3"] if cpu.arch(0).startswith("x86-64") else []
    report = subprocess.run(
        [*command, *cpu.FLAGS, *march, "-fopt-info-vec", "-o", str(tmp_path / "out"), str(path)],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    vectorized = {int(n) for n in re.findall(r":(\d+):\d+: optimized: loop vectorized", report)}
    for step in STEPS[direction]:
        before, _, _ = text.partition(step)
        loop = before.rpartition("FOR_LANES_")[0].count("\n") + 1
        assert loop in vectorized, f"{step}: {report}"
