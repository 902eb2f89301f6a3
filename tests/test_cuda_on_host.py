"""The CUDA kernels' ways through steps and lanes, run without a GPU against the oracle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support import slow

# steps on both sides of every group that is loaded or recomputed together
STEPS = (0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 50, 100)


@pytest.mark.parametrize(
    ("model", "dtype", "steps"),
    [
        ("LIF", "float32", (0, 1, 5, 17)),
        ("IZHIKEVICH", "float16", (17,)),
        slow("LIF", "float32", STEPS),
        slow("IZHIKEVICH", "float16", (4, 17, 50)),
        slow("IZHIKEVICH", "float32", STEPS),
        slow("LIF", "float16", STEPS),
        slow("LIF", "bfloat16", (4, 17, 50)),
        slow("LIF", "float64", (4, 17, 50)),
        slow("PLIF", "float32", (4, 17, 50)),
        slow("EIF", "float32", (4, 17, 50)),
        slow("synaptic", "float32", (4, 17, 50)),
        slow("alpha", "float32", (4, 17, 50)),
    ],
)
def test_the_oracle_agrees(model: str, dtype: str, steps: tuple[int, ...]) -> None:
    script = Path(__file__).with_name("cuda_on_host.py")
    command = [sys.executable, script, model, dtype, *map(str, steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("right\n")


@pytest.mark.parametrize("dtype", ["float32", slow("float64")])
def test_quotients_are_those_of_plain_divisions(dtype: str) -> None:
    """By infinite, huge, subnormal and zero divisors too, forward and backward."""
    test_the_oracle_agrees("quotients", dtype, ())


@pytest.mark.parametrize(
    "dtype", ["float16", slow("float32"), slow("bfloat16"), slow("float64")]
)  # fmt: skip
def test_helpers(dtype: str) -> None:
    """Bits against whole numbers of Python, statistics against torch's batch norm in float64."""
    test_the_oracle_agrees("helpers", dtype, ())
