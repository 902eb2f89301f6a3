"""The examples run as they stand, with few epochs, and learn."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import each_device

EXAMPLES = Path(__file__).parent.parent / "examples"

NEEDED = ("sklearn", "matplotlib")  # found, not imported: that would take seconds of every run
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, NEEDED)),
        reason=f"the examples need {' and '.join(NEEDED)}: pip install -e '.[examples]'",
    ),
]


def run(script, *options, cwd, **variables):
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *options],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # torch says that of CPU builds to whoever registers operators, as SpikingJelly does
    said = [line for line in done.stderr.splitlines() if "Triton not available" not in line]
    assert not said, done.stderr
    return done.stdout


def number(pattern, text):
    found = re.search(pattern, text, re.M)
    assert found, f"no {pattern!r} in:\n{text}"
    return float(found[1])


@each_device
def test_digits(tmp_path, device):
    picture = tmp_path / "out" / "digits.png"
    options = ("--epochs", "3", "--device", device, "--out", str(picture))
    said = run("digits.py", *options, cwd=tmp_path)
    assert len(re.findall(r"^epoch +\d  loss \d\.\d+  test accuracy", said, re.M)) == 3
    assert f"target: {device} kernels on " in said
    compiled = number(r"^kernels: (\d+) compiled", said)
    loaded = number(r"compiled, (\d+) loaded from the cache", said)
    assert compiled + loaded >= 2
    assert number(r"^test accuracy: ([\d.]+)% of 382 images after 3 epochs", said) > 88
    assert number(r"^one epoch: ([\d.]+) s, eager neurons [\d.]+ s \([\d.]+ times\)", said) > 0
    assert number(r"forward and backward: ([\d.]+) ms, eager [\d.]+ ms", said) > 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 30_000


@pytest.mark.parametrize("neuron", ["plif", "izhikevich"])
def test_digits_with_other_neurons(tmp_path, neuron):
    """Few steps and one epoch: that they run; what they learn in that time is not much."""
    options = ("--epochs", "1", "--time-steps", "2", "--neuron", neuron, "--out", "digits.png")
    said = run("digits.py", *options, cwd=tmp_path)
    assert "picture: digits.png" in said and (tmp_path / "digits.png").is_file()


def test_a_custom_neuron(tmp_path):
    said = run("custom_neuron.py", "--epochs", "4", cwd=tmp_path)
    assert "theta = v_threshold + beta * a" in said
    assert "__global__" in said
    for name in ("leaky", "adaptive"):
        # one of ten is chance; 20 epochs bring 76 and 83
        assert number(rf"^{name} neurons: ([\d.]+)% of 382 test images right", said) > 40
    again = run("custom_neuron.py", "--epochs", "1", cwd=tmp_path)
    assert number(r"^kernels: 0 compiled, (\d+) loaded from the cache", again) == 4


@each_device
def test_a_training_step_in_a_graph(tmp_path, device):
    visible = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    said = run("train_graph.py", "--epochs", "3", cwd=tmp_path, **visible)
    found = [float(a) for a in re.findall(r"^test accuracy: ([\d.]+)%", said, re.M)]
    assert len(found) == (2 if device == "cuda" else 1) and min(found) > 88
    if device == "cuda":
        assert number(r"^a training step: ([\d.]+) ms, eager [\d.]+ ms", said) > 0
    else:
        assert "CUDA graphs need a GPU" in said


@each_device
@pytest.mark.peers("spikingjelly")
def test_a_spikingjelly_network_before_and_after(tmp_path, device):
    visible = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    said = run("accelerate_spikingjelly.py", "--epochs", "2", cwd=tmp_path, **visible)
    assert said.startswith("3 of 3 neurons accelerated (spikingjelly ")
    assert "sample: the same; 819,200 spikes" in said
    accuracies = [float(a) for a in re.findall(r"([\d.]+)% of the test images right", said)]
    assert len(accuracies) == 2 and min(accuracies) > 85
    assert number(r"the first three steps differ by ([\d.e+-]+)", said) < 1e-4


@each_device
@pytest.mark.peers("snntorch")
def test_a_snntorch_network_before_and_after(tmp_path, device):
    visible = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    said = run("accelerate_snntorch.py", "--epochs", "2", cwd=tmp_path, **visible)
    assert said.startswith("3 of 3 neurons accelerated (snntorch ")
    assert "sample: the same; 534,528 spikes" in said
    assert "before training, 0 of 10240 spikes of the last layer differ" in said
    accuracies = [float(a) for a in re.findall(r"([\d.]+)% of the test images right", said)]
    assert len(accuracies) == 3 and min(accuracies) > 75  # one of ten is chance
    assert number(r"the first three steps differ by ([\d.e+-]+)", said) < 1e-4
