"""SpikingJelly's nodes: what is known of each, one row, and the methods that an instance gets.

A node of SpikingJelly 2.0.0 has its dynamics in functional forwards, states in and states out. They
are all that is replaced: memories, `reset`, `detach`, `state_dict` and hooks stay SpikingJelly's.
Nothing here imports it: whoever passes one of its nodes has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import neurons
from ..errors import NeuronJitError, SpecError
from ..models.model import NeuronModel
from ..models.surrogate import Surrogate
from ..run.autograd import Output, carried, multistep
from ..surrogates import StraightThrough, as_surrogate
from . import classes

NAME, PACKAGE, TESTED = "SpikingJelly", "spikingjelly", "2.0.0"
FAMILY = ("spikingjelly.activation_based.neuron", "spikingjelly.clock_driven.neuron")


def _surrogate(node: Any) -> Surrogate:
    return as_surrogate(node.surrogate_function)


class Row(NamedTuple):
    """What a node computes, read from the instance at every call; SpecError where we cannot."""

    model: Callable[[Any], NeuronModel]  # its states are named as the node's memories
    params: Callable[[Any], Mapping[str, Any]]  # v_threshold and v_reset only where they differ
    surrogate: Callable[[Any], Surrogate] = _surrogate
    # the sequence as kernels take it, and the parameters and inputs whose shapes are made for it
    fit: Callable[[Any, Tensor], tuple[Tensor, Mapping[str, Any]]] | None = None
    # what single steps put out in place of spikes, of the step's h
    analog: Callable[[Any, Tensor], Tensor] | None = None


def _attributes(*names: str) -> Callable[[Any], Mapping[str, Any]]:
    return lambda node: {name: getattr(node, name) for name in names}


# as neurons.EIF, in SpikingJelly's order of operations: the same bits but for exp
_EIF = NeuronModel(
    "eif_spikingjelly",
    "h = v + (x + v_rest - v + delta_T * exp((v - theta_rh) / delta_T)) / tau",
    state=dict(v=0.0),
    params=dict(neurons.EIF.params),
    positive=neurons.EIF.positive,
)

# neurons.RAF, whose damped rotation is three numbers here: a step evaluates no exp and no cos
_RAF = NeuronModel(
    "raf",
    """
    h = alpha * (u * sine + v * cosine)
    u = alpha * (u * cosine - v * sine) + x
    """,
    state=dict(v=0.0, u=0.0),
    params=dict(alpha=0.8, cosine=0.5, sine=0.8),
)


def _rotation(node: Any) -> Mapping[str, float]:
    angle = node.omega * node.dt
    return dict(alpha=math.exp(node.b * node.dt), cosine=math.cos(angle), sine=math.sin(angle))


# neurons.GATED_LIF, whose gates and leaks are numbers of the layer but for the gain of each step
_GATED_LIF = NeuronModel(
    "gated_lif_steps",
    """
    h = decay * v - leak + x * gain
    h = h - decay * v * gamma * last - fall * last
    last = s
    v = h
    u = h
    """,
    inputs=("x", "gain"),
    state=dict(v=0.0, u=0.0, last=0.0),
    params=dict(decay=0.6, leak=0.03, gamma=0.5, fall=0.25, v_threshold=0.5),
)


def _gated(node: Any, x_seq: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
    if node.step_mode != "m":
        raise SpecError("step_mode='s', and a GatedLIFNode has numbers for each step of a sequence")
    if x_seq.dim() != 5 or len(x_seq) < node.T:
        raise SpecError(f"its input is not [T, N, C, H, W] with T >= {node.T}")
    names = ("alpha", "beta", "gamma", "tau", "v_threshold", "linear_decay", "v_subreset")
    alpha, beta, gamma, tau, threshold, linear_decay, v_subreset = (
        getattr(node, name).view(-1, 1, 1).sigmoid() for name in names
    )
    conduct = node.conduct.view(node.T, 1, -1, 1, 1).sigmoid()
    return x_seq[: node.T], dict(
        gain=1 - beta * (1 - conduct),
        decay=1 - alpha * (1 - tau),
        leak=(1 - alpha) * linear_decay,
        gamma=gamma,
        fall=(1 - gamma) * v_subreset,
        v_threshold=threshold,
    )


_ACTIVATION_AWARE = NeuronModel(
    "activation_aware_if",
    "h = v + x\ns = fire(h + v_offset, theta)",
    state=dict(v=0.0),
    params=dict(v_offset=0.0),
)


def _by_channel(node: Any, x_seq: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
    dims, channel = x_seq.dim() - 1, node.channel_dim
    if not -dims <= channel < dims:
        raise SpecError(f"channel_dim={channel}, and a step of its input has {dims} dimensions")
    after = (1,) * (dims - 1 - channel % dims)
    named = {name: getattr(node, name) for name in ("v_threshold", "v_offset")}
    return x_seq, {n: z.view(-1, *after) if z.dim() else z for n, z in named.items()}


_CHARGES = {
    None: "v + x",
    True: "v + (x - (v - v_reset)) / tau",
    False: "v - (v - v_reset) / tau + x",
}


@cache
def _klif(decay_input: bool, scale_reset: bool, soft: bool) -> NeuronModel:
    """Jiang and Zhang 2023, arXiv:2302.09238: a learnable slope k and a ReLU after the charge."""
    if decay_input and not scale_reset:
        return neurons.KLIF
    reset = ""
    if scale_reset:
        scaled = "v = h / k - s * (theta / k)" if soft else "v = s * v_reset + (1 - s) * (h / k)"
        reset = f"\n{scaled}"
    return NeuronModel(
        f"klif{'' if decay_input else '_no_decay'}{'_scaled' if scale_reset else ''}",
        f"h = relu(k * ({_CHARGES[decay_input]})){reset}",
        state=dict(v=0.0),
        params=dict(tau=2.0, k=1.0),
        positive=["tau"],
    )


@cache
def _ternary(decay_input: bool | None, soft: bool, detach_reset: bool) -> NeuronModel:
    """Spikes of -1, 0 and 1; a hard reset follows a spike of either sign."""
    either = "detach(p + n)" if detach_reset else "p + n"
    reset = "" if soft else f"\nr = {either}\nv = r * v_reset + (1 - r) * h"
    leak = {} if decay_input is None else dict(tau=2.0)
    return NeuronModel(
        "ternary_if" if decay_input is None else "ternary_lif",
        f"h = {_CHARGES[decay_input]}\np = fire(h, theta)\nn = fire(-h, theta)\ns = p - n{reset}",
        state=dict(v=0.0),
        params=leak,
        positive=list(leak),
    )


def _clif(node: Any) -> NeuronModel:
    if node.store_state_seqs:
        raise SpecError("store_state_seqs=True, and kernels store v alone")
    return neurons.CLIF


def _clif_surrogate(node: Any) -> Surrogate:
    ours = _surrogate(node)  # in eval mode the node has none
    return ours if node.training or not ours.spiking else classes.NO_SLOPE


def _lif(node: Any) -> NeuronModel:
    return neurons.LIF if node.decay_input else neurons.LIF_NO_DECAY


def _activation(node: Any, h: Tensor) -> Tensor:
    out: Tensor = node.act(h - node.v_threshold if node.threshold_related else h)
    return out


def _ilif(node: Any) -> Mapping[str, Any]:
    count = node.surrogate_function
    if not count.spiking or (count.grad_min, count.grad_max) != (0, count.max_spike_count):
        raise SpecError("its gradient's window is not that of its spikes, or it does not spike")
    return {"tau": node.tau, "levels": count.max_spike_count}


NODES = {
    "IFNode": Row(lambda node: neurons.IF, _attributes()),
    "HalfThresholdIFNode": Row(lambda node: neurons.IF, _attributes()),
    "LIFNode": Row(_lif, _attributes("tau")),
    "ParametricLIFNode": Row(
        lambda node: neurons.PLIF if node.decay_input else neurons.PLIF_NO_DECAY,
        lambda node: {"reciprocal_tau": node.w.sigmoid()},
    ),
    "QIFNode": Row(lambda node: neurons.QIF, _attributes("tau", "v_c", "a0", "v_rest")),
    "EIFNode": Row(lambda node: _EIF, _attributes("tau", "delta_T", "theta_rh", "v_rest")),
    "IzhikevichNode": Row(
        lambda node: neurons.IZHIKEVICH,
        _attributes("tau", "v_c", "a0", "v_rest", "tau_w", "a", "b"),
    ),
    "CUBALIFNode": Row(lambda node: neurons.CUBA_LIF, _attributes("c_decay", "v_decay")),
    "RAFNode": Row(lambda node: _RAF, _rotation),
    "KLIFNode": Row(
        lambda node: _klif(node.decay_input, node.scale_reset, node.v_reset is None),
        _attributes("tau", "k"),
    ),
    "TernaryIFNode": Row(
        lambda node: _ternary(None, node.v_reset is None, node.detach_reset), _attributes()
    ),
    "TernaryLIFNode": Row(
        lambda node: _ternary(node.decay_input, node.v_reset is None, node.detach_reset),
        _attributes("tau"),
    ),
    "ComplementaryLIFNode": Row(_clif, _attributes("tau"), _clif_surrogate),
    "ILIFNode": Row(lambda node: neurons.ILIF, _ilif, lambda node: StraightThrough),
    "LIAFNode": Row(_lif, _attributes("tau"), analog=_activation),
    "GatedLIFNode": Row(lambda node: _GATED_LIF, _attributes(), fit=_gated),
    "ActivationAwareIFNode": Row(lambda node: _ACTIVATION_AWARE, _attributes(), fit=_by_channel),
}
# why others have none, and those that are derived from them
_READOUT = "it is a readout, which never fires"
_NO_LOOP = "it is a product or a convolution over time, no loop"
_RATES = "its gradient is that of rates, over the whole sequence"
_REASONS = {
    "SimpleBaseNode": "its charge, fire and reset are methods to override; use IFNode or LIFNode",
    "NonSpikingBaseNode": _READOUT,
    "NoisyNonSpikingBaseNode": _READOUT,
    "NoisyBaseNode": "it draws random numbers in each step",
    "ILCBaseNode": "it is recurrent: a convolution of its spikes is added to the next input",
    "MPBNBaseNode": "it normalises its potential over the batch, within each step",
    "OTTTLIFNode": "it learns online, from a trace that it puts out beside its spikes",
    "SLTTLIFNode": "it learns online: each step forgets where its potential is from",
    "PSN": _NO_LOOP,
    "MaskedPSN": _NO_LOOP,
    "SlidingPSN": _NO_LOOP,
    "DSRIFNode": _RATES,
    "DSRLIFNode": _RATES,
    "FewSpikeNode": "its steps are the digits of one number, which comes at once",
    "STBIFNode": "it has no gradient, and kernels of SpikingJelly's own",
    "FlexSN": "its equations are a function in Python, which SpikingJelly compiles itself",
}

# a class or an instance that has one of these of its own has dynamics of its own
_DYNAMICS = (
    "__call__", "forward", "single_step_forward", "multi_step_forward", "functional_forward",
    "single_step_functional_forward", "multi_step_functional_forward", "materialize_states",
    "_v_seq_source", "_append_v_seq",
)  # fmt: skip


def can_fuse(kind: type) -> bool:
    """Whether kernels of this node take x as it is, so that a batch norm can stand before it."""
    base = classes.known(kind, FAMILY, NODES)
    return base is not None and NODES[base.__name__].fit is None


def look(module: torch.nn.Module) -> Row | str | None:
    """The row of a node that can be swapped, why a neuron cannot be, or None: it is no neuron."""
    kind = type(module)
    names = [base.__name__ for base in classes.family(kind, FAMILY)]
    if not names:
        return None
    named = next((name for name in names if name in NODES or name in _REASONS), None)
    if named in _REASONS:
        return _REASONS[named]
    base = classes.known(kind, FAMILY, NODES)
    if base is None:
        return f"no equations for it; there are some for {', '.join(NODES)}"
    if not hasattr(base, "single_step_functional_forward"):
        return f"an older SpikingJelly, without functional forwards; {TESTED} is known"
    if changed := classes.own_dynamics(module, base, _DYNAMICS):
        return changed
    try:
        _read(module, NODES[base.__name__])
    except NeuronJitError as error:
        return str(error)
    return NODES[base.__name__]


def describe(module: Any, row: Row) -> str:
    """What runs in the node's place."""
    model, surrogate, given = _read(module, row)
    smooth = "" if surrogate.spiking else ", not spiking"
    reset = "own" if model.own_reset else "soft" if given["v_reset"] is None else "hard"
    then = ", its activation in single steps" if row.analog else ""
    return f"{model.name}, {reset} reset, {classes.shown(surrogate)}{smooth}{then}"


def _read(node: Any, row: Row) -> tuple[NeuronModel, Surrogate, dict[str, Any]]:
    """What a node computes now: model, surrogate, parameters; SpecError where we cannot."""
    if getattr(node, "_neuron_precision", None) is not None:
        raise SpecError("its neuron precision is set, which SpikingJelly's own kernels serve")
    given = {"v_threshold": node.v_threshold, "v_reset": getattr(node, "v_reset", None)}
    return row.model(node), row.surrogate(node), {**given, **row.params(node)}


class Methods:
    """What stands before the methods of a node's class when the node is accelerated."""

    _neuronjit: Row
    _memories: dict[str, Any]
    _norm: Any = None  # the batch norm before it, which its kernels do: see nn/batch_norm.py

    def materialize_states(self, inputs: Any, states: Any, step_mode: str) -> Any:
        """States as they are where they fit the input: kernels take numbers, and keep float32."""
        x = inputs[0]
        shape = x.shape[1:] if step_mode == "m" else x.shape
        for state in states:
            if isinstance(state, Tensor):
                fits = state.shape == shape and state.device == x.device
            else:
                fits = type(state) is float
            if not fits:
                return super().materialize_states(inputs, states, step_mode)  # type: ignore[misc]
        return states

    def single_step_functional_forward(self, inputs: Any, states: Any, **kwargs: Any) -> Any:
        """One time step as a kernel of T = 1."""
        out = self._run(inputs[0].unsqueeze(0), states, steps=True)
        if out is None:
            return super().single_step_functional_forward(inputs, states, **kwargs)  # type: ignore[misc]
        return (out.spikes[0],), tuple(out.state[name] for name in self._memories)

    def multi_step_functional_forward(self, inputs: Any, states: Any, **kwargs: Any) -> Any:
        """A whole sequence as one kernel."""
        out = self._run(inputs[0], states)
        if out is None:
            return super().multi_step_functional_forward(inputs, states, **kwargs)  # type: ignore[misc]
        return (out.spikes,), tuple(out.state[name] for name in self._memories)

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A whole sequence as one kernel, which stores `v_seq` where that is asked for."""
        states = self.materialize_states((x_seq,), tuple(self._memories.values()), "m")
        store = getattr(self, "store_v_seq", False)
        # as SpikingJelly, which runs single steps where it stores them
        out = self._run(x_seq, states, ("v",) if store else (), steps=store)
        if out is None:
            return super().multi_step_forward(x_seq, *args, **kwargs)  # type: ignore[misc]
        for name in self._memories:
            self._memories[name] = out.state[name]
        if store:
            self.v_seq = out.record["v"]
        return out.spikes

    def _run(
        self, x_seq: Tensor, states: Any, record: tuple[str, ...] = (), steps: bool = False
    ) -> Output | None:
        """The kernel's output; None where only SpikingJelly can run the node, or this input."""
        node: Any = self
        row = node._neuronjit
        try:
            model, surrogate, given = _read(node, row)
            if row.fit is not None:
                x_seq, fitted = row.fit(node, x_seq)
                given.update(fitted)
        except NeuronJitError as error:
            if node._norm is not None:
                raise SpecError(
                    f"a {type(node).__name__} was changed, and SpikingJelly's runs without the"
                    f" batch norm that is fused into it: {error}; call neuronjit.nn.unfuse(net)"
                    " first"
                ) from None
            classes.warn_left(node, NAME, error)
            return None
        kind = type(node).__name__
        states = [carried(s, kind) if isinstance(s, Tensor) else s for s in states]
        analog = row.analog if steps else None
        run = multistep if node._norm is None else node._norm.multistep
        out: Output = run(
            model, x_seq, dict(zip(node._memories, states, strict=True)), surrogate=surrogate,
            detach_reset=getattr(node, "detach_reset", False),
            record=record if analog is None else (*record, "h"), **given,
        )  # fmt: skip
        if analog is None:
            return out
        return out._replace(spikes=torch.stack([analog(node, h) for h in out.record["h"]]))


# --- our own layers among SpikingJelly's ----------------------------------------------------------


def adopted(kind: Any, memory_module: type | None) -> Any:
    """A class of layers of ours as SpikingJelly's MemoryModule too.

    Its memopt and `to_functional_forward` find states in nothing else, and its `reset_net`,
    `detach_net` and `set_step_mode` log a warning of every other module that has these methods.
    """
    if memory_module is None or issubclass(kind, memory_module):
        return kind
    return _adopted(kind, memory_module)


@cache
def _adopted(kind: Any, memory_module: type) -> type:
    own = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (Adopted, kind, memory_module), {**own, "_neuronjit_origin": kind})


def again(origin: Any) -> Any:
    """An empty instance, in `pickle` and `deepcopy`."""
    return origin.__new__(origin)


class Adopted:
    """What SpikingJelly asks of its modules, answered by our layers."""

    step_mode = "m"  # an attribute of instances, where SpikingJelly has a property
    _neuronjit_origin: type
    _memories: dict[str, Any]

    def functional_forward(self, x: Any, state: Any = None, *inputs: Any, **kwargs: Any) -> Any:
        """As the layer's own; as SpikingJelly's, tuples to tuples, where x is a tuple."""
        run = super().functional_forward  # type: ignore[misc]
        if not isinstance(x, tuple):
            return run(x, state, *inputs, **kwargs)
        given = zip(self._memories, state, strict=True)
        start = {name: value for name, value in given if value is not None}
        spikes, last = run(x[0], start, *x[1:])
        return (spikes,), tuple(last[name] for name in self._memories)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        return (again, (self._neuronjit_origin,), *reduced[2:])
