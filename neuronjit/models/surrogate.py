"""Surrogate gradients: what replaces the derivative of the Heaviside step in backward.

Every surrogate is data: two expressions of u = h - theta and its numbers. Calling one gives the
same surrogate with other numbers, `ATan(alpha=3.0)`; as kernel arguments, they compile nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import SpecError, expect_fields, expect_number, known
from ..immutable import Immutable, ReadOnly
from ..language.mathematics import aligned, to_latex
from ..language.parse import check_label, check_name, parse_expression, plain
from ..language.tree import Node


class Surrogate(Immutable):
    """A surrogate gradient, written as expressions of u = h - theta. Immutable.

    Args:
        name: any name; appears in kernel names and listings.
        derivative: what backward uses for ds/du, e.g. "where(abs(u) < width, 0.5 / width, 0.0)".
        primitive: the smooth function that replaces the spike when `spiking=False`; its exact
            derivative is then the gradient (what `torch.autograd.gradcheck` verifies). None:
            there is none.
        params: the names that the expressions read, with default numbers.
        spiking: False for the smooth output.

    Raises:
        EquationError: an expression outside the language of the equations.
        SpecError: a number that is not finite, or `spiking=False` without a primitive.
    """

    name: str
    derivative: str
    primitive: str | None
    names: tuple[str, ...]  # of params
    values: tuple[float, ...]  # of params
    spiking: bool
    derivative_tree: Node
    primitive_tree: Node | None
    form: Surrogate  # the one that the others with the same expressions were made from
    token: str  # as a model's; numbers are no part of it

    _advice = "surrogates are immutable; call one to get another, e.g. ATan(alpha=3.0)"
    _identity: tuple[Any, ...]
    _hash: int
    _shared: tuple[str, ...]  # the names of what all numbers of one form have in common

    def __init__(
        self,
        name: str,
        derivative: str,
        primitive: str | None = None,
        params: Mapping[str, float] | None = None,
        *,
        spiking: bool = True,
    ) -> None:
        check_label(name, "surrogate name")
        names = tuple(check_name(p, "surrogate parameter") for p in params or {})
        if "u" in names:
            reason = "'u' is the distance to the threshold, not a parameter"
            raise SpecError(f"surrogate '{name}': {reason}")
        readable = {"u", *names}
        identity = (name, derivative, primitive, names)
        form = dict(
            name=name,
            derivative=derivative,
            primitive=primitive,
            names=names,
            derivative_tree=parse_expression(derivative, readable),
            primitive_tree=None if primitive is None else parse_expression(primitive, readable),
            form=self,
            token=json.dumps(
                [name, plain(derivative), None if primitive is None else plain(primitive), names]
            ),
            _identity=identity,
            _hash=hash(identity),
        )
        # `__call__` hands them on
        self._keep(**form, _shared=(*form, "_shared"))
        self._set(dict.fromkeys(names, 0.0), params or {}, spiking)

    def _set(self, numbers: dict[str, float], params: Mapping[str, Any], spiking: bool) -> None:
        """While the object is made: `numbers`, with those in `params` instead."""
        for key, value in params.items():
            this = f"surrogate '{self.name}'"
            if key not in numbers:
                raise SpecError(f"{this} has no parameter '{key}'. {known(numbers)}")
            numbers[key] = expect_number(value, f"{this}: {key}")
        if not spiking and self.primitive is None:
            reason = "has no primitive, so spiking=False has no output to give"
            raise SpecError(f"surrogate '{self.name}' {reason}")
        self._keep(values=tuple(numbers.values()), spiking=bool(spiking))

    @property
    def params(self) -> Mapping[str, float]:
        """The numbers by name, to be read only."""
        advice = f"surrogates are immutable: {self.name}({{change}}) gives another one"
        return ReadOnly(self._numbers(), advice)

    def _numbers(self) -> dict[str, float]:
        """As `params`, for torch.compile too: Dynamo of torch 2.6 makes no dict of another type."""
        return dict(zip(self.names, self.values, strict=True))

    def _keep(self, **attributes: Any) -> None:
        """While the object is made. Dynamo of torch 2.11 follows no `__dict__.update`."""
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def __call__(self, *numbers: float, spiking: bool | None = None, **params: float) -> Surrogate:
        """The same surrogate with other numbers: `ATan(3.0)` or `ATan(alpha=3.0, spiking=False)`.

        Numbers without a name are those of `params`, in their order.
        """
        if numbers:
            params = self._in_order(numbers, params)
        other = object.__new__(Surrogate)
        other._keep(**{name: getattr(self, name) for name in self._shared})
        other._set(self._numbers(), params, self.spiking if spiking is None else spiking)
        return other

    def _in_order(self, numbers: tuple[float, ...], params: dict[str, float]) -> dict[str, float]:
        if len(numbers) > len(self.names):
            given = f"surrogate '{self.name}' takes {len(self.names)} numbers, got {len(numbers)}"
            raise SpecError(f"{given}. {known(self.names)}")
        placed = dict(zip(self.names[: len(numbers)], numbers, strict=True))
        if twice := placed.keys() & params.keys():
            raise SpecError(f"surrogate '{self.name}': {sorted(twice)} given twice")
        return placed | params

    def to_dict(self) -> dict[str, Any]:
        """All that makes the surrogate, as JSON can hold it."""
        return {
            "name": self.name,
            "derivative": self.derivative,
            "primitive": self.primitive,
            "params": self._numbers(),
            "spiking": self.spiking,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Surrogate:
        """The surrogate that `to_dict` described. The data may be a stranger's.

        Raises EquationError, InputTypeError or SpecError for anything else.
        """
        kinds = dict(name=str, derivative=str, primitive=str, params=dict, spiking=bool)
        if isinstance(data, dict) and data.get("primitive", "") is None:
            kinds["primitive"] = type(None)
        return cls(**expect_fields(data, kinds, "surrogate"))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the constructor's arguments: str hashes differ between processes."""
        form = self.name, self.derivative, self.primitive, self.form._numbers()
        return _unpickle, (form, self._numbers(), self.spiking)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Surrogate):
            return False
        mine = self._identity, self.values, self.spiking
        if mine != (other._identity, other.values, other.spiking):
            return False
        return 0.0 not in self.values or repr(self.values) == repr(other.values)  # -0.0 is not 0.0

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        numbers = "".join(f"{k}={v:g}, " for k, v in self._numbers().items())
        return f"{self.name}({numbers}spiking={self.spiking})"

    def __repr__(self) -> str:
        fields = self.to_dict()
        said = [f"'{fields.pop('name')}'", *(f"{k}={v!r}" for k, v in fields.items())]
        return f"Surrogate({', '.join(said)})"

    def _repr_markdown_(self) -> str:
        lines = [(r"\frac{\partial s}{\partial u}", "=", to_latex(self.derivative_tree))]
        if self.primitive_tree:
            lines.append((r"\mathrm{primitive}", "=", to_latex(self.primitive_tree)))
        return f"**{self}**\n\n$$\n{aligned(lines)}\n$$"


def _unpickle(form: tuple[Any, ...], params: dict[str, float], spiking: bool) -> Surrogate:
    return Surrogate(*form)(spiking=spiking, **params)
