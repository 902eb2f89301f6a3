"""Layers with state in CUDA graphs: replays do what the same calls do, or an error says why not."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import inputs
from torch import Tensor

import neuronjit as nj

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:.*(TF32|deprecated|isinstance_treespec|online softmax)"),
]


def captured(step: Callable[[], Any], warm: int = 2) -> torch.cuda.CUDAGraph:
    """A graph of one step, after a few on a side stream, as PyTorch wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def network(step_mode: str = "m") -> torch.nn.Module:
    torch.manual_seed(0)
    lif = nj.nn.LIF(tau=3.0, learnable=("tau",), step_mode=step_mode, v_threshold=0.3)
    izhikevich = nj.nn.Izhikevich(a=0.2, b=0.1, step_mode=step_mode, v_threshold=0.3)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 32), lif, torch.nn.Linear(32, 8), izhikevich
    ).cuda()


def test_inference_goes_on_from_the_last_replay() -> None:
    net = network().eval()
    other, x, out = copy.deepcopy(net), torch.zeros(5, 4, 6, device="cuda"), {}
    data = [inputs((5, 4, 6), seed=i).cuda() for i in range(6)]

    def step() -> None:
        out["y"] = net(x)

    with torch.no_grad():
        x.copy_(data[0])
        graph = captured(step, warm=1)
        other(data[0])
        for turn in range(2):
            for batch in data[1:4]:
                x.copy_(batch)
                graph.replay()
                assert torch.equal(out["y"], other(batch))
                assert torch.equal(net[1].v, other[1].v)
            nj.nn.reset_net(net), nj.nn.reset_net(other)  # in between: the next replay starts anew
            if turn:
                continue
            x.copy_(data[5])
            graph.replay()
            assert torch.equal(out["y"], other(data[5]))
            # an eager call in between goes on from the replay, and the next replay from that
            assert torch.equal(net(data[2]), other(data[2]))
            x.copy_(data[4])
            graph.replay()
            assert torch.equal(out["y"], other(data[4]))
            net(data[3][:, :2]), other(data[3][:, :2])  # of another shape: as without a graph
            nj.nn.reset_net(net), nj.nn.reset_net(other)


def test_what_is_assigned_between_replays_is_where_the_next_one_starts() -> None:
    net, x, out = network().eval(), torch.zeros(5, 4, 6, device="cuda"), {}
    other, x_other = copy.deepcopy(net), inputs((5, 4, 6)).cuda()

    def step() -> None:
        out["y"] = net(x)

    with torch.no_grad():
        graph = captured(step, warm=1)
        x.copy_(x_other)
        start = torch.rand(4, 32, device="cuda")
        for value in (start, 0.25, torch.tensor(0.5, device="cuda").expand(4, 32), None):
            nj.nn.reset_net(net), nj.nn.reset_net(other)
            net[1].v = value
            if value is not None:
                other[1].v = value if isinstance(value, Tensor) else torch.full_like(start, value)
            graph.replay()
            assert torch.equal(out["y"], other(x_other))
            assert torch.equal(net[1].v, other[1].v)


def step_of(net: torch.nn.Module, x: Tensor, prepare: Callable[[], None]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

    def step() -> None:
        prepare()
        optimizer.zero_grad(set_to_none=True)
        y = net(x) if net[1].step_mode == "m" else torch.stack([net(x_t) for x_t in x])
        y.float().square().mean().backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("carried", [False, True], ids=["reset", "carried"])
def test_training_steps(carried: bool, step_mode: str) -> None:
    """Reset or detached within the step: replays train as eager steps do."""
    nets = [network(step_mode) for _ in range(2)]
    x = torch.zeros(20, 4, 6, device="cuda")
    prepare = nj.nn.detach_net if carried else nj.nn.reset_net
    steps = [step_of(net, x, lambda net=net: prepare(net)) for net in nets]
    x.copy_(inputs((20, 4, 6)))
    for _ in range(2):
        steps[1]()
    graph = captured(steps[0])
    for seed in range(5):
        x.copy_(inputs((20, 4, 6), seed=seed))
        graph.replay()
        steps[1]()
        assert torch.equal(nets[0][1].v, nets[1][1].v)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_capture_that_would_always_start_anew_is_an_error() -> None:
    net, x = network(), inputs((5, 4, 6)).cuda()
    with torch.no_grad():
        net(x)
        nj.nn.reset_net(net)  # outside: replays would not do it again
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = net[0](x)
            with pytest.raises(nj.SpecError, match="reset_net"):
                net[1](first)
        assert torch.isfinite(net(x)).all()  # nothing is lost
        with (
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            pytest.raises(nj.SpecError, match="captured"),
        ):
            net[1].v = torch.zeros(4, 32, device="cuda")


def test_make_graphed_callables() -> None:
    """A module that resets its net first, as each of its replays does then."""

    class Anew(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            nj.nn.reset_net(self.net)
            return self.net(x)

    net = Anew()
    other = copy.deepcopy(net)
    graphed = torch.cuda.make_graphed_callables(net, (inputs((20, 4, 6)).cuda(),))
    for seed in range(4):
        x = inputs((20, 4, 6), seed=seed).cuda()
        grads = []
        for run, owner in ((graphed, net), (other, other)):
            owner.zero_grad()
            y = run(x)
            y.square().mean().backward()
            grads.append([y.detach().clone(), *[p.grad.clone() for p in owner.parameters()]])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_make_graphed_callables_of_a_part_among_eager_layers() -> None:
    """The usual way: one block of a network is captured, the rest stays eager."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.dense, self.norm = torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16)
            self.lif = nj.nn.LIF(learnable="v_threshold", detach_reset=True)

        def forward(self, x: Tensor) -> Tensor:
            self.lif.reset()
            y = self.norm(self.dense(x).flatten(0, 1)).unflatten(0, x.shape[:2])
            return self.lif(y)

    torch.manual_seed(0)
    nets = [
        torch.nn.Sequential(torch.nn.Linear(6, 8), Block(), torch.nn.Linear(16, 3)).cuda()
        for _ in range(2)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    sample = torch.zeros(5, 4, 8, device="cuda", requires_grad=True)
    nets[0][1] = torch.cuda.make_graphed_callables(nets[0][1], (sample,))
    for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        a.copy_(b)  # warming up has moved the running statistics
    losses = []
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        losses.append([])
        for seed in range(5):
            optimizer.zero_grad()
            loss = net(inputs((5, 4, 6), seed=seed).cuda()).mean(0).square().sum()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[1][0] != losses[1][-1]
    for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_amp_with_a_grad_scaler(dtype: torch.dtype) -> None:
    """The whole step with autocast, scaling, unscaling and the scale's update in one graph."""
    nets = [network() for _ in range(2)]
    x, y = torch.zeros(20, 4, 6, device="cuda"), torch.tensor([1, 0, 3, 2], device="cuda")

    def step_with(net: torch.nn.Module) -> tuple[Callable[[], Tensor], torch.amp.GradScaler]:
        # capturable: Adam skips a step of infinite gradients without asking the host
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, capturable=True, fused=True)
        scaler = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=3)

        def step() -> Tensor:
            nj.nn.reset_net(net)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype):
                out = net(x).float().mean(0)
            loss = torch.nn.functional.cross_entropy(out, y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss.detach()

        return step, scaler

    (step, scaler), (other, other_scaler) = (step_with(net) for net in nets)
    x.copy_(inputs((20, 4, 6)))
    for _ in range(2):
        other()
    kept = {}
    graph = captured(lambda: kept.update(loss=step()))
    losses: tuple[list[float], list[float]] = ([], [])
    for seed in range(8):
        x.copy_(inputs((20, 4, 6), seed=seed))
        graph.replay()
        losses[0].append(kept["loss"].item())
        losses[1].append(other().item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert scaler.get_scale() == other_scaler.get_scale() != 256.0  # it grew in replays, too


# as PyTorch's notes on CUDA semantics ask, "Usage with DistributedDataParallel"
DDP = """
import copy, os, sys
import torch, torch.distributed as dist
import neuronjit as nj

os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
torch.cuda.set_device(0)
dist.init_process_group("nccl", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
torch.manual_seed(0)
net = torch.nn.Sequential(
    torch.nn.Linear(6, 32), nj.nn.LIF(tau=3.0, learnable="tau", v_threshold=0.3),
    torch.nn.Linear(32, 8), nj.nn.PLIF(v_threshold=0.3),
).cuda()
plain, x = copy.deepcopy(net), torch.zeros(20, 4, 6, device="cuda")
batches = [torch.rand(20, 4, 6, device="cuda") * 3 - 0.5 for _ in range(5)]

def step_of(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    def step():
        nj.nn.reset_net(net)
        optimizer.zero_grad(set_to_none=True)
        (net(x) - 0.5).square().mean().backward()
        optimizer.step()
    return step

stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
x.copy_(batches[0])
torch.cuda.synchronize()
with torch.cuda.stream(stream):
    step = step_of(torch.nn.parallel.DistributedDataParallel(net, device_ids=[0]))
    for _ in range(11):
        step()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, stream=stream):
    step()
other, before = step_of(plain), [p.detach().clone() for p in net.parameters()]
for _ in range(11):
    other()
for batch in batches:
    x.copy_(batch)
    graph.replay()
    other()
torch.cuda.synchronize()
for p, q, start in zip(net.parameters(), plain.parameters(), before, strict=True):
    assert not torch.equal(p, start)  # the replays train
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
del graph
dist.destroy_process_group()
"""


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_nccl_available(),
    reason="only NCCL's collectives can be captured",
)
def test_ddp_in_a_captured_step(tmp_path: Path) -> None:
    """One process, with NCCL: the gradients' all-reduce is in the graph with all else."""
    path = [str(Path(nj.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", DDP, str(tmp_path / "store")], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_reduce_overhead_of_a_network_that_is_reset_inside() -> None:
    """mode="reduce-overhead": losses of the eager network, at two batch sizes, batch norm too."""
    torch._dynamo.reset()

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nj.nn.EachStep(torch.nn.Conv2d(2, 6, 3), torch.nn.BatchNorm2d(6))
            self.lif = nj.nn.LIF(learnable="v_threshold", channels=6)
            self.last = torch.nn.Linear(6 * 16, 5)

        def forward(self, x: Tensor) -> Tensor:
            nj.nn.reset_net(self)
            return self.last(self.lif(self.first(x)).flatten(2)).mean(0)

    eager = Net().cuda()
    fast = copy.deepcopy(eager)
    runs = ((eager, eager), (fast, torch.compile(fast, mode="reduce-overhead", fullgraph=True)))
    found: list[list[float]] = []
    for net, run in runs:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        found.append([])
        for seed, count in enumerate((4, 4, 4, 4, 8, 8, 4, 8)):
            torch.compiler.cudagraph_mark_step_begin()
            y = torch.arange(count, device="cuda") % 5
            optimizer.zero_grad(set_to_none=True)
            out = run(inputs((5, count, 2, 6, 6), seed=seed).cuda())
            loss = torch.nn.functional.cross_entropy(out, y)
            loss.backward()
            optimizer.step()
            found[-1].append(loss.item())
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert found[1] == pytest.approx(found[0], rel=0.05)
    torch._dynamo.reset()
