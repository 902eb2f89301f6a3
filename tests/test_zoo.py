"""The built-in models beyond the seed's: against their papers in plain PyTorch, and their peers.

Each row of ROWS is one step of a model, written from its paper or its peer's documentation; a loop
and an autograd function of this file make the rest. Numbers are such that neurons fire often.
"""

from __future__ import annotations

import copy
import math
import pickle
import pydoc
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace as Bag
from typing import Any

import pytest
import torch
from support import assert_near, each_device, inputs
from torch import Tensor

import neuronjit as nj

PAGE = Path(__file__).parent.parent / "docs" / "neurons.md"
BUILT_IN = nj.neurons.built_in()
SEED = ("if", "lif", "lif_no_decay", "plif", "plif_no_decay", "qif", "eif", "izhikevich")
T, N = 9, 40
# how near to a step of the output a value may come: beyond, rounding decides
CLEAR = {torch.float32: 1e-4, torch.float64: 1e-10}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


class ATan(torch.autograd.Function):
    """The step function with SpikingJelly's ATan(2) as its slope."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, strict: bool) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0 if strict else u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return grad / (1 + (math.pi * u) ** 2), None


@dataclass
class Steps:
    """What a row may use besides tensors: `fire`, and a note of how near each step came."""

    strict: bool
    distances: list[Tensor] = field(default_factory=list)

    def near(self, distance: Tensor) -> None:
        self.distances.append(distance.detach().abs())

    def fire(self, u: Tensor) -> Tensor:
        self.near(u)
        return ATan.apply(u, self.strict)

    def fired(self, z: Any, p: Any) -> Tensor:
        """snnTorch's reset: the spike that v would give again, detached."""
        self.near(z.v - p.v_threshold)
        return (z.v - p.v_threshold > 0).to(z.v.dtype)


def hard(h: Tensor, s: Tensor, p: Any) -> Tensor:
    return (1 - s) * h + s * p.v_reset


Step = Callable[[Tensor, Any, Any, Steps], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class Row:
    """One step gives what comes out, and the new states."""

    step: Step
    params: Mapping[str, float] = field(default_factory=dict)  # where the defaults hardly fire
    scale: float = 1.0  # of the input
    slow: bool = False  # another row has most of its equations


# --- one step of each, from its paper or peer -----------------------------------------------------


def li(x, z, p, k):
    v = z.v + (x - (z.v - p.v_leak)) / p.tau
    return v, {"v": v}


def klif(x, z, p, k):
    h = torch.relu(p.k * (z.v + (x - (z.v - p.v_reset)) / p.tau))
    s = k.fire(h - p.v_threshold)
    return s, {"v": hard(h, s, p)}


def gated_lif(x, z, p, k):
    leak = 1 - p.alpha * (1 - p.tau)
    u = leak * z.v - (1 - p.alpha) * p.linear_decay + x * (1 - p.beta * (1 - p.conduct))
    u = u - leak * z.v * p.gamma * z.last - (1 - p.gamma) * p.v_subreset * z.last
    s = k.fire(u - p.v_threshold)
    return s, {"v": u, "last": s}


def clif(x, z, p, k):
    u = z.v - z.v / p.tau + x
    s = k.fire(u - p.v_threshold)
    m = z.m * torch.sigmoid(u / p.tau) + s
    return s, {"v": u - s * (p.v_threshold + torch.sigmoid(m)), "m": m}


def ilif(x, z, p, k):
    u = z.v - z.v / p.tau + x
    level = u / p.v_threshold
    k.near((level - 0.5) - torch.round(level - 0.5))
    inside = torch.minimum(torch.maximum(level, torch.zeros_like(level)), p.levels)
    s = inside + (torch.round(inside) - inside).detach()
    return s, {"v": u - s * p.v_threshold}


def ternary_lif(x, z, p, k):
    u = z.v + (x - (z.v - p.v_reset)) / p.tau
    plus, minus = k.fire(u - p.v_threshold), k.fire(-u - p.v_threshold)
    return plus - minus, {"v": hard(u, plus + minus, p)}


def ternary_lif_soft(x, z, p, k):
    u = z.v + (x - z.v) / p.tau
    s = k.fire(u - p.v_threshold) - k.fire(-u - p.v_threshold)
    return s, {"v": u - s * p.v_threshold}


def liaf(x, z, p, k):
    u = z.v + (x - (z.v - p.v_reset)) / p.tau
    s = k.fire(u - p.v_threshold)
    return torch.relu(u - p.v_threshold), {"v": hard(u, s, p)}


def lif_refractory(x, z, p, k):
    free = (z.rho <= 0).to(x.dtype)
    u = z.v + free * (x - (z.v - p.v_reset)) / p.tau
    s = free * k.fire(u - p.v_threshold)
    rho = torch.where(s > 0, p.period, torch.relu(z.rho - 1))
    return s, {"v": hard(u, s, p), "rho": rho}


def tc_lif(x, z, p, k):
    dendrite = z.d + p.beta_1 * z.v + x
    soma = z.v + p.beta_2 * dendrite
    s = k.fire(soma - p.v_threshold)
    return s, {"d": dendrite - p.gamma * s, "v": soma - p.v_threshold * s}


def sliding_psn(x, z, p, k):
    h = p.w_3 * z.x_3 + p.w_2 * z.x_2 + p.w_1 * z.x_1 + p.w_0 * x
    return k.fire(h - p.v_threshold), {"v": h, "x_1": x, "x_2": z.x_1, "x_3": z.x_2}


def alif(x, z, p, k):
    threshold = p.v_threshold + p.beta * z.b
    u = p.alpha * z.v + (1 - p.alpha) * x
    s = k.fire(u - threshold)
    return s, {"v": u - threshold * s, "b": p.rho * z.b + (1 - p.rho) * s}


def adlif(x, z, p, k):
    u = p.alpha * z.v + (1 - p.alpha) * (x - z.w)
    s = k.fire(u - p.v_threshold)
    return s, {"v": u - p.v_threshold * s, "w": p.beta * z.w + p.a * u + p.b * s}


def dh_lif(x, z, p, k):
    d = p.alpha * z.d + (1 - p.alpha) * x
    d2 = p.alpha2 * z.d2 + (1 - p.alpha2) * p.x2
    u = p.beta * z.v + (1 - p.beta) * (d + d2)
    s = k.fire(u - p.v_threshold)
    return s, {"v": u - s * p.v_threshold, "d": d, "d2": d2}


def adex(x, z, p, k):
    rise = p.delta_T * torch.exp((z.v - p.theta_rh) / p.delta_T)
    h = z.v + (x - (z.v - p.v_rest) + rise - z.w) / p.tau
    s = k.fire(h - p.v_threshold)
    return s, {"v": hard(h, s, p), "w": z.w + (p.a * (h - p.v_rest) - z.w) / p.tau_w + p.b * s}


def izhikevich_2003(x, z, p, k):
    h = z.v + p.dt * (0.04 * z.v * z.v + 5 * z.v + 140 - z.u + x)
    s = k.fire(h - p.v_threshold)
    return s, {"v": h - s * (h - p.c), "u": z.u + p.dt * p.a * (p.b * z.v - z.u) + s * p.d}


def raf(x, z, p, k):
    turned = torch.complex(z.u, z.v) * torch.exp(torch.complex(p.b, p.omega) * p.dt) + x
    s = k.fire(turned.imag - p.v_threshold)
    return s, {"v": hard(turned.imag, s, p), "u": turned.real}


def brf(x, z, p, k):
    sustained = (torch.sqrt(1 - (p.dt * p.omega) ** 2) - 1) / p.dt
    b = sustained - p.b_offset - z.q
    re = z.v + p.dt * (b * z.v - p.omega * z.w + x)
    im = z.w + p.dt * (p.omega * z.v + b * z.w)
    s = k.fire(re - p.v_threshold - z.q)
    return s, {"v": re, "w": im, "q": p.gamma * z.q + s}


def leaky(x, z, p, k):
    h = p.beta * z.v + x - k.fired(z, p) * p.v_threshold
    return k.fire(h - p.v_threshold), {"v": h}


def leaky_zero(x, z, p, k):
    h = p.beta * ((1 - k.fired(z, p)) * z.v) + x
    return k.fire(h - p.v_threshold), {"v": h}


def leaky_no_reset(x, z, p, k):
    h = p.beta * z.v + x
    return k.fire(h - p.v_threshold), {"v": h}


def leaky_at_once(x, z, p, k):
    r = k.fired(z, p)
    h = p.beta * z.v + x - r * p.v_threshold
    s = k.fire(h - p.v_threshold)
    return s, {"v": h - (s - r) * p.v_threshold}


def leaky_zero_at_once(x, z, p, k):
    r = k.fired(z, p)
    h = p.beta * ((1 - r) * z.v) + x
    s = k.fire(h - p.v_threshold)
    return s, {"v": h - (s - r) * h}


def synaptic(x, z, p, k):
    syn = p.alpha * z.syn + x
    h = p.beta * z.v + syn - k.fired(z, p) * p.v_threshold
    return k.fire(h - p.v_threshold), {"v": h, "syn": syn}


def alpha(x, z, p, k):
    kept = 1 - k.fired(z, p)
    exc, inh = p.alpha * z.syn_exc + x, p.beta * z.syn_inh - x
    tau = torch.log(p.alpha) / (torch.log(p.beta) - torch.log(p.alpha)) + 1
    h = tau * (exc + inh) * kept
    return k.fire(h - p.v_threshold), {"v": h, "syn_exc": exc * kept, "syn_inh": inh * kept}


def lapicque(x, z, p, k):
    h = x * p.R * (1 / (p.R * p.C)) * p.dt + (1 - p.dt / (p.R * p.C)) * z.v
    h = h - k.fired(z, p) * p.v_threshold
    return k.fire(h - p.v_threshold), {"v": h}


def cuba_lif(x, z, p, k):
    c = p.c_decay * z.c + x
    h = p.v_decay * z.v + c
    s = k.fire(h - p.v_threshold)
    return s, {"v": hard(h, s, p), "c": c}


def nir_cuba_lif(x, z, p, k):
    i = z.i + p.dt / p.tau_syn * (-z.i + p.w_in * x)
    h = z.v + p.dt / p.tau_mem * ((p.v_leak - z.v) + p.r * i)
    s = k.fire(h - p.v_threshold)
    return s, {"v": hard(h, s, p), "i": i}


def nir_cuba_li(x, z, p, k):
    i = z.i + p.dt / p.tau_syn * (-z.i + p.w_in * x)
    v = z.v + p.dt / p.tau_mem * ((p.v_leak - z.v) + p.r * i)
    return v, {"v": v, "i": i}


def nir_if(x, z, p, k):
    h = z.v + p.dt * p.r * x
    s = k.fire(h - p.v_threshold)
    return s, {"v": hard(h, s, p)}


def nir_li(x, z, p, k):
    v = z.v + p.dt / p.tau * ((p.v_leak - z.v) + p.r * x)
    return v, {"v": v}


def nir_lif(x, z, p, k):
    h = z.v + p.dt / p.tau * ((p.v_leak - z.v) + p.r * x)
    s = k.fire(h - p.v_threshold)
    return s, {"v": hard(h, s, p)}


def nir_threshold(x, z, p, k):
    return k.fire(x - p.v_threshold), {"v": x}


def norse_lif(x, z, p, k):
    i = z.i + x
    h = z.v + p.dt * p.tau_mem_inv * ((p.v_leak - z.v) + i)
    s = k.fire(h - p.v_threshold)
    return s, {"v": hard(h, s, p), "i": i - p.dt * p.tau_syn_inv * i}


def norse_lif_box(x, z, p, k):
    h = z.v + p.dt * p.tau_mem_inv * (x + p.v_leak - z.v)
    s = k.fire(h - p.v_threshold)
    return s, {"v": hard(h, s, p)}


def norse_lif_ex(x, z, p, k):
    i = z.i + x
    rise = p.delta_T * torch.exp((z.v - p.v_threshold) / p.delta_T)
    h = z.v + p.dt * p.tau_mem_inv * ((p.v_leak - z.v) + rise + i)
    s = k.fire(h - p.v_threshold)
    return s, {"v": hard(h, s, p), "i": i - p.dt * p.tau_syn_inv * i}


def norse_lif_adex(x, z, p, k):
    i = z.i + x
    rise = p.delta_T * torch.exp((z.v - p.v_threshold) / p.delta_T)
    h = z.v + p.dt * p.tau_mem_inv * ((p.v_leak - z.v) + rise + i - z.a)
    s = k.fire(h - p.v_threshold)
    a = z.a + p.dt * p.tau_ada_inv * (p.adaptation_current * (z.v - p.v_leak) - z.a)
    a = a + p.adaptation_spike * s
    return s, {"v": hard(h, s, p), "i": i - p.dt * p.tau_syn_inv * i, "a": a}


def norse_lif_refrac(x, z, p, k):
    free, new = norse_lif(x, z, p, k)
    held = ATan.apply(z.rho, True)
    s = (1 - held) * free
    rho = (1 - s) * torch.relu(z.rho - held) + s * p.rho_reset
    return s, {"v": (1 - held) * new["v"] + held * z.v, "i": new["i"], "rho": rho}


def norse_iaf(x, z, p, k):
    h = z.v + x
    s = k.fire(h - p.v_threshold)
    return s, {"v": hard(h, s, p)}


def several(u, theta, slope, p, k):
    """Spikes of sinabs' MaxSpike, with the slope of `slope`."""
    count = (u / theta).detach()
    k.near(count - torch.round(count))
    count = torch.trunc(count).clamp(min=0).minimum(p.max_spikes)
    return count.detach() + slope - slope.detach()


def sinabs_lif(x, z, p, k):
    u = p.alpha_mem * z.v + (1 - p.alpha_mem) * x
    s = several(u, p.v_threshold, k.fire(u - p.v_threshold), p, k)
    return s, {"v": u - s * p.v_threshold}


def sinabs_alif(x, z, p, k):
    u = p.alpha_mem * z.v + (1 - p.alpha_mem) * x
    theta = p.v_threshold + p.adapt_scale * z.b
    s = several(u, theta, k.fire(u - theta.detach()), p, k)
    return s, {"v": u - s * theta, "b": p.alpha_adapt * z.b + (1 - p.alpha_adapt) * s}


ROWS: dict[str, Row] = {
    "li": Row(li),
    "klif": Row(klif, {"k": 1.3}),
    "gated_lif": Row(gated_lif, {"alpha": 0.7, "beta": 0.4, "gamma": 0.6, "conduct": 0.8}),
    "clif": Row(clif),
    "ilif": Row(ilif, scale=2.0),
    "ternary_lif": Row(ternary_lif, {"v_threshold": 0.4}, scale=1.5),
    "ternary_lif_soft": Row(ternary_lif_soft, {"v_threshold": 0.4}, scale=1.5, slow=True),
    "liaf": Row(liaf, {"v_threshold": 0.4}, slow=True),
    "lif_refractory": Row(lif_refractory, {"v_threshold": 0.5}, scale=2.0, slow=True),
    "tc_lif": Row(tc_lif),
    "sliding_psn": Row(sliding_psn, slow=True),
    "alif": Row(alif, {"alpha": 0.7, "rho": 0.9, "beta": 0.5, "v_threshold": 0.3}),
    "adlif": Row(adlif, {"alpha": 0.6, "b": 0.2, "a": 0.1, "v_threshold": 0.2}),
    "dh_lif": Row(dh_lif, {"beta": 0.4, "v_threshold": 0.4}),
    "adex": Row(adex, slow=True),  # benchmarks and other tests have it too
    "izhikevich_2003": Row(izhikevich_2003, {"dt": 0.5}, scale=60.0, slow=True),
    "raf": Row(raf, {"v_threshold": 0.3}, scale=1.5),
    "brf": Row(brf, {"omega": 15.0, "v_threshold": 0.2, "dt": 0.05}, scale=8.0),
    "leaky": Row(leaky),
    "leaky_zero": Row(leaky_zero, slow=True),
    "leaky_no_reset": Row(leaky_no_reset, slow=True),
    "leaky_at_once": Row(leaky_at_once, slow=True),
    "leaky_zero_at_once": Row(leaky_zero_at_once, slow=True),
    "synaptic": Row(synaptic, slow=True),
    "alpha": Row(alpha),
    "lapicque": Row(lapicque, {"C": 0.6}, slow=True),
    "cuba_lif": Row(cuba_lif, slow=True),
    "nir_cuba_lif": Row(nir_cuba_lif, {"r": 2.5}, scale=4.0, slow=True),
    "nir_cuba_li": Row(nir_cuba_li, {"r": 2.5}, scale=4.0, slow=True),
    "nir_if": Row(nir_if, {"r": 800.0}, slow=True),
    "nir_li": Row(nir_li, {"r": 4.0}, slow=True),
    "nir_lif": Row(nir_lif, {"r": 2.5, "v_leak": 0.1}, scale=4.0),
    "nir_threshold": Row(nir_threshold, slow=True),
    "norse_lif": Row(norse_lif, {"tau_mem_inv": 300.0}, slow=True),
    "norse_lif_box": Row(norse_lif_box, {"tau_mem_inv": 300.0}, scale=2.0, slow=True),
    "norse_lif_ex": Row(norse_lif_ex, {"tau_mem_inv": 300.0}, slow=True),
    "norse_lif_adex": Row(norse_lif_adex, {"tau_mem_inv": 300.0, "tau_ada_inv": 80.0}, slow=True),
    "norse_lif_refrac": Row(norse_lif_refrac, {"tau_mem_inv": 300.0, "rho_reset": 2.0}, scale=2.0),
    "norse_iaf": Row(norse_iaf, slow=True),
    "sinabs_lif": Row(sinabs_lif, {"alpha_mem": 0.6}, scale=5.0, slow=True),
    "sinabs_alif": Row(sinabs_alif, {"alpha_mem": 0.6, "alpha_adapt": 0.8}, scale=8.0),
}
each_row = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if r.slow else []) for n, r in ROWS.items()]
)


# --- the library against them ---------------------------------------------------------------------


def numbers(name: str) -> dict[str, float]:
    """The parameters of a row's test."""
    return {**BUILT_IN[name].params, **ROWS[name].params}


def looped(
    name: str,
    x: Tensor,
    start: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """What comes out and the last states; and which neurons [N] stay clear of every step.

    `others` are the inputs besides x.
    """
    k, z, out = Steps(BUILT_IN[name].strict), dict(start), []
    for t, x_t in enumerate(x):
        p = Bag(**params, **{n: sequence[t] for n, sequence in others.items()})
        y, z = ROWS[name].step(x_t, Bag(**z), p, k)
        out.append(y)
    clear = torch.ones(x.shape[1:], dtype=torch.bool)
    for distance in k.distances:
        clear &= distance > CLEAR[x.dtype]
    return {"out": torch.stack(out), **z}, clear


def compare(
    name: str, device: str, dtype: torch.dtype = torch.float32, backend: str | None = None
) -> None:
    """Spikes, last states and every gradient: of x, the initial states and all parameters."""
    model = BUILT_IN[name]
    x = inputs((T, N), dtype, scale=ROWS[name].scale)
    spread = torch.linspace(0, 0.3, N, dtype=dtype)
    given = {"x": x, **{f"state {z}": spread + v for z, v in model.state.items()}}
    given |= {f"param {p}": torch.tensor(v, dtype=dtype) for p, v in numbers(name).items()}
    given |= {f"input {n}": x.flip(0) for n in model.inputs[1:]}

    def leaves(where: str) -> tuple[dict[str, Tensor], ...]:
        made = {n: t.to(where, copy=True).requires_grad_() for n, t in given.items()}
        parts = (
            {n.removeprefix(f"{part} "): t for n, t in made.items() if n.startswith(f"{part} ")}
            for part in ("state", "param", "input")
        )
        return made, *parts

    theirs, state, params, others = leaves("cpu")
    want, clear = looped(name, theirs["x"], state, params, others)
    ours, state, params, others = leaves(device)
    result = nj.multistep(model, ours["x"], state, backend=backend, **params, **others)
    got = {"out": result.spikes, **result.state}
    assert clear.double().mean() > 0.8, "the inputs of this row sit on a step"
    fired = (want["out"] != 0).double().mean().item()
    assert 0.1 < fired <= 1.0 and want["out"].std() > 0.1, f"{fired:.0%} fire"
    for key, value in want.items():
        tolerance = (
            0.0
            if key == "out" and name not in ("li", "liaf", "nir_cuba_li", "nir_li")
            else TOLERANCE[dtype]
        )
        assert_near(got[key].detach().cpu() * clear, value * clear, tolerance, key)
    generator = torch.Generator().manual_seed(3)
    weights = {
        key: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype) * clear
        for key, value in want.items()
    }
    grads = [
        torch.autograd.grad(
            [outputs[key] for key in weights], list(made.values()),
            [weight.to(made["x"].device) for weight in weights.values()],
            allow_unused=True, materialize_grads=True,
        )
        for outputs, made in ((got, ours), (want, theirs))
    ]  # fmt: skip
    for key, mine, reference in zip(given, *grads, strict=True):
        floor = 1.0 if key.startswith("param") else 0.1  # a sum in another order
        assert_near(mine, reference, TOLERANCE[dtype], f"gradient of {key}", floor)


def test_every_model_has_a_row() -> None:
    assert {*BUILT_IN} == {*SEED, *ROWS}


@pytest.mark.parametrize("name", ROWS)
def test_equations_are_the_papers(name: str) -> None:
    """All of them, where nothing is compiled; kernels are compared with this backend elsewhere."""
    compare(name, "cpu", backend="eager")


@each_device
@each_row
def test_kernels_are_the_papers(name: str, device: str) -> None:
    compare(name, device)


@each_device
@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_kernels_are_the_papers_in_float64(name: str, device: str) -> None:
    compare(name, device, torch.float64)


# --- the library against the peers' own classes ---------------------------------------------------

Peer = Callable[[Tensor, dict[str, float]], Tensor]  # of x [T, N] and the row's parameters


def of_spikingjelly(
    make: Callable[[Any, dict[str, Any], dict[str, float]], Any], step_mode: str = "m"
) -> Peer:
    def run(x: Tensor, p: dict[str, float]) -> Tensor:
        from spikingjelly.activation_based import neuron, surrogate

        atan = surrogate.ATan(2.0)
        usual = dict(v_threshold=p["v_threshold"], v_reset=p["v_reset"], surrogate_function=atan)
        layer = make(neuron, usual, p).to(x.device)
        layer.step_mode = step_mode
        return torch.stack([*layer(x)] if step_mode == "m" else [layer(x_t) for x_t in x])

    return run


def _klif_node(neuron: Any, usual: dict[str, Any], p: dict[str, float]) -> Any:
    layer = neuron.KLIFNode(tau=p["tau"], **usual)
    layer.k.data.fill_(p["k"])
    return layer


def _clif_node(neuron: Any, usual: dict[str, Any], p: dict[str, float]) -> Any:
    del usual["v_reset"]
    return neuron.ComplementaryLIFNode(tau=p["tau"], **usual)


def _gated_lif_node(neuron: Any, usual: dict[str, Any], p: dict[str, float]) -> Any:
    layer = neuron.GatedLIFNode(T, surrogate_function=usual["surrogate_function"])
    for key, value in layer.named_parameters():
        value.data.fill_(math.log(p[key] / (1 - p[key])))
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (N, 1, 1, 1)), layer, torch.nn.Flatten(1)
    )  # it wants images


def _sliding_psn(neuron: Any, usual: dict[str, Any], p: dict[str, float]) -> Any:
    layer = neuron.SlidingPSN(4, surrogate_function=usual["surrogate_function"])
    layer.weight.data = torch.tensor([p["w_3"], p["w_2"], p["w_1"], p["w_0"]])
    layer.bias.data.fill_(-p["v_threshold"])
    return layer


def of_snntorch(make: Callable[[Any, dict[str, Any], dict[str, float]], Any]) -> Peer:
    def run(x: Tensor, p: dict[str, float]) -> Tensor:
        import snntorch

        slope = snntorch.surrogate.atan(2.0)
        layer = make(snntorch, dict(threshold=p["v_threshold"], spike_grad=slope), p).to(x.device)
        state: list[Tensor] = []
        spikes = []
        for x_t in x:
            s, *state = layer(x_t, *state)
            spikes.append(s)
        return torch.stack(spikes)

    return run


def a_leaky(**options: Any) -> Peer:
    return of_snntorch(lambda snn, usual, p: snn.Leaky(p["beta"], **usual, **options))


def of_norse(module: str, function: str, given: str, states: str) -> Peer:
    """Its step function, with the parameters class and the state class that belong to it."""

    def run(x: Tensor, p: dict[str, float]) -> Tensor:
        import importlib

        f = importlib.import_module(f"norse.torch.functional.{module}")
        kinds = getattr(f, given)
        named = {**p, "v_th": p["v_threshold"]}
        fields = {k: torch.tensor(v) for k, v in named.items() if k in kinds._fields}
        numbers = kinds(**fields)
        names = getattr(f, states)._fields
        start = BUILT_IN["izhikevich_2003"].state if module == "izhikevich" else {}
        state = getattr(f, states)(*(torch.full_like(x[0], start.get(n, 0.0)) for n in names))
        if module == "izhikevich":
            numbers = numbers._replace(tau_inv=1000.0 * p["dt"], v_th=p["v_threshold"])
        spikes = []
        for x_t in x:
            s, state = getattr(f, function)(x_t, state, numbers)
            spikes.append(s)
        return torch.stack(spikes)

    return run


def _norse_refrac(x: Tensor, p: dict[str, float]) -> Tensor:
    from norse.torch.functional import lif, lif_refrac

    kinds = {"v_th": p["v_threshold"], **p}
    inner = lif.LIFParameters(
        **{k: torch.tensor(v) for k, v in kinds.items() if k in lif.LIFParameters._fields}
    )
    numbers = lif_refrac.LIFRefracParameters(inner, torch.tensor(p["rho_reset"]))
    zero = torch.zeros_like(x[0])
    state = lif_refrac.LIFRefracFeedForwardState(lif.LIFFeedForwardState(zero, zero), zero)
    spikes = []
    for x_t in x:
        s, state = lif_refrac.lif_refrac_feed_forward_step(x_t, state, numbers)
        spikes.append(s)
    return torch.stack(spikes)


def of_sinabs(kind: str, **options: str) -> Peer:
    def run(x: Tensor, p: dict[str, float]) -> Tensor:
        from sinabs import activation, layers

        tau = {k.replace("alpha", "tau"): -1 / math.log(v) for k, v in p.items() if "alpha_" in k}
        scale = {"adapt_scale": p["adapt_scale"]} if "adapt_scale" in p else {}
        layer = getattr(layers, kind)(
            **tau, **scale, spike_threshold=torch.tensor(p["v_threshold"]),
            spike_fn=activation.MultiSpike, surrogate_grad_fn=activation.Gaussian(sigma=0.5),
        )  # fmt: skip
        return layer.to(x.device)(x.T[:, :, None])[:, :, 0].T

    return run


PEERS: dict[str, tuple[str, Peer]] = {
    "li": (
        "spikingjelly",
        of_spikingjelly(lambda n, usual, p: n.NonSpikingLIFNode(p["tau"])),
    ),
    "klif": ("spikingjelly", of_spikingjelly(_klif_node)),
    "gated_lif": ("spikingjelly", of_spikingjelly(_gated_lif_node)),
    "clif": ("spikingjelly", of_spikingjelly(_clif_node)),
    "ilif": ("spikingjelly", of_spikingjelly(lambda n, usual, p: n.ILIFNode(p["tau"]))),
    "ternary_lif": (
        "spikingjelly", of_spikingjelly(lambda n, usual, p: n.TernaryLIFNode(p["tau"], **usual)),
    ),
    "ternary_lif_soft": (
        "spikingjelly",
        of_spikingjelly(
            lambda n, usual, p: n.TernaryLIFNode(p["tau"], **{**usual, "v_reset": None})
        ),
    ),
    "liaf": (
        "spikingjelly",
        of_spikingjelly(  # in its step_mode "m", release 2.0.0 gives spikes
            lambda n, usual, p: n.LIAFNode(torch.relu, True, p["tau"], **usual), step_mode="s"
        ),
    ),
    "sliding_psn": ("spikingjelly", of_spikingjelly(_sliding_psn)),
    "raf": (
        "spikingjelly",
        of_spikingjelly(lambda n, usual, p: n.RAFNode(p["b"], p["omega"], p["dt"], **usual)),
    ),
    "cuba_lif": (
        "spikingjelly",
        of_spikingjelly(lambda n, usual, p: n.CUBALIFNode(p["c_decay"], p["v_decay"], **usual)),
    ),
    "leaky": ("snntorch", a_leaky()),
    "leaky_zero": ("snntorch", a_leaky(reset_mechanism="zero")),
    "leaky_no_reset": ("snntorch", a_leaky(reset_mechanism="none")),
    "leaky_at_once": ("snntorch", a_leaky(reset_delay=False)),
    "leaky_zero_at_once": ("snntorch", a_leaky(reset_mechanism="zero", reset_delay=False)),
    "synaptic": (
        "snntorch", of_snntorch(lambda snn, usual, p: snn.Synaptic(p["alpha"], p["beta"], **usual)),
    ),
    "alpha": (
        "snntorch", of_snntorch(lambda snn, usual, p: snn.Alpha(p["alpha"], p["beta"], **usual)),
    ),
    "lapicque": (
        "snntorch",
        of_snntorch(lambda snn, usual, p: snn.Lapicque(R=p["R"], C=p["C"], **usual)),
    ),
    "izhikevich_2003": (
        "norse",
        of_norse("izhikevich", "izhikevich_feed_forward_step", "IzhikevichParameters",
                 "IzhikevichState"),
    ),
    "norse_lif": (
        "norse", of_norse("lif", "lif_feed_forward_step", "LIFParameters", "LIFFeedForwardState"),
    ),
    "norse_lif_box": (
        "norse",
        of_norse("lif_box", "lif_box_feed_forward_step", "LIFBoxParameters",
                 "LIFBoxFeedForwardState"),
    ),
    "norse_lif_ex": (
        "norse",
        of_norse("lif_ex", "lif_ex_feed_forward_step", "LIFExParameters", "LIFExFeedForwardState"),
    ),
    "norse_lif_adex": (
        "norse",
        of_norse("lif_adex", "lif_adex_feed_forward_step", "LIFAdExParameters",
                 "LIFAdExFeedForwardState"),
    ),
    "norse_lif_refrac": ("norse", _norse_refrac),
    "norse_iaf": (
        "norse", of_norse("iaf", "iaf_feed_forward_step", "IAFParameters", "IAFFeedForwardState"),
    ),
    "sinabs_lif": ("sinabs", of_sinabs("LIF")),
    "sinabs_alif": ("sinabs", of_sinabs("ALIF")),
}  # fmt: skip
SLOPES = {
    "norse": nj.surrogates.SuperSpike(1.0),  # whatever its alpha is
    "sinabs": nj.surrogates.Gaussian(0.5),
}
each_peer = pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=[pytest.mark.peers(peer)] + [pytest.mark.slow] * ROWS[n].slow, id=f"{n}-{peer}"
        )
        for n, (peer, _) in PEERS.items()
    ],
)


@each_peer
@each_device
def test_as_the_peer(name: str, device: str) -> None:
    """What comes out and the gradient of x: those of the peer's own class, from its own start."""
    peer, run = PEERS[name]
    row, model = ROWS[name], BUILT_IN[name]
    x = inputs((T, N), scale=row.scale).to(device)
    state = {z: torch.full((N,), v) for z, v in model.state.items()}
    params = {k: torch.tensor(v) for k, v in numbers(name).items()}
    _, clear = looped(name, x.cpu(), state, params, {})
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    got = nj.multistep(model, mine, surrogate=SLOPES.get(peer, "ATan"), **row.params).spikes
    want = run(theirs, numbers(name))
    tolerance = 2e-5 if name in ("li", "liaf") else 0.0
    kept = clear.to(device)
    assert clear.double().mean() > 0.8
    assert_near(got * kept, (want * kept).cpu(), tolerance, "out")
    weight = torch.randn((T, N), generator=torch.Generator().manual_seed(3)).to(device) * kept
    (grad,) = torch.autograd.grad(got, mine, weight)
    (wanted,) = torch.autograd.grad(want, theirs, weight)
    assert_near(grad, wanted.cpu(), 2e-5, "gradient of x")


# --- as layers, and as data -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_as_a_layer(name: str) -> None:
    """Whole sequences, pieces and single steps, every parameter learnable and one per channel."""
    model, channels = BUILT_IN[name], 3
    factors = torch.tensor([1.0, 1.02, 1.05])
    params = {p: value * factors for p, value in numbers(name).items()}
    options = dict(learnable=model.params, channels=channels, backend="eager")
    x = inputs((T, 4, channels, 5), scale=ROWS[name].scale)
    others = [x.flip(0) for _ in model.inputs[1:]]
    whole = nj.nn.Neuron(name, **options, **params)
    spikes = whole(x, *others)
    start = {z: torch.full_like(x[0], value) for z, value in model.state.items()}
    column = {p: value[:, None].requires_grad_() for p, value in params.items()}
    named = dict(zip(model.inputs[1:], others, strict=True))
    want, clear = looped(name, x, start, column, named)
    assert clear.double().mean() > 0.7
    assert_near(spikes.detach() * clear, want["out"] * clear, 2e-5, "out")

    (spikes * clear).sum().backward()
    (want["out"] * clear).sum().backward()
    for p, value in column.items():
        wanted = torch.zeros_like(value) if value.grad is None else value.grad
        assert_near(getattr(whole, p).grad, wanted[:, 0], 2e-5, f"gradient of {p}", floor=1.0)

    single = nj.nn.Neuron(model, step_mode="s", **options, **params)
    steps = torch.stack([single(*now) for now in zip(x, *others, strict=True)])
    whole.reset()
    parts = ([t[piece] for t in (x, *others)] for piece in (slice(0, 4), slice(4, T)))
    pieces = torch.cat([whole(*part) for part in parts])
    assert torch.equal(spikes, steps) and torch.equal(spikes, pieces)
    for z in model.state:
        assert torch.equal(getattr(single, z), getattr(whole, z)), z


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_model_is_found_and_says_what_it_is(name: str) -> None:
    model = nj.neurons.by_name(name.upper())
    assert getattr(nj.neurons, name.upper()) is model
    assert model.about.endswith(".") and "  " not in model.about
    assert nj.nn.Neuron(name).model is model
    shown = pydoc.render_doc(model)
    assert all(line.strip() in shown for line in (model.about, *model.equations.splitlines()))


def test_about_is_for_readers_only() -> None:
    """It makes no other model, kernel, plan or graph; copies and pickles keep it."""
    model = nj.neurons.KLIF
    other = nj.NeuronModel(**model.to_dict(), about="Another sentence.")
    assert other == model and hash(other) == hash(model) and other.token == model.token
    assert "about" not in model.to_dict()
    text = nj.render(model, target="cpu")
    assert nj.render(other, target="cpu") == text and model.about not in text
    for same in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):  # noqa: S301 -- our own
        assert same == model and same.about == "Another sentence."
    assert nj.NeuronModel.from_dict(model.to_dict()).about == ""  # as pickles of 0.1 are read
    with pytest.raises(nj.SpecError, match="about must be str, got int"):
        nj.NeuronModel("one", "h = v + x", state=dict(v=0.0), about=1)


def test_strict_models_do_not_fire_at_the_threshold() -> None:
    x = torch.ones(1, 1)
    for name, fires in (("norse_iaf", 0.0), ("if", 1.0), ("leaky", 0.0), ("cuba_lif", 1.0)):
        out = nj.multistep(name, x, backend="eager", v_threshold=1.0)
        assert out.spikes.item() == fires, name


# --- docs/neurons.md ------------------------------------------------------------------------------


def page() -> str:
    """The table as the models make it."""
    heads = ("name", "equations", "states", "parameters", "reset", "fires", "what, source, peer")
    rows = [heads, ("---",) * len(heads)]
    for model in BUILT_IN.values():
        block = [f"`{line}`" for line in textwrap.dedent(model.equations).strip().splitlines()]
        states, params = (
            "<br>".join(f"`{n} = {value:g}`" for n, value in names.items())
            for names in (model.state, model.params)
        )
        reset = "its own" if model.own_reset else "the call's"
        fires = "`>`" if model.strict else "`>=`"
        name = f"`{model.name}`"
        rows.append((name, "<br>".join(block), states, params, reset, fires, model.about))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


MARK = "<!-- python tests/test_zoo.py writes all below -->\n"


def test_the_page_is_the_models() -> None:
    assert PAGE.read_text().partition(MARK)[2] == "\n" + page(), (
        "python tests/test_zoo.py writes it"
    )


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().partition(MARK)[0] + MARK + "\n" + page())
