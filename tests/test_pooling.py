"""Max pooling with a byte a window: against torch's, alone, in networks, packed, in graphs.

Its kernels run on the host in tests/cuda_on_host.py.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support import DTYPES, compare_pooling, poolings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import neuronjit as nj
from neuronjit.kernels import build
from neuronjit.nn.pooling import is_light, lighten
from neuronjit.run import pooling
from neuronjit.run.pooling import max_pool2d


def light(*args: Any, **options: Any) -> nn.MaxPool2d:
    pool = nn.MaxPool2d(*args, **options)
    lighten(pool)
    return pool


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels of poolings that are queued from now on."""
    names: list[str] = []
    right = pooling._Pooling._launch

    def launch(self: Any, back: int, *given: Any) -> None:
        names.append(self._specs[back].helper)
        right(self, back, *given)

    monkeypatch.setattr(pooling._Pooling, "_launch", launch)
    return names


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_torch(dtype: torch.dtype) -> None:
    for x, size, ceil_mode in poolings(dtype, "cuda"):
        leaf = x.requires_grad_()
        y = max_pool2d(leaf, size, ceil_mode)
        assert y is not None
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        assert y.is_contiguous(memory_format=layout)
        with torch.no_grad():
            assert torch.equal(max_pool2d(x, size, ceil_mode).nan_to_num(9), y.nan_to_num(9))

        def back(grad: Tensor, y: Tensor = y, leaf: Tensor = leaf) -> Tensor:
            return torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]

        compare_pooling(x, size, ceil_mode, y, back)


@pytest.mark.cuda
def test_large_as_torch(queued: list[str]) -> None:
    """The stems of networks, where torch's own kernels sum in another order."""
    for last in (False, True):
        for size in (2, 3):
            x = (torch.randn(16, 64, 112, 112, device="cuda") > 1).half()
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            ours, theirs = (x.clone().requires_grad_() for _ in range(2))
            y = light(size, 2, size - 2)(ours)
            want = F.max_pool2d(theirs, size, 2, size - 2)
            assert torch.equal(y, want)
            grad = torch.randn_like(want)
            y.backward(grad)
            want.backward(grad)
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert set(queued) == {
        "max_pool", "max_pool_back", "max_pool_rows", "max_pool_rows_back",
    }  # fmt: skip


@pytest.mark.cuda
def test_what_is_kept(queued: list[str]) -> None:
    """A byte a window; nothing where no gradient is asked for."""
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
    x = torch.randn(2, 8, 8, 8, device="cuda", requires_grad=True)
    with hooks:
        y = light(2)(x)
        light(2)(x.detach())
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, y.numel())]
    assert queued == ["max_pool_rows"] * 2


@pytest.mark.cuda
def test_others_are_torchs(queued: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other layouts, dtypes and transforms, and where there are no kernels."""
    pool = light(3, 2, 1)
    x = torch.randn(2, 8, 8, 8, device="cuda")
    right = F.max_pool2d(x, 3, 2, 1)
    assert torch.equal(pool(x.transpose(2, 3)), F.max_pool2d(x.transpose(2, 3), 3, 2, 1))
    assert torch.equal(pool(x[:, :, ::2]), F.max_pool2d(x[:, :, ::2], 3, 2, 1))
    assert torch.equal(pool(x[0]), right[0])
    assert torch.equal(torch.func.vmap(pool)(x[None])[0], right)
    assert torch.equal(pool(x.cpu()), right.cpu())
    assert pool(x[:0]).shape == (0, 8, 4, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(pool(dual)).tangent
        assert torch.equal(tangent, torch.ones_like(right))
    assert torch.equal(torch.jit.trace(pool, x, check_trace=False)(x), right)
    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    assert torch.equal(pool(x), right)
    monkeypatch.delenv("NEURONJIT_BACKEND")
    with pytest.raises(RuntimeError, match="Output size"):
        light(2)(x[:, :, :1].contiguous())
    assert not queued
    monkeypatch.setattr(build, "_helpers", {})
    monkeypatch.setattr(pooling, "plans", {})

    def load_kernel(*_: object) -> None:
        raise nj.BackendError("none here")

    monkeypatch.setattr(build, "load_kernel", load_kernel)
    assert torch.equal(pool(x), right) and not queued


@pytest.mark.cuda
def test_attributes_may_change(queued: list[str]) -> None:
    pool = light(2)
    x = torch.randn(2, 8, 8, 8, device="cuda")
    assert torch.equal(pool(x), F.max_pool2d(x, 2))
    pool.padding = 1
    assert torch.equal(pool(x), F.max_pool2d(x, 2, 2, 1))
    pool.padding, pool.return_indices = 0, True
    _, indices = pool(x)
    assert indices.dtype == torch.int64
    assert queued == ["max_pool_rows"]


@pytest.mark.cuda
def test_derivatives() -> None:
    x = torch.randn(2, 4, 6, 6, device="cuda", requires_grad=True)
    y = light(2)(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.square().sum().backward()
    y = light(2)(x)
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(y, x, torch.ones(3, *y.shape, device="cuda"), is_grads_batched=True)
    y = light(2)(x)
    y.register_hook(lambda grad: grad.half())
    with pytest.raises(RuntimeError):
        y.sum().backward()
    y = light(2)(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.cuda
def test_what_hooks_give_back() -> None:
    x = torch.randn(2, 8, 8, 8, device="cuda", requires_grad=True)
    want = torch.autograd.grad(light(2)(x).square().sum(), x)[0]
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        y = light(2)(x)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], want)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.cpu()):
        y = light(2)(x)
    with pytest.raises(nj.SpecError, match="windows that backward is given are not what forward"):
        y.sum().backward()


@pytest.mark.cuda
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool, queued: list[str]) -> None:
    x = torch.randn(2, 4, 6, 6, device="cuda", requires_grad=True)
    checkpoint(light(3, 2, 1), x, use_reentrant=reentrant).square().sum().backward()
    leaf = x.detach().requires_grad_()
    F.max_pool2d(leaf, 3, 2, 1).square().sum().backward()
    assert torch.equal(x.grad, leaf.grad)
    assert queued == ["max_pool_rows"] * 2 + ["max_pool_rows_back"]


@pytest.mark.cuda
def test_captured(queued: list[str]) -> None:
    x = torch.randn(2, 4, 6, 6, device="cuda", requires_grad=True)
    pool = light(2)
    graph = torch.cuda.CUDAGraph()
    torch.autograd.grad(pool(x).square().sum(), x)
    with torch.cuda.graph(graph):
        (grad,) = torch.autograd.grad(pool(x).square().sum(), x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    leaf = x.detach().requires_grad_()
    F.max_pool2d(leaf, 2).square().sum().backward()
    assert torch.equal(grad, leaf.grad)
    assert len(queued) == 4


@pytest.mark.cuda
def test_kernels_that_cannot_be_loaded_in_a_capture(
    queued: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's are captured, and the next call finds ours."""
    monkeypatch.setattr(build, "_helpers", {})
    monkeypatch.setattr(build, "_kernels", {})
    monkeypatch.setattr(pooling, "plans", {})
    x = torch.randn(2, 4, 6, 6, device="cuda")
    pool = light(2)
    F.max_pool2d(x, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = pool(x)
    assert not queued
    graph.replay()
    assert torch.equal(y, pool(x)) and queued


def network(device: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nj.nn.EachStep(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)), nj.nn.LIF(),
        nj.nn.EachStep(nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        nj.nn.LIF(), nj.nn.EachStep(nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(128, 10)),
    ).to(device)  # fmt: skip


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    nj.nn.reset_net(net)
    net.zero_grad()
    net(x).square().mean().backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.cuda
def test_a_network(queued: list[str]) -> None:
    """As without; packed as well, where the pooled spikes are packed for the next convolution."""
    x = torch.randn(4, 3, 2, 16, 16, device="cuda")
    net = network("cuda")
    want = gradients(net, x)
    assert nj.nn.fuse(net) == 2 and not queued
    for near in (gradients(net, x), gradients(copy.deepcopy(net), x)):
        for a, b in zip(near, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(queued) == 8
    saved: list[Any] = []
    inner = nj.run.packed._pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nj.run.packed, "_pack", lambda t: (saved.append(inner(t)), saved[-1])[1])
        with nj.packed_spikes():
            packed = gradients(net, x)
    for a, b in zip(packed, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    kept = [known.shape for _, _, known in saved if known is not None]
    assert (12, 8, 8, 8) in kept and (12, 128) in kept  # of a convolution, of a linear layer


@pytest.mark.cuda
@pytest.mark.slow
def test_compiled(queued: list[str]) -> None:
    """Compilers keep torch's."""
    x = torch.randn(4, 3, 2, 16, 16, device="cuda")
    net = network("cuda")
    want = gradients(net, x)
    nj.nn.fuse(net)
    for a, b in zip(gradients(torch.compile(net, fullgraph=True), x), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not queued


def test_fuse_and_unfuse() -> None:
    """On a CPU they are torch's."""
    x = torch.randn(4, 3, 2, 16, 16)
    net = network("cpu")
    net[4][0].register_forward_hook(lambda module, given, y: y)
    net.append(nn.MaxPool2d(4))
    want, keys = gradients(net[:5], x), list(net.state_dict())
    for _ in range(2):
        nj.nn.fuse(net)
        pools = [m for m in net.modules() if isinstance(m, nn.MaxPool2d)]
        assert [is_light(pool) for pool in pools] == [True, True, False]
        assert list(net.state_dict()) == keys
    again = copy.deepcopy(net)
    assert again[2][0].forward.args[0] is again[2][0]
    loaded = pickle.loads(pickle.dumps(net[2]))  # noqa: S301
    assert is_light(loaded[0]) and loaded[0].forward.args[0] is loaded[0]
    for a, b in zip(gradients(net[:5], x), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert nj.nn.unfuse(net) == 2
    assert not any(map(is_light, net.modules()))


def test_poolings_that_are_left_alone() -> None:
    class Own(nn.MaxPool2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    odd = nn.MaxPool2d(2)
    odd.forward = lambda x: x
    others = [
        Own(2), odd, nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(3), nn.MaxPool2d((2, 3)),
        nn.MaxPool2d(2, 1), nn.MaxPool2d(2, dilation=2), nn.MaxPool2d(3, 2), nn.MaxPool1d(2),
    ]  # fmt: skip
    net = nn.Sequential(*others, nn.MaxPool2d((3, 3), (2, 2), [1, 1], (1, 1)), nn.MaxPool2d([2, 2]))
    nj.nn.fuse(net)
    assert [is_light(pool) for pool in net] == [False] * len(others) + [True] * 2


@pytest.mark.peers("spikingjelly")
def test_accelerate() -> None:
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), neuron.LIFNode(), layer.MaxPool2d(2, 2)
    )
    functional.set_step_mode(net, "m")
    x = torch.randn(4, 2, 2, 8, 8)
    report = nj.accelerate(net, x, fuse=True)
    assert report.poolings == ("3",) and is_light(net[3]) and report.proof.same
    assert "max pooling with a byte a window for backward, on a GPU: 3\n" in str(report)
    assert nj.accelerate(net, fuse=True).poolings == ("3",)
    functional.reset_net(net)
    y = net(x)
    functional.reset_net(net)
    assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(x), y)
    functional.reset_net(net)
    functional.set_step_mode(net, "s")
    assert net[3](x[0]).shape == (2, 2, 4, 4)
    net[3].step_mode = "m"
    with pytest.raises(ValueError, match="expected x with shape"):
        net[3](x[0])
    assert nj.restore(net) == 1 and not is_light(net[3])


@pytest.mark.cuda
@pytest.mark.peers("spikingjelly")
def test_spikingjellys(queued: list[str]) -> None:
    """Time is folded into the batch, channels_last steps stay channels_last."""
    from spikingjelly.activation_based import layer

    pool = layer.MaxPool2d(3, 2, 1, step_mode="m")
    for last in (False, True):
        x = torch.randn(12, 8, 9, 9, device="cuda")
        x = (x.contiguous(memory_format=torch.channels_last) if last else x).unflatten(0, (4, 3))
        want = pool(x)
        lighten(pool)
        got = pool(x)
        assert torch.equal(got, want) and got.stride() == want.stride()
        nj.nn.pooling.restore(pool)
    assert queued == ["max_pool"] * 2
