"""The peers' own networks with our layers under torch.compile: they compile, and train alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from networks import NETWORKS, batches, train
from support import each_device

pytestmark = [
    pytest.mark.peers("spikingjelly", "torchvision"),  # its models import that
    pytest.mark.filterwarnings("ignore:.*(TF32|deprecated|isinstance_treespec|online softmax)"),
]


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    cache = tmp_path_factory.getbasetemp() / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))


def compare(
    name: str, device: str, mode: str | None, *, carry: bool, amp: torch.dtype | None = None,
    channels_last: bool = False, first: float = 0.02, later: float = 0.2, **options: Any,
) -> None:  # fmt: skip
    """Losses of four steps, compiled beside eager, within relative tolerances.

    Inductor rounds batch norm otherwise, so that potentials near the threshold fall on the other
    side: that moves the first loss by 0.4 % (SEW-ResNet-18), and later ones by what is learned.
    """
    make, size = NETWORKS[name]
    eager = make().to(device)
    if channels_last:
        eager = eager.to(memory_format=torch.channels_last)
    fast = copy.deepcopy(eager)
    data = batches(4, device, size)
    if channels_last:
        data = [
            (x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2)), y)
            for x, y in data
        ]
    want = train(eager, eager, data, carry=carry, amp=amp)
    compiled = torch.compile(fast, mode=mode, **options)
    got = train(fast, compiled, data, carry=carry, amp=amp)
    assert all(loss == loss and 0 < loss < 20 for loss in got)
    assert got[0] == pytest.approx(want[0], rel=first), (got, want)
    assert got == pytest.approx(want, rel=later), (got, want)


@each_device
@pytest.mark.slow
@pytest.mark.parametrize("carry", [False, True], ids=["reset", "carried"])
@pytest.mark.parametrize("name", NETWORKS)
def test_traced_and_differentiated(name: str, carry: bool, device: str) -> None:
    """By aot_eager, which leaves every operation as it is: the very losses."""
    # on a GPU, convolutions add up in another order each time
    exact = dict(first=1e-5, later=0.2 if device == "cuda" else 1e-3)
    compare(name, device, None, carry=carry, backend="aot_eager", **exact)


@each_device
@pytest.mark.slow
@pytest.mark.parametrize("carry", [False, True], ids=["reset", "carried"])
@pytest.mark.parametrize("name", NETWORKS)
def test_default_mode(name: str, carry: bool, device: str) -> None:
    compare(name, device, "default", carry=carry)


@pytest.mark.cuda
@pytest.mark.parametrize("carry", [False, True], ids=["reset", "carried"])
@pytest.mark.parametrize("name", NETWORKS)
def test_reduce_overhead(name: str, carry: bool) -> None:
    compare(name, "cuda", "reduce-overhead", carry=carry)


@each_device
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_amp_and_channels_last(mode: str, device: str) -> None:
    amp = torch.float16 if device == "cuda" else torch.bfloat16
    compare("sew_resnet18", device, mode, carry=False, amp=amp, channels_last=True)
