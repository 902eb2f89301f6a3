"""Networks under torch.compile: SpikingJelly's own, with our layers or accelerated, and ours.

They compile without a graph break, train as they do in eager mode, and a new batch size makes no
more graphs than it does of the same network without neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import (
    NETWORKS,
    batches,
    cifar10net,
    convolutional,
    mlp,
    normed_mlp,
    sew_resnet,
    spikformer,
    spikingjelly,
    train,
    without_neurons,
)
from support import Counted, each_device

import neuronjit as nj
from neuronjit.nn import batch_norm

pytestmark = [
    pytest.mark.peers("spikingjelly"),
    pytest.mark.filterwarnings("ignore:.*(TF32|deprecated|isinstance_treespec|online softmax)"),
]


@pytest.fixture(autouse=True)
def fresh(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    cache = tmp_path_factory.getbasetemp() / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))


def compare(
    name: str, device: str, mode: str | None, *, carry: bool, amp: torch.dtype | None = None,
    channels_last: bool = False, dtype: torch.dtype = torch.float32, first: float = 0.02,
    later: float = 0.2, **options: Any,
) -> None:  # fmt: skip
    """Losses of four steps, compiled beside eager, within relative tolerances.

    Inductor rounds batch norm otherwise, so that in float32 potentials near the threshold fall on
    the other side: that moves the first loss by a percent, and later ones by what is learned.
    """
    make, size = NETWORKS[name]
    eager = make().to(device, dtype)
    if channels_last:
        eager = eager.to(memory_format=torch.channels_last)
    fast = copy.deepcopy(eager)
    data = [(x.to(dtype), y) for x, y in batches(4, device, size)]
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
@pytest.mark.parametrize("name", NETWORKS)
def test_default_mode(name: str, device: str) -> None:
    """With the state carried; `test_inductor_trains_as_eager_steps_do` resets it."""
    exact = dict(dtype=torch.float64, first=1e-6, later=1e-6)
    compare(name, device, "default", carry=True, **exact)


@pytest.mark.cuda
@pytest.mark.parametrize("carry", [False, True], ids=["reset", "carried"])
@pytest.mark.parametrize("name", NETWORKS)
def test_reduce_overhead(name: str, carry: bool) -> None:
    compare(name, "cuda", "reduce-overhead", carry=carry)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "device"),
    [
        ("default", "cpu"),
        pytest.param("default", "cuda", marks=pytest.mark.cuda),
        pytest.param("reduce-overhead", "cuda", marks=pytest.mark.cuda),
    ],
)
def test_amp_and_channels_last(mode: str, device: str) -> None:
    amp = torch.float16 if device == "cuda" else torch.bfloat16
    compare("sew_resnet", device, mode, carry=False, amp=amp, channels_last=True, first=0.05)


# --- accelerated, and of our own layers: any batch size -------------------------------------------


def accelerated(make: Callable[[Any], torch.nn.Module]) -> torch.nn.Module:
    """A network of SpikingJelly's nodes, which run on our kernels."""
    _, neuron, _ = spikingjelly()
    net = make(neuron)
    assert nj.accelerate(net, strict=True).accelerated
    return net


SIZES = (2, 3, 5, 7, 4, 2, 9)


def any_batch_size(
    net: torch.nn.Module, size: int, device: str, allowed: int | None = None, **options: Any
) -> None:
    """Train compiled and eager by batches of several sizes: the same losses, and few graphs.

    As many are allowed as the network makes without neurons: convolutions on a CPU ask for some.
    """
    net = net.to(device)
    data = batches(len(SIZES), device, size, SIZES)

    def compiled(net: torch.nn.Module) -> tuple[list[float], int]:
        torch._dynamo.reset()
        with Counted() as counted:
            losses = train(net, torch.compile(net, fullgraph=True, **options), data)
        return losses, counted.graphs

    got, graphs = compiled(copy.deepcopy(net))
    if allowed is None:
        _, allowed = compiled(without_neurons(copy.deepcopy(net)))
    want = train(net, net, data)
    assert len({round(loss, 4) for loss in want}) == len(want)  # it learns, so it can differ
    # on a GPU, convolutions add up in another order each time
    assert got == pytest.approx(want, rel=0.2 if device == "cuda" else 1e-4), (got, want)
    assert got[0] == pytest.approx(want[0], rel=0.02 if device == "cuda" else 1e-4)
    assert graphs <= allowed, f"{graphs} graphs, {allowed} without neurons"


@each_device
def test_dense_layers_of_any_batch_size(device: str) -> None:
    """Two graphs: of the first size, and of all others."""
    any_batch_size(accelerated(mlp), 8, device, allowed=2, backend="aot_eager")


@each_device
@pytest.mark.slow
def test_our_own_layers_of_any_batch_size(device: str) -> None:
    any_batch_size(mlp(), 8, device, allowed=2, backend="aot_eager")
    any_batch_size(convolutional(), 8, device, backend="aot_eager")
    net = convolutional().to(device)
    assert nj.nn.fuse(net) == 1
    twin = copy.deepcopy(net)
    fast = torch.compile(twin, fullgraph=True, backend="aot_eager")
    data = batches(5, device, 8, SIZES)
    assert train(twin, fast, data) == pytest.approx(train(net, net, data), rel=1e-3)


@each_device
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "size"),
    [(cifar10net, 32), (sew_resnet, 64), (spikformer, 32)],
    ids=["cifar10net", "sew_resnet", "spikformer"],
)
def test_accelerated_networks_of_any_batch_size(make: Any, size: int, device: str) -> None:
    any_batch_size(accelerated(make), size, device, backend="aot_eager")


@each_device
@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True], ids=["accelerated", "our layers"])
def test_states_are_carried_through_batch_sizes(ours: bool, device: str) -> None:
    """Cut by detach_net between steps; another batch size starts anew, compiled as eager."""
    old = torch.__version__.startswith("2.6.")  # docs/graphs.md says what it needs
    static = torch._dynamo.config.patch(force_nn_module_property_static_shapes=not old)
    net = (mlp() if ours else accelerated(mlp)).to(device)
    twin, third = copy.deepcopy(net), copy.deepcopy(net)
    sizes = (2, 2, 3, 3, 3, 5, 5, 4, 2)
    data = batches(len(sizes), device, 8, sizes)
    with Counted() as counted, static:
        fast = torch.compile(twin, fullgraph=True, backend="aot_eager")
        got = train(twin, fast, data, carry=True)
    want = train(net, net, data, carry=True)
    assert got == pytest.approx(want, rel=1e-3)
    anew = train(third, third, data)
    assert got[1] != pytest.approx(anew[1], rel=1e-3)  # it does go on
    assert counted.graphs <= 5


@each_device
@pytest.mark.slow
def test_inductor_and_batch_sizes(device: str) -> None:
    """The default backend: also where batch norm is rounded otherwise, no graph more."""
    any_batch_size(accelerated(mlp), 8, device, allowed=2)


SMALL: dict[str, tuple[Callable[[Any], torch.nn.Module], int]] = {
    "mlp": (mlp, 8),
    "normed_mlp": (normed_mlp, 8),
    "sew_resnet": (sew_resnet, 64),
    "spikformer": (partial(spikformer, size=16, depths=1), 16),
}
FUSED = ["normed_mlp", "sew_resnet", "spikformer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fuse", "kept"),
    [
        *((name, False, False) for name in SMALL),
        ("normed_mlp", True, False),  # in a graph on a CPU, batch norm and neuron are two again
        *((name, True, True) for name in FUSED),
    ],
)
def test_inductor_trains_as_eager_steps_do(
    name: str, fuse: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one batch size, at another, at the first again: losses, and what the last step learns.

    In float64, where Inductor's order of sums moves no potential over its threshold.
    """
    if kept:  # as on a GPU
        monkeypatch.setattr(batch_norm, "_pays", lambda x: True)
    make, size = SMALL[name]
    _, neuron, _ = spikingjelly()
    net = make(neuron).double()
    report = nj.accelerate(net, strict=True, fuse=fuse)
    assert any(layer.norm for layer in report.layers) == fuse
    twin = copy.deepcopy(net)
    data = [(x.double(), y) for x, y in batches(6, "cpu", size, (2, 2, 3, 3, 2, 2))]
    want = train(net, net, data)
    got = train(twin, torch.compile(twin, fullgraph=True), data)
    assert len({round(loss, 4) for loss in want}) == len(want)  # it learns, so it can differ
    assert got == pytest.approx(want, rel=1e-9)
    for (parameter, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        atol = 1e-9 * float(p.grad.abs().max() + 1)
        assert torch.allclose(q.grad, p.grad, rtol=1e-6, atol=atol), parameter


@pytest.mark.cuda
def test_reduce_overhead_and_batch_sizes() -> None:
    """A CUDA graph for each batch size, of no more graphs of Dynamo's than without neurons."""
    any_batch_size(accelerated(mlp), 8, "cuda", allowed=2, mode="reduce-overhead")
    any_batch_size(mlp(), 8, "cuda", allowed=2, mode="reduce-overhead")
