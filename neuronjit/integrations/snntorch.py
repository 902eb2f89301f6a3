"""snnTorch's neurons: what is known of each, one row, and the `forward` that an instance gets.

A neuron of snnTorch 1.0.0 is called once a time step, by the user's own loop: each call becomes a
kernel of T = 1. States, `reset_mem`, `utils.reset` and hooks stay snnTorch's. Nothing here imports
it: whoever passes one of its neurons has.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import surrogates
from ..errors import InputTypeError, NeuronJitError, SpecError
from ..models.model import NeuronModel
from ..models.surrogate import Surrogate
from ..run.autograd import Output, multistep
from . import classes

NAME, PACKAGE, TESTED = "snnTorch", "snntorch", "1.0.0"
FAMILY = "snntorch._neurons."
_NEURONS = ("SpikingNeuron", "LeakyParallel", "LeakyKernel")  # what its neurons derive from, or are


# --- the equations --------------------------------------------------------------------------------


class Row(NamedTuple):
    """What a neuron computes in a step, after r, which is 1 where the last step ended in a spike.

    The zoo's models say the same for fixed numbers. Here decays are clamped as snnTorch's are, and
    the graded spike comes out. `rec` is what the last step's spikes add to the input.
    """

    name: str
    # attributes, in the order of forward's arguments; mem is the model's v, spk are the last spikes
    states: tuple[str, ...]
    params: tuple[str, ...]  # attributes; each neuron has threshold and graded_spikes_factor too
    charge: Mapping[str, str]  # by what is done after a spike: "sub", "zero", "int" (nothing)


_SYN = "syn = clamp(alpha, 0, 1) * syn + x\n"
_ALPHA = """
a = clamp(alpha, 0, 1)
b = clamp(beta, 0, 1)
inh = b * syn_inh - x
exc = a * syn_exc + x
h = (log(a) / (log(b) - log(a)) + 1) * (exc + inh)
"""
_RSYN = "syn = clamp(alpha, 0, 1) * syn + x + rec\n"
_RC = "h = x * R * (1 / (R * C)) * time_step + (1 - time_step / (R * C)) * v"

NODES = {
    row.name: row
    for row in (
        Row(
            "Leaky", ("mem",), ("beta",),
            dict(
                sub="h = clamp(beta, 0, 1) * v + x - r * v_threshold",
                zero="h = clamp(beta, 0, 1) * ((1 - r) * v) + x",
                int="h = clamp(beta, 0, 1) * v + x",
            ),
        ),
        Row(
            "Synaptic", ("syn", "mem"), ("alpha", "beta"),
            dict(
                sub=f"{_SYN}h = clamp(beta, 0, 1) * v + syn - r * v_threshold",
                zero=f"{_SYN}h = clamp(beta, 0, 1) * v + syn\nh = h - h * r",
                int=f"{_SYN}h = clamp(beta, 0, 1) * v + syn",
            ),
        ),
        Row(
            "Alpha", ("syn_exc", "syn_inh", "mem"), ("alpha", "beta"),
            dict(
                sub=f"{_ALPHA}h = h + syn_inh * r\n"
                "syn_exc = exc - v_threshold * r\nsyn_inh = inh - inh * r",
                zero=f"{_ALPHA}h = h - h * r\nsyn_exc = exc - exc * r\nsyn_inh = inh - inh * r",
                int=f"{_ALPHA}syn_exc = exc\nsyn_inh = inh",
            ),
        ),
        Row(
            "Lapicque", ("mem",), ("R", "C", "time_step"),
            dict(sub=f"{_RC} - r * v_threshold", zero=f"{_RC}\nh = h - h * r", int=_RC),
        ),
        Row(
            "RLeaky", ("spk", "mem"), ("beta",),
            dict(
                sub="h = clamp(beta, 0, 1) * v + x + rec - r * v_threshold",
                zero="h = clamp(beta, 0, 1) * v + x + rec\nh = h - h * r",
                int="h = clamp(beta, 0, 1) * v + x + rec",
            ),
        ),
        Row(
            "RSynaptic", ("spk", "syn", "mem"), ("alpha", "beta"),
            dict(
                sub=f"{_RSYN}h = clamp(beta, 0, 1) * v + syn - r * v_threshold",
                zero=f"{_RSYN}h = clamp(beta, 0, 1) * v + syn\nh = h - h * r",
                int=f"{_RSYN}h = clamp(beta, 0, 1) * v + syn",
            ),
        ),
    )
}  # fmt: skip

_AT_ONCE = {  # with reset_delay=False; y / g - r undoes what the charge has reset already
    "subtract": "v = h - (y / graded_spikes_factor - r) * v_threshold",
    "zero": "v = h - (y / graded_spikes_factor - r) * h",
}


# how spikes come back: not at all; each neuron's own, times V, in the kernel; or through a module
# between the steps, as an input
_NONE, _ONE, _ALL = "", "one_to_one", "all_to_all"

# dictionaries, because torch.compile reads them where it would trace through functools.cache
_models: dict[tuple[str, str, str, str], NeuronModel] = {}
_slopes: dict[FunctionType, Surrogate] = {}


def _model(row: Row, before: str, after: str, wiring: str) -> NeuronModel:
    """The model of a neuron that resets so `before` it charges and `after` it fired."""
    key = (row.name, before, after, wiring)
    return _models.get(key) or _models.setdefault(key, _new_model(*key))


def _new_model(name: str, before: str, after: str, wiring: str) -> NeuronModel:
    row = NODES[name]
    text = f"{row.charge[before]}\ny = s * graded_spikes_factor\n{_AT_ONCE.get(after, 'v = h')}"
    if before != "int" or after in _AT_ONCE:
        text = f"r = where(v > v_threshold, 1, 0)\n{text}"
    if wiring == _ONE:
        text = f"rec = spk * V\n{text}"
    if wiring != _NONE:
        text = f"{text}\nspk = y"
    said = [name.lower(), before, "at_once" if after in _AT_ONCE else "", wiring]
    params = [*row.params, *(["V"] if wiring == _ONE else []), "graded_spikes_factor"]
    return NeuronModel(
        "_".join(part for part in said if part),
        text,
        inputs=("x", "rec") if wiring == _ALL else ("x",),
        state=dict.fromkeys(["v", *(state for state in row.states if state != "mem")], 0.0),
        params=dict.fromkeys(params, 0.5),
        strict=True,
    )


# --- surrogates -----------------------------------------------------------------------------------

_TRIANGULAR = Surrogate("Triangular", "where(u < 0, k, -k)", None, dict(k=1.0))
_SFS = Surrogate(
    "SparseFastSigmoid",
    "where(u > B, 1 / (slope * abs(u) + 1)**2, 0)",
    None,
    dict(slope=25.0, B=1.0),
)
_STEP = Surrogate("Heaviside", "where(u > 0, 1, 0)")
# by the functions of snntorch.surrogate that make them: ours, and the names of their numbers there
_SURROGATES: dict[str, tuple[Surrogate, tuple[str, ...]]] = {
    "atan": (surrogates.ATan, ("alpha",)),
    "fast_sigmoid": (surrogates.FastSigmoid, ("slope",)),
    "sigmoid": (surrogates.Sigmoid, ("slope",)),
    "straight_through_estimator": (surrogates.StraightThrough, ()),
    "triangular": (_TRIANGULAR, ("threshold",)),
    "heaviside": (_STEP, ()),
    "spike_rate_escape": (surrogates.SpikeRateEscape, ("beta", "slope")),
    "SFS": (_SFS, ("slope", "B")),
}


def _surrogate(given: Any) -> Surrogate:
    """Ours for a neuron's spike_grad."""
    if not isinstance(given, FunctionType):
        raise SpecError(f"unknown surrogate of type {type(given).__name__}")
    return _slopes.get(given) or _slope(given)


def _slope(given: FunctionType) -> Surrogate:
    """Ours for a closure that a function of snntorch.surrogate returned."""
    # a function's globals are those of the module that defined it; names can be set by anybody
    home = given.__globals__.get("__name__")
    if home == f"{FAMILY}neurons" and given.__name__ == "_surrogate_bypass":
        return classes.NO_SLOPE  # surrogate_disable=True
    maker = given.__qualname__.partition(".")[0]
    if home != "snntorch.surrogate" or maker not in _SURROGATES:
        known = ", ".join(_SURROGATES)
        raise SpecError(
            f"unknown surrogate {given.__qualname__}; those are known that have fixed slopes and"
            f" come from snntorch.surrogate: {known}"
        )
    cells = zip(given.__code__.co_freevars, given.__closure__ or (), strict=True)
    numbers = {name: cell.cell_contents for name, cell in cells}
    if not all(isinstance(number, int | float) for number in numbers.values()):
        raise SpecError(f"the numbers of its surrogate {maker} are no plain numbers: {numbers}")
    ours, names = _SURROGATES[maker]
    if len(_slopes) >= 1000:  # a new one in every epoch, or step
        _slopes.clear()
    return _slopes.setdefault(given, ours(*(float(numbers[name]) for name in names)))


# --- reading an instance --------------------------------------------------------------------------

# a class or an instance that has one of these of its own has dynamics of its own
_DYNAMICS = (
    "__call__", "forward", "fire", "mem_reset", "_base_state_function", "_base_sub", "_base_zero",
    "_base_int", "_base_state_reset_zero", "_base_state_reset_sub_function",
)  # fmt: skip


def look(module: torch.nn.Module) -> Row | str | None:
    """The row of a neuron that can be swapped, why it cannot be, or None: it is no neuron."""
    kind = type(module)
    if not any(base.__name__ in _NEURONS for base in classes.family(kind, FAMILY)):
        return None
    base = classes.known(kind, FAMILY, NODES)
    if base is None:
        return f"no equations for it; there are some for {', '.join(NODES)}"
    if not hasattr(module, "state_function") or not hasattr(module, "graded_spikes_factor"):
        return f"an older snnTorch; {TESTED} is known"
    if changed := classes.own_dynamics(module, base, _DYNAMICS):
        return changed
    try:
        _read(module, NODES[base.__name__])
    except NeuronJitError as error:
        return str(error)
    return NODES[base.__name__]


def describe(module: Any, row: Row) -> str:
    """What runs in the neuron's place."""
    model, surrogate = _read(module, row)
    return f"{model.name}, {classes.shown(surrogate)}"


def _read(node: Any, row: Row) -> tuple[NeuronModel, Surrogate]:
    """What a neuron computes now, but for its parameters; SpecError where we cannot."""
    if node.inhibition:
        raise SpecError("inhibition=True, and a kernel's neurons do not see each other")
    if node.state_quant:
        raise SpecError("state_quant is set, and kernels do not quantise states")
    step = node.state_function  # chosen when the neuron was made; later ones of the user's are not
    known = [name for name in row.charge if _same(step, getattr(node, f"_base_{name}"))]
    if not known:
        raise SpecError("its state_function is no method of its own that is known")
    after = "none" if getattr(node, "reset_delay", True) else node.reset_mechanism
    if after != "none" and row.name == "RSynaptic":  # it raises, or resets what it does not return
        raise SpecError("reset_delay=False, which the RSynaptic of snnTorch 1.0.0 does not do")
    return _model(row, known[0], after, _wiring(node, row)), _surrogate(node.spike_grad)


def _same(step: Any, own: Any) -> Any:
    """Whether both are one method: Dynamo tells it one way in torch 2.6, the other in 2.13."""
    held = getattr(step, "__self__", None), getattr(step, "__func__", None)
    return step == own or (held[0] is own.__self__ and held[1] is own.__func__)


def _returned(row: Row) -> list[str]:
    """The states that `forward` returns after the spikes."""
    return [name for name in row.states if name != "spk"]


def _wiring(node: Any, row: Row) -> str:
    if "spk" not in row.states:
        return _NONE
    kind = type(node.recurrent)
    own = kind.__name__ == "RecurrentOneToOne" and kind.__module__.startswith(FAMILY)
    return _ONE if own else _ALL


# --- running it -----------------------------------------------------------------------------------


def _params(node: Any, row: Row, model: NeuronModel, x_seq: Tensor) -> dict[str, Any]:
    named = {name: getattr(node, name) for name in (*row.params, "graded_spikes_factor")}
    named["v_threshold"] = node.threshold
    if "V" in model.params:
        named["V"] = node.recurrent.V
        if not named["V"].ndim:  # where it is not learned, `.to(device)` does not reach it
            named["V"] = named["V"].to(x_seq.device)
    for name, value in named.items():
        if not value.is_floating_point():  # snnTorch keeps threshold=1 as an integer
            named[name] = value.float()
        elif value.dtype == torch.float64 != x_seq.dtype and value.ndim:
            raise SpecError(f"{name} is a float64 tensor, which makes its potentials float64")
    return named


def _run(node: Any, row: Row, x_seq: Tensor, args: Any, kwargs: Any, every: bool = False) -> Output:
    """Run a neuron over x_seq `[T, N, *]`, from its states or those given; it keeps the last ones.

    As in snnTorch, a state of another shape than the input's starts at zero. SpecError or
    InputTypeError where kernels cannot.
    """
    given = dict(zip(row.states[: len(args)], args, strict=True))
    for name, value in {**given, **kwargs}.items():
        if value is not None:
            setattr(node, name, value)
    keys = {name: "v" if name == "mem" else name for name in row.states}
    held = {key: getattr(node, name) for name, key in keys.items()}
    state = {key: z if z.shape == x_seq.shape[1:] else 0.0 for key, z in held.items()}
    model, surrogate = _read(node, row)
    options: dict[str, Any] = _params(node, row, model, x_seq)
    options.update(surrogate=surrogate, record=tuple(held) if every else ())
    if "rec" in model.inputs:
        out = _step_by_step(node.recurrent, model, x_seq, state, **options)
    else:
        out = multistep(model, x_seq, state, **options)
    for name, key in keys.items():
        setattr(node, name, out.state[key])
    node.reset = None  # what snnTorch would keep here is inside the kernel
    return out


def _step_by_step(
    recurrent: Any, model: NeuronModel, x_seq: Tensor, state: Mapping[str, Any], **options: Any
) -> Output:
    """As multistep, a kernel for each step, with a module for the last spikes between them."""
    if not isinstance(state["spk"], Tensor):
        state = {**state, "spk": x_seq.new_zeros(x_seq.shape[1:])}
    steps = []
    for x in x_seq.split(1):
        rec = recurrent(state["spk"]).unsqueeze(0)
        steps.append(multistep(model, x, state, rec=rec, **options))
        state = steps[-1].state
    if len(steps) == 1:
        return steps[0]
    record = {name: torch.cat([out.record[name] for out in steps]) for name in steps[0].record}
    return Output(torch.cat([out.spikes for out in steps]), state, record)


def _check(node: Any, row: Row, args: Any, kwargs: Any) -> None:
    """Raise InputTypeError if the states that were given are not those that the neuron takes."""
    if len(args) > len(row.states) or not kwargs.keys() <= set(row.states[len(args) :]):
        takes = f"takes the input and then {', '.join(row.states)}"
        given = f"{len(args)} states and {sorted(kwargs)}"
        raise InputTypeError(f"snnTorch's {row.name} {takes}, got {given}")
    if node.init_hidden and any(value is not None for value in (*args, *kwargs.values())):
        raise InputTypeError(
            f"this {row.name} was made with init_hidden=True: it keeps its states itself, and"
            f" {', '.join(row.states)} cannot be passed"
        )


class Methods:
    """What stands before the methods of a neuron's class when the neuron is accelerated."""

    _neuronjit: Row

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One time step as a kernel of T = 1."""
        node: Any = self
        row = node._neuronjit
        _check(node, row, args, kwargs)
        try:
            out = _run(node, row, input_.unsqueeze(0), args, kwargs)
        except (SpecError, InputTypeError) as error:
            classes.warn_left(node, NAME, error)
            return super().forward(input_, *args, **kwargs)  # type: ignore[misc]
        # float32 as snnTorch's, whatever the input's dtype; no view, where it is a state as well
        spikes = (node.spk if "spk" in row.states else out.spikes[0]).float()
        if node.init_hidden and not node.output:
            return spikes
        return (spikes, *(getattr(node, name) for name in _returned(row)))


class Sequence(torch.nn.Module):
    """A neuron of snnTorch over a whole sequence: one kernel in place of a loop over time.

    A recurrent one with `all_to_all=True`, whose spikes go through its `recurrent` between the
    steps, is a loop here, of one kernel a step.

    Options, parameters and states are the layer's, read at every call; it keeps the last states.
    Its own `forward` and hooks do not run. `utils.reset(net)` looks for neurons among the direct
    children of `net` only: where they stand in sequences, call `reset_mem`.

    Args:
        layer: snnTorch's Leaky, Synaptic, Alpha, Lapicque, RLeaky or RSynaptic, accelerated or
            not.
        every_state: return the states of all steps, `[T, N, *]`, in place of the last ones.

    Raises:
        InputTypeError: layer is no neuron of snnTorch.
        SpecError: it is one that kernels cannot run; the message says why.
    """

    def __init__(self, layer: torch.nn.Module, *, every_state: bool = False) -> None:
        super().__init__()
        row = layer._neuronjit if isinstance(layer, Methods) else look(layer)
        kind = type(layer).__name__
        if row is None:
            raise InputTypeError(f"layer must be a snnTorch {' or '.join(NODES)}, got {kind}")
        if isinstance(row, str):
            raise SpecError(f"no kernel can run this {kind}: {row}")
        self.layer: Any = layer
        self.row, self.every_state = row, every_state

    def reset_mem(self) -> Any:
        """Set the layer's states to zero, and return what its own `reset_mem` returns."""
        return self.layer.reset_mem()

    def forward(self, x_seq: Tensor, *args: Tensor | None, **kwargs: Tensor | None) -> Any:
        """What the layer would return if it were called for each step of x_seq in turn.

        Args:
            x_seq: input `[T, N, *]`, time first; float32, float16, bfloat16 or float64.
            *args, **kwargs: states to start from, `[N, *]`, in the layer's order or by its names;
                where one is missing, the layer's own.

        Returns:
            Spikes `[T, N, *]` in float32, then each state after the last step `[N, *]` (after all
            steps, `[T, N, *]`, with `every_state`). From a layer with init_hidden=True and
            output=False, the spikes alone.

        Raises:
            SpecError, InputTypeError: as `multistep`; or the layer was changed into one that
                kernels cannot run, or states were passed that it does not take.
        """
        node, row = self.layer, self.row
        _check(node, row, args, kwargs)
        out = _run(node, row, x_seq, args, kwargs, self.every_state)
        spikes = out.spikes.float()
        if node.init_hidden and not node.output:
            return spikes
        if self.every_state:
            return (spikes, *(out.record["v" if n == "mem" else n] for n in _returned(row)))
        return (spikes, *(getattr(node, name) for name in _returned(row)))
