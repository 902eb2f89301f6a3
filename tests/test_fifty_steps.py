"""Fifty steps of training: whatever way a network runs, its losses are those of plain PyTorch.

Equal losses to rounding can be asked for because everything is float64. A way that rounds
otherwise moves potentials by about 1e-15, and only a potential that near to the threshold then
fires in one way and not in the other: of the million potentials here, none is to be expected. In
float32, with 1e-7 instead, some would be, and a spike more or less moves all later losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import oracle
import pytest
import torch
from support import Counted, each_device
from torch import Tensor, nn
from torch.nn import functional as F

import neuronjit as nj
from neuronjit.nn import batch_norm
from neuronjit.run import packed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*(TF32|deprecated|isinstance_treespec)"),
]
STEPS = 50
T, N = 4, 6


class Plain(nn.Module):
    """The oracle's LIF: steps in PyTorch, differentiated by autograd."""

    def forward(self, x: Tensor) -> Tensor:
        return oracle.run("LIF", x, surrogate=oracle.Surrogate("ATan")).spikes


def normed(before: int) -> nn.Module:
    norm = nn.BatchNorm2d(8)
    nn.init.constant_(norm.weight, 2.0)  # at 1, few neurons would fire
    return nj.nn.EachStep(nn.Conv2d(before, 8, 3, padding=1, bias=False), norm)


class Block(nn.Module):
    """Of SEW-ResNet: the spikes that went in are added to those that come out."""

    def __init__(self, neuron: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.first_neuron = normed(8), neuron()
        self.second, self.second_neuron = normed(8), neuron()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first_neuron(self.first(x))
        return self.second_neuron(self.second(inner)) + x


def network(neuron: Callable[[], nn.Module] = nj.nn.LIF) -> nn.Module:
    torch.manual_seed(0)
    last = nj.nn.EachStep(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 5))
    return nn.Sequential(normed(3), neuron(), Block(neuron), last).double()


@cache
def batches() -> list[tuple[Tensor, Tensor]]:
    """Five, which come again and again, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((5, T, N, 3, 8, 8), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (5, N), generator=generator)
    return list(zip(images, labels, strict=True))


def stream(device: str) -> Iterator[tuple[Tensor, Tensor]]:
    for turn in range(STEPS):
        x, y = batches()[turn % 5]
        yield x.to(device), y.to(device)


def step_of(
    net: nn.Module, run: Callable[[Tensor], Tensor], context: Callable[[], Any] = nullcontext
) -> Callable[[Tensor, Tensor], Tensor]:
    """One step of SGD, which returns its loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.4)

    def step(x: Tensor, y: Tensor) -> Tensor:
        nj.nn.reset_net(net)
        optimizer.zero_grad(set_to_none=True)
        with context():
            loss = F.cross_entropy(run(x).mean(0), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@cache
def wanted() -> list[float]:
    net = network(Plain)
    step = step_of(net, net)
    losses = [step(x, y).item() for x, y in stream("cpu")]
    assert losses[-1] < losses[0] / 2  # it learns
    return losses


def assert_same_way(losses: list[float]) -> None:
    assert losses == pytest.approx(wanted(), rel=1e-9)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the spikes that were kept as bits."""
    sizes: list[int] = []
    bits_of = packed._bits_of

    def watched(x: Tensor, *rest: Any) -> Any:
        sizes.append(x.numel())
        return bits_of(x, *rest)

    monkeypatch.setattr(packed, "_bits_of", watched)
    return sizes


def prepared(fused: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    net = network().to(device)
    if fused:
        monkeypatch.setattr(batch_norm, "_pays", lambda x: True)  # small ones on a GPU too
        assert nj.nn.fuse(net) == 3
    return net


def context_of(packs: bool) -> Callable[[], AbstractContextManager[Any]]:
    return nj.packed_spikes if packs else nullcontext


each_way = pytest.mark.parametrize(
    ("fused", "packs"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["eager", "fused", "packed", "fused and packed"],
)


@each_device
@each_way
def test_eager(
    fused: bool, packs: bool, device: str, packings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = prepared(fused, device, monkeypatch)
    step = step_of(net, net, context_of(packs))
    assert_same_way([step(x, y).item() for x, y in stream(device)])
    assert bool(packings) == packs


@each_device
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(
    backend: str, fused: bool, device: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    net = prepared(fused, device, monkeypatch)
    with Counted() as counted:
        step = step_of(net, torch.compile(net, fullgraph=True, backend=backend))
        assert_same_way([step(x, y).item() for x, y in stream(device)])
    assert counted.graphs == 1


@pytest.mark.cuda
@each_way
def test_captured(
    fused: bool, packs: bool, packings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole step as one CUDA graph, replayed for each batch."""
    net = prepared(fused, "cuda", monkeypatch)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = (t.clone() for t in next(stream("cuda")))
    step = step_of(net, net, context_of(packs))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x, y)
    net.load_state_dict(start)  # as before the steps that warmed up
    losses = []
    for images, labels in stream("cuda"):
        x.copy_(images)
        y.copy_(labels)
        graph.replay()
        losses.append(loss.item())
    assert_same_way(losses)
    assert bool(packings) == packs
