"""Spikes kept as bits: the same gradients, bit for bit, from less memory; errors as without."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import networks
import oracle
import pytest
import torch
from support import GRADIENT_TOLERANCE, assert_near, assert_same_bits, each_device, each_dtype
from support import inputs as random_input
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import neuronjit as nj
from neuronjit.run import packed

EACH_WAY = (nullcontext, nj.packed_spikes)


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: Any) -> None:
    """Gradients of convolutions that are equal from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def fired(x: Tensor, **options: Any) -> Tensor:
    return nj.multistep("lif", x, **options).spikes


def storage_of(t: Tensor) -> Any:
    return weakref.ref(t.untyped_storage())


class Saved:
    """The memory of all tensors of 0 and 1 that `packed_spikes` saw."""

    def __init__(self, monkeypatch: Any) -> None:
        self.spikes: list[Any] = []
        pack = packed._pack

        def watched(x: Tensor) -> Any:
            large = x.is_floating_point() and x.numel() > 20  # no parameter of a batch norm
            if large and ((x == 0) | (x == 1)).all():
                self.spikes.append(storage_of(x))
            return pack(x)

        monkeypatch.setattr(packed, "_pack", watched)

    def kept(self) -> list[bool]:
        """Of each spike tensor that was saved, whether it still has its memory."""
        gc.collect()
        return [s() is not None for s in self.spikes]


# --- what packs -----------------------------------------------------------------------------------

# [4, 3, 6, 10, 10] spikes and what reads them; each saves them or one copy of them for `w`
READERS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": ((5, 10), F.linear),
    "conv2d": ((5, 6, 3, 3), lambda s, w: F.conv2d(s.flatten(0, 1), w)),
    "conv2d, a view of fewer": ((5, 6, 3, 3), lambda s, w: F.conv2d(s[2, :2, :, 1:, :7], w)),
    "each step": ((5, 10), lambda s, w: torch.stack([F.linear(t, w) for t in s])),
    "product": ((3, 6, 10, 10), lambda s, w: s * w),
    "matmul, transposed": ((10, 5), lambda s, w: s.transpose(-1, -2) @ w),
    "a reshape that copies": ((24, 2), lambda s, w: s.permute(1, 3, 4, 0, 2).flatten(3) @ w),
    "another layout": (
        (5, 6, 3, 3),
        lambda s, w: F.conv2d(s.flatten(0, 1).contiguous(memory_format=torch.channels_last), w),
    ),
    "another dtype": ((3, 6, 10, 10), lambda s, w: s.double() * w.double()),
    "max_pool2d": ((5, 6, 3, 3), lambda s, w: F.conv2d(F.max_pool2d(s.flatten(0, 1), 2), w)),
    "max_pool1d": ((5, 5), lambda s, w: F.linear(F.max_pool1d(s[3, :, 0], 2), w)),
    "max_pool3d": ((3, 3, 5, 5), lambda s, w: F.max_pool3d(s, 2) * w),
    "expanded": ((2, 4, 3, 6, 10, 10), lambda s, w: s.expand(2, -1, -1, -1, -1, -1) * w),
    "detached": ((3, 6, 10, 10), lambda s, w: s.detach() * w),
    "a neuron": ((10,), lambda s, w: nj.multistep("lif", s, tau=w.abs() + 1.5).spikes),
    "checkpoint": (
        (5, 10),
        lambda s, w: checkpoint(lambda s, w: F.linear(s, w).sin(), s, w, use_reentrant=False),
    ),
    "checkpoint, reentrant": (
        (5, 10),
        lambda s, w: checkpoint(lambda s, w: F.linear(s, w).sin(), s, w, use_reentrant=True),
    ),
}


@each_device
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("reader", READERS)
def test_readers_of_spikes(reader: str, layout: str, device: str, monkeypatch: Any) -> None:
    """No reader keeps their memory, and each gets its gradient from bits."""
    size, read = READERS[reader]
    first = random_input((4, 3, 6, 10, 10)).to(device)
    if layout == "channels_last":
        first = first.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        first = first.unflatten(0, (4, 3))
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device)
    found, saved = [], None
    for context in EACH_WAY:
        x, w = first.clone().requires_grad_(), weight.clone().requires_grad_()
        if context is nj.packed_spikes:
            saved = Saved(monkeypatch)
        with context():
            spikes = fired(x)
            memory = storage_of(spikes)
            y = read(spikes, w)
            del spikes
        if context is nj.packed_spikes:
            assert memory() is None and saved is not None
            assert saved.spikes and not any(saved.kept())
        y.sin().sum().backward()
        found.append((x.grad, w.grad))
    for name, plain, got in zip("xw", *found, strict=True):
        if plain is not None or got is not None:
            assert_same_bits(got, plain.cpu(), name)
    assert found[0][1].any()


def network(dtype: torch.dtype, device: str, **neuron: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        nj.nn.EachStep(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5)),
        nj.nn.LIF(**neuron),
        nj.nn.EachStep(torch.nn.MaxPool2d(2), torch.nn.Conv2d(5, 7, 3)),
        nj.nn.LIF(**neuron),
        nj.nn.Flatten(),
        torch.nn.Linear(7 * 9, 3),
    ).to(device, dtype)


def step(net: torch.nn.Module, x: Tensor, context: Any = nullcontext, times: int = 1) -> Any:
    """Loss and gradients, of x too."""
    nj.nn.reset_net(net)
    net.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    with context():
        loss = sum(net(x + i * 0.1).float().square().sum() for i in range(times))
    loss.backward()
    return [loss.detach(), x.grad, *[p.grad for p in net.parameters()]]


def assert_all_same_bits(got: Any, want: Any) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_same_bits(a, b.cpu(), f"{i}")


@each_device
@pytest.mark.parametrize(
    ("dtype", "fused"),
    [
        (torch.float32, False),
        (torch.float32, True),
        pytest.param(torch.float64, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.slow),
    ],
)
def test_a_network(dtype: torch.dtype, fused: bool, device: str, monkeypatch: Any) -> None:
    """Three calls in a row, the state carried from one to the next."""
    net = network(dtype, device)
    assert nj.nn.fuse(net) if fused else True
    x = random_input((4, 2, 3, 12, 12), dtype).to(device)
    want = step(net, x, times=3)
    saved = Saved(monkeypatch)
    got = step(net, x, nj.packed_spikes, times=3)
    assert_all_same_bits(got, want)
    # convolution, linear and pooling read spikes; fused on a GPU, pooling does not keep them
    assert len(saved.spikes) == (6 if fused and device == "cuda" else 9)
    assert not any(saved.kept()) and not packed._known


@each_device
def test_fifty_steps(device: str) -> None:
    """Training goes the same way."""
    x = random_input((4, 2, 3, 12, 12)).to(device)
    losses = []
    for context in EACH_WAY:
        net = network(torch.float32, device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        each = []
        for _ in range(50):
            each.append(step(net, x, context)[0].item())
            optimizer.step()
        losses.append(each)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] / 2


@each_device
def test_against_plain_autograd(device: str) -> None:
    """Two layers of LIF and ATan written in plain PyTorch."""
    surrogate = oracle.Surrogate("ATan")
    x = random_input((5, 3, 8)).mul_(2)
    torch.manual_seed(0)
    weights = [torch.randn(8, 8), torch.randn(4, 8)]
    theirs = [w.clone().requires_grad_() for w in weights]
    s = oracle.run("LIF", F.linear(x, theirs[0]), {}, surrogate=surrogate).spikes
    y = oracle.run("LIF", F.linear(s, theirs[1]), {}, surrogate=surrogate).spikes
    y.square().mean().backward()
    ours = [w.clone().to(device).requires_grad_() for w in weights]
    with nj.packed_spikes():
        s = fired(F.linear(x.to(device), ours[0]))
        y = fired(F.linear(s, ours[1]))
    y.square().mean().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a.grad, b.grad, GRADIENT_TOLERANCE[torch.float32], "weight", floor=1.0)


@each_device
@each_dtype
def test_bits_of_any_view(dtype: torch.dtype, device: str) -> None:
    """Any shape, stride and offset, of sizes that 8 does not divide, come back as they were."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 7, 8, 9, 24, 105, 1000):
        flat = (torch.rand(size, generator=generator) < 0.4).to(device, dtype)
        assert_same_bits(packed.unpack_bits(packed.pack_bits(flat), dtype)[:size], flat.cpu(), "")
        for width in (2, 4, 8):
            most = 2**width - 1
            flat = torch.randint(0, most + 1, (size,), generator=generator).to(device, dtype)
            flat[-1] = most
            bits = packed.pack_bits(flat, width)
            assert len(bits) == -(-size * width // 8)
            assert_same_bits(packed.unpack_bits(bits, dtype, width)[:size], flat.cpu(), f"{width}")
    x = random_input((5, 3, 7), dtype).to(device)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda s: s, lambda s: s[1:, ::2, 3:], lambda s: s.transpose(0, 2), lambda s: s[4, 2, 6],
        lambda s: s[:, 1].unsqueeze(0).expand(3, -1, -1), lambda s: s[2:2],
        lambda s: s.unfold(2, 3, 2), lambda s: s.view(-1)[9:],
        lambda s: s.permute(1, 0, 2)[1:].flatten(),
    ]  # fmt: skip
    with nj.packed_spikes():
        spikes = fired(x.requires_grad_())
        for view in views:
            want = view(spikes)
            got = packed._unpack(packed._pack(want))
            assert got.stride() == want.stride()
            assert_same_bits(got, want.cpu(), "view")


@each_device
def test_shared_by_all_readers(device: str, monkeypatch: Any) -> None:
    """One set of bits for all; gone when the last of them is."""
    made = []
    pack_bits = packed.pack_bits

    def watched(flat: Tensor, width: int) -> Tensor:
        bits = pack_bits(flat, width)
        made.append(weakref.ref(bits))
        return bits

    monkeypatch.setattr(packed, "pack_bits", watched)
    x = random_input((4, 3, 8)).to(device).requires_grad_()
    w = torch.randn(5, 8, device=device, requires_grad=True)
    with nj.packed_spikes():
        s = fired(x)
        y = F.linear(s, w).square() + F.linear(s[1:2], w) + s.sum(-1, keepdim=True) * (s @ w.t())
    assert len(made) == 1 and made[0]().numel() == 4 * 3 * 8 // 8
    y.sum().backward()
    del y
    gc.collect()
    assert made[0]() is None
    with nj.packed_spikes():
        F.linear(s, w)
    assert len(made) == 2  # nobody had them any more


def residuals(s: Tensor, t: Tensor, read: Any) -> None:
    """Each is read by the block that adds to it, as in a ResNet."""
    y = s + t
    for _ in range(4):
        y = fired(read(y)) + y
    read(y)


# of two sets of [4, 3, 6, 6] spikes; `read` multiplies by weights, so it saves what it is given
SUMS: dict[str, tuple[list[int], Callable[[Tensor, Tensor, Any], Any]]] = {
    "a residual": ([2], lambda s, t, read: read(s + t)),
    "of itself": ([2], lambda s, t, read: read(s + s)),
    "of views": ([2], lambda s, t, read: read((s.transpose(2, 3) + t[:, :1]).flatten(0, 1)[3:])),
    "residuals": ([2, 2, 4, 4, 4], residuals),
    "a product": ([1], lambda s, t, read: read(s * t)),
    "a concatenation": ([1], lambda s, t, read: read(torch.cat([s, t], 1)[:, 2:5])),
    "a stack": ([1], lambda s, t, read: read(torch.stack([s, t])[1])),
    "a cast of a sum": ([2, 2], lambda s, t, read: (read(u := s + t), read(u.double()))),
    "a pooled sum": ([2, 2], lambda s, t, read: (read(u := s + t), read(F.max_pool2d(u[0], 2)))),
    "of two dtypes": ([1, 2], lambda s, t, read: (read(u := t.double()), read(s + u))),
}


@each_device
@pytest.mark.parametrize("kind", SUMS)
def test_sums_of_spikes(kind: str, device: str) -> None:
    """What residual connections make of spikes takes as many bits as its greatest number needs."""
    widths, combine = SUMS[kind]
    found = []
    for context in EACH_WAY:
        x = random_input((2, 4, 3, 6, 6)).to(device).mul_(2).requires_grad_()
        weights: list[Tensor] = []
        products: list[Tensor] = []
        seen: list[tuple[Any, Any]] = []

        def read(y: Tensor) -> Tensor:
            w = random_input(y.shape, seed=len(weights)).to(device, y.dtype).add_(1)  # noqa: B023
            weights.append(w.requires_grad_())  # noqa: B023
            products.append(y * w)  # noqa: B023
            seen.append((storage_of(y), packed._spikes_of(y)))  # noqa: B023
            return products[-1]  # noqa: B023

        with context():
            combine(fired(x[0]), fired(x[1] + 0.3), read)
        if context is nj.packed_spikes:
            assert [known.width for _, known in seen] == widths
            assert [memory() for memory, _ in seen] == [None for _ in widths]
        sum(y.double().sin().sum() for y in products).backward()
        found.append([x.grad, *[w.grad for w in weights]])
    assert_all_same_bits(*found)
    assert all(grad.any() for grad in found[0])


@pytest.mark.parametrize("model", ["lif", "izhikevich"])
def test_residuals_within_the_kernel(model: str) -> None:
    """What a fused layer adds to its spikes: known where the residual is."""
    torch.manual_seed(0)
    norms = [torch.nn.BatchNorm1d(3) for _ in range(2)]
    for norm in norms:
        torch.nn.init.constant_(norm.weight, 4.0)
    layers = [nj.nn.NormedNeuron(n, nj.nn.Neuron(model), residual="after") for n in norms]
    found, widths = [], []
    for context in EACH_WAY:
        nj.nn.reset_net(torch.nn.ModuleList(layers))
        x = random_input((2, 4, 5, 3)).mul_(9).requires_grad_()
        w = random_input((4, 5, 3), seed=1).requires_grad_()
        with context():
            y = layers[0](x[0], fired(x[1]))
            z = layers[1](y * w, y)
            out = y.square() + z * w
        if context is nj.packed_spikes:
            widths = [getattr(packed._known.get(t.untyped_storage()), "width", 0) for t in (y, z)]
        out.sum().backward()
        found.append([x.grad, w.grad])
        assert y.max() == 2 and z.max() > 1
    assert widths == [2, 2]
    assert_all_same_bits(*found)


def test_sums_that_grow() -> None:
    """More than eight bits hold is kept as it is, and so is what is made of it."""
    x = torch.full((2, 3), 2.0, requires_grad=True)
    with nj.packed_spikes():
        y, widths = fired(x), []
        for i in range(10):
            w = torch.ones((2, 3), requires_grad=True)
            z = y * w
            known = packed._spikes_of(y)
            widths.append(known and known.width)
            (grad,) = torch.autograd.grad(z.sum(), w)
            assert torch.equal(grad, torch.full((2, 3), 2.0**i))
            y = y + y
    assert widths == [1, 2, 4, 4, 8, 8, 8, 8, None, None]


def test_without_gradients_of_their_own() -> None:
    """Spikes of a frozen first layer are inputs of the next weights all the same."""
    x, w = random_input((4, 3, 8)), torch.randn(5, 8, requires_grad=True)
    with nj.packed_spikes():
        frozen = fired(x)
        with torch.no_grad():
            silent = fired(x * 1.5)
        memory = [storage_of(frozen), storage_of(silent)]
        want = (frozen + silent).sum((0, 1))
        y = F.linear(frozen, w) + F.linear(silent, w)
        del frozen, silent
    assert [m() for m in memory] == [None, None]
    y.sum().backward()
    assert torch.equal(w.grad, want.expand(5, -1))


def test_in_inference_mode() -> None:
    with nj.packed_spikes(), torch.inference_mode():
        assert fired(random_input((4, 3, 8))).untyped_storage() not in packed._known


def test_no_operation_keeps_itself() -> None:
    """What saves its own result is freed with it, without the garbage collector."""
    x = random_input((4, 3, 8)).requires_grad_()
    gc.disable()
    try:
        with nj.packed_spikes():
            y = fired(x).exp()
        memory = storage_of(y)
        del y
        assert memory() is None
    finally:
        gc.enable()


# --- what does not --------------------------------------------------------------------------------


def times_half(s: Tensor) -> Tensor:
    with torch.no_grad():
        s.mul_(0.5)
    return s


def halved_copy(s: Tensor) -> Tensor:
    return times_half(s.clone()).transpose(0, 1)


def copy_of_a_halved_copy(s: Tensor) -> Tensor:
    copy = s.double()
    times_half(copy)
    return copy.float()


def copy_of_what_was_halved(s: Tensor) -> Tensor:
    return times_half(s).double().float()


def read_and_scaled(s: Tensor) -> Tensor:
    """What was known when it was read is not known any more."""
    total = s + s
    F.linear(total, torch.ones(1, 6, requires_grad=True))
    return times_half(total) + s


def through_data(s: Tensor) -> Tensor:
    other = s.data
    return times_half(other)


NOT_SPIKES: dict[str, Callable[[Tensor], Tensor]] = {
    "a sum with others": lambda s: s + torch.full_like(s, 0.25, requires_grad=True),
    "a sum with a number": lambda s: s + 0.25,
    "a scaled sum": lambda s: torch.add(s, s, alpha=0.5),
    "a sum that is scaled": lambda s: times_half(s + s[:1]),
    "a sum of what was scaled": lambda s: (t := s.clone(), times_half(s))[1] + t,
    "a sum of a copy that was scaled": lambda s: times_half(s.clone()) + s,
    "a sum of a sum that was scaled": lambda s: times_half(s + s) + s,
    "a sum of a sum that was read and scaled": read_and_scaled,
    "a difference": lambda s: s - s[:1],
    "a product with others": lambda s: s * torch.full_like(s, 0.25, requires_grad=True),
    "a concatenation with others": lambda s: torch.cat([s, torch.full_like(s, 0.25)]),
    "scaled": lambda s: s * 0.5,
    "dropout": lambda s: F.dropout(s, 0.5, training=True),
    "average pooling": lambda s: F.avg_pool2d(s, 2).repeat(1, 2, 2),
    "scaled in place": lambda s: s.mul_(0.5),
    "a part scaled in place": lambda s: (s[1].mul_(0.5), s)[1],
    "scaled without autograd": times_half,
    "a view of it": lambda s: times_half(s).transpose(0, 1),
    "a copy of it": lambda s: times_half(s).clone(),
    "casts of it": copy_of_what_was_halved,
    "a copy that is scaled": halved_copy,
    "a copy of a copy that was scaled": copy_of_a_halved_copy,
    "scaled as .data": through_data,
    ".data of what was scaled": lambda s: times_half(s).data,
    "bits as integers": lambda s: s.view(torch.int32),
    "negated": lambda s: -s,
    "a negative view": lambda s: torch._neg_view(s),
    "a pooling of padding": lambda s: F.max_pool2d(s[:, :1, :1], 2, 2, 1, 2),
    "a copy into others": lambda s: torch.full_like(s, 0.5).index_copy(0, torch.tensor([1]), s[:1]),
}


@pytest.mark.parametrize("kind", NOT_SPIKES)
def test_what_is_not_spikes_stays(kind: str) -> None:
    """A product's gradient is what was saved, so it shows whether numbers were lost."""
    x = random_input((4, 6, 6)).mul_(2)
    found = []
    for context in EACH_WAY:
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        with context():
            kept = NOT_SPIKES[kind](fired(leaf))
            w = torch.ones(kept.shape, dtype=torch.float32, requires_grad=True)
            y = kept * w
        want = kept.detach().float()
        y.sum().backward()
        assert torch.equal(w.grad, want)
        found.append(w.grad)
    assert torch.equal(*found)
    assert not ((found[0] == 0) | (found[0] == 1)).all()


MODELS = {
    "ternary": nj.NeuronModel(
        "ternary", "h = v + x\ns = fire(h, theta) - fire(-h, theta)", state=dict(v=0.0)
    ),
    "integer": nj.NeuronModel(
        "integer", "h = v + 3 * x\ns = round(clamp(h, 0, 4))", state=dict(v=0.0)
    ),
    "graded": nj.NeuronModel("graded", "h = v + x\ny = 0.5 * s", state=dict(v=0.0)),
    "residual": nj.NeuronModel("residual", "h = v + x\ny = s + x", state=dict(v=0.0)),
}


@pytest.mark.parametrize("kind", [*MODELS, "smooth", "a residual after"])
def test_outputs_of_other_levels_stay(kind: str) -> None:
    x = random_input((4, 3, 2, 5)).mul_(2).requires_grad_()
    w = torch.randn(4, 3, 2, 5).requires_grad_()
    with nj.packed_spikes():
        if kind == "a residual after":
            neuron = nj.nn.LIF(backend="eager")
            layer = nj.nn.NormedNeuron(torch.nn.BatchNorm1d(2), neuron, residual="after")
            out = layer(x, x.detach().round())
        elif kind == "smooth":
            out = fired(x, surrogate=nj.surrogates.Sigmoid(spiking=False), backend="eager")
        else:
            out = nj.multistep(MODELS[kind], x, backend="eager").spikes
        y = out * w
    levels = out.detach().clone()
    assert not ((levels == 0) | (levels == 1)).all()
    assert out.untyped_storage() not in packed._known
    y.sum().backward()
    assert torch.equal(w.grad, levels)


@pytest.mark.parametrize("name", sorted(nj.neurons.built_in()))
def test_every_neuron_is_known_for_what_it_puts_out(name: str) -> None:
    """What is noted as spikes is 0 or 1, and what is not noted puts out something else."""
    model = nj.neurons.built_in()[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((20, 40), generator=generator, dtype=torch.float64) * 100
    others = {i: torch.rand((20, 40), generator=generator).double() for i in model.inputs[1:]}
    with nj.packed_spikes():
        out = nj.multistep(model, x, backend="eager", **others).spikes
    noted = out.untyped_storage() in packed._known
    assert noted == bool(((out == 0) | (out == 1)).all())


def test_addresses_that_are_used_again() -> None:
    """Numbers that lie where spikes were are no spikes."""
    x, w = random_input((4, 64)), torch.randn(4, 64, requires_grad=True)
    reused = 0
    with nj.packed_spikes():
        for _ in range(100):
            spikes = fired(x)
            F.linear(spikes, w)
            memory, address = storage_of(spikes), spikes.data_ptr()
            del spikes
            assert memory() is None
            for numbers in [torch.full((4, 64), 0.25) for _ in range(10)]:
                if numbers.data_ptr() == address:
                    reused += 1
                    (grad,) = torch.autograd.grad(F.linear(numbers, w).sum(), w)
                    assert torch.equal(grad, torch.ones(4, 64))
    if not reused:
        pytest.skip("the allocator gave no address twice")


# --- errors are torch's ---------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "spikes": lambda s, hidden, w: s.zero_(),
    "a view of spikes": lambda s, hidden, w: s[0].add_(1.0),
    "spikes without autograd": lambda s, hidden, w: times_half(s),
    "other activations": lambda s, hidden, w: hidden.add_(1.0),
    "weights": lambda s, hidden, w: times_half(w),
}


@each_device
@pytest.mark.parametrize("what", CHANGES)
def test_changes_in_place_are_errors(what: str, device: str) -> None:
    for context in EACH_WAY:
        x = random_input((4, 3, 8)).to(device).requires_grad_()
        w = torch.randn(8, 8, device=device, requires_grad=True)
        with context():
            s = fired(x)
            hidden = F.linear(s, w)
            y = F.linear(hidden, w)
        CHANGES[what](s, hidden, w)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 0"):
            y.sum().backward()


def test_backward_again() -> None:
    """With retain_graph as often as wanted; without, torch's error."""
    x, w = random_input((4, 3, 8)).requires_grad_(), torch.randn(5, 8, requires_grad=True)
    with nj.packed_spikes():
        y = F.linear(fired(x), w).sin().sum()
    first = torch.autograd.grad(y, (x, w), retain_graph=True)
    second = torch.autograd.grad(y, (x, w))
    assert_all_same_bits(second, first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, (x, w))


def test_second_derivatives() -> None:
    found = []
    for context in EACH_WAY:
        x, w = random_input((4, 3, 8)).requires_grad_(), torch.ones(5, 8, requires_grad=True)
        with context():
            y = F.linear(fired(x, backend="eager"), w).sin().sum()
            (grad,) = torch.autograd.grad(y, w, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), (x, w)))
    assert_all_same_bits(*found)
    assert found[0][0].any()


def test_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="packed_spikes"):
        nj.packed_spikes(True)  # type: ignore[call-arg]


# --- beside other things --------------------------------------------------------------------------


def test_an_error_inside_ends_it() -> None:
    with pytest.raises(ZeroDivisionError), nj.packed_spikes(), nj.packed_spikes():
        raise ZeroDivisionError
    assert not packed.here.contexts
    w = torch.randn(5, 8, requires_grad=True)
    s = fired(random_input((4, 3, 8)).requires_grad_())
    assert s.untyped_storage() not in packed._known
    assert (s @ w.t()).sum().isfinite() and not packed._known


def test_other_hooks() -> None:
    """The innermost are asked, as among torch's own."""
    x, w = random_input((4, 3, 8)), torch.randn(5, 8, requires_grad=True)
    asked: list[Tensor] = []
    others = saved_tensors_hooks(lambda t: (asked.append(t), t.detach())[1], lambda t: t)
    with others, nj.packed_spikes():
        s = fired(x)
        y = F.linear(s, w)
        assert not asked
        with saved_tensors_hooks(lambda t: (asked.append(t), t.detach())[1], lambda t: t):
            y = y + F.linear(s, w)
    assert any(t.data_ptr() == s.data_ptr() for t in asked)
    y.sum().backward()
    assert torch.equal(w.grad, 2 * s.sum((0, 1)).expand(5, -1))


def test_threads_have_their_own() -> None:
    """As torch's hooks: a context that is open in one thread packs nothing of another's."""
    net = network(torch.float32, "cpu")
    x = random_input((4, 2, 3, 12, 12))
    want = step(net, x)
    nets = [network(torch.float32, "cpu") for _ in range(4)]
    got: list[Any] = [None] * 4

    def run(i: int) -> None:
        assert not packed.here.contexts
        got[i] = step(nets[i], x, EACH_WAY[i % 2])

    with nj.packed_spikes():
        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for grads in got:
        assert_all_same_bits(grads, want)


@each_device
def test_autocast(device: str, monkeypatch: Any) -> None:
    """A float32 neuron before a linear layer in half precision: what is kept is a cast copy."""
    x = random_input((4, 3, 8)).to(device)
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(device)
    found, saved = [], Saved(monkeypatch)
    for context in EACH_WAY:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        with context(), torch.autocast(device, torch.bfloat16):
            y = F.linear(fired(x), w)
        found.append(torch.autograd.grad(y.float().sin().sum(), (x, w)))
    assert saved.spikes and not any(saved.kept())
    assert_all_same_bits(*found)


@each_device
@pytest.mark.slow
def test_around_a_compiled_part(device: str) -> None:
    """Inside, nothing is packed; eager spikes that go in are."""
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    x = random_input((4, 3, 8)).to(device)

    def part(s: Tensor, w: Tensor) -> Tensor:
        return F.linear(nj.multistep("lif", F.linear(s, w)).spikes, w).sin()

    def broken(s: Tensor, w: Tensor) -> Tensor:
        with nj.packed_spikes():
            return part(fired(F.linear(s, w)), w)

    whole = torch.compile(part, backend="aot_eager", fullgraph=True)
    parts = torch.compile(broken, backend="aot_eager")
    found = [torch.autograd.grad(f(x, w).sum(), w) for f in (broken, parts)]
    assert_all_same_bits(*found)
    found = []
    for context in EACH_WAY:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        with context():
            spikes = fired(x)
            memory = storage_of(spikes)
            y = whole(spikes, w)
            del spikes
        assert (memory() is None) == (context is nj.packed_spikes)
        found.append(torch.autograd.grad(y.sum(), (x, w)))
    assert_all_same_bits(*found)


@pytest.mark.cuda
def test_nothing_waits_for_the_gpu() -> None:
    x = random_input((4, 3, 8, 8, 8)).cuda().requires_grad_()
    w = torch.randn(5, 8, 3, 3, device="cuda", requires_grad=True)

    def run() -> None:
        with nj.packed_spikes():
            y = F.conv2d(F.max_pool2d(fired(x).flatten(0, 1), 2), w)
        torch.autograd.grad(y.sum(), (x, w))

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_in_a_captured_step() -> None:
    """Replays of one CUDA graph train to the losses of eager steps without packing."""
    losses = []
    for captured in (False, True):
        net = network(torch.float32, "cuda")
        x = random_input((4, 2, 3, 12, 12)).cuda()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        loss = torch.zeros((), device="cuda")

        def run(context: Any, net: Any = net, optimizer: Any = optimizer, loss: Any = loss) -> None:
            nj.nn.reset_net(net)
            optimizer.zero_grad(set_to_none=True)
            with context():
                made = net(x).square().mean()  # noqa: B023 runs in this turn of the loop
            made.backward()
            optimizer.step()
            loss.copy_(made.detach())

        context = EACH_WAY[captured]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run(context)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                run(context)
        each = []
        for _ in range(5):
            graph.replay() if captured else run(context)
            each.append(loss.item())
        losses.append(each)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


@pytest.mark.cuda
def test_streams_have_their_own_bits() -> None:
    x = random_input((4, 3, 8)).cuda()
    w = torch.randn(5, 8, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    with nj.packed_spikes():
        s = fired(x)
        y = F.linear(s, w)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            z = F.linear(s, w)
    assert len(packed._known[s.untyped_storage()].bits) == 2
    torch.cuda.current_stream().wait_stream(side)
    (y + z).sum().backward()
    torch.testing.assert_close(w.grad, 2 * s.sum((0, 1)).expand(5, -1))


@pytest.mark.cuda
def test_memory_of_a_step() -> None:
    """A stack of linear layers with neurons between."""
    torch.manual_seed(0)
    layers = [(torch.nn.Linear(1024, 1024), nj.nn.LIF()) for _ in range(4)]
    net = torch.nn.Sequential(*[layer for pair in layers for layer in pair]).cuda()
    x = random_input((8, 512, 1024)).cuda()
    one = x.numel() * x.itemsize
    held = []
    for context in EACH_WAY:
        step(net, x, context)
        nj.nn.reset_net(net)
        before = torch.cuda.memory_allocated()
        with context():
            y = net(x)
        held.append((torch.cuda.memory_allocated() - before) / one)
        del y
    assert held[0] - held[1] > 2.8  # three of the four spike tensors are inputs of a next layer


@each_device
@pytest.mark.peers
@pytest.mark.parametrize("name", ["cifar10net", "spikformer", "sew_resnet"])
def test_accelerated_spikingjelly(name: str, device: str, monkeypatch: Any) -> None:
    _, neuron, functional = networks.spikingjelly()
    net = getattr(networks, name)(neurons=neuron)
    functional.set_step_mode(net, "m")
    for module in net.modules():
        for key, child in list(module.named_children()):
            if "Dropout" in type(child).__name__:
                setattr(module, key, torch.nn.Identity())
    nj.accelerate(net.to(device), strict=True)
    x = random_input((4, 2, 3, 32, 32)).to(device)
    found, saved = [], Saved(monkeypatch)
    for context in EACH_WAY:
        functional.reset_net(net)
        net.zero_grad(set_to_none=True)
        with context():
            loss = net(x).square().sum()
        loss.backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert_all_same_bits(*found)
    assert saved.kept().count(False) > 5  # others are averages that happen to be 0 and 1


@pytest.mark.peers("snntorch")
def test_accelerated_snntorch(monkeypatch: Any) -> None:
    import snntorch

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(8, 16), snntorch.Leaky(beta=0.9, init_hidden=True), torch.nn.Linear(16, 4)
    )
    nj.accelerate(net, strict=True)
    x = random_input((5, 3, 8)).mul_(2)
    found, saved = [], Saved(monkeypatch)
    for context in EACH_WAY:
        net.zero_grad(set_to_none=True)
        net[1].reset_mem()
        with context():
            loss = sum(net(one).square().sum() for one in x)
        loss.backward()
        found.append([p.grad for p in net.parameters()])
    assert_all_same_bits(*found)
    assert len(saved.spikes) >= 5 and not any(saved.kept())
