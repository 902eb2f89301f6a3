"""Norse's modules: what is known of each, one row, and the `forward` that an instance gets.

A module of Norse 1.1.0 calls a function of one step, which gets the state, the parameters `p` and
`dt`, and whose name says what is computed. A layer loops over time: its loop becomes one kernel. A
cell does not: its step does. Nothing here imports Norse: whoever passes one of its modules has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import neurons, surrogates
from ..errors import InputTypeError, NeuronJitError, SpecError
from ..models.model import NeuronModel
from ..models.surrogate import Surrogate
from ..run.autograd import multistep
from . import classes
from .classes import NO_SLOPE

NAME, PACKAGE, TESTED = "Norse", "norse", "1.1.0"
FAMILY = "norse.torch.module."
_NEURONS = ("SNN", "SNNCell", "SNNRecurrent", "SNNRecurrentCell")


# --- the equations --------------------------------------------------------------------------------


@cache
def _li() -> NeuronModel:
    return NeuronModel(
        "norse_li",
        """
        j = i + x
        h = v + dt * tau_mem_inv * (v_leak - v + j)
        v = h
        y = v
        i = j - dt * tau_syn_inv * j
        """,
        state=dict(v=0.0, i=0.0),
        params=dict(tau_syn_inv=200.0, tau_mem_inv=100.0, v_leak=0.0, dt=0.001),
    )


@cache
def _li_box() -> NeuronModel:
    return NeuronModel(
        "norse_li_box",
        "h = v + dt * tau_mem_inv * (v_leak - v + x)\nv = h\ny = v",
        state=dict(v=0.0),
        params=dict(tau_mem_inv=100.0, v_leak=0.0, dt=0.001),
    )


@cache
def _lsnn() -> NeuronModel:
    """A threshold b that falls back to v_threshold and rises by beta with each spike."""
    return NeuronModel(
        "norse_lsnn",
        """
        theta = b + dt * tau_adapt_inv * (v_threshold - b)
        h = v + dt * tau_mem_inv * (v_leak - v + i)
        b = theta + s * beta
        i = i - dt * tau_syn_inv * i + x
        """,
        state=dict(v=0.0, i=0.0, b=1.0),
        params=dict(
            tau_syn_inv=200.0, tau_mem_inv=100.0, tau_adapt_inv=1 / 800, v_leak=0.0, beta=1.8,
            dt=0.001,
        ),
        strict=True,
    )  # fmt: skip


@cache
def _izhikevich() -> NeuronModel:
    """With all numbers of IzhikevichParameters, in Norse's order: the rates are products in p."""
    return NeuronModel(
        "norse_izhikevich",
        """
        h = v + rate * (sq * (v * v) + mn * v + bias - u + x)
        u = u + rate_u * (b * v - u)
        u = (1 - s) * u + s * (u + d)
        v = (1 - s) * h + s * c
        """,
        state=dict(v=-70.0, u=-14.0),
        params=dict(rate=0.25, rate_u=0.005, sq=0.04, mn=5.0, bias=140.0, b=0.2, c=-65.0, d=6.0),
        strict=True,
    )


def _rates(p: Any, dt: float) -> Mapping[str, Any]:
    return {"rate": p.tau_inv * dt, "rate_u": p.tau_inv * dt * p.a}


class Row(NamedTuple):
    """What a module computes. The model's states are named as the state's fields."""

    step: str  # Norse's function of one step
    model: Callable[[], NeuronModel]
    more: Callable[[Any, float], Mapping[str, Any]] = lambda p, dt: {"dt": dt}  # than p's fields


NODES = {
    "LIF": Row("lif_feed_forward_step", lambda: neurons.NORSE_LIF),
    "LIFEx": Row("lif_ex_feed_forward_step", lambda: neurons.NORSE_LIF_EX),
    "LIFAdEx": Row("lif_adex_feed_forward_step", lambda: neurons.NORSE_LIF_ADEX),
    "IAF": Row("iaf_feed_forward_step", lambda: neurons.NORSE_IAF, lambda p, dt: {}),
    "LI": Row("li_feed_forward_step", _li),
    "LSNN": Row("lsnn_feed_forward_step", _lsnn),
    "Izhikevich": Row("izhikevich_feed_forward_step", _izhikevich, _rates),
}
NODES |= {f"{name}Cell": row for name, row in NODES.items()}
NODES["LIBoxCell"] = Row("li_box_feed_forward_step", _li_box)
NODES["LIFBoxCell"] = Row("lif_box_feed_forward_step", lambda: neurons.NORSE_LIF_BOX)

_TRIANGLE = Surrogate("Triangle", "alpha * relu(1 - abs(u))", None, dict(alpha=0.3))
_CIRC = Surrogate(
    "Circ",
    "alpha * (1 / sqrt(alpha * alpha + u * u) - u * u / (alpha * alpha + u * u)**1.5)",
    None,
    dict(alpha=1.0),
)
_ERFC = Surrogate("HeaviErfc", "2 / sqrt(pi) * exp(-(alpha * u)**2)", None, dict(alpha=1.0))
_RESETS = {"reset_value": "hard", "reset_subtract": "soft"}  # p.reset_method, which LIFBoxCell has
# by p.method, for p.alpha; "super" has a fixed slope in 1.1.0
_SURROGATES: dict[str, Callable[[float], Surrogate]] = {
    "super": lambda alpha: surrogates.SuperSpike(1.0),
    "heaviside": lambda alpha: NO_SLOPE,
    "triangle": _TRIANGLE,
    "tanh": surrogates.Tanh,
    "circ": _CIRC,
    "heavi_erfc": _ERFC,
}


# --- reading an instance --------------------------------------------------------------------------

_DYNAMICS = ("__call__", "forward")


def look(module: torch.nn.Module) -> Row | str | None:
    """The row of a module that can be swapped, why it cannot be, or None: it is no neuron."""
    kind = type(module)
    if not any(base.__name__ in _NEURONS for base in classes.family(kind, FAMILY)):
        return None
    base = classes.known(kind, FAMILY, NODES)
    if base is None:
        why = "it is recurrent" if "Recurrent" in kind.__name__ else "no equations for it"
        return f"{why}; there are some for {', '.join(NODES)}"
    if changed := classes.own_dynamics(module, base, _DYNAMICS):
        return changed
    row = NODES[base.__name__]
    try:
        _read(module, row)
    except NeuronJitError as error:
        return str(error)
    return row


def describe(module: Any, row: Row) -> str:
    """What runs in the module's place."""
    model, surrogate, reset, _ = _read(module, row)
    return f"{model.name}, {reset} reset, {classes.shown(surrogate)}"


def _read(module: Any, row: Row) -> tuple[NeuronModel, Surrogate, str, dict[str, Any]]:
    """What a module computes now: model, surrogate, reset, parameters. SpecError: we cannot."""
    step, p = module.activation, module.p
    name = getattr(step, "__name__", type(step).__name__)
    if name != row.step or not step.__module__.startswith("norse."):
        raise SpecError(f"its steps are {name}, and there are equations for {row.step}")
    model = row.model()
    fields = {name: "v_th" if name == "v_threshold" else name for name in model.params}
    params = {name: getattr(p, field) for name, field in fields.items() if hasattr(p, field)}
    surrogate = NO_SLOPE  # of what does not spike
    if hasattr(p, "method"):
        if p.method not in _SURROGATES:
            raise SpecError(f"unknown method {p.method!r}; known: {', '.join(_SURROGATES)}")
        surrogate = _SURROGATES[p.method](float(p.alpha))
    reset = "own" if model.own_reset else "hard"
    if hasattr(p, "reset_method"):
        name = getattr(p.reset_method, "__name__", "")
        if name not in _RESETS or not p.reset_method.__module__.startswith("norse."):
            raise SpecError(f"unknown reset_method {name!r}; known: {', '.join(_RESETS)}")
        if (reset := _RESETS[name]) == "soft":
            del params["v_reset"]
    return model, surrogate, reset, {**params, **row.more(p, module.dt)}


# --- running it -----------------------------------------------------------------------------------


def _on(device: torch.device, value: Any) -> Any:
    """A number for what Norse keeps in a tensor on the CPU, where `.to(device)` does not reach."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu" and value.ndim == 0 and not value.requires_grad:
        return value.item()
    return value.to(device) if value.ndim == 0 else value


class Methods:
    """What stands before the methods of a module's class when the module is accelerated."""

    _neuronjit: Row

    def forward(self, input_tensor: Tensor, state: Any = None) -> Any:
        """A whole sequence, or a cell's step, as one kernel."""
        module: Any = self
        start = state if state is not None else module.state_fallback(input_tensor)
        cell = not hasattr(module, "record_states")
        recorded = not cell and module.record_states
        try:
            if input_tensor.dtype in (torch.float16, torch.bfloat16):
                raise SpecError(f"the input is {input_tensor.dtype}, where Norse mixes precisions")
            model, surrogate, reset, params = _read(module, module._neuronjit)
            if missing := [name for name in model.state if not hasattr(start, name)]:
                raise SpecError(f"the state {type(start).__name__} has no {', '.join(missing)}")
            device = input_tensor.device
            out = multistep(
                model,
                input_tensor.unsqueeze(0) if cell else input_tensor,
                {name: _on(device, getattr(start, name)) for name in model.state},
                surrogate=surrogate,
                reset="soft" if reset == "soft" else "hard",
                record=tuple(model.state) if recorded else (),
                **{name: _on(device, value) for name, value in params.items()},
            )
        except (SpecError, InputTypeError) as error:
            classes.warn_left(module, NAME, error)
            return super().forward(input_tensor, start)  # type: ignore[misc]
        last = out.record if recorded else out.state
        states = type(start)(**{name: last[name] for name in model.state})
        return out.spikes[0] if cell else out.spikes, states
