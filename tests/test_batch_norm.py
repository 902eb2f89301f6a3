"""Batch norm within the neuron's kernels, against torch's batch norm and the neuron apart."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support import each_device
from torch import Tensor, nn

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
            scale = max(want.double().abs().max().item(), 1e-3)
            assert (want - got).double().abs().max().item() <= tolerance * scale
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


@each_device
@pytest.mark.parametrize("model", ["lif", "izhikevich", "klif", "ilif", "alif"])
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


def test_fuse_leaves_alone_what_it_cannot_see_through() -> None:
    class Block(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    class Shifted(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    each, norm, relu, lif = nj.nn.EachStep, nn.BatchNorm2d, nn.ReLU(), nj.nn.LIF
    shared = norm(2)
    for net in (
        Block(each(norm(2)), lif()),
        nn.Sequential(each(Shifted(2)), lif()),
        nn.Sequential(each(shared), lif(), each(shared), nn.ReLU()),
        nn.Sequential(relu, each(norm(2)), relu, lif()),  # the relu is there twice
        nn.Sequential(each(relu, norm(2), relu), lif()),
        nn.Sequential(each(norm(2)), nj.nn.LIFNode()),
        nn.ModuleDict({"norm": norm(2), "neuron": lif()}),
    ):
        assert nj.nn.fuse(net) == 0
    assert nj.nn.fuse(nn.Sequential(nn.Sequential(each(norm(2)), lif()), lif())) == 1


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


def test_in_a_graph() -> None:
    for train in (True, False):
        net = nj.nn.NormedNeuron(norm_of((4, 3, 6)), nj.nn.LIF(surrogate=SMOOTH)).train(train)
        found = []
        for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
            net.neuron.reset()
            x = sequence((4, 3, 6), 1).float().requires_grad_()
            out = run(x)
            found.append([out.detach(), torch.autograd.grad(out.square().sum(), x)[0]])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_what_is_not_fused() -> None:
    lif = nj.nn.LIF()
    for norm, why in (
        (nn.LayerNorm(3), "LayerNorm is no BatchNorm"),
        (nn.SyncBatchNorm(3), "SyncBatchNorm is no BatchNorm"),
        (nn.LazyBatchNorm2d(), "has not seen an input yet"),
    ):
        with pytest.raises(nj.SpecError, match=why):
            nj.nn.NormedNeuron(norm, lif)
    with pytest.raises(nj.SpecError, match="single steps"):
        nj.nn.NormedNeuron(nn.BatchNorm2d(3), nj.nn.LIFNode())
    with pytest.raises(nj.SpecError, match="no layer of neuronjit"):
        nj.nn.NormedNeuron(nn.BatchNorm2d(3), nn.ReLU())
    with pytest.raises(nj.SpecError, match="unknown residual 'beside'"):
        nj.nn.NormedNeuron(nn.BatchNorm2d(3), lif, "beside")
    fused = nj.nn.NormedNeuron(nn.BatchNorm2d(3), lif)
    with pytest.raises(nj.SpecError, match="fused already"):
        nj.nn.NormedNeuron(nn.BatchNorm2d(3), lif)
    with pytest.raises(nj.SpecError, match=r"3 features, so x_seq must be \[T, N, 3, \*\]"):
        fused(torch.ones(2, 2, 4, 5, 5))
    with pytest.raises(nj.SpecError, match="more than one value a channel"):
        fused(torch.ones(1, 1, 3, 1, 1))
    with pytest.raises(nj.SpecError, match="has the inputs x; got 2 of them"):
        fused(torch.ones(2, 2, 3, 5, 5), torch.ones(2, 2, 3, 5, 5))
    with pytest.raises(nj.SpecError, match="EachStep takes sequences"):
        nj.nn.EachStep(nn.Linear(3, 3))(torch.ones(2, 3))


def test_add_grad() -> None:
    """At every step of backward, whatever arrives; not in what the step computes."""
    plain = nj.NeuronModel("plain", "h = 0.5 * v + x", state={"v": 0.0})
    more = nj.NeuronModel(
        "more", "h = 0.5 * v + add_grad(x, a + x * x)", state={"v": 0.0}, params={"a": 0.25}
    )
    for backend in ("cpu", "eager"):
        x = sequence((5, 3), 1).requires_grad_()
        outs = [nj.multistep(m, x, backend=backend).spikes for m in (plain, more)]
        assert torch.equal(*outs)
        without, with_it = (torch.autograd.grad(out.sum(), x)[0] for out in outs)
        torch.testing.assert_close(with_it, without + 0.25 + x.detach() ** 2)
    with pytest.raises(nj.EquationError, match=r"add_grad\(\) stands in the equations of a model"):
        nj.Surrogate("wrong", "add_grad(u, 1)")
