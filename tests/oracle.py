"""An independent oracle: every neuron again, as a plain PyTorch loop that autograd differentiates.

Written from the equations alone and sharing no code with the library, so that a fault would have
to be made twice to go unseen. It runs on the CPU (on CUDA, torch turns a division by a CPU number
into a product with its reciprocal). Numbers become 0-dim tensors of the arithmetic dtype, so that
`/ tau` is one IEEE division, and each line keeps the written order of operations: spikes of models
without transcendental functions must match the kernels' bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from oracle_surrogates import SEED_SURROGATES, SURROGATES, Surrogate
from torch import Tensor

__all__ = ["MODELS", "SEED", "SEED_SURROGATES", "SURROGATES", "USER", "Result", "Surrogate", "run"]


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a sequence of this storage dtype is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one step is given, besides the states `z` and the parameters `p` (attribute bags)."""

    surrogate: Surrogate
    reset: str
    detach_reset: bool
    strict: bool
    seen: dict[str, Tensor] = field(default_factory=dict)

    def fire(self, h: Tensor, theta: Tensor) -> Tensor:
        self.seen["h"], self.seen["u"] = h, h - theta
        self.seen["s"] = self.surrogate.fire(h, theta, self.strict)
        return self.seen["s"]

    def cut(self, s: Tensor) -> Tensor:
        """The spike as the reset sees it."""
        return s.detach() if self.detach_reset else s

    def after(self, h: Tensor, s: Tensor, theta: Tensor, v_reset: Tensor) -> Tensor:
        """V after a hard or soft reset."""
        s = self.cut(s)
        if self.reset == "soft":
            return h - s * theta
        return h * (1 - s) + v_reset * s


class _Bag:
    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.__dict__.update(values)


@dataclass(frozen=True)
class Model:
    """`step(x, z, p, k)` gives the new states; `text` says the same in the library's language."""

    step: Callable[[Tensor, Any, Any, Step], dict[str, Tensor]]
    params: Mapping[str, float]
    state: Mapping[str, float]
    exact: bool = True  # no transcendental function: every implementation gives the same bits
    text: str | None = None
    strict: bool = False
    own_reset: bool = False


def _simple(charge: Callable[[Tensor, Any, Any], Tensor]) -> Callable[..., dict[str, Tensor]]:
    """A model whose only state is v: charge, fire, reset."""

    def step(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
        h = charge(x, z.v, p)
        s = k.fire(h, p.v_threshold)
        return {"v": k.after(h, s, p.v_threshold, p.v_reset)}

    return step


def _izhikevich(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
    h = z.v + (x + p.a0 * (z.v - p.v_rest) * (z.v - p.v_c) - z.w) / p.tau
    s = k.fire(h, p.v_threshold)
    w = z.w + (p.a * (h - p.v_rest) - z.w) / p.tau_w + p.b * s
    return {"v": k.after(h, s, p.v_threshold, p.v_reset), "w": w}


_BASE = {"v_threshold": 1.0, "v_reset": 0.0}
_V = {"v": 0.0}


def _lif(x: Tensor, v: Tensor, p: Any) -> Tensor:
    return v + (x - (v - p.v_reset)) / p.tau


def _lif_no_decay(x: Tensor, v: Tensor, p: Any) -> Tensor:
    return v - (v - p.v_reset) / p.tau + x


def _plif(x: Tensor, v: Tensor, p: Any) -> Tensor:
    return v + (x - (v - p.v_reset)) * p.reciprocal_tau


def _plif_no_decay(x: Tensor, v: Tensor, p: Any) -> Tensor:
    return v - (v - p.v_reset) * p.reciprocal_tau + x


def _qif(x: Tensor, v: Tensor, p: Any) -> Tensor:
    return v + (x + p.a0 * (v - p.v_rest) * (v - p.v_c)) / p.tau


def _eif(x: Tensor, v: Tensor, p: Any) -> Tensor:
    return v + (x - (v - p.v_rest) + p.delta_T * torch.exp((v - p.theta_rh) / p.delta_T)) / p.tau


_TAU = {**_BASE, "tau": 2.0}
_RECIPROCAL = {**_BASE, "reciprocal_tau": 0.5}
_QIF = {"v_threshold": 1.0, "v_reset": -0.1, "tau": 2.0, "v_c": 0.8, "a0": 1.0, "v_rest": 0.0}
_EIF = {**_TAU, "v_reset": -0.1, "delta_T": 1.0, "theta_rh": 0.8, "v_rest": 0.0}
_IZHIKEVICH = {**_QIF, "v_reset": 0.0, "v_rest": -0.1, "tau_w": 2.0, "a": 0.0, "b": 0.0}

SEED: dict[str, Model] = {
    "IF": Model(_simple(lambda x, v, p: v + x), _BASE, _V),
    "LIF": Model(_simple(_lif), _TAU, _V),
    "LIF_NO_DECAY": Model(_simple(_lif_no_decay), _TAU, _V),
    "PLIF": Model(_simple(_plif), _RECIPROCAL, _V),
    "PLIF_NO_DECAY": Model(_simple(_plif_no_decay), _RECIPROCAL, _V),
    "QIF": Model(_simple(_qif), _QIF, _V),
    "EIF": Model(_simple(_eif), _EIF, _V, exact=False),
    "IZHIKEVICH": Model(_izhikevich, _IZHIKEVICH, {"v": 0.0, "w": 0.0}),
}


# --- models beyond the seed, each next to its equations -----------------------------------------


def _alif(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
    h = p.beta * z.v + x
    theta = p.v_threshold + p.beta_a * z.a
    s = k.fire(h, theta)
    return {"a": p.rho * z.a + s, "v": k.after(h, s, theta, p.v_reset)}


def _adex(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
    h = (
        z.v
        + (x - (z.v - p.v_rest) + p.delta_T * torch.exp((z.v - p.theta_rh) / p.delta_T) - z.w)
        / p.tau
    )
    s = k.fire(h, p.v_threshold)
    w = z.w + (p.a * (h - p.v_rest) - z.w) / p.tau_w + p.b * s
    return {"w": w, "v": k.after(h, s, p.v_threshold, p.v_reset)}


def _clif(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
    h = z.v - z.v / p.tau + x
    s = k.fire(h, p.v_threshold)
    m = z.m * torch.sigmoid(h / p.tau) + s
    return {"m": m, "v": h - k.cut(s) * (p.v_threshold + torch.sigmoid(m))}


def _leaky(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
    delayed = (z.v > p.v_threshold).to(x.dtype)
    h = p.beta * z.v + x - delayed * p.v_threshold
    k.fire(h, p.v_threshold)
    return {"v": h}


def _synaptic(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
    i = p.alpha * z.i + x
    h = p.beta * z.v + i
    s = k.fire(h, p.v_threshold)
    return {"i": i, "v": k.after(h, s, p.v_threshold, p.v_reset)}


def _refractory(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
    h = torch.where(z.c > 0, z.v, z.v + (x - z.v) / p.tau)
    s = k.fire(h, p.v_threshold)
    one, half, zero = (torch.tensor(n, dtype=x.dtype) for n in (1.0, 0.5, 0.0))
    c = torch.where(s > half, p.steps, torch.maximum(z.c - one, zero))
    return {"c": c, "v": k.after(h, s, p.v_threshold, p.v_reset)}


def _klif(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
    zero = torch.zeros((), dtype=x.dtype)
    h = torch.maximum(p.k * (z.v + (x - (z.v - p.v_reset)) / p.tau), zero)
    s = k.fire(h, p.v_threshold)
    return {"v": k.after(h, s, p.v_threshold, p.v_reset)}


def _alpha(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
    e = p.a * z.e + x
    n = p.b * z.n - x
    h = p.t * (e + n)
    s = k.fire(h, p.v_threshold)
    return {"e": e, "n": n, "v": k.after(h, s, p.v_threshold, p.v_reset)}


def _classic_izhikevich(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
    number = {n: torch.tensor(n, dtype=x.dtype) for n in (0.04, 5.0, 140.0, 0.5)}
    h = z.v + p.dt * (number[0.04] * z.v * z.v + number[5.0] * z.v + number[140.0] - z.r + x)
    r = z.r + p.dt * p.a * (p.b * z.v - z.r)
    s = k.fire(h, p.v_threshold)
    r = r + p.d * s
    return {"r": r, "v": torch.where(k.cut(s) > number[0.5], p.c, h)}


def _rotating(x: Tensor, z: Any, p: Any, k: Step) -> dict[str, Tensor]:
    h = p.decay * (torch.cos(p.omega) * z.v - torch.sin(p.omega) * z.q) + x
    q = p.decay * (torch.sin(p.omega) * z.v + torch.cos(p.omega) * z.q)
    s = k.fire(h, p.v_threshold)
    return {"q": q, "v": k.after(h, s, p.v_threshold, p.v_reset)}


USER: dict[str, Model] = {
    "alif": Model(
        _alif,
        {**_BASE, "beta": 0.9, "beta_a": 0.3, "rho": 0.8},
        {"v": 0.0, "a": 0.0},
        text="""
            h = beta * v + x
            theta = v_threshold + beta_a * a
            a = rho * a + s
        """,
    ),
    "adex": Model(
        _adex,
        {
            **_BASE,
            "tau": 2.0,
            "v_rest": 0.0,
            "delta_T": 1.0,
            "theta_rh": 0.8,
            "a": 0.1,
            "b": 0.1,
            "tau_w": 2.0,
        },
        {"v": 0.0, "w": 0.0},
        exact=False,
        text="""
            h = v + (x - (v - v_rest) + delta_T * exp((v - theta_rh) / delta_T) - w) / tau
            w = w + (a * (h - v_rest) - w) / tau_w + b * s
        """,
    ),
    "clif": Model(
        _clif,
        {**_BASE, "tau": 2.0},
        {"v": 0.0, "m": 0.0},
        exact=False,
        own_reset=True,
        text="""
            h = v - v / tau + x
            m = m * sigmoid(h / tau) + s
            v = h - s * (theta + sigmoid(m))
        """,
    ),
    "leaky": Model(
        _leaky,
        {**_BASE, "beta": 0.9},
        _V,
        strict=True,
        own_reset=True,
        text="""
            r = detach(where(v > v_threshold, 1, 0))
            h = beta * v + x - r * v_threshold
            v = h
        """,
    ),
    "synaptic": Model(
        _synaptic,
        {**_BASE, "alpha": 0.8, "beta": 0.9},
        {"v": 0.0, "i": 0.0},
        text="""
            i = alpha * i + x
            h = beta * v + i
        """,
    ),
    "refractory": Model(
        _refractory,
        {**_BASE, "tau": 2.0, "steps": 3.0},
        {"v": 0.0, "c": 0.0},
        text="""
            h = where(c > 0, v, v + (x - v) / tau)
            c = where(s > 0.5, steps, maximum(c - 1, 0))
        """,
    ),
    "klif": Model(
        _klif,
        {**_BASE, "tau": 2.0, "k": 1.2},
        _V,
        text="h = maximum(k * (v + (x - (v - v_reset)) / tau), 0)",
    ),
    "alpha": Model(
        _alpha,
        {**_BASE, "a": 0.9, "b": 0.8, "t": 1.5},
        {"v": 0.0, "e": 0.0, "n": 0.0},
        text="""
            e = a * e + x
            n = b * n - x
            h = t * (e + n)
        """,
    ),
    "classic_izhikevich": Model(
        _classic_izhikevich,
        {"v_threshold": 30.0, "v_reset": 0.0, "dt": 0.5, "a": 0.02, "b": 0.2, "c": -65.0, "d": 8.0},
        {"v": -65.0, "r": -13.0},
        own_reset=True,
        text="""
            h = v + dt * (0.04 * v * v + 5 * v + 140 - r + x)
            r = r + dt * a * (b * v - r)
            r = r + d * s
            v = where(s > 0.5, c, h)
        """,
    ),
    "rotating": Model(
        _rotating,
        {**_BASE, "decay": 0.95, "omega": 0.7},
        {"v": 0.0, "q": 0.0},
        exact=False,
        text="""
            h = decay * (cos(omega) * v - sin(omega) * q) + x
            q = decay * (sin(omega) * v + cos(omega) * q)
        """,
    ),
}

MODELS = {**SEED, **USER}


# --- the loop -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    spikes: Tensor  # [T, N, *], dtype of x
    record: dict[str, Tensor]  # every state and "h", [T, N, *], dtype of x
    state: dict[str, Tensor]  # [N, *], arithmetic dtype
    distance: Tensor  # h - theta, [T, N, *], arithmetic dtype


def run(
    model: str | Model,
    x: Tensor,
    state: Mapping[str, Any] | None = None,
    *,
    surrogate: Surrogate,
    reset: str = "hard",
    detach_reset: bool = False,
    **params: Any,
) -> Result:
    """Step `model` over x [T, N, *]. States, parameters: numbers, or tensors broadcast to x[0]."""
    model = MODELS[model] if isinstance(model, str) else model
    assert x.device.type == "cpu", "the oracle runs on the CPU"
    real = arithmetic(x.dtype)

    def tensor(value: Any) -> Tensor:
        return (
            value.to(real) if isinstance(value, Tensor) else torch.tensor(float(value), dtype=real)
        )

    assert params.keys() <= model.params.keys(), f"unknown parameters in {sorted(params)}"
    values = {**model.params, **params}
    if reset == "soft":
        values["v_reset"] = params.get("v_reset", 0.0)
    p = _Bag({key: tensor(value) for key, value in values.items()})
    start = {**model.state, **(state or {})}
    z = {key: tensor(value).expand(x.shape[1:]) for key, value in start.items()}
    sequences: dict[str, list[Tensor]] = {key: [] for key in ("s", "h", "u", *z)}
    for x_t in x.to(real):
        k = Step(surrogate, reset, detach_reset, model.strict)
        z = {
            key: torch.broadcast_to(new, x.shape[1:])
            for key, new in model.step(x_t, _Bag(z), p, k).items()
        }
        for key, value in {**k.seen, **z}.items():
            sequences[key].append(value)
    stacked = {
        key: torch.stack(many) if many else x.new_zeros(x.shape, dtype=real)
        for key, many in sequences.items()
    }
    return Result(
        spikes=stacked["s"].to(x.dtype),
        record={key: stacked[key].to(x.dtype) for key in ("h", *z)},
        state=z,
        distance=stacked["u"].detach(),
    )
