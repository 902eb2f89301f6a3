"""Surrogate gradients: what replaces the derivative of the Heaviside step in backward.

Every surrogate is data: two expressions of u = h - theta and its numbers. Calling one gives the
same surrogate with other numbers, `ATan(alpha=3.0)`; as kernel arguments, they compile nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .errors import InputTypeError, SpecError, known
from .expressions import check_label, check_name, parse_expression


class Surrogate:
    """A surrogate gradient, written as expressions of u = h - theta.

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

    def __init__(
        self,
        name: str,
        derivative: str,
        primitive: str | None = None,
        params: Mapping[str, float] | None = None,
        *,
        spiking: bool = True,
    ) -> None:
        self.name = check_label(name, "surrogate name")
        self.params = {check_name(p, "surrogate parameter"): 0.0 for p in params or {}}
        if "u" in self.params:
            reason = "'u' is the distance to the threshold, not a parameter"
            raise SpecError(f"surrogate '{name}': {reason}")
        readable = {"u", *self.params}
        self.derivative = derivative
        self.primitive = primitive
        self.derivative_tree = parse_expression(derivative, readable)
        self.primitive_tree = None if primitive is None else parse_expression(primitive, readable)
        self.form = self
        self._identity = (name, derivative, primitive, tuple(self.params))
        self._hash = hash(self._identity)
        self.token = json.dumps(self._identity)  # as a model's; numbers are no part of it
        self._set(params or {}, spiking)

    def _set(self, params: Mapping[str, Any], spiking: bool) -> None:
        this = f"surrogate '{self.name}'"
        for key, value in params.items():
            if key not in self.params:
                raise SpecError(f"{this} has no parameter '{key}'. {known(self.params)}")
            try:
                number = float(value)
            except OverflowError:
                raise SpecError(f"{this}: {key} must be finite") from None
            except (TypeError, ValueError):
                reason = f"{this}: {key} must be a number, got {value!r:.80}"
                raise InputTypeError(reason) from None
            if not math.isfinite(number):
                raise SpecError(f"{this}: {key} must be finite, got {number}")
            self.params[key] = number
        if not spiking and self.primitive is None:
            raise SpecError(f"{this} has no primitive, so spiking=False has no output to give")
        self.spiking = bool(spiking)
        self.values = tuple(self.params.values())

    def __call__(self, *, spiking: bool | None = None, **params: float) -> Surrogate:
        """The same surrogate with other numbers, e.g. `ATan(alpha=3.0, spiking=False)`."""
        other = object.__new__(Surrogate)
        other.__dict__.update(self.__dict__)
        other.params = dict(self.params)
        other._set(params, self.spiking if spiking is None else spiking)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its text, for hashes of text differ between processes."""
        form = self.name, self.derivative, self.primitive, self.form.params
        return _unpickle, (form, self.params, self.spiking)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Surrogate):
            return False
        mine = self._identity, self.values, self.spiking
        return mine == (other._identity, other.values, other.spiking)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        numbers = "".join(f"{k}={v:g}, " for k, v in self.params.items())
        return f"{self.name}({numbers}spiking={self.spiking})"


def _unpickle(form: tuple[Any, ...], params: dict[str, float], spiking: bool) -> Surrogate:
    return Surrogate(*form)(spiking=spiking, **params)


def _sigmoid_like(alpha: str) -> str:
    return f"{alpha} * sigmoid({alpha} * u) * (1 - sigmoid({alpha} * u))"


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
    "where(u < -w, c * u + c * w, where(u > w, c * u - c * w + 1, 0.5 * u / w + 0.5))",
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
    "where(u < 0, 0.5 * (1 + 2 * abs(u) / (alpha - 1))**(1 - alpha), "
    "1 - 0.5 * (1 + 2 * abs(u) / (alpha - 1))**(1 - alpha))",
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
    "where(abs(u) * alpha < 1, 0.5 - 0.5 * alpha * alpha * abs(u) * u + alpha * u, "
    "where(u < 0, 0, 1))",
    dict(alpha=1.0),
)
Triangle = PiecewiseQuadratic
PiecewiseExp = Surrogate(
    "PiecewiseExp",
    "0.5 * alpha * exp(-alpha * abs(u))",
    "where(u < 0, 0.5 * exp(-alpha * abs(u)), 1 - 0.5 * exp(-alpha * abs(u)))",
    dict(alpha=1.0),
)
SoftSign = Surrogate(
    "SoftSign",
    "0.5 / (alpha * (1 / alpha + abs(u))**2)",
    "0.5 * (alpha * u / (1 + abs(alpha * u)) + 1)",
    dict(alpha=2.0),
)
SuperSpike = Surrogate("SuperSpike", "alpha / (1 + abs(u))**2", None, dict(alpha=1.0))
FastSigmoid = Surrogate(
    "FastSigmoid", "1 / (1 + k * abs(u))**2", "u / (1 + k * abs(u)) + 0.5", dict(k=25.0)
)
Erf = Surrogate(
    "Erf", "alpha / sqrt(pi) * exp(-(alpha * u)**2)", "0.5 * (1 + erf(alpha * u))", dict(alpha=2.0)
)
NonzeroSignLogAbs = Surrogate(
    "NonzeroSignLogAbs",
    "1 / (1 / alpha + abs(u))",
    "where(u < 0, -1, 1) * log(alpha * abs(u) + 1)",
    dict(alpha=1.0),
)
Rect = Surrogate(
    "Rect",
    "where(abs(u) < 0.5 / alpha, alpha, 0)",
    "minimum(maximum(alpha * u + 0.5, 0), 1)",
    dict(alpha=1.0),
)
StraightThrough = Surrogate("StraightThrough", "1", "u")
SpikeRateEscape = Surrogate(
    "SpikeRateEscape", "k * exp(-beta * abs(u - 1))", None, dict(beta=1.0, k=25.0)
)
Gaussian = Surrogate(
    "Gaussian",
    "exp(-0.5 * (u / sigma)**2) / (sigma * sqrt(2 * pi))",
    "0.5 * (1 + erf(u / (sigma * sqrt(2))))",
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
