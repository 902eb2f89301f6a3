"""Batch norm within the neuron's kernels, against torch's batch norm and the neuron apart."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support import each_device, slow
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import neuronjit as nj
from neuronjit.nn import batch_norm

SMOOTH = nj.surrogates.ATan(spiking=False)


@pytest.fixture(autouse=True)
def always_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, where small sequences are not worth it."""
    monkeypatch.setattr(batch_norm, "_pays", lambda x: True)


def apart(norm: nn.Module, neuron: nn.Module, x: Tensor, skip: Tensor, residual: Any) -> Tensor:
    y = norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    out = neuron(y + skip if residual == "before" else y)
    return out + skip if residual == "after" else out


def norm_of(shape: tuple[int, ...], **options: Any) -> nn.Module:
    kind = {3: nn.BatchNorm1d, 4: nn.BatchNorm1d, 5: nn.BatchNorm2d, 6: nn.BatchNorm3d}[len(shape)]
    norm = kind(shape[2], **options)
    if norm.affine:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            norm.weight.copy_(torch.rand(shape[2], generator=generator) * 1.5 + 0.5)
            norm.bias.copy_(torch.rand(shape[2], generator=generator) - 0.3)
    return norm


def sequence(shape: tuple[int, ...], seed: int, last: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if last:
        order = (0, 1, *range(3, len(shape)), 2)
        x = x.permute(order).contiguous().permute(0, 1, -1, *range(2, len(shape) - 1))
    return x


def largest(t: Tensor) -> float:
    return t.double().abs().max().item() if t.numel() else 0.0


def compare(
    shape: tuple[int, ...], device: str, *, residual: str | None = None, last: bool = False,
    model: str = "plif", surrogate: Any = SMOOTH, dtype: torch.dtype = torch.float64,
    train: bool = True, **options: Any,
) -> None:  # fmt: skip
    """Outputs, all gradients, and running statistics, over three batches with one state."""
    norm = norm_of(shape, **options).to(device, dtype).train(train)
    learnable = ("reciprocal_tau",) if model == "plif" else ()
    neuron = nj.nn.Neuron(model, surrogate=surrogate, learnable=learnable).to(device, dtype)
    fused = nj.nn.NormedNeuron(copy.deepcopy(norm), copy.deepcopy(neuron), residual)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for batch in range(3):
        data = [(sequence(shape, 3 * batch, last) * 2 + 3), sequence(shape, 3 * batch + 1) * 0.3]
        weight = sequence(shape, 3 * batch + 2).to(device, dtype)
        found = []
        for modules in ((norm, neuron), (fused.norm, fused.neuron)):
            x, skip = (t.to(device, dtype).requires_grad_() for t in data)
            leaves = [x, *modules[0].parameters(), *modules[1].parameters()]
            leaves += [skip] if residual else []
            if modules[0] is norm:
                out = apart(norm, neuron, x, skip, residual)
            else:
                out = fused(x, *([skip] if residual else []))
            grads = torch.autograd.grad(out, leaves, weight)
            modules[1].detach()
            found.append([out.detach(), *grads, *modules[0].buffers()])
        for want, got in zip(*found, strict=True):
            assert want.shape == got.shape and want.dtype == got.dtype
            scale = max(largest(want), 1e-3)
            assert largest(want - got) <= tolerance * scale
    nj.nn.reset_net(fused)


@each_device
@pytest.mark.parametrize("residual", [None, "before", "after"])
@pytest.mark.parametrize("last", [False, True])
def test_as_apart(residual: str | None, last: bool, device: str) -> None:
    compare((5, 4, 8, 6, 6), device, residual=residual, last=last)
    compare((5, 4, 8, 6, 6), device, residual=residual, last=last, dtype=torch.float32)


@each_device
@pytest.mark.parametrize("shape", [(21, 6, 5), (3, 1, 4, 7), (2, 3, 2, 3, 2, 5), (1, 2, 3, 4, 4)])
def test_shapes(shape: tuple[int, ...], device: str) -> None:
    compare(shape, device)


@each_device
@pytest.mark.parametrize(
    "options",
    [
        dict(affine=False), dict(track_running_stats=False), dict(momentum=None),
        dict(momentum=0.37, eps=0.1), dict(train=False),
        dict(track_running_stats=False, train=False),
    ],
    ids=str,
)  # fmt: skip
def test_options_of_the_norm(options: dict[str, Any], device: str) -> None:
    compare((4, 3, 6, 5, 5), device, **options)


@pytest.mark.parametrize("train", [True, False])
def test_a_norm_that_was_changed_since_it_was_made(train: bool) -> None:
    """Frozen statistics, no count of batches, other numbers: read at every call."""

    def changed(norm: Any) -> None:
        norm.track_running_stats = False

    def uncounted(norm: Any) -> None:
        norm.num_batches_tracked = None

    def forgotten(norm: Any) -> None:
        norm.running_mean = norm.running_var = None

    for change in (changed, uncounted, forgotten):
        plain, fused = (norm_of((4, 3, 6, 5, 5)).double().train(train) for _ in range(2))
        neurons = [nj.nn.LIF(surrogate=SMOOTH) for _ in range(2)]
        made = nj.nn.NormedNeuron(fused, neurons[1])
        for norm in (plain, fused):
            change(norm)
        for batch in range(2):
            x = sequence((4, 3, 6, 5, 5), batch) * 2 + 3
            want = apart(plain, neurons[0], x, x, None)
            torch.testing.assert_close(made(x), want, rtol=1e-10, atol=1e-12)
            assert plain.state_dict().keys() == fused.state_dict().keys()
            for name, value in plain.state_dict().items():
                torch.testing.assert_close(fused.state_dict()[name], value)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(4, 0, 3, 5, 5), (0, 2, 3, 5, 5), (2, 2, 3, 0, 5)])
def test_empty_batches(shape: tuple[int, ...], train: bool) -> None:
    """As torch's batch norm, which leaves the running statistics as they are."""
    compare(shape, "cpu", model="lif", train=train)


def test_evaluation_then_training_before_backward() -> None:
    """The running mean is brought on in place, and backward reads that of its own forward."""
    norm = norm_of((4, 3, 6, 5, 5)).double()
    norm(sequence((12, 6, 5, 5), 1))
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    fused = nj.nn.NormedNeuron(norm, nj.nn.LIF(surrogate=SMOOTH))
    x = sequence((4, 3, 6, 5, 5), 2).requires_grad_()
    out = fused.eval()(x)
    fused.neuron.reset()
    fused.train()(x)
    by_channel = [t.view(6, 1, 1) for t in (mean, var, norm.weight, norm.bias)]
    y = (x - by_channel[0]) / (by_channel[1] + norm.eps).sqrt() * by_channel[2] + by_channel[3]
    want = nj.multistep("lif", y, surrogate=SMOOTH, backend="eager").spikes
    leaves = [x, *norm.parameters()]
    got, right = (torch.autograd.grad(t.square().sum(), leaves) for t in (out, want))
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


@each_device
@pytest.mark.parametrize("model", ["lif", "izhikevich", slow("klif"), slow("ilif"), slow("alif")])
def test_neurons(model: str, device: str) -> None:
    compare((4, 3, 6, 5, 5), device, model=model)
    compare((4, 3, 6, 5, 5), device, model=model, surrogate=nj.surrogates.ATan())


@each_device
def test_large_mean(device: str) -> None:
    """Sums about one of the values keep the variance of x that is far from 0."""
    x = (torch.randn(4, 8, 3, 9, 9, generator=torch.Generator().manual_seed(0)) + 3000).to(device)
    norm = nn.BatchNorm2d(3).to(device)
    nj.nn.NormedNeuron(norm, nj.nn.LIF())(x.requires_grad_())
    want = x.double().transpose(0, 2).flatten(1).var(1)
    torch.testing.assert_close(norm.running_var.double(), 0.9 + 0.1 * want, rtol=1e-3, atol=0)


@each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    """The normalised x is never rounded to half precision; so spikes are those of float32."""
    x = sequence((4, 3, 8, 6, 6), 1).to(device, dtype)
    norm, wide = norm_of((4, 3, 8, 6, 6)).to(device), norm_of((4, 3, 8, 6, 6)).to(device)
    got = nj.nn.NormedNeuron(norm, nj.nn.LIF())(x)
    want = nj.nn.NormedNeuron(wide, nj.nn.LIF())(x.float())
    assert got.dtype == dtype and (got.float() != want).float().mean() < 1e-3
    torch.testing.assert_close(norm.running_mean, wide.running_mean)
    # nor is anything else, where the norm's own numbers are in half precision
    norm.to(dtype).eval(), wide.load_state_dict(norm.state_dict())
    v = [nj.nn.LIF(surrogate=SMOOTH) for _ in range(2)]
    nj.nn.NormedNeuron(norm, v[0])(x), nj.nn.NormedNeuron(wide.eval(), v[1])(x.float())
    torch.testing.assert_close(v[0].v, v[1].v)


@pytest.mark.parametrize("residual", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_residual_of_another_dtype(
    dtype: torch.dtype, residual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes out has x's dtype, whether the two run as one or, in graphs, apart."""
    x, skip = sequence((3, 2, 3, 4, 4), 1).float(), sequence((3, 2, 3, 4, 4), 2).to(dtype)
    found = []
    for pays in (True, False):
        monkeypatch.setattr(batch_norm, "_pays", lambda x, pays=pays: pays)
        fused = nj.nn.NormedNeuron(nn.BatchNorm2d(3), nj.nn.LIF(surrogate=SMOOTH), residual)
        out = fused(x, skip)
        assert out.dtype == fused.neuron.v.dtype == torch.float32
        found.append(out)
    torch.testing.assert_close(*found)


def test_gradcheck() -> None:
    x, skip = (sequence((3, 2, 2, 2), seed).requires_grad_() for seed in (1, 2))
    for residual in (None, "before", "after"):
        fused = nj.nn.NormedNeuron(
            norm_of((3, 2, 2, 2)).double(), nj.nn.LIF(surrogate=SMOOTH), residual
        )

        def run(x: Tensor, *skip: Tensor, fused: Any = fused) -> Tensor:
            fused.neuron.reset()
            return fused(x, *skip)

        assert torch.autograd.gradcheck(run, (x, skip) if residual else (x,))


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nj.nn.EachStep(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), nj.nn.LIF(),
        nj.nn.EachStep(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), nj.nn.PLIF(),
        nj.nn.EachStep(nn.MaxPool2d(2)), nj.nn.Flatten(), nj.nn.EachStep(nn.Linear(24, 5)),
    )  # fmt: skip


def losses(net: nn.Module, steps: int = 12) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    found = []
    for step in range(steps):
        x = sequence((4, 3, 2, 8, 8), step).float()
        loss = (net(x).mean(0) - torch.eye(3, 5)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        nj.nn.reset_net(net)
        found.append(loss.item())
    return found


def test_fuse_and_unfuse() -> None:
    plain, fused = network(), network()
    keys = list(plain.state_dict())
    assert nj.nn.fuse(fused) == 2 and nj.nn.fuse(fused) == 0
    assert list(fused.state_dict()) == keys
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=2e-3, atol=2e-4)
    again = pickle.loads(pickle.dumps(copy.deepcopy(fused)))  # noqa: S301 our own
    x = sequence((4, 3, 2, 8, 8), 99).float()
    for net in (plain, fused, again):
        net.eval()
    want = plain(x)
    torch.testing.assert_close(fused(x), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(again(x), want, rtol=1e-3, atol=1e-3)
    assert again[1]._norm.norm is again[0][1]  # and not the norm of the net that was copied
    assert nj.nn.unfuse(fused) == 2 and nj.nn.unfuse(fused) == 0
    nj.nn.reset_net(fused)
    torch.testing.assert_close(fused(x), want, rtol=1e-3, atol=1e-3)


class Parts(nn.Module):
    """Two convolutions with batch norms, a neuron, and what the forwards below do with them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        each = nj.nn.EachStep
        self.first = each(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2))
        self.second = nn.Sequential(nn.Identity(), each(nn.BatchNorm2d(2)))
        self.more = nn.ModuleList([each(nn.BatchNorm2d(2)), nj.nn.LIF(surrogate=SMOOTH)])
        self.sn, self.relu = nj.nn.LIF(surrogate=SMOOTH), nn.ReLU()
        self.seen: list[Any] = []


class Shortcut(Parts):
    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        return self.sn(out) + x


class Through(Parts):
    """The norm is the last of a container in a container; a list of modules."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.sn(self.second(x))
        for module in self.more:
            x = module(x)
        return x


class Checked(Parts):
    """Conditions that guard errors alone; notes what it saw."""

    def forward(self, x: Tensor) -> Tensor:
        T, _, channels, *_ = x.shape[0], x.shape[1], x.shape[2]
        if T < 1 or channels != 2:
            raise ValueError(f"{x.shape}")
        if not x.dim() == 5:
            raise ValueError(f"{x.shape}")
        assert x.shape[3] > 2
        self.last = x
        self.seen.append(x)
        return torch.rand(1) * 0 + self.sn(self.first(x))


class Outer(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.block = Ends()

    def forward(self, x: Tensor) -> Tensor:
        return self.sn(self.block(x))


class Ends(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.relu(x))


class Loop(Parts):
    """What cannot be traced, round a Sequential and a block that can."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.row = Shortcut(), nn.Sequential(self.first, self.sn)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = x.unsqueeze(0)
        return self.row(self.block(x))


@pytest.mark.parametrize(
    ("kind", "count"), [(Shortcut, 1), (Through, 2), (Checked, 1), (Outer, 1), (Loop, 1)]
)
def test_fuse_reads_forwards(kind: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, gradients and running statistics in float64, in training and in evaluation."""
    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    plain, fused = kind().double(), kind().double()
    torch.manual_seed(9)
    drawn = torch.rand(1)
    torch.manual_seed(9)
    assert nj.nn.fuse(fused) == count
    assert torch.equal(torch.rand(1), drawn)
    assert fused.seen == [] and not hasattr(fused, "last")
    for train in (True, True, False):
        x, found = sequence((3, 2, 2, 4, 4), 1), []
        for net in (plain.train(train), fused.train(train)):
            nj.nn.reset_net(net)
            net.zero_grad()
            own = x.clone().requires_grad_()
            out = net(own)
            (out * sequence(tuple(out.shape), 2)).sum().backward()
            grads = [own.grad, *(p.grad for p in net.parameters() if p.grad is not None)]
            found.append([out.detach(), *grads, *net.buffers()])
        assert len(found[0]) == len(found[1]) > 5
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def forwards() -> dict[str, Any]:
    """Forwards of Parts whose norm must stay where it is."""
    features = torch.nn.functional.relu
    return {
        "others take the output": lambda self, x: (y := self.first(x), self.sn(y) + features(y))[1],
        "it is returned too": lambda self, x: (y := self.first(x), (self.sn(y), y))[1],
        "something between": lambda self, x: self.sn(features(self.first(x))),
        "changed in place": lambda self, x: (
            x := x + 0,
            y := self.first[1](x.flatten(0, 1)),
            x.mul_(2),
            self.sn(y),
        )[-1],
        "something in between": lambda self, x: (y := self.first(x), x.mul_(2), self.sn(y))[-1],
        "a module between": lambda self, x: self.sn(self.relu(self.first(x))),
        "the norm runs twice": lambda self, x: self.sn(self.first(x)) + self.first(x),
        "the neuron runs twice": lambda self, x: self.sn(self.sn(self.first(x))),
        "a part of it is called": lambda self, x: self.sn(self.first(x)) + self.first[1](x[0]),
        "two arguments": lambda self, x: self.sn(self.first(x), x),
        "it branches": lambda self, x: self.sn(self.first(x)) if x.dim() > 4 else self.first(x),
        "an option": lambda self, x, all=False: self.sn(self.first(x)),
        "options": lambda self, *x: self.sn(self.first(*x)),
        "in training only": lambda self, x: (
            self.sn(self.first(x)) if self.training else self.sn(self.first(x) + 1)
        ),
        "over time": lambda self, x: torch.stack(
            [self.sn(self.first(x[t])) for t in range(len(x))]
        ),
    }


@pytest.mark.parametrize("why", forwards())
def test_forwards_that_are_left_alone(why: str) -> None:
    net = type("Block", (Parts,), {"forward": forwards()[why]})()
    assert nj.nn.fuse(net) == 0
    assert all("forward" not in vars(module) for module in net.modules())


def test_fuse_leaves_alone_what_it_cannot_see_through() -> None:
    class Shifted(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    each, norm, relu, lif = nj.nn.EachStep, nn.BatchNorm2d, nn.ReLU(), nj.nn.LIF
    shared, block = norm(2), nn.Sequential(each(norm(2)), lif())
    hooked = [nn.Sequential(each(norm(2)), lif()) for _ in range(4)]
    hooked[0][0][0].register_forward_hook(lambda *_: None)
    hooked[1][0].register_forward_pre_hook(lambda *_: None)
    hooked[2][1].register_full_backward_hook(lambda *_: None)
    hooked[3][0].forward = lambda x: x
    for net in (
        nn.Sequential(each(Shifted(2)), lif()),
        nn.Sequential(each(shared), lif(), each(shared), nn.ReLU()),
        nn.Sequential(block, block),
        nn.Sequential(relu, each(norm(2)), relu, lif()),  # the relu is there twice
        nn.Sequential(each(relu, norm(2), relu), lif()),
        nn.Sequential(each(norm(2)), nj.nn.LIFNode()),
        nn.Sequential(nn.BatchNorm1d(2), lif()),  # of [T, N, C] it would take N for channels
        nn.Sequential(each(norm(2), lif())),
        nn.Sequential(each(each(norm(2))), lif()),
        nn.ModuleDict({"norm": norm(2), "neuron": lif()}),
        *hooked,
    ):
        assert nj.nn.fuse(net) == 0
    assert nj.nn.fuse(nn.Sequential(nn.Sequential(each(norm(2)), lif()), lif())) == 1


def test_a_parametrised_norm() -> None:
    """Its weight is computed, from a parameter that gets the gradient."""
    nets = []
    for _ in range(2):
        torch.manual_seed(5)
        norm = nn.BatchNorm2d(2)
        parametrize.register_parametrization(norm, "weight", nn.Softplus())
        neuron = nj.nn.LIF(surrogate=SMOOTH, backend="eager")
        nets.append(nn.Sequential(nj.nn.EachStep(nn.Conv2d(2, 2, 3), norm), neuron).double())
    assert nj.nn.fuse(nets[1]) == 1
    for net in nets:
        net(sequence((3, 2, 2, 4, 4), 1)).square().sum().backward()
    for want, got in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-12)


def test_a_fused_neuron_knows_when_its_norm_did_not_run() -> None:
    x = sequence((2, 2, 2, 4, 4), 1).float()
    for change in ("alone", "replaced", "in parts"):
        net = nn.Sequential(nj.nn.EachStep(nn.BatchNorm2d(2)), nj.nn.LIF(backend="eager"))
        assert nj.nn.fuse(net) == 1
        net(x)
        if change == "replaced":
            net[0][0] = nn.SyncBatchNorm.convert_sync_batchnorm(net[0][0])
            net.eval()
        with pytest.raises(nj.SpecError, match=r"without its batch norm .*unfuse\(net\)"):
            net[1](x) if change == "alone" else net[1](net[0](x)[:1] if change == "in parts" else x)


def test_a_normed_neuron_knows_when_a_part_was_replaced() -> None:
    x = sequence((2, 2, 2, 4, 4), 1).float()
    for change in ("norm", "neuron", "synchronised"):
        net = nj.nn.NormedNeuron(nn.BatchNorm2d(2), nj.nn.LIF(backend="eager"))
        copy.deepcopy(net)(x)
        if change == "synchronised":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        else:
            setattr(net, change, copy.deepcopy(getattr(net, change)))
        with pytest.raises(nj.SpecError, match="of a NormedNeuron was replaced"):
            net(x)


@pytest.mark.parametrize("kind", ["prune", "forward", "full_backward"])
def test_hooks_that_would_not_run(kind: str) -> None:
    net = nj.nn.NormedNeuron(nn.BatchNorm2d(2), nj.nn.LIF(backend="eager"))
    x = sequence((2, 2, 2, 4, 4), 1).float()
    net(x)
    if kind == "prune":  # recomputes the weight before each call
        prune.random_unstructured(net.norm, "weight", 0.5)
    else:
        hook = getattr(net.norm, f"register_{kind}_hook")(lambda *_: None)
    with pytest.raises(nj.SpecError, match="has hooks"):
        net(x)
    if kind == "prune":
        prune.remove(net.norm, "weight")
    else:
        hook.remove()
    net(x)


def test_a_fused_norm_knows_when_its_neuron_did_not_run() -> None:
    x = sequence((2, 2, 2, 4, 4), 1).float()
    for change in ("replaced", "in parts"):
        net = nn.Sequential(nj.nn.EachStep(nn.BatchNorm2d(2)), nj.nn.LIF(backend="eager"))
        assert nj.nn.fuse(net) == 1
        net(x)
        if change == "replaced":
            net[1] = nj.nn.LIF(backend="eager")
        net[: 2 if change == "replaced" else 1](x)
        with pytest.raises(nj.SpecError, match=r"was not called after it, .*unfuse\(net\)"):
            net(x)


def test_a_fused_network_goes_on_after_an_error() -> None:
    x = sequence((2, 2, 2, 4, 4), 1).float()
    net = nn.Sequential(nj.nn.EachStep(nn.BatchNorm2d(2)), nj.nn.LIF(backend="eager"))
    nj.nn.fuse(net)
    want = net(x)
    nj.nn.reset_net(net)
    with pytest.raises(nj.SpecError, match="has 2 features"):
        net(torch.cat([x, x], 2))
    assert torch.equal(net(x), want)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    hook = net[1].register_forward_pre_hook(stop)
    nj.nn.reset_net(net)
    with pytest.raises(KeyboardInterrupt):
        net(x)
    hook.remove()
    with pytest.raises(nj.SpecError, match="If an error ended that call, call again"):
        net(x)
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_of_fused_networks(reentrant: bool) -> None:
    """Of the norm without its neuron, and of both, where the state is reset inside."""
    x, found = sequence((2, 2, 2, 4, 4), 1), []
    for region in (None, "norm", "both"):
        net = nn.Sequential(nj.nn.EachStep(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)), nj.nn.LIF())
        torch.manual_seed(1)
        nn.init.normal_(net[0][0].weight)
        net.double()
        assert nj.nn.fuse(net) == 1

        def both(x: Tensor, net: Any = net) -> Tensor:
            nj.nn.reset_net(net)
            return net(x)

        for _ in range(3):
            net.zero_grad()
            own = x.clone().requires_grad_()
            nj.nn.reset_net(net)
            if region == "norm":
                out = net[1](checkpoint(net[0], own, use_reentrant=reentrant))
            else:
                out = net(own) if region is None else checkpoint(both, own, use_reentrant=reentrant)
            out.square().sum().backward()
        found.append([own.grad, net[0][0].weight.grad, net[0][1].weight.grad])
    for got in found[1:]:
        torch.testing.assert_close(got, found[0])


@pytest.mark.slow
def test_fused_networks_compile() -> None:
    torch._dynamo.reset()
    plain, fused = (nn.Sequential(Shortcut(), Shortcut()) for _ in range(2))
    assert nj.nn.fuse(fused) == 2
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    found = []
    for batch in (2, 3):
        for net in (plain, compiled):
            nj.nn.reset_net(fused if net is compiled else net)
            x = sequence((3, batch, 2, 4, 4), batch).float().requires_grad_()
            out = net(x)
            found.append([out.detach(), torch.autograd.grad(out.square().sum(), x)[0]])
    torch.testing.assert_close(found[1::2], found[::2], rtol=1e-4, atol=1e-5)


def test_a_forgotten_reset_is_named() -> None:
    fused = nj.nn.NormedNeuron(nn.BatchNorm2d(3), nj.nn.LIF())
    x = sequence((2, 2, 3, 4, 4), 1).float().requires_grad_()
    fused(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"the state of LIF was carried over .* call reset_net"):
        fused(x).sum().backward()
    fused.neuron.reset()
    (grad,) = torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    with pytest.raises(nj.DifferentiationError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.peers("spikingjelly")
@pytest.mark.parametrize("pays", [True, False])
def test_norms_of_spikingjelly(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from spikingjelly.activation_based import layer

    monkeypatch.setattr(batch_norm, "_pays", lambda x: pays)
    made = (layer.BatchNorm2d(3, step_mode="m"), layer.ThresholdDependentBatchNorm2d(1.0, 0.5, 3))
    for norm in made:
        theirs, x = copy.deepcopy(norm), sequence((4, 2, 3, 5, 5), 1).float()
        want = nj.nn.LIF(surrogate=SMOOTH)(theirs(x))
        got = nj.nn.NormedNeuron(norm, nj.nn.LIF(surrogate=SMOOTH))(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, theirs.running_var)


@pytest.mark.peers("spikingjelly")
def test_fuse_knows_spikingjellys_containers_and_norms() -> None:
    from spikingjelly.activation_based import layer

    from neuronjit.compat import layer as old

    lif, two = nj.nn.LIF, dict(step_mode="m")
    for before, count in (
        (layer.BatchNorm2d(2, **two), 1),
        (layer.ThresholdDependentBatchNorm2d(1.0, 0.5, 2), 1),
        (layer.SeqToANNContainer(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), 1),
        (nn.Sequential(layer.Conv2d(2, 2, 1, **two), layer.BatchNorm2d(2, **two)), 1),
        (layer.BatchNorm2d(2), 0),  # takes single steps
        (layer.TemporalEffectiveBatchNorm2d(3, 2), 0),  # scales each step
        (layer.SeqToANNContainer(layer.BatchNorm2d(2)), 1),
        (layer.MultiStepContainer(nn.BatchNorm2d(2)), 0),  # statistics of each step
        (layer.TLastSeqToANNContainer(nn.BatchNorm2d(2)), 0),
        (old.BatchNorm2d(2, **two), 1),  # ours, for scripts of its old versions
        (old.SeqToANNContainer(nn.BatchNorm2d(2)), 1),
    ):
        assert nj.nn.fuse(nn.Sequential(before, lif())) == count, before


def test_without_kernels() -> None:
    """In eager PyTorch, the same."""
    x = sequence((4, 2, 3, 5, 5), 1)
    found = []
    for backend in ("cpu", "eager"):
        norm = norm_of((4, 2, 3, 5, 5)).double()
        fused = nj.nn.NormedNeuron(norm, nj.nn.LIF(surrogate=SMOOTH, backend=backend), "after")
        leaves = [x.clone().requires_grad_(), (x * 0.5).requires_grad_(), *norm.parameters()]
        out = fused(*leaves[:2])
        grads = torch.autograd.grad(out.square().sum(), leaves)
        found.append([out.detach(), *grads, *norm.buffers()])
    torch.testing.assert_close(*found)


GRAPHS = [
    dict(), dict(residual="before"), dict(residual="after"), dict(train=False, residual="after"),
    dict(affine=False), dict(momentum=None), dict(track_running_stats=False), dict(last=True),
    dict(shape=(4, 3, 6)), dict(shape=(4, 3, 6, 5)), dict(dtype=torch.float64),
]  # fmt: skip


@each_device
@pytest.mark.parametrize("options", GRAPHS, ids=str)
def test_in_a_graph(options: dict[str, Any], device: str) -> None:
    """Without a graph break: kernels, statistics brought on, gradients; over three batches."""
    compare_in_a_graph("aot_eager", device, **options)


@each_device
@pytest.mark.slow
@pytest.mark.parametrize("options", GRAPHS, ids=str)
def test_compiled(options: dict[str, Any], device: str) -> None:
    compare_in_a_graph("inductor", device, **options)


def compare_in_a_graph(
    backend: str, device: str, *, shape: tuple[int, ...] = (4, 3, 6, 5, 5), last: bool = False,
    residual: str | None = None, train: bool = True, dtype: torch.dtype = torch.float32,
    dynamic: bool = False, **options: Any,
) -> None:  # fmt: skip
    torch._dynamo.reset()
    plain = nj.nn.NormedNeuron(norm_of(shape, **options), nj.nn.LIF(surrogate=SMOOTH), residual)
    plain = plain.to(device, dtype).train(train)
    traced = copy.deepcopy(plain)
    compiled = torch.compile(traced, fullgraph=True, backend=backend, dynamic=dynamic or None)
    for batch in range(3):
        shape = (shape[0], shape[1] + batch * dynamic, *shape[2:])
        data = [sequence(shape, batch, last).to(device, dtype) * 2 + 1 for _ in range(3)]
        found = []
        for net, run in ((plain, plain), (traced, compiled)):
            x, skip = (t.clone().requires_grad_() for t in data[:2])
            leaves = [x, *net.parameters(), *([skip] if residual else [])]
            out = run(x, *([skip] if residual else []))
            assert out.stride() == x.stride()
            grads = torch.autograd.grad(out, leaves, data[2])
            net.neuron.detach()
            found.append([out.detach(), *grads, *net.buffers()])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_graph_has_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they pay: on a GPU. Compilers fuse batch norms of their own."""
    for pays in (True, False):
        monkeypatch.setattr(batch_norm, "_pays", lambda x, pays=pays: pays)
        graphs: list[Any] = []

        def keep(graph: Any, inputs: Any, graphs: Any = graphs) -> Any:
            graphs.append(graph.code)
            return graph

        net = nj.nn.NormedNeuron(norm_of((4, 3, 6)), nj.nn.LIF())
        torch._dynamo.reset()
        torch.compile(net, backend=keep, fullgraph=True)(sequence((4, 3, 6), 1).float())
        assert ("neuronjit.statistics" in graphs[0]) == pays
        assert ("batch_norm" in graphs[0]) != pays


@pytest.mark.slow
def test_in_a_graph_for_any_batch() -> None:
    compare_in_a_graph("aot_eager", "cpu", dynamic=True)


def test_in_a_graph_without_kernels() -> None:
    """Backward goes twice over the sequence in eager PyTorch, too."""
    for backend in ("cpu", "eager"):
        net = nj.nn.NormedNeuron(norm_of((4, 3, 6)), nj.nn.LIF(surrogate=SMOOTH, backend=backend))
        found = []
        torch._dynamo.reset()
        for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
            net.neuron.reset()
            x = sequence((4, 3, 6), 1).float().requires_grad_()
            found.append(torch.autograd.grad(run(x).square().sum(), [x, *net.norm.parameters()]))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
