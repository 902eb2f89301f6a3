"""The compiled front end: cold, then warm in C++, against the oracle; and what it leaves to Python.

The other tests say the same of it where they run with NEURONJIT_FRONT_END=compiled.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import check, each_device, inputs, starts
from torch import Tensor

import neuronjit as nj
from neuronjit.cache import admin
from neuronjit.nn import batch_norm
from neuronjit.run import front_end
from neuronjit.run.plan import plans


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NEURONJIT_FRONT_END", "compiled")
    plans.clear()
    yield
    plans.clear()


def in_cpp(tensor: Tensor) -> bool:
    return "Multistep" in tensor.grad_fn.name() and type(tensor.grad_fn).__name__ == "CppFunction"


def check_warm_calls(model: str, arriving: Any, dtype: torch.dtype, device: str) -> None:
    x = inputs((20, 41), dtype).requires_grad_()
    state = {name: value.requires_grad_() for name, value in starts(model, (41,)).items()}
    given: dict[str, Any] = {"v_threshold": torch.tensor(0.9, requires_grad=True)}
    if model == "PLIF":
        given["reciprocal_tau"] = torch.tensor([0.4], requires_grad=True)
    for call in range(3):
        out = check(model, x, state, device=device, arriving=arriving, **given)
        assert in_cpp(out.spikes) == (call > 0)


@each_device
@pytest.mark.parametrize(
    ("model", "arriving", "dtype"),
    [
        ("LIF", None, torch.float64),
        ("LIF", ["v_last"], torch.float16),
        ("PLIF", ["s"], torch.float64),
        ("IZHIKEVICH", ["v_seq"], torch.float64),
    ],
)
def test_warm_calls(model: str, arriving: Any, dtype: torch.dtype, device: str) -> None:
    check_warm_calls(model, arriving, dtype, device)


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
@pytest.mark.parametrize("arriving", [None, ["s"], ["v_seq"], ["v_last"]], ids=str)
@pytest.mark.parametrize("model", ["LIF", "PLIF", "IZHIKEVICH"])
def test_all_warm_calls(model: str, arriving: Any, dtype: torch.dtype, device: str) -> None:
    check_warm_calls(model, arriving, dtype, device)


LAYOUTS = {
    "in order": lambda shape: torch.rand(shape) * 2,
    "channels last": lambda shape: (
        torch.rand([*shape[:2], *shape[3:], shape[2]]).movedim(-1, 2) * 2
    ),
    "a view": lambda shape: (torch.rand([*shape, 2]) * 2)[..., 0],
    "unaligned": lambda shape: (torch.rand(torch.Size(shape).numel() + 1) * 2)[1:].view(shape),
}


@each_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_and_inputs(layout: str, device: str) -> None:
    """Parameters of channels and of neurons, an input of all neurons and one of all steps."""
    model = nj.NeuronModel(
        "mixed", "h = v + (gain * x - v) / tau + skip + rate", state=dict(v=0.0),
        params=dict(tau=2.0, gain=1.0), inputs=("x", "skip", "rate"),
    )  # fmt: skip
    shape = (4, 2, 6, 8, 8)
    torch.manual_seed(0)
    values = {
        "x": LAYOUTS[layout](shape), "skip": torch.rand(shape) - 0.5, "rate": torch.rand(4, 1),
        "gain": torch.rand(6, 1, 1) + 0.5, "tau": torch.rand(6, 1, 1) + 1.5,
    }  # fmt: skip
    values["rate"] = values["rate"].reshape(4, 1, 1, 1, 1)
    weights = torch.rand(shape)

    def smooth(x: Tensor, skip: Tensor, rate: Tensor, gain: Tensor, tau: Tensor) -> Tensor:
        v, steps = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            h = v + (gain * x[t] - v) / tau + skip[t] + rate[t]
            steps.append(torch.atan(torch.pi * (h - 1.0)) / torch.pi + 0.5)
            v = h * (1 - steps[-1])
        return torch.stack(steps)

    leaves = {name: value.clone().double().requires_grad_() for name, value in values.items()}
    out = smooth(**leaves)
    want = torch.autograd.grad(out, [*leaves.values()], weights.double())
    for call in range(3):
        ours = {n: v.to(device).detach().requires_grad_() for n, v in values.items()}
        given = {n: v for n, v in ours.items() if n != "x"}
        surrogate = nj.surrogates.ATan(spiking=False)
        spikes = nj.multistep(model, ours["x"], surrogate=surrogate, **given).spikes
        assert in_cpp(spikes) == (call > 0)
        torch.testing.assert_close(spikes.cpu().double(), out, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(spikes, [*ours.values()], weights.to(device))
        for name, grad, expected in zip(values, grads, want, strict=True):
            scale = expected.abs().max().item()
            assert grad.shape == expected.shape, name
            assert (grad.cpu().double() - expected).abs().max().item() <= 1e-4 * scale, name


def warm(x: Tensor, **options: Any) -> Any:
    """A call that runs in C++, as those before it have loaded what it needs."""
    for _ in range(2):
        out = nj.multistep("lif", x, **options)
        torch.autograd.grad(out.spikes.sum(), x)
    return nj.multistep("lif", x, **options)


@each_device
@pytest.mark.parametrize("residual", [None, "before", "after"])
def test_a_batch_norm_in_two_passes(
    residual: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's batch norm and autograd of an IF neuron that never resets nor rounds."""
    monkeypatch.setattr(batch_norm, "_pays", lambda x: True)
    torch.manual_seed(0)
    norms = [torch.nn.BatchNorm2d(6).to(device, torch.float64) for _ in range(2)]
    integrate = nj.NeuronModel("integrate", "v = v + x\nh = v\ny = v * v", state=dict(v=0.0))
    layer = nj.nn.NormedNeuron(norms[1], nj.nn.Neuron(integrate), residual)
    for batch in range(3):
        data = [torch.randn(4, 2, 6, 4, 4, dtype=torch.float64, device=device) for _ in range(3)]
        x, skip, weight = (
            data[0].mul_(2).add_(3).requires_grad_(),
            data[1].requires_grad_(),
            data[2],
        )
        layer.neuron.reset()
        y = norms[0](x.flatten(0, 1)).unflatten(0, x.shape[:2])
        want = (y + skip if residual == "before" else y).cumsum(0).square()
        want = want + skip if residual == "after" else want
        got = layer(x, *([skip] if residual else []))
        assert in_cpp(got) == (batch > 0)
        torch.testing.assert_close(got, want)
        found = []
        for out, norm in zip((want, got), norms, strict=True):
            leaves = [x, *norm.parameters(), *([skip] if residual else [])]
            found.append([*torch.autograd.grad(out, leaves, weight), *norm.buffers()])
        torch.testing.assert_close(*found)


def test_gradients_that_are_not_plain() -> None:
    """Expanded, zero without memory, of a gradient's gradient: as Python has it."""
    x = inputs((5, 8)).requires_grad_()
    weights = torch.rand(5, 8)
    out = warm(x)
    assert in_cpp(out.spikes)
    want = torch.autograd.grad(out.spikes, x, weights, retain_graph=True)[0]
    for grad in (weights.t().contiguous().t(), weights.to_sparse()):
        (again,) = torch.autograd.grad(out.spikes, x, grad, retain_graph=True)
        assert torch.equal(again, want)
    zero = torch._efficientzerotensor((5, 8))
    assert not torch.autograd.grad(out.spikes, x, zero, retain_graph=True)[0].any()
    (grad,) = torch.autograd.grad(out.spikes.sum(), x, create_graph=True)
    with pytest.raises(nj.DifferentiationError, match="first derivatives only"):
        grad.sum().backward()


def test_what_is_changed_or_freed_is_noticed() -> None:
    x = inputs((5, 8)).requires_grad_()
    v = torch.zeros(8)
    out = warm(x, state={"v": v})
    v += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.spikes.sum().backward()
    out = warm(x)
    out.spikes.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.spikes.sum().backward()


def test_a_state_that_was_carried_over() -> None:
    net = nj.nn.LIFNode(step_mode="m")
    x = inputs((5, 8)).requires_grad_()
    for _ in range(2):
        net.reset()
        net(x).sum().backward()
    net(x)
    with pytest.raises(RuntimeError, match="the state of LIFNode was carried over"):
        net(x).sum().backward()
    net.reset()
    changed = x * 1
    net(changed)
    loss = net(x).sum()
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_saved_tensor_hooks_and_threads() -> None:
    x = inputs((5, 8)).requires_grad_()
    (want,) = torch.autograd.grad(warm(x).spikes.sum(), x)
    with torch.autograd.graph.save_on_cpu():
        (again,) = torch.autograd.grad(warm(x).spikes.sum(), x)
    assert torch.equal(again, want)
    found: list[Tensor] = []

    def run() -> None:
        calls = (nj.multistep("lif", x).spikes.sum() for _ in range(50))
        found.extend(torch.autograd.grad(spikes, x)[0] for spikes in calls)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert all(torch.equal(grad, want) for grad in found)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_stays() -> None:
    x = inputs((5, 8))
    want = nj.multistep("lif", x).spikes
    for current, device in ((0, 1), (1, 0), (0, 0), (1, 1), (0, 1)):
        with torch.cuda.device(current):
            there = x.to(f"cuda:{device}").requires_grad_()
            out = warm(there).spikes
            out.sum().backward()
            assert in_cpp(out)
            assert out.device == there.device
            assert torch.equal(out.cpu(), want)
            assert torch.cuda.current_device() == current


def test_nothing_is_kept_alive() -> None:
    x = inputs((5, 8)).requires_grad_()
    out = warm(x)
    kept = [weakref.ref(plan) for plan in plans.values()]
    plans.clear()
    gc.collect()
    assert any(ref() is not None for ref in kept)  # backward may need it
    del out
    gc.collect()
    assert not any(ref() is not None for ref in kept)


FORKED = """
import os, torch, neuronjit as nj
x = torch.rand(16, 4096, requires_grad=True)  # enough for several threads
def run():
    return torch.autograd.grad(nj.multistep("lif", x).spikes.sum(), x)[0]
want = [run(), run()][-1]
spikes = nj.multistep("lif", x).spikes[:, :50].tolist()
child = os.fork()
if not child:
    rows = nj.multistep("lif", x).spikes[:, :50].tolist()  # torch's own threads are gone as well
    os._exit(0 if rows == spikes else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(run(), want)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_runs() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


def test_without_a_compiler_python_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    code = (
        "import torch, neuronjit as nj; nj.multistep('lif', torch.rand(4, 8));"
        "print(nj.multistep('lif', torch.rand(4, 8, requires_grad=True)).spikes.grad_fn)"
    )
    environment = {**os.environ, "NEURONJIT_CACHE_DIR": str(tmp_path), "CXX": "/bin/false"}
    environment["NEURONJIT_BACKEND"] = "auto"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "neuronjit's front end stays in Python" in done.stderr
    assert done.stderr.count("front end stays") == 1


def test_another_word_is_told() -> None:
    code = "import torch, neuronjit as nj; nj.multistep('lif', torch.rand(4, 8))"
    environment = {**os.environ, "NEURONJIT_FRONT_END": "fast"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "NEURONJIT_FRONT_END='fast' is neither 'python' nor 'compiled'" in done.stderr


def test_it_is_an_entry_of_the_cache() -> None:
    """Named in lists, verified, and found again by its key."""
    from neuronjit.cache import admin
    from neuronjit.kernels import build

    entry = front_end.entry()
    listed = {found.key: found for found in admin.entries()}[entry.key]
    assert not listed.problem
    assert listed.meta["target"] == "front end"
    assert not admin.verify(build.why_no_kernel)[1]
    assert front_end.entry().binary == entry.binary


def test_a_torch_with_another_abi_finds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    other = not torch.compiled_with_cxx11_abi()
    front_end.entry()
    monkeypatch.setenv("NEURONJIT_NO_COMPILE", "1")
    assert front_end.entry()
    monkeypatch.setattr(torch, "compiled_with_cxx11_abi", lambda: other)
    with pytest.raises(nj.BackendError, match="no cache holds it"):
        front_end.entry()


def test_it_can_be_built_ahead(capsys: pytest.CaptureFixture[str]) -> None:
    from neuronjit import cli

    assert cli.main(["prebuild", "--front-end", "--json"]) == 0
    counted = admin.stats()
    assert counted["targets"]["front end"] == 1 and "None" not in counted["models"]
    code = "import torch, neuronjit as nj; nj.multistep('lif', torch.rand(4, 8), backend='auto')"
    environment = {**os.environ, "CXX": "/nowhere", "NEURONJIT_NO_COMPILE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "front end" not in done.stderr  # found by what it was asked for
