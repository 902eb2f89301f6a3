"""What docs/contributing.md says to add, added from outside: each in as few places as it says."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import neuronjit as nj
from neuronjit.kernels import render, spec
from neuronjit.language import algebra, functions
from neuronjit.language.tree import Node
from neuronjit.models import block

Slope = Callable[[Tensor], Tensor]


class Step(torch.autograd.Function):
    """The Heaviside step, with a slope of its own."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, slope: Slope) -> Tensor:
        ctx.save_for_backward(u)
        ctx.slope = slope
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return grad * ctx.slope(u), None


def atan(u: Tensor) -> Tensor:
    return 1.0 / (1.0 + (math.pi * u) ** 2)  # alpha = 2


def compared(
    model: nj.NeuronModel,
    charge: Callable[[Tensor, Tensor], Tensor],
    after: Callable[[Tensor, Tensor], Tensor],
    slope: Slope = atan,
    **options: Any,
) -> None:
    """The kernels against h = charge(v, x), s = step(h - 1), v = after(h, s), in plain PyTorch."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20, 7, generator=generator, dtype=torch.float64) * 2 - 0.3
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    v, spikes = torch.zeros(7, dtype=torch.float64), []
    for step in theirs:
        h = charge(v, step)
        spikes.append(Step.apply(h - 1, slope))
        v = after(h, spikes[-1])
    wanted = torch.stack(spikes)
    assert 10 < wanted.sum() < 130
    weights = torch.rand(20, 7, generator=generator, dtype=torch.float64)
    (wanted * weights).sum().backward()
    for backend in ("cpu", "eager"):
        ours.grad = None
        out = nj.multistep(model, ours, backend=backend, **options)
        assert torch.equal(out.spikes, wanted), backend
        (out.spikes * weights).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-13)


def hard(h: Tensor, s: Tensor) -> Tensor:
    return h * (1 - s)


def test_a_neuron_is_one_model() -> None:
    model = nj.NeuronModel(
        "cubic", "h = v + (x - k * v**3) / tau", state=dict(v=0.0), params=dict(k=0.3, tau=1.5)
    )
    compared(model, lambda v, x: v + (x - 0.3 * v**3) / 1.5, hard)
    assert "cubic" in nj.render(model, target="cuda")
    assert nj.nn.Neuron(model)(torch.ones(4, 3)).shape == (4, 3)


def test_a_surrogate_is_one_surrogate() -> None:
    box = nj.Surrogate("box", "where(abs(u) < width, 0.5 / width, 0)", params=dict(width=0.4))

    def slope(u: Tensor) -> Tensor:
        return torch.where(u.abs() < 0.4, 0.5 / 0.4, 0.0).to(u)

    compared(nj.neurons.IF, lambda v, x: v + x, hard, slope, surrogate=box)


def test_a_reset_is_one_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(block.RESETS, "half", "v = h - 0.5 * s * theta")
    compared(nj.neurons.IF, lambda v, x: v + x, lambda h, s: h - 0.5 * s, reset="half")
    text = nj.render("if", reset="half", direction="forward")
    assert "reset (half): v = h - 0.5 * s * theta" in text
    assert nj.nn.Neuron("if", reset="half")(torch.ones(4, 3)).sum() == 12
    with pytest.raises(nj.SpecError, match=r"unknown reset 'third'\. Known: half, hard, soft"):
        nj.multistep("if", torch.ones(4, 3), reset="third")


def softplus(node: Node, a: Node) -> tuple[Node]:
    return (algebra.over(algebra.ONE, Node("+", (algebra.ONE, Node("exp", (Node("neg", (a,)),))))),)


def test_a_function_is_one_row_and_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = functions.Operation(1, torch.nn.functional.softplus, softplus, long=True)
    for table in (functions.FUNCTIONS, functions.OPERATIONS):
        monkeypatch.setitem(table, "softplus", row)
    templates = shutil.copytree(spec.templates(), tmp_path / "templates")
    with (templates / "math.h.j2").open("a") as file:
        file.write(
            "template <typename R> INLINE_ R softplus_(R a) { return log_(R(1) + exp_(a)); }\n"
        )
    kept = spec._renderer, render._environment
    for cached in kept:
        cached.cache_clear()
    monkeypatch.setattr(spec, "templates", lambda: templates)
    monkeypatch.setattr(render, "templates", lambda: templates)
    try:
        model = nj.NeuronModel("bent", "h = 0.9 * v + softplus(x) - 0.5", state=dict(v=0.0))
        compared(model, lambda v, x: 0.9 * v + torch.nn.functional.softplus(x) - 0.5, hard)
    finally:
        for cached in kept:
            cached.cache_clear()
