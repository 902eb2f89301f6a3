"""Backward believes nothing: what it is given is compared with what forward saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from support import GRADIENT_TOLERANCE, assert_near, each_device, inputs
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import neuronjit as nj

SURROGATE = oracle.Surrogate("ATan")
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: (
        x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])
    ),
    "transposed": lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),
    "sliced": lambda x: torch.cat((x, x), -1)[..., ::2],
}
GIVEN_BACK: dict[str, Callable[[Tensor], Tensor]] = {
    "the same": lambda t: t,
    "C-contiguous": lambda t: t.contiguous().clone(memory_format=torch.contiguous_format),
    "reversed": lambda t: t.permute(*range(t.dim())[::-1]).contiguous().permute(
        *range(t.dim())[::-1]
    ),
    "misaligned": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
    "strided": lambda t: torch.stack((t, t), -1)[..., 0],
}  # fmt: skip


def gradients(x: Tensor, v: Tensor, tau: Tensor, hooks: Any) -> tuple[Tensor, ...]:
    with hooks:
        out = nj.multistep("lif", x, {"v": v}, tau=tau, record=("v",))
    loss = (out.spikes * out.record["v"].detach()).sum() + out.state["v"].square().sum()
    return torch.autograd.grad(loss, (x, v, tau))


def leaves(device: str, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    x = LAYOUTS[layout](inputs((20, 2, 3, 4, 5)).to(device)).detach().requires_grad_()
    v = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(3)).to(device)
    tau = torch.full((3, 1, 1), 1.7, device=device)
    return x, v.requires_grad_(), tau.requires_grad_()


@each_device
@pytest.mark.parametrize("kind", GIVEN_BACK)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_mended(layout: str, kind: str, device: str) -> None:
    given = leaves(device, layout)
    theirs = [t.detach().cpu().requires_grad_() for t in given]
    out = oracle.run("LIF", theirs[0], {"v": theirs[1]}, surrogate=SURROGATE, tau=theirs[2])
    loss = (out.spikes * out.record["v"].detach()).sum() + out.state["v"].square().sum()
    want = torch.autograd.grad(loss, theirs)
    hooks = saved_tensors_hooks(lambda t: t, GIVEN_BACK[kind])
    for turn in range(2):  # cold, then warm
        for name, a, b in zip("xvt", gradients(*given, hooks), want, strict=True):
            assert_near(a, b, GRADIENT_TOLERANCE[torch.float32], f"{name}, {turn}", floor=1.0)


@pytest.mark.cuda
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_on_the_cpu_in_pinned_memory(layout: str) -> None:
    """It gives back C-contiguous tensors, whatever was saved."""
    given = leaves("cuda", layout)
    want = gradients(*given, saved_tensors_hooks(lambda t: t, lambda t: t))
    for a, b in zip(gradients(*given, save_on_cpu(pin_memory=True)), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "another dtype": lambda t: t.double(),
    "half of it": lambda t: t[: len(t) // 2],
    "flat": lambda t: t.flatten()[:-1],
    "more": lambda t: torch.cat((t, t)),
    "sparse": lambda t: t.to_sparse(),
}


@each_device
@pytest.mark.parametrize("which", ["x_seq", "v_init", "checkpoints"])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_shapes_and_dtypes_are_refused(kind: str, which: str, device: str) -> None:
    """By name, and the next call is as if nothing had been."""
    x, v, tau = leaves(device, "contiguous")
    shape = {"x_seq": x.shape, "v_init": v.shape}.get(which)

    def unpack(t: Tensor) -> Tensor:
        mine = t.shape == shape if shape else t.dim() == 1
        return REFUSED[kind](t) if mine else t

    with pytest.raises(nj.SpecError, match=which):
        gradients(x, v, tau, saved_tensors_hooks(lambda t: t, unpack))
    assert gradients(x, v, tau, saved_tensors_hooks(lambda t: t, lambda t: t))[0].isfinite().all()


@each_device
@pytest.mark.parametrize("shape", [(20, 3), (5, 4), (20, 8), (0, 4)])
def test_data_that_is_replaced_is_refused(shape: tuple[int, ...], device: str) -> None:
    x = inputs((20, 4)).to(device).requires_grad_()
    spikes = nj.multistep("lif", x).spikes
    x.data = torch.zeros(shape, device=device)
    with pytest.raises((nj.SpecError, RuntimeError), match=r"x_seq|shape|size"):
        spikes.sum().backward()


# --- tensors without memory -----------------------------------------------------------------------


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


WITHOUT_MEMORY = {
    "freed": freed,
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape, device=t.device),
}


@each_device
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
@pytest.mark.parametrize("which", ["x_seq", "v_init", "tau", "tau per neuron"])
def test_tensors_without_memory_are_refused_by_name(which: str, kind: str, device: str) -> None:
    """An address of 0 means "a number was given" to kernels."""
    make = WITHOUT_MEMORY[kind]
    x, v, tau = inputs((5, 4)).to(device), torch.zeros(4, device=device), torch.tensor([2.0])
    tau = tau.expand(4).contiguous() if which == "tau per neuron" else tau
    given = {"x_seq": x, "v_init": v, "tau": tau.to(device)}
    nj.multistep("lif", given["x_seq"], {"v": given["v_init"]}, tau=given["tau"])  # warm
    name = which.split()[0]
    given[name] = make(given[name])
    for _ in range(2):
        with pytest.raises((nj.SpecError, NotImplementedError, RuntimeError)) as caught:
            nj.multistep("lif", given["x_seq"], {"v": given["v_init"]}, tau=given["tau"])
        if kind == "freed":
            assert name in str(caught.value) and "memory" in str(caught.value)


@each_device
def test_functionalize_is_refused(device: str) -> None:
    x, v = inputs((5, 4)).to(device), torch.zeros(4, device=device)
    run = torch.func.functionalize(lambda x, v: nj.multistep("lif", x, {"v": v}).spikes)
    for _ in range(2):
        with pytest.raises((nj.DifferentiationError, nj.SpecError)):
            run(x, v)


# --- gradients that arrive ------------------------------------------------------------------------


class Arriving(torch.autograd.Function):
    """Identity whose gradient comes in another form."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, change: Any) -> Tensor:
        ctx.change = change
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.change(grad), None


@each_device
@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.to_sparse(),
        lambda g: torch._neg_view(-g),
        lambda g: g[..., :1].expand_as(g).clone().mul_(0).add_(g),
        lambda g: g.transpose(0, -1).contiguous().transpose(0, -1),
    ],
    ids=["sparse", "negated view", "copy", "transposed"],
)
def test_gradients_in_any_form(change: Any, device: str) -> None:
    x = inputs((20, 4)).to(device).requires_grad_()
    grads = []
    for form in (change, lambda g: g):
        out = nj.multistep("lif", x, record=("v",))
        parts = [Arriving.apply(t, form) for t in (out.spikes, out.state["v"], out.record["v"])]
        loss = parts[0].square().sum() + parts[1].square().sum() + parts[2].sin().sum()
        grads.append(torch.autograd.grad(loss, x)[0])
    assert torch.equal(*grads)


# --- parameters of odd shapes and layouts ---------------------------------------------------------


@each_device
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_one_element_of_any_dimension_is_a_number(backend: str, device: str) -> None:
    x = inputs((5, 4)).to(device)
    want = nj.multistep("lif", x, tau=1.5, backend=backend).spikes
    for shape in ((), (1,), (1, 1), (1, 1, 1, 1)):
        tau = torch.full(shape, 1.5, device=device, requires_grad=True)
        out = nj.multistep("lif", x, tau=tau, backend=backend)
        assert torch.equal(out.spikes, want)
        (grad,) = torch.autograd.grad(out.state["v"].sum(), tau)
        assert grad.shape == tau.shape and grad.isfinite().all()


@each_device
def test_nested_tensors_are_no_parameters(device: str) -> None:
    x = inputs((5, 2)).to(device)
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(1)], device=device)
    for given in (dict(tau=nested), dict(state={"v": nested})):
        for _ in range(2):
            with pytest.raises(nj.InputTypeError, match="nested"):
                nj.multistep("lif", x, **given)
