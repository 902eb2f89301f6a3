"""CUDA: graphs, streams, threads and several GPUs. Every test needs a GPU."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from support import inputs
from torch import Tensor

import neuronjit as nj

pytestmark = pytest.mark.cuda


def lif(x: Tensor, **params: float | Tensor) -> Tensor:
    return nj.multistep(nj.neurons.LIF, x, **params).spikes


def fresh(name: str) -> nj.NeuronModel:
    """A model that no other test has: its kernels are cold."""
    return nj.NeuronModel(name, f"h = v * 0.5 + x + 0 * {abs(hash(name)) % 9973}", state={"v": 0.0})


def warmed_up(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run`, captured as torch's documentation says: after a few runs on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.fixture(autouse=True)
def usable() -> Iterator[None]:
    """The context is usable after every test."""
    gc.collect()  # what earlier tests left must not be freed within a capture
    yield
    torch.cuda.synchronize()
    assert lif(torch.full((3, 4), 1.5, device="cuda")).sum() > 0


# --- graphs --------------------------------------------------------------------------------------


def test_inference_in_a_graph() -> None:
    x, out = torch.zeros(20, 1000, device="cuda"), {}

    def run() -> None:
        with torch.no_grad():
            out["spikes"] = lif(x, tau=1.5)

    graph = warmed_up(run)
    for seed in range(3):
        x.copy_(inputs((20, 1000), seed=seed))
        graph.replay()
        assert torch.equal(out["spikes"], lif(x, tau=1.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_training_step_in_a_graph(dtype: torch.dtype) -> None:
    """Forward, backward and the optimizer's step, with checkpoints and a learned parameter."""

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layers = torch.nn.Linear(6, 8), nj.nn.LIF(learnable=("tau", "v_threshold")), nj.nn.PLIF()
        net = torch.nn.Sequential(*layers).cuda()
        return net, torch.optim.SGD(net.parameters(), lr=0.05)

    def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        nj.nn.reset_net(net)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16, enabled=dtype == torch.float16):
            loss = net(x).float().square().mean()
        loss.backward()
        optimizer.step()

    (net, optimizer), (other, plain) = make(), make()
    x = torch.zeros(20, 16, 6, device="cuda")
    before = [p.detach().clone() for p in net.parameters()]
    graph = warmed_up(lambda: step(net, optimizer, x))
    with torch.no_grad():  # the warm-up learned as well
        for p, start in zip(net.parameters(), before, strict=True):
            p.copy_(start)
    for seed in range(4):
        x.copy_(inputs((20, 16, 6), seed=seed))
        graph.replay()
        step(other, plain, x)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_make_graphed_callables() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), Stateless()).cuda()
    x = inputs((20, 4, 6)).cuda().requires_grad_()
    want = torch.autograd.grad(net(x).sum(), [x, *net.parameters()])
    graphed = torch.cuda.make_graphed_callables(net, (x.detach().clone().requires_grad_(),))
    got = torch.autograd.grad(graphed(x).sum(), [x, *net.parameters()])
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(a, b)


class Stateless(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return lif(x)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_cold_kernel_in_a_capture(direction: str) -> None:
    """An error that says what to do; then the capture ends well, and another one works."""
    model = fresh(f"cold_{direction}")
    x = inputs((20, 64)).cuda().requires_grad_(direction == "backward")
    arriving = torch.ones_like(x)
    if direction == "backward":
        nj.multistep(model, x)  # forward is warm
    kept = torch.zeros(64, device="cuda")
    torch.cuda.synchronize()

    def step() -> Tensor:
        spikes = nj.multistep(model, x).spikes
        return torch.autograd.grad(spikes, x, arriving)[0] if direction == "backward" else spikes

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept.add_(1)
        with pytest.raises(nj.MissingKernelError, match="prebuild"):
            step()
        kept.add_(1)
    graph.replay()
    assert kept.eq(2).all()

    out: dict[str, Tensor] = {}
    warmed_up(lambda: out.update(result=step())).replay()
    assert torch.equal(out["result"], step())


# --- streams and threads -------------------------------------------------------------------------


def test_side_streams() -> None:
    """A kernel waits for what its stream does before, and only for that."""
    want = {seed: lif(inputs((20, 5000), seed=seed).cuda()) for seed in range(4)}
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(5):
        got = {}
        for seed, stream in enumerate(streams):
            host = inputs((20, 5000), seed=seed).pin_memory()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)
                x = torch.zeros(20, 5000, device="cuda")
                x.copy_(host, non_blocking=True)
                got[seed] = lif(x)
        torch.cuda.synchronize()
        assert all(torch.equal(got[seed], want[seed]) for seed in got)


def test_backward_on_a_side_stream() -> None:
    x = inputs((20, 500)).cuda().requires_grad_()
    (want,) = torch.autograd.grad(lif(x).sum(), x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000)
        spikes = lif(x * 1.0)
    torch.cuda.current_stream().wait_stream(stream)
    (got,) = torch.autograd.grad(spikes.sum(), x)
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("cold", [False, True])
def test_launches_from_another_thread(cold: bool) -> None:
    """A thread that never touched CUDA: forward and backward, kernels warm or still to be made."""
    model = fresh("threads") if cold else nj.neurons.LIF
    results: dict[int, Tensor] = {}
    x = inputs((20, 100)).cuda()
    if not cold:
        nj.multistep(model, x.clone().requires_grad_()).spikes.sum().backward()

    def work(i: int) -> None:
        mine = x.clone().requires_grad_()
        nj.multistep(model, mine).spikes.sum().backward()
        torch.cuda.synchronize()
        results[i] = mine.grad

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(torch.equal(results[0], grad) for grad in results.values())


# --- memory, and the GPU never waits -------------------------------------------------------------


def test_memory_is_outputs_and_checkpoints() -> None:
    """By the allocator's own statistics, also at the peak."""

    def rounded(*counts: int) -> int:
        return sum(-(-4 * count // 512) * 512 for count in counts)

    t, n = 40, 4096
    x = inputs((t, n)).cuda().requires_grad_()
    lif(x).sum().backward()
    x.grad = None
    torch.cuda.synchronize()
    for grad, beyond in ((False, 0), (True, 2 * n + 2)):
        out = None  # the round before would be freed within the one that is measured
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(grad):
            out = nj.multistep(nj.neurons.LIF, x)
        assert torch.cuda.memory_allocated() - before == rounded(t * n, n, beyond)
        assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()
    arriving = torch.ones_like(out.spikes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (grad_x,) = torch.autograd.grad(out.spikes, x, arriving, retain_graph=True)
    assert torch.cuda.max_memory_allocated() - before == rounded(t * n)
    del grad_x
    deadline = time.monotonic() + 5  # autograd's thread may hold it for a moment longer
    while torch.cuda.memory_allocated() != before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert torch.cuda.memory_allocated() == before


def test_nothing_waits_for_the_gpu() -> None:
    x = inputs((20, 64)).cuda().requires_grad_()
    tau = torch.tensor(1.8, device="cuda", requires_grad=True)
    lif(x, tau=tau).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lif(x, tau=tau).sum().backward()
        with torch.no_grad():
            lif(x, tau=1.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- several GPUs --------------------------------------------------------------------------------

two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two
def test_any_device_whatever_the_current_one() -> None:
    want = inputs((20, 64)).cuda(0).requires_grad_()
    spikes = lif(want)
    spikes.sum().backward()
    for current in (0, 1):
        with torch.cuda.device(current):
            for name in ("cuda:1", "cuda:0"):
                x = inputs((20, 64)).to(name).requires_grad_()
                got = lif(x)
                got.sum().backward()
                assert got.device == x.device == torch.device(name)
                assert torch.equal(got.cpu(), spikes.cpu())
                assert torch.equal(x.grad.cpu(), want.grad.cpu())
            assert torch.cuda.current_device() == current


@two
def test_tensors_on_two_gpus() -> None:
    x = inputs((4, 8)).cuda(0)
    with pytest.raises(nj.SpecError, match=r"cuda:0.*cuda:1"):
        nj.multistep(nj.neurons.LIF, x, {"v": torch.zeros(8, device="cuda:1")})


@two
@pytest.mark.filterwarnings("ignore:.*(gather|scalars)")
def test_data_parallel() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), Stateless()).cuda(0)
    x = inputs((20, 8, 6)).cuda(0)
    parallel = torch.nn.DataParallel(net, [0, 1], dim=1)
    torch.testing.assert_close(parallel(x), net(x))
