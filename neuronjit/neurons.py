"""Neuron models as data: a block of equations, states that start somewhere, parameters."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from .errors import EquationError, InputTypeError, SpecError, known
from .expressions import Node, Statement, check_label, check_name, name, number, parse_block, plain
from .immutable import Immutable, ReadOnly

_RESERVED = {
    "x": "the input",
    "s": "the spike",
    "h": "the charged membrane potential",
    "theta": "the threshold",
}
_EVERY_MODELS = {"v_threshold": 1.0, "v_reset": 0.0}
_OTHER_STATE = "models are immutable: pass state={...} to the call, or make a new NeuronModel(...)"
_OTHER_NUMBERS = (
    "models are immutable: pass {change} to the call or layer, or make a new NeuronModel(...)"
)


class NeuronModel(Immutable):
    """The equations of a neuron, run once a time step. Immutable.

    Args:
        name: any name; appears in kernel names and listings.
        equations: assignments in Python syntax, run in order. They read x (the input), the states,
            the parameters and what was assigned before. `h` (the charged membrane potential) must
            be assigned, `theta` (the threshold) may be and is `v_threshold` otherwise. The neuron
            fires, s = (h >= theta), just before the first statement that reads `s`, or at the end.
            Then v is reset from h and s by the reset mode, unless the block assigns `v` itself.
            `detach(...)` cuts a gradient.
        state: states (v among them) with the numbers they start from.
        params: parameters with default numbers; `v_threshold` (1.0) and `v_reset` (0.0) always
            exist.
        strict: fire on h > theta instead of h >= theta (as snnTorch and Norse do).
        positive: parameters that only make sense above zero; numbers are checked in every call.

    Raises:
        EquationError: equations outside the language; names the line and the word.
    """

    name: str
    equations: str
    state: Mapping[str, float]
    params: Mapping[str, float]
    strict: bool
    positive: frozenset[str]
    statements: tuple[Statement, ...]
    own_reset: bool  # the block assigns v
    token: str  # what a compiled graph holds of the model: a constant, readable in any process

    _advice = "models are immutable; make a new NeuronModel(name, equations, ...)"
    _identity: tuple[Any, ...]
    _hash: int

    def __init__(
        self,
        name: str,
        equations: str,
        *,
        state: Mapping[str, float],
        params: Mapping[str, float] | None = None,
        strict: bool = False,
        positive: Iterable[str] = (),
    ) -> None:
        check_label(name, "model name")
        this = f"model '{name}'"
        state = {check_name(k, "state"): _number(k, v) for k, v in state.items()}
        params = {check_name(k, "parameter"): _number(k, v) for k, v in (params or {}).items()}
        params = {**params, **{k: v for k, v in _EVERY_MODELS.items() if k not in params}}
        positive = frozenset(positive)
        for key in [*state, *params]:
            if key in _RESERVED:
                reason = f"'{key}' is {_RESERVED[key]}; it cannot be a state or a parameter"
                raise EquationError(f"{this}: {reason}")
        if "v" not in state:
            reason = f"the membrane potential 'v' must be one of the states {list(state)}"
            raise EquationError(f"{this}: {reason}")
        if both := state.keys() & params.keys():
            raise EquationError(f"{this}: {sorted(both)} cannot be both a state and a parameter")
        if unknown := positive - params.keys():
            raise EquationError(f"{this}: positive names {sorted(unknown)}. {known(params)}")
        readable = {"x", "s", "theta", *state, *params}
        statements = parse_block(equations, readable)
        _check_block(name, params, statements)
        described = dict(
            name=name, equations=equations, state=state, params=params, strict=bool(strict)
        )
        numbers = repr((state, params))  # as text: -0.0 is another default than 0.0
        identity = (name, equations, numbers, bool(strict), positive)
        self.__dict__.update(
            described,
            state=ReadOnly(state, _OTHER_STATE),
            params=ReadOnly(params, _OTHER_NUMBERS),
            positive=positive,
            statements=statements,
            own_reset=any(s.target == "v" for s in statements),
            # what a compiled graph holds of the model: a constant, readable in any other process
            token=json.dumps(
                {**described, "equations": plain(equations), "positive": sorted(positive)}
            ),
            _identity=identity,
            _hash=hash(identity),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the constructor's arguments: str hashes differ between processes."""
        numbers = dict(self.state), dict(self.params)
        return _unpickle, (self.name, self.equations, *numbers, self.strict, self.positive)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, NeuronModel) and self._identity == other._identity
        return self is other or same

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"NeuronModel('{self.name}', state={self.state}, params={self.params})"


def _unpickle(
    name: str, equations: str, state: Any, params: Any, strict: bool, positive: Any
) -> NeuronModel:
    return NeuronModel(
        name, equations, state=state, params=params, strict=strict, positive=positive
    )


@dataclass(frozen=True)
class Program:
    """A model with its reset, each name assigned once: to print, evaluate and differentiate."""

    statements: tuple[Statement, ...]  # one of them assigns "s" from Node("fire", (h, theta))
    final: Mapping[str, str]  # state -> the name that holds it after the step
    h: str  # the name of the charged membrane potential


@cache
def program(model: NeuronModel, reset: str, detach_reset: bool) -> Program:
    """Write out the spike and the reset: "hard", "soft", or "own" where the block assigns v."""
    current: dict[str, str] = {}  # a name of the equations -> the name that holds its value now
    count: dict[str, int] = {}  # how often a name was assigned, the entry of a state included
    statements: list[Statement] = []

    def assign(target: str, expression: Node, line: int = 0) -> None:
        count[target] = count.get(target, target in model.state) + 1
        again = count[target] - 1
        fresh = f"new{again if again > 1 else ''}_{target}_" if again else target
        expression = expression.substitute({k: name(v) for k, v in current.items()})
        statements.append(Statement(fresh, expression, line))
        current[target] = fresh

    def fire() -> None:
        assign("s", Node("fire", (name("h"), name("theta"))))
        s = Node("detach", (name("s"),)) if detach_reset else name("s")
        if reset == "hard":  # v = h * (1 - s) + v_reset * s
            kept = Node("*", (name("h"), Node("-", (number(1), s))))
            assign("v", Node("+", (kept, Node("*", (name("v_reset"), s)))))
        elif reset == "soft":  # v = h - s * theta
            assign("v", Node("-", (name("h"), Node("*", (s, name("theta"))))))

    if not any(s.target == "theta" for s in model.statements):
        assign("theta", name("v_threshold"))
    for statement in model.statements:
        expression = statement.expression
        if "s" in expression.names() and "s" not in current:
            fire()
        if statement.whole == "v" and detach_reset:
            expression = expression.substitute({"s": Node("detach", (name("s"),))})
        assign(statement.target, expression, statement.line)
    if "s" not in current:
        fire()
    return Program(tuple(statements), {z: current.get(z, z) for z in model.state}, current["h"])


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputTypeError(f"{key}: a default must be a number, got {type(value).__name__}")
    if not abs(value) <= sys.float_info.max:  # an int may be too large to be a float
        raise SpecError(f"{key}: a default must be finite, got {ascii(value)[:80]}")
    return float(value)


def _check_block(
    model: str, params: Mapping[str, float], statements: tuple[Statement, ...]
) -> None:
    """The rules about x, h, theta and s that parsing alone does not know. Raises EquationError."""
    assigned: set[str] = set()
    fired = False
    own_theta = any(s.target == "theta" for s in statements)
    for statement in statements:
        reads, target = statement.expression.names(), statement.target
        where = f"line {statement.line}: "
        fired = fired or "s" in reads
        if "s" in reads and "h" not in assigned:
            reason = "'s' is read before 'h' is assigned, so the neuron cannot fire yet"
            raise EquationError(where + reason)
        if "theta" in reads and own_theta and "theta" not in assigned:
            raise EquationError(f"{where}'theta' is read before it is assigned")
        if target in ("x", "s") or target in params:
            what = _RESERVED.get(target, "a parameter")
            raise EquationError(f"{where}'{target}' is {what}; it cannot be assigned")
        if target in ("h", "theta") and fired:
            reason = "is assigned after the neuron fired (the first statement that reads 's')"
            raise EquationError(f"{where}'{target}' {reason}")
        assigned.add(target)
    if "h" not in assigned:
        reason = "'h', the charged membrane potential, is never assigned"
        raise EquationError(f"model '{model}': {reason}")


# The six models of SpikingJelly's CuPy kernels, in their order of operations. With soft reset,
# v_reset is 0.
IF = NeuronModel("if", "h = v + x", state=dict(v=0.0))
LIF = NeuronModel(
    "lif",
    "h = v + (x - (v - v_reset)) / tau",
    state=dict(v=0.0),
    params=dict(tau=2.0),
    positive=["tau"],
)
LIF_NO_DECAY = NeuronModel(  # decay_input=False: the input is not divided by tau
    "lif_no_decay",
    "h = v - (v - v_reset) / tau + x",
    state=dict(v=0.0),
    params=dict(tau=2.0),
    positive=["tau"],
)
PLIF = NeuronModel(  # Fang et al. 2021, arXiv:2007.05785: LIF with a learnable 1 / tau
    "plif",
    "h = v + (x - (v - v_reset)) * reciprocal_tau",
    state=dict(v=0.0),
    params=dict(reciprocal_tau=0.5),
)
PLIF_NO_DECAY = NeuronModel(
    "plif_no_decay",
    "h = v - (v - v_reset) * reciprocal_tau + x",
    state=dict(v=0.0),
    params=dict(reciprocal_tau=0.5),
)
QIF = NeuronModel(  # Gerstner et al. 2014, Neuronal Dynamics, section 5.3
    "qif",
    "h = v + (x + a0 * (v - v_rest) * (v - v_c)) / tau",
    state=dict(v=0.0),
    params=dict(tau=2.0, v_c=0.8, a0=1.0, v_rest=0.0, v_reset=-0.1),
    positive=["tau", "a0"],
)
EIF = NeuronModel(  # Fourcaud-Trocme et al. 2003; Neuronal Dynamics, section 5.2
    "eif",
    "h = v + (x - (v - v_rest) + delta_T * exp((v - theta_rh) / delta_T)) / tau",
    state=dict(v=0.0),
    params=dict(tau=2.0, delta_T=1.0, theta_rh=0.8, v_rest=0.0, v_reset=-0.1),
    positive=["tau", "delta_T"],
)
IZHIKEVICH = NeuronModel(  # Izhikevich 2003 in SpikingJelly's form: QIF with an adaptation w
    "izhikevich",
    """
    h = v + (x + a0 * (v - v_rest) * (v - v_c) - w) / tau
    w = w + (a * (h - v_rest) - w) / tau_w + b * s
    """,
    state=dict(v=0.0, w=0.0),
    params=dict(tau=2.0, v_c=0.8, a0=1.0, v_rest=-0.1, tau_w=2.0, a=0.0, b=0.0),
    positive=["tau", "a0", "tau_w"],
)
Izhikevich = IZHIKEVICH

_BUILT_IN = {m.name: m for m in list(globals().values()) if isinstance(m, NeuronModel)}


def by_name(name: str) -> NeuronModel:
    """A built-in model by its name, in any case: `by_name("lif")`. Raises SpecError."""
    try:
        return _BUILT_IN[str(name).lower()]
    except KeyError:
        raise SpecError(f"unknown neuron {ascii(name)[:80]}. {known(_BUILT_IN)}") from None


def as_model(given: Any) -> NeuronModel:
    """Our model for `given`: a NeuronModel or the name of a built-in one."""
    if isinstance(given, NeuronModel):
        return given
    if isinstance(given, str):
        return by_name(given)
    raise InputTypeError(
        f"model must be a neuronjit.NeuronModel or the name of one, got {type(given).__name__}"
    )
