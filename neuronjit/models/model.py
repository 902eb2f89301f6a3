"""A neuron model: a block of equations, states that start somewhere, parameters."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import EquationError, expect, expect_fields, expect_number, known
from ..immutable import Immutable, ReadOnly
from ..language.mathematics import aligned, latex_name, to_latex
from ..language.parse import check_label, check_name, parse_block, place_of, plain
from ..language.tree import Statement

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
        inputs: the sequences that the equations read. The first is x, the x_seq of a call; the
            others are tensors that a call is given by keyword.
        equations: assignments in Python syntax, run in order. They read the inputs, the states,
            the parameters and what was assigned before. `h` (the charged membrane potential) must
            be assigned, `theta` (the threshold) may be and is `v_threshold` otherwise. The neuron
            fires, s = fire(h, theta), just before the first statement that reads `s`, or at the
            end; or where the block assigns `s` itself. Then v is reset from h and s by the reset
            mode, unless the block assigns `v` itself. `fire(a, b)` is 1 where a >= b, with the
            surrogate's slope. `y`, where it is assigned, is what comes out instead of s.
            `detach(...)` cuts a gradient.
        state: states (v among them) with the numbers they start from.
        params: parameters with default numbers; `v_threshold` (1.0) and `v_reset` (0.0) always
            exist.
        strict: fire on h > theta instead of h >= theta (as snnTorch and Norse do).
        positive: parameters that only make sense above zero; numbers are checked in every call.
        about: what the neuron is and where it comes from, for readers: `help(model)` shows it. It
            is no part of the model's identity; models that differ in nothing else are equal.

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
    inputs: tuple[str, ...]
    arguments: tuple[str, ...]  # states, inputs but x, parameters: the order of all their values
    keywords: tuple[str, ...]  # of them, what a call takes by keyword
    own_reset: bool  # the block assigns v
    about: str
    recordable: tuple[str, ...]  # the states, h, and what else the block assigns
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
        inputs: Iterable[str] = ("x",),
        strict: bool = False,
        positive: Iterable[str] = (),
        about: str = "",
    ) -> None:
        check_label(name, "model name")
        expect(about, str, "about")
        this = f"model '{name}'"
        state = {check_name(k, "state"): _default(k, v) for k, v in state.items()}
        params = {check_name(k, "parameter"): _default(k, v) for k, v in (params or {}).items()}
        params = {**params, **{k: v for k, v in _EVERY_MODELS.items() if k not in params}}
        positive = frozenset(positive)
        inputs = _inputs(this, inputs)
        names = [*state, *inputs[1:], *params]
        for key in names:
            if key in _RESERVED:
                reason = f"'{key}' is {_RESERVED[key]}; it cannot be a state or a parameter"
                raise EquationError(f"{this}: {reason}")
        if "v" not in state:
            reason = f"the membrane potential 'v' must be one of the states {list(state)}"
            raise EquationError(f"{this}: {reason}")
        if twice := sorted({n for n in names if names.count(n) > 1}):
            reason = f"{twice} can only be one of a state, an input and a parameter"
            raise EquationError(f"{this}: {reason}")
        if unknown := positive - params.keys():
            raise EquationError(f"{this}: positive names {sorted(unknown)}. {known(params)}")
        readable = {*inputs, "s", "theta", *state, *params}
        statements = parse_block(equations, readable)
        _check_block(name, equations, inputs, params, statements)
        numbers = repr((state, params))  # as text: -0.0 is another default than 0.0
        identity = (name, equations, inputs, numbers, bool(strict), positive)
        self.__dict__.update(
            name=name,
            equations=equations,
            strict=bool(strict),
            state=ReadOnly(state, _OTHER_STATE),
            params=ReadOnly(params, _OTHER_NUMBERS),
            positive=positive,
            about=about,
            statements=statements,
            inputs=inputs,
            arguments=tuple(names),
            keywords=tuple(names[len(state) :]),
            own_reset=any(s.target == "v" for s in statements),
            recordable=_recordable(state, statements),
            _identity=identity,
            _hash=hash(identity),
        )
        if about:
            shown = textwrap.dedent(equations).strip()
            self.__dict__["__doc__"] = f"{about}\n\n{shown}"  # what help(model) shows
        self.__dict__["token"] = json.dumps({**self.to_dict(), "equations": plain(equations)})

    def to_dict(self) -> dict[str, Any]:
        """All that makes the model, as JSON can hold it: for graphs, manifests and pickles.

        `about` is left out: it makes no other model, and older versions read what this one writes.
        """
        return {
            "name": self.name,
            "equations": self.equations,
            "state": dict(self.state),
            "params": dict(self.params),
            "inputs": list(self.inputs),
            "strict": self.strict,
            "positive": sorted(self.positive),
        }

    @classmethod
    def from_dict(cls, data: Any, about: str = "") -> NeuronModel:
        """The model that `to_dict` described. The data may be a stranger's.

        Raises EquationError, InputTypeError or SpecError for anything else.
        """
        kinds = dict(name=str, equations=str, state=dict, params=dict, inputs=list, strict=bool)
        given = expect_fields(data, {**kinds, "positive": list}, "model")
        for field in ("inputs", "positive"):
            for name in given[field]:
                expect(name, str, field)
        return cls(**given, about=about)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the constructor's arguments: str hashes differ between processes."""
        return NeuronModel.from_dict, (self.to_dict(), self.about)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, NeuronModel) and self._identity == other._identity
        return self is other or same

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        fields = self.to_dict()
        if self.inputs == ("x",):
            del fields["inputs"]
        text = fields.pop("equations")
        lines = f'"""{text}"""' if "\n" in text and not re.search(r'\\|"', text) else repr(text)
        said = [repr(fields.pop("name")), lines, *(f"{k}={v!r}" for k, v in fields.items() if v)]
        return f"NeuronModel({', '.join(said)})"

    def _repr_markdown_(self) -> str:
        """The equations of the block in mathematics; `neuronjit.explain` has all of a step."""
        lines = (
            (latex_name(s.target), r"\leftarrow", to_latex(s.expression)) for s in self.statements
        )
        numbers = {"starts from": self.state, "parameters": self.params}
        listed = (
            f"{what} `{', '.join(f'{k} = {v:g}' for k, v in of.items())}`"
            for what, of in numbers.items()
        )
        return f"**{self.name}**\n\n$$\n{aligned(lines)}\n$$\n\n{'; '.join(listed)}"


def _default(key: str, value: Any) -> float:
    return expect_number(value, f"{key}: a default")


def _inputs(this: str, given: Iterable[str]) -> tuple[str, ...]:
    inputs = (given,) if isinstance(given, str) else tuple(given)
    if inputs[:1] != ("x",):
        raise EquationError(f"{this}: the first of inputs is 'x', got {ascii(inputs)[:80]}")
    return "x", *(check_name(name, "input") for name in inputs[1:])


def _recordable(state: Iterable[str], statements: Iterable[Statement]) -> tuple[str, ...]:
    """Names that a call may record; what comes out anyway is none of them."""
    assigned = [s.target for s in statements if s.target == s.whole]
    return tuple(n for n in dict.fromkeys((*state, "h", *assigned)) if n not in ("s", "y"))


def _check_block(
    model: str,
    text: str,
    inputs: Iterable[str],
    params: Mapping[str, float],
    statements: tuple[Statement, ...],
) -> None:
    """The rules about x, h, theta and s that parsing alone does not know. Raises EquationError."""
    assigned: set[str] = set()
    fired = False
    own_theta, own_s = (any(s.target == n for s in statements) for n in ("theta", "s"))

    def refused(line: int, word: str, reason: str, *, read: bool = False) -> EquationError:
        return EquationError(f"{place_of(text, line, word, read=read)}: {reason}")

    for statement in statements:
        line = statement.line
        reads, target = statement.expression.names(), statement.target
        fired = fired or "s" in reads
        if own_s and "s" in reads and "s" not in assigned:
            raise refused(line, "s", "'s' is read before it is assigned", read=True)
        if "s" in (*reads, target) and "h" not in assigned:
            used = "read" if "s" in reads else "assigned"
            reason = f"'s' is {used} before 'h' is assigned, so the neuron cannot fire yet"
            raise refused(line, "s", reason, read="s" in reads)
        if "theta" in reads and own_theta and "theta" not in assigned:
            raise refused(line, "theta", "'theta' is read before it is assigned", read=True)
        if target == "s" and "s" in assigned:
            raise refused(line, target, "'s' is assigned twice; the neuron fires once a step")
        if target in inputs or target in params:
            what = "a parameter" if target in params else "an input"
            raise refused(line, target, f"'{target}' is {what}; it cannot be assigned")
        if target in ("h", "theta") and fired:
            when = "where 's' is assigned" if own_s else "the first statement that reads 's'"
            raise refused(line, target, f"'{target}' is assigned after the neuron fired ({when})")
        fired = fired or target == "s"
        assigned.add(target)
    if "h" not in assigned:
        reason = "'h', the charged membrane potential, is never assigned"
        raise EquationError(f"model '{model}': {reason}")
