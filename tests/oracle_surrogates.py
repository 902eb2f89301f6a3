"""The surrogates of the oracle: derivative and primitive columns, written again in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    defaults: Mapping[str, float]
    derivative: Callable[[Tensor, Any], Tensor]
    primitive: Callable[[Tensor, Any], Tensor] | None
    kinks: Callable[[Mapping[str, float]], tuple[float, ...]] = lambda p: (
        0.0,
    )  # where either is not smooth


class _Values:
    """Parameters as attributes, each a 0-dim tensor of u's dtype."""

    def __init__(self, values: Mapping[str, float], like: Tensor) -> None:
        for key, value in values.items():
            setattr(self, key, torch.tensor(value, dtype=like.dtype))


def _logistic_slope(u: Tensor, alpha: Tensor) -> Tensor:
    sig = torch.sigmoid(alpha * u)
    return alpha * sig * (1 - sig)


def _piecewise_leaky(u: Tensor, p: Any) -> Tensor:
    outer = torch.where(u < -p.w, p.c * u + p.c * p.w, p.c * u - p.c * p.w + 1)
    return torch.where(u.abs() < p.w, u / (2 * p.w) + 0.5, outer)


def _q_pseudo(u: Tensor, p: Any) -> Tensor:
    below = 0.5 * (1 - 2 * u.clamp(max=0) / (p.alpha - 1)) ** (1 - p.alpha)
    above = 1 - 0.5 * (1 + 2 * u.clamp(min=0) / (p.alpha - 1)) ** (1 - p.alpha)
    return torch.where(u < 0, below, above)


def _fake_numerical(u: Tensor, p: Any) -> Tensor:
    sign_plus = torch.where(u >= 0, torch.ones_like(u), -torch.ones_like(u))
    return torch.where(u == 0, p.alpha, torch.minimum(sign_plus / u, p.alpha))


def _log_tailed_slope(u: Tensor, p: Any) -> Tensor:
    return torch.where(u <= 0, p.alpha, torch.where(u <= 1, torch.ones_like(u), 1 / u))


def _log_tailed(u: Tensor, p: Any) -> Tensor:
    return torch.where(u <= 0, p.alpha * u, torch.where(u <= 1, u, torch.log(u.clamp(min=1)) + 1))


def _triangle(u: Tensor, p: Any) -> Tensor:
    middle = -(p.alpha**2) * u.abs() * u / 2 + p.alpha * u + 0.5
    return torch.where(u < -1 / p.alpha, 0, torch.where(u > 1 / p.alpha, 1, middle))


def _two_sided_exp(u: Tensor, p: Any) -> Tensor:
    below = torch.exp(p.alpha * u.clamp(max=0)) / 2
    return torch.where(u < 0, below, 1 - torch.exp(-p.alpha * u.clamp(min=0)) / 2)


def _square_wave_slope(u: Tensor, p: Any) -> Tensor:
    total = torch.zeros_like(u)
    for i in range(1, int(p.n)):
        total = total + torch.cos((2 * i - 1) * 2 * math.pi * u / p.T)
    return 4 / p.T * total


def _square_wave(u: Tensor, p: Any) -> Tensor:
    total = torch.zeros_like(u)
    for i in range(1, int(p.n)):
        total = total + torch.sin((2 * i - 1) * 2 * math.pi * u / p.T) / (2 * i - 1)
    return 0.5 + 2 / math.pi * total


def _s2nn_slope(u: Tensor, p: Any) -> Tensor:
    return torch.where(u < 0, _logistic_slope(u, p.alpha), p.beta / (u + 1))


def _s2nn(u: Tensor, p: Any) -> Tensor:
    return torch.where(
        u < 0, torch.sigmoid(p.alpha * u), p.beta * torch.log((u + 1).abs() + 1e-5) + 0.5
    )


SEED_SURROGATES = (
    "Sigmoid", "ATan", "PiecewiseLeakyReLU", "S2NN", "QPseudoSpike", "LeakyKReLU",
    "FakeNumericalGradient", "LogTailedReLU",
)  # fmt: skip

SURROGATES: dict[str, Shape] = {
    "Sigmoid": Shape(
        {"alpha": 4.0},
        lambda u, p: _logistic_slope(u, p.alpha),
        lambda u, p: torch.sigmoid(p.alpha * u),
    ),
    "ATan": Shape(
        {"alpha": 2.0},
        lambda u, p: (p.alpha / 2) / (1 + (math.pi * p.alpha * u / 2) ** 2),
        lambda u, p: torch.atan(math.pi * p.alpha * u / 2) / math.pi + 0.5,
    ),
    "PiecewiseLeakyReLU": Shape(
        {"w": 1.0, "c": 0.01},
        lambda u, p: torch.where(u.abs() < p.w, 1 / (2 * p.w), p.c),
        _piecewise_leaky,
        lambda p: (0.0, p["w"], -p["w"]),
    ),
    "S2NN": Shape({"alpha": 4.0, "beta": 1.0}, _s2nn_slope, _s2nn),
    "QPseudoSpike": Shape(
        {"alpha": 2.0}, lambda u, p: (1 + 2 * u.abs() / (p.alpha - 1)) ** (-p.alpha), _q_pseudo
    ),
    "LeakyKReLU": Shape(
        {"leak": 0.0, "k": 1.0},
        lambda u, p: torch.where(u >= 0, p.k, p.leak),
        lambda u, p: torch.where(u >= 0, p.k, p.leak) * u,
    ),
    "FakeNumericalGradient": Shape({"alpha": 0.3}, _fake_numerical, None),
    "LogTailedReLU": Shape({"alpha": 0.0}, _log_tailed_slope, _log_tailed, lambda p: (0.0, 1.0)),
    "PiecewiseQuadratic": Shape(
        {"alpha": 1.0},
        lambda u, p: (p.alpha - p.alpha**2 * u.abs()).clamp(min=0),
        _triangle,
        lambda p: (0.0, 1 / p["alpha"], -1 / p["alpha"]),
    ),
    "PiecewiseExp": Shape(
        {"alpha": 1.0},
        lambda u, p: (p.alpha / 2) * torch.exp(-p.alpha * u.abs()),
        _two_sided_exp,
    ),
    "SoftSign": Shape(
        {"alpha": 2.0},
        lambda u, p: 1 / (2 * p.alpha * (1 / p.alpha + u.abs()) ** 2),
        lambda u, p: (p.alpha * u / (1 + (p.alpha * u).abs()) + 1) / 2,
    ),
    "SuperSpike": Shape({"alpha": 1.0}, lambda u, p: p.alpha / (1 + u.abs()) ** 2, None),
    "FastSigmoid": Shape(
        {"k": 25.0},
        lambda u, p: 1 / (1 + p.k * u.abs()) ** 2,
        lambda u, p: u / (1 + p.k * u.abs()) + 0.5,
    ),
    "Erf": Shape(
        {"alpha": 2.0},
        lambda u, p: (p.alpha / math.sqrt(math.pi)) * torch.exp(-(p.alpha**2) * u**2),
        lambda u, p: torch.erfc(-p.alpha * u) / 2,
    ),
    "NonzeroSignLogAbs": Shape(
        {"alpha": 1.0},
        lambda u, p: 1 / (1 / p.alpha + u.abs()),
        lambda u, p: torch.where(u >= 0, 1.0, -1.0).to(u.dtype) * torch.log(p.alpha * u.abs() + 1),
    ),
    "Rect": Shape(
        {"alpha": 1.0},
        lambda u, p: torch.where(u.abs() < 1 / (2 * p.alpha), p.alpha, torch.zeros_like(p.alpha)),
        lambda u, p: (p.alpha * u + 0.5).clamp(0, 1),
        lambda p: (0.0, 0.5 / p["alpha"], -0.5 / p["alpha"]),
    ),
    "StraightThrough": Shape({}, lambda u, p: torch.ones_like(u), lambda u, p: u),
    "SquarewaveFourierSeries": Shape({"n": 2, "T": 8.0}, _square_wave_slope, _square_wave),
    "SpikeRateEscape": Shape(
        {"beta": 1.0, "k": 25.0},
        lambda u, p: p.k * torch.exp(-p.beta * (u - 1).abs()),
        None,
        lambda p: (0.0, 1.0),
    ),
    "Gaussian": Shape(
        {"sigma": 1.0},
        lambda u, p: torch.exp(-0.5 * (u / p.sigma) ** 2) / (p.sigma * math.sqrt(2 * math.pi)),
        lambda u, p: torch.erfc(-u / (p.sigma * math.sqrt(2))) / 2,
    ),
    "Tanh": Shape(
        {"k": 1.0},
        lambda u, p: 1 - torch.tanh(p.k * u) ** 2,
        lambda u, p: torch.tanh(p.k * u) / p.k + 0.5,
    ),
}  # fmt: skip


class _Spike(torch.autograd.Function):
    """Forward: the step. Backward: the derivative column of the surrogate."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, fired: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(u)
        ctx.surrogate = surrogate
        return fired.to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (u,) = ctx.saved_tensors
        return grad * ctx.surrogate.slope(u), None, None


class Surrogate:
    """One of SURROGATES with its numbers."""

    def __init__(self, name: str, spiking: bool = True, **params: float) -> None:
        self.name, self.spiking, self.shape = name, spiking, SURROGATES[name]
        assert params.keys() <= self.shape.defaults.keys(), f"{name} has no {params}"
        self.params = {**self.shape.defaults, **params}

    def slope(self, u: Tensor) -> Tensor:
        return self.shape.derivative(u, _Values(self.params, u))

    def smooth(self, u: Tensor) -> Tensor:
        assert self.shape.primitive is not None, f"{self.name} has no primitive"
        return self.shape.primitive(u, _Values(self.params, u))

    def fire(self, h: Tensor, theta: Tensor, strict: bool) -> Tensor:
        u = h - theta
        if not self.spiking:
            return self.smooth(u)
        return _Spike.apply(u, (h > theta) if strict else (h >= theta), self)

    def kinks(self) -> tuple[float, ...]:
        return self.shape.kinks(self.params)
