"""What only a GPU shows: graphs, streams, threads, several devices."""

from __future__ import annotations

import threading

import pytest
import torch

import neuronjit as nj

pytestmark = pytest.mark.cuda


def training_step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    spikes = nj.multistep(nj.neurons.LIF, x, tau=2.0).spikes
    (grad,) = torch.autograd.grad(spikes.sum(), x)
    return spikes, grad


def data(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").requires_grad_()


def capture(work, x: torch.Tensor) -> torch.cuda.CUDAGraph:  # type: ignore[no-untyped-def]
    """A graph of `work(x)`, which is run before as the rules of capture want."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.outputs = work(x)  # type: ignore[attr-defined]
    return graph


@pytest.mark.parametrize("steps", [4, 40])
def test_a_training_step_in_a_graph(steps: int) -> None:
    x = data(steps, 515)
    graph = capture(training_step, x)
    for _ in range(3):
        fresh = torch.randn_like(x)
        with torch.no_grad():
            x.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        want = training_step(fresh.requires_grad_())
        for ours, theirs in zip(graph.outputs, want, strict=True):  # type: ignore[attr-defined]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_inference_in_a_graph() -> None:
    x = torch.randn(8, 256, device="cuda")
    graph = capture(lambda x: nj.multistep(nj.neurons.IZHIKEVICH, x).spikes, x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    want = nj.multistep(nj.neurons.IZHIKEVICH, x.clone()).spikes
    assert torch.equal(graph.outputs, want)  # type: ignore[attr-defined]


def test_a_cold_kernel_in_a_capture_is_an_error_that_spoils_nothing() -> None:
    cold = nj.NeuronModel("cold", "h = v + 0.25 * x", state={"v": 0.0})
    x = torch.randn(4, 128, device="cuda")
    said = None
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        y = x * 2
        try:
            nj.multistep(cold, x)
        except nj.MissingKernelError as error:
            said = str(error)
    assert said and "before the capture" in said and "prebuild" in said
    assert y.shape == x.shape
    graph = capture(lambda x: nj.multistep(cold, x).spikes, x)  # warmed up: now it is captured
    graph.replay()
    assert torch.equal(graph.outputs, nj.multistep(cold, x).spikes)  # type: ignore[attr-defined]


def test_the_current_stream_is_used() -> None:
    x, late = torch.zeros(4, 1 << 20, device="cuda"), torch.ones(4, 1 << 20, device="cuda") * 3
    nj.multistep(nj.neurons.IF, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # on this stream x is still zero for a while
        x.copy_(late)
        spikes = nj.multistep(nj.neurons.IF, x).spikes
    side.synchronize()
    assert spikes.min() == 1


def test_many_threads_on_streams_of_their_own() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            generator = torch.Generator("cuda").manual_seed(seed)
            x = torch.randn(16, 1003, device="cuda", generator=generator).requires_grad_()
            first = [t.clone() for t in training_step(x)]
            for _ in range(20):
                if not all(map(torch.equal, first, training_step(x))):
                    wrong.append(seed)
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_no_synchronisation_in_a_warm_step() -> None:
    x = data(16, 1024)
    tau = torch.tensor(2.0, device="cuda", requires_grad=True)

    def step() -> None:
        out = nj.multistep(nj.neurons.LIF, x, tau=tau, record=("v",))
        (out.spikes.sum() + out.record["v"].sum()).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_only_outputs_and_checkpoints_are_allocated() -> None:
    """T <= K keeps no sequence at all; beyond, 4 bytes of state every K = 16 steps."""
    n = 1 << 18
    for steps, checkpoints in ((4, 0), (16, 0), (64, 3)):
        x = data(steps, n)
        nj.multistep(nj.neurons.LIF, x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = nj.multistep(nj.neurons.LIF, x)
        used = torch.cuda.memory_allocated() - before
        sequence, state = steps * n * 4, n * 4
        assert used <= sequence + state + checkpoints * state + 4096
        del out, x


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_any_device_whatever_the_current_one() -> None:
    x = torch.randn(9, 333)
    results = {}
    for device in ("cuda:0", "cuda:1"):
        results[device] = [t.cpu() for t in training_step(x.to(device).requires_grad_())]
        assert torch.cuda.current_device() == 0
    for ours, theirs in zip(*results.values(), strict=True):
        assert torch.equal(ours, theirs)
