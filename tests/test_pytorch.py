"""Whatever PyTorch lets one do with its own operators: right here too, or an error that says so."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import each_device, inputs
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import neuronjit as nj


def lif(x: Tensor, backend: str | None = None) -> Tensor:
    return nj.multistep(nj.neurons.LIF, x, backend=backend).spikes


def network(device: str = "cpu") -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 8), nj.nn.LIF(tau=1.5), torch.nn.Linear(8, 5), nj.nn.PLIF()
    return torch.nn.Sequential(*layers).to(device)


def gradients(net: torch.nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> Any:
    nj.nn.reset_net(net)
    net.zero_grad()
    (run or net)(x).square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


# --- autograd ------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool, device: str) -> None:
    """torch.utils.checkpoint runs forward again in backward, the state reset by hand."""
    net, x = network(device), inputs((20, 4, 6)).to(device).requires_grad_()

    def whole(x: Tensor) -> Tensor:
        nj.nn.reset_net(net)
        return net(x)

    want = gradients(net, x)
    got = gradients(net, x, lambda x: checkpoint(whole, x, use_reentrant=reentrant))
    assert all(map(torch.equal, want, got))


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_would_go_on_from_another_state(reentrant: bool, carried: bool) -> None:
    """Its second forward starts from where the first ended: other gradients, so an error."""
    net, x = network(), inputs((20, 4, 6)).requires_grad_()
    if carried:
        net(x)
        nj.nn.detach_net(net)
    loss = checkpoint(net, x, use_reentrant=reentrant).sum()
    with pytest.raises(nj.SpecError, match=r"runs LIF again, .* call reset_net\(net\) inside"):
        loss.backward()
    start = {z: torch.full((4, 8), 0.3) for z in net[1].model.state}

    def assigned(x: Tensor) -> Tensor:
        net[1].v = start["v"]
        hidden = net[1](net[0](x[:9])), net[1](net[0](x[9:]))  # the second goes on from the first
        return torch.cat(hidden)

    net.zero_grad()
    checkpoint(assigned, x, use_reentrant=reentrant).square().sum().backward()
    got = [p.grad for p in net[0].parameters()]
    spikes, _ = net[1].functional_forward(net[0](x), start)
    want = torch.autograd.grad(spikes.square().sum(), [*net[0].parameters()])
    torch.testing.assert_close(got, [*want])


@each_device
def test_gradient_accumulation(device: str) -> None:
    net, batches = network(device), inputs((20, 8, 6)).to(device).split(4, 1)
    apart = [gradients(net, x) for x in batches]
    net.zero_grad()
    for x in batches:
        nj.nn.reset_net(net)
        net(x).square().sum().backward()
    for p, *parts in zip(net.parameters(), *apart, strict=True):
        torch.testing.assert_close(p.grad, sum(parts))


@each_device
def test_hooks_and_retained_gradients(device: str) -> None:
    x = inputs((20, 5)).to(device).requires_grad_()
    middle = x * 1.5
    middle.retain_grad()
    seen: list[Tensor] = []
    spikes = lif(middle)
    spikes.register_hook(lambda g: g * 2)
    spikes.grad_fn.register_hook(lambda given, _: seen.append(given[0]))
    spikes.sum().backward()
    (plain,) = torch.autograd.grad(lif(x * 1.5).sum(), x)
    assert torch.equal(x.grad, plain * 2) and torch.equal(middle.grad * 1.5, x.grad)
    assert torch.equal(seen[0], middle.grad)


@each_device
def test_saved_tensor_hooks_and_anomaly_mode(device: str) -> None:
    """Offloading what backward needs: x, and checkpoints, which make up little."""
    x = inputs((40, 64)).to(device).requires_grad_()
    (want,) = torch.autograd.grad(lif(x).sum(), x)
    packed: list[int] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.numel())
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        spikes = lif(x)
    assert sorted(packed) == [2 * 64 + 2, 40 * 64]
    assert torch.equal(torch.autograd.grad(spikes.sum(), x)[0], want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            assert torch.equal(torch.autograd.grad(lif(x).sum(), x)[0], want)


@each_device
def test_changes_in_place(device: str) -> None:
    """Changing x before backward is torch's error; changing the spikes is seen by autograd."""
    base = inputs((20, 5)).to(device).requires_grad_()
    x = base * 1
    spikes = lif(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spikes.sum().backward()
    spikes = lif(base)
    spikes.mul_(3)
    (tripled,) = torch.autograd.grad(spikes.sum(), base)
    torch.testing.assert_close(tripled, torch.autograd.grad(lif(base).sum() * 3, base)[0])
    leaf = inputs((20, 5)).to(device).requires_grad_()
    doubled = lif(leaf)
    squared = doubled.square()  # saves the spikes themselves
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


def test_inference_tensors_cannot_be_trained_on() -> None:
    with torch.inference_mode():
        x = inputs((4, 5))
        assert lif(x).is_inference()
    assert torch.equal(lif(x), lif(x.clone()))
    tau = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(RuntimeError, match="nference tensors"):
        nj.multistep(nj.neurons.LIF, x, tau=tau)


@each_device
def test_threads(device: str) -> None:
    """Many threads at once give what one gives."""
    from concurrent.futures import ThreadPoolExecutor

    def step(seed: int) -> Tensor:
        x = inputs((20, 33), seed=seed).to(device).requires_grad_()
        return torch.autograd.grad(lif(x).sum(), x)[0]

    want = [step(seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert all(map(torch.equal, want, pool.map(step, range(16))))


# --- transforms ----------------------------------------------------------------------------------

X = inputs((5, 4), torch.float64)
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "grad": lambda f: grad(lambda x: f(x).sum())(X),
    "vmap": lambda f: vmap(f)(torch.stack((X, X * 0.5))),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).sum()))(torch.stack((X, X * 0.5))),
    "jvp": lambda f: jvp(f, (X,), (torch.ones_like(X),))[1],
    "jacrev": lambda f: jacrev(f)(X),
    "forward AD": lambda f: forward_mode(f),
    "batched gradients": lambda f: batched(f),
    "functionalize": lambda f: torch.func.functionalize(f)(X),
}


def forward_mode(f: Callable[[Tensor], Tensor]) -> Tensor | None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        return torch.autograd.forward_ad.unpack_dual(f(dual)).tangent


def batched(f: Callable[[Tensor], Tensor]) -> Tensor:
    x = X.clone().requires_grad_()
    arriving = torch.eye(20, dtype=x.dtype, device=x.device).reshape(20, 5, 4)
    return torch.autograd.grad(f(x), x, arriving, is_grads_batched=True)[0]


@each_device
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms_are_clear_errors(kind: str, device: str, monkeypatch: Any) -> None:
    """Never numbers without a derivative: an error that names what serves; and it does."""
    monkeypatch.setattr(f"{__name__}.X", X.to(device))
    for _ in range(2):
        with pytest.raises(nj.DifferentiationError, match="backend='eager'"):
            TRANSFORMS[kind](lif)
    assert lif(X).any() == lif(X, "eager").any()
    if kind == "functionalize":
        return  # torch has no rule for the autograd.Function of the eager reference either
    smooth = nj.surrogates.Sigmoid(spiking=False)

    def eager(x: Tensor) -> Tensor:
        return nj.multistep(nj.neurons.LIF, x, surrogate=smooth, backend="eager").spikes

    spiking = TRANSFORMS[kind](lambda x: lif(x, "eager"))
    got = TRANSFORMS[kind](eager)
    assert got.shape == spiking.shape and spiking.isfinite().all()
    jacobian = torch.autograd.functional.jacobian(eager, X)  # by plain backward, row by row
    total = jacobian.sum((0, 1))
    if kind in ("jacrev", "batched gradients"):
        torch.testing.assert_close(got.reshape(jacobian.shape), jacobian)
    elif kind == "grad":
        torch.testing.assert_close(got, total)
    elif kind == "vmap of grad":
        torch.testing.assert_close(got[0], total)
    elif kind in ("jvp", "forward AD"):
        torch.testing.assert_close(got, jacobian.sum((2, 3)))


def test_functional_call() -> None:
    net, x = network(), inputs((20, 4, 6))
    other = {name: (p * 1.1).detach().requires_grad_() for name, p in net.named_parameters()}
    nj.nn.reset_net(net)
    out = functional_call(net, other, (x,))
    grads = torch.autograd.grad(out.square().sum(), list(other.values()))
    net.load_state_dict(other)
    assert all(map(torch.equal, grads, gradients(net, x)))


def test_fake_and_meta_tensors_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and dtypes only."""
    from torch._subclasses import FakeTensorMode

    monkeypatch.setenv("NEURONJIT_NO_COMPILE", "1")
    monkeypatch.setenv("NEURONJIT_CACHE_DIR", "/nonexistent")
    before = nj.stats()
    with FakeTensorMode():
        x = torch.empty(20, 3, 7, dtype=torch.float16, requires_grad=True)
        fakes = nj.multistep(nj.neurons.LIF, x, record=("v",))
        (fake_grad,) = torch.autograd.grad(fakes.spikes.sum(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metas = nj.multistep(nj.neurons.LIF, torch.empty(20, 3, 7, device="meta"), record=("v",))
    for out, dtype in ((fakes, torch.float16), (metas, torch.float32)):
        assert out.spikes.shape == out.record["v"].shape == (20, 3, 7)
        assert out.spikes.dtype == dtype and out.state["v"].dtype == torch.float32
        assert out.state["v"].shape == (3, 7)
    assert fake_grad.shape == x.shape and nj.stats() == before


def test_tracing_by_torch_jit_is_a_clear_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(nj.BackendError, match=r"torch\.export"):
            torch.jit.trace(lif, inputs((4, 8)))


# --- mixed precision -----------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """Spikes follow x, the state stays float32, and all gradients arrive in their own dtype."""
    net, x = network(device), inputs((20, 4, 6)).to(device).requires_grad_()
    seen: list[Tensor] = []
    net[1].register_forward_hook(lambda _, given, out: seen.extend((given[0], out)))
    with torch.autocast(device, dtype):
        out = net(x)
    assert [t.dtype for t in seen] == [dtype, dtype] and out.dtype == dtype
    assert net[1].v.dtype == torch.float32
    for inside in (True, False):
        x.grad = None
        with torch.autocast(device, dtype, enabled=inside):
            out.float().sum().backward(retain_graph=True)
        assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())
    half = seen[0].detach()
    again = nj.multistep(net[1].model, half, {"v": torch.zeros(4, 8, device=device)}, tau=1.5)
    assert torch.equal(again.spikes, seen[1])  # the very arithmetic of a call without autocast


@each_device
def test_grad_scaler(device: str) -> None:
    """A scale that overflows half precision skips the step; the next one is taken."""
    net = network(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40, growth_interval=1000)
    before = [p.detach().clone() for p in net.parameters()]
    taken = 0
    for seed in range(40):
        nj.nn.reset_net(net)
        with torch.autocast(device, torch.float16):
            loss = net(inputs((20, 4, 6), seed=seed).to(device)).float().mean()
        optimizer.zero_grad()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        taken += scaler.get_scale() == scale
    assert 0 < taken < 40
    assert all(p.isfinite().all() for p in net.parameters())
    assert any(not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


# --- memory --------------------------------------------------------------------------------------


def allocated(run: Callable[[], Any]) -> list[tuple[int, ...]]:
    """The shapes of all tensors that torch makes in a call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes: list[tuple[int, ...]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if "empty" in str(func) or "clone" in str(func) or "copy" in str(func):
                shapes.append(tuple(out.shape))
            return out

    with Watch():
        run()
    return sorted(shapes)


def test_nothing_is_allocated_beyond_outputs_and_checkpoints() -> None:
    x = inputs((40, 64)).requires_grad_()
    with torch.no_grad():
        assert allocated(lambda: lif(x)) == [(40, 64), (64,)]
        assert allocated(lambda: nj.multistep("lif", x, final_state=False)) == [(40, 64)]
    assert allocated(lambda: lif(x)) == [(40, 64), (64,), (2 * 64 + 2,)]
    assert sorted(allocated(lambda: lif(x[:4]))) == [(4, 64), (64,)]
    arriving, spikes = torch.ones(40, 64), lif(x)
    assert allocated(lambda: torch.autograd.grad(spikes, x, arriving)) == [(40, 64)]


@pytest.mark.slow
@each_device
def test_no_growth_over_10_000_calls(device: str) -> None:
    """Neither Python's objects, nor torch's memory, nor the process."""
    x = inputs((20, 33)).to(device).requires_grad_()
    tau = torch.tensor(2.0, device=device, requires_grad=True)

    def calls(n: int) -> tuple[int, int, int]:
        for _ in range(n):
            out = nj.multistep(nj.neurons.LIF, x, tau=tau, record=("h",))
            torch.autograd.grad(out.spikes.sum() + out.state["v"].sum(), [x, tau])
        gc.collect()
        memory = torch.cuda.memory_allocated() if device == "cuda" else 0
        return len(gc.get_objects()), memory, resident()

    calls(500)
    objects, memory, process = calls(500)
    after = calls(10_000)
    assert after[0] - objects < 200
    assert after[1] == memory
    assert after[2] - process < 4 << 20, "bytes"


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
