"""Surrogate gradients: what replaces the derivative of the Heaviside step in backward.

Every surrogate is data: two expressions of u = h - theta and its numbers. Calling one gives the
same surrogate with other numbers, `ATan(alpha=3.0)`; as kernel arguments, they compile nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from .errors import InputTypeError, SpecError, known
from .expressions import Node, check_label, check_name, parse_expression, plain
from .immutable import Immutable, ReadOnly

_NO_NUMBERS = bool, str, bytes  # though float() takes them
_ANOTHER = "({change}) gives another one"


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
    params: Mapping[str, float]
    values: tuple[float, ...]  # of params
    spiking: bool
    derivative_tree: Node
    primitive_tree: Node | None
    form: Surrogate  # the one that the others with the same expressions were made from
    token: str  # as a model's; numbers are no part of it

    _advice = "surrogates are immutable; call one to get another, e.g. ATan(alpha=3.0)"
    _identity: tuple[Any, ...]
    _hash: int

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
        names = [check_name(p, "surrogate parameter") for p in params or {}]
        if "u" in names:
            reason = "'u' is the distance to the threshold, not a parameter"
            raise SpecError(f"surrogate '{name}': {reason}")
        readable = {"u", *names}
        identity = (name, derivative, primitive, tuple(names))
        self.__dict__.update(
            name=name,
            derivative=derivative,
            primitive=primitive,
            derivative_tree=parse_expression(derivative, readable),
            primitive_tree=None if primitive is None else parse_expression(primitive, readable),
            form=self,
            # as a model's; numbers are no part of it
            token=json.dumps(
                [name, plain(derivative), None if primitive is None else plain(primitive), names]
            ),
            _identity=identity,
            _hash=hash(identity),
        )
        self._set(dict.fromkeys(names, 0.0), params or {}, spiking)

    def _set(self, numbers: dict[str, float], params: Mapping[str, Any], spiking: bool) -> None:
        """While the object is made: `numbers`, with those in `params` instead."""
        for key, value in params.items():
            this = f"surrogate '{self.name}'"
            if key not in numbers:
                raise SpecError(f"{this} has no parameter '{key}'. {known(numbers)}")
            try:
                if isinstance(value, _NO_NUMBERS):
                    raise TypeError
                number = float(value)
            except OverflowError:
                raise SpecError(f"{this}: {key} must be finite") from None
            except (TypeError, ValueError):
                reason = f"{this}: {key} must be a number, got {value!r:.80}"
                raise InputTypeError(reason) from None
            if not abs(number) <= sys.float_info.max:
                raise SpecError(f"{this}: {key} must be finite, got {number}")
            numbers[key] = number
        if not spiking and self.primitive is None:
            reason = "has no primitive, so spiking=False has no output to give"
            raise SpecError(f"surrogate '{self.name}' {reason}")
        own = self.__dict__
        own["params"] = ReadOnly(numbers, f"surrogates are immutable: {self.name}{_ANOTHER}")
        own["values"], own["spiking"] = tuple(numbers.values()), bool(spiking)

    def __call__(self, *numbers: float, spiking: bool | None = None, **params: float) -> Surrogate:
        """The same surrogate with other numbers: `ATan(3.0)` or `ATan(alpha=3.0, spiking=False)`.

        Numbers without a name are those of `params`, in their order.
        """
        if numbers:
            params = self._in_order(numbers, params)
        other = object.__new__(Surrogate)
        other.__dict__.update(self.__dict__)
        other._set(dict(self.params), params, self.spiking if spiking is None else spiking)
        return other

    def _in_order(self, numbers: tuple[float, ...], params: dict[str, float]) -> dict[str, float]:
        if len(numbers) > len(self.params):
            given = f"surrogate '{self.name}' takes {len(self.params)} numbers, got {len(numbers)}"
            raise SpecError(f"{given}. {known(self.params)}")
        placed = dict(zip(self.params, numbers, strict=False))
        if twice := placed.keys() & params.keys():
            raise SpecError(f"surrogate '{self.name}': {sorted(twice)} given twice")
        return placed | params

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the constructor's arguments: str hashes differ between processes."""
        form = self.name, self.derivative, self.primitive, dict(self.form.params)
        return _unpickle, (form, dict(self.params), self.spiking)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Surrogate):
            return False
        mine = self._identity, self.values, self.spiking
        if mine != (other._identity, other.values, other.spiking):
            return False
        return 0.0 not in self.values or repr(self.values) == repr(other.values)  # -0.0 is not 0.0

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        numbers = "".join(f"{k}={v:g}, " for k, v in self.params.items())
        return f"{self.name}({numbers}spiking={self.spiking})"


def _unpickle(form: tuple[Any, ...], params: dict[str, float], spiking: bool) -> Surrogate:
    return Surrogate(*form)(spiking=spiking, **params)


# abs(u) in primitives: its slope at u = 0 is that of u > 0, where abs has the slope 0
_DISTANCE = "where(u < 0, -u, u)"


def _sigmoid_like(alpha: str) -> str:
    return f"{alpha} * sigmoid({alpha} * u) * (1 - sigmoid({alpha} * u))"


def _from_tail(tail: str) -> str:
    """The primitive that is `tail` below the threshold, and symmetric about it.

    Written so, it keeps its digits far below, and neither branch overflows where it is closed.
    """
    return f"where(u < 0, {tail}, 1 - {tail})"


Sigmoid = Surrogate("Sigmoid", _sigmoid_like("alpha"), "sigmoid(alpha * u)", dict(alpha=4.0))
ATan = Surrogate(
    "ATan",
    "0.5 * alpha / (1 + (0.5 * pi * alpha * u)**2)",
    "atan(0.5 * pi * alpha * u) / pi + 0.5",
    dict(alpha=2.0),
)
PiecewiseLeakyReLU = Surrogate(
    "PiecewiseLeakyReLU",
    "where(abs(u) < w, 0.5 / w, c)",
    "where(u <= -w, c * u + c * w, where(u >= w, c * u - c * w + 1, 0.5 * u / w + 0.5))",
    dict(w=1.0, c=0.01),
)
S2NN = Surrogate(
    "S2NN",
    f"where(u < 0, {_sigmoid_like('alpha')}, beta / (u + 1))",
    "where(u < 0, sigmoid(alpha * u), beta * log(abs(u + 1) + 1e-5) + 0.5)",
    dict(alpha=4.0, beta=1.0),
)
QPseudoSpike = Surrogate(
    "QPseudoSpike",
    "(1 + 2 * abs(u) / (alpha - 1))**(-alpha)",
    _from_tail(f"0.5 * (1 + 2 * {_DISTANCE} / (alpha - 1))**(1 - alpha)"),
    dict(alpha=2.0),
)
LeakyKReLU = Surrogate(
    "LeakyKReLU", "where(u >= 0, k, leak)", "where(u >= 0, k, leak) * u", dict(leak=0.0, k=1.0)
)
FakeNumericalGradient = Surrogate(
    "FakeNumericalGradient", "minimum(1 / abs(u), alpha)", None, dict(alpha=0.3)
)
LogTailedReLU = Surrogate(
    "LogTailedReLU",
    "where(u <= 0, alpha, where(u <= 1, 1, 1 / u))",
    "where(u <= 0, alpha * u, where(u <= 1, u, log(maximum(u, 1)) + 1))",
    dict(alpha=0.0),
)
PiecewiseQuadratic = Surrogate(
    "PiecewiseQuadratic",
    "maximum(0, alpha - alpha * alpha * abs(u))",
    _from_tail(f"0.5 * maximum(0, 1 - alpha * {_DISTANCE})**2"),
    dict(alpha=1.0),
)
Triangle = PiecewiseQuadratic
PiecewiseExp = Surrogate(
    "PiecewiseExp",
    "0.5 * alpha * exp(-alpha * abs(u))",
    _from_tail(f"0.5 * exp(-alpha * {_DISTANCE})"),
    dict(alpha=1.0),
)
SoftSign = Surrogate(
    "SoftSign",
    "0.5 / (alpha * (1 / alpha + abs(u))**2)",
    _from_tail(f"0.5 / (1 + alpha * {_DISTANCE})"),
    dict(alpha=2.0),
)
SuperSpike = Surrogate("SuperSpike", "alpha / (1 + abs(u))**2", None, dict(alpha=1.0))
FastSigmoid = Surrogate(
    "FastSigmoid",
    "1 / (1 + k * abs(u))**2",
    # u / (1 + k |u|) + 0.5; written as on the right far from 0, where its slope would lose digits
    f"0.5 + where(k * {_DISTANCE} < 1, u / (1 + k * {_DISTANCE}), "
    f"where(u < 0, -1, 1) * (1 - 1 / (1 + k * {_DISTANCE})) / where(k > 0, k, 1))",
    dict(k=25.0),
)
Erf = Surrogate(
    "Erf", "alpha / sqrt(pi) * exp(-(alpha * u)**2)", "0.5 * erfc(-alpha * u)", dict(alpha=2.0)
)
NonzeroSignLogAbs = Surrogate(
    "NonzeroSignLogAbs",
    "1 / (1 / alpha + abs(u))",
    f"where(u < 0, -1, 1) * log(alpha * {_DISTANCE} + 1)",
    dict(alpha=1.0),
)
Rect = Surrogate(
    "Rect",
    "where(abs(u) < 0.5 / alpha, alpha, 0)",
    "where(abs(u) < 0.5 / alpha, alpha * u + 0.5, where(u < 0, 0, 1))",
    dict(alpha=1.0),
)
StraightThrough = Surrogate("StraightThrough", "1", "u")
SpikeRateEscape = Surrogate(
    "SpikeRateEscape", "k * exp(-beta * abs(u - 1))", None, dict(beta=1.0, k=25.0)
)
Gaussian = Surrogate(
    "Gaussian",
    "exp(-0.5 * (u / sigma)**2) / (sigma * sqrt(2 * pi))",
    "0.5 * erfc(-u / (sigma * sqrt(2)))",
    dict(sigma=1.0),
)
Tanh = Surrogate("Tanh", "1 - tanh(k * u)**2", "tanh(k * u) / k + 0.5", dict(k=1.0))


def SquarewaveFourierSeries(n: int = 2, T: float = 8.0, *, spiking: bool = True) -> Surrogate:
    """The square wave's Fourier series of period T up to term n - 1; n shapes the expression."""
    if not isinstance(n, int) or not 2 <= n <= 32:
        raise SpecError(f"SquarewaveFourierSeries: n must be an integer from 2 to 32, got {n!r}")
    odd = range(1, 2 * n - 2, 2)
    slopes = " + ".join(f"cos({k} * 2 * pi * u / T)" for k in odd)
    terms = " + ".join(f"sin({k} * 2 * pi * u / T) / {k}" for k in odd)
    slope, primitive = f"4 / T * ({slopes})", f"0.5 + 2 / pi * ({terms})"
    name = f"SquarewaveFourierSeries{n}"
    return Surrogate(name, slope, primitive, dict(T=T), spiking=spiking)


_BUILT_IN = {s.name: s for s in list(globals().values()) if isinstance(s, Surrogate)}


def by_name(name: str) -> Surrogate:
    """A built-in surrogate by its name, in any case: `by_name("atan")`. Raises SpecError."""
    for key, surrogate in (_BUILT_IN | {"Triangle": Triangle}).items():
        if key.lower() == str(name).lower():
            return surrogate
    if str(name).lower() == "squarewavefourierseries":
        return SquarewaveFourierSeries()
    names = [*_BUILT_IN, "SquarewaveFourierSeries"]
    raise SpecError(f"unknown surrogate {ascii(name)[:80]}. {known(names)}")


def as_surrogate(given: Any) -> Surrogate:
    """Our surrogate for `given`: one of ours, a name, or a SpikingJelly object.

    The last is known by its class name and attributes.
    Raises SpecError for an unknown one, InputTypeError for what is no surrogate at all.
    """
    if isinstance(given, Surrogate):
        return given
    if given is SquarewaveFourierSeries:
        return by_name("SquarewaveFourierSeries")
    if isinstance(given, str):
        return by_name(given)
    if isinstance(given, type) or not hasattr(given, "spiking"):
        raise InputTypeError(
            "surrogate must be a neuronjit.Surrogate, its name, or a SpikingJelly surrogate object,"
            f" got {getattr(given, '__name__', type(given).__name__)}"
        )
    kind = {"DeterministicPass": "StraightThrough"}.get(type(given).__name__, type(given).__name__)
    if kind == "SquarewaveFourierSeries":
        return SquarewaveFourierSeries(given.n, given.T_period, spiking=given.spiking)
    ours = by_name(kind)
    return ours(spiking=given.spiking, **{p: getattr(given, p) for p in ours.params})
