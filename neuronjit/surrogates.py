"""The built-in surrogates: data, one entry each. Calling one changes its numbers, `ATan(3.0)`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch.compiler import is_compiling

from .errors import InputTypeError, SpecError, known
from .models.surrogate import Surrogate

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


_BUILT_IN = {n.lower(): s for n, s in list(globals().items()) if isinstance(s, Surrogate)}


def by_name(name: str) -> Surrogate:
    """A built-in surrogate by its name, in any case: `by_name("atan")`. Raises SpecError."""
    lower = str(name).lower()
    if lower in _BUILT_IN:
        return _BUILT_IN[lower]
    if lower == "squarewavefourierseries":
        return SquarewaveFourierSeries()
    names = [*dict.fromkeys(s.name for s in _BUILT_IN.values()), "SquarewaveFourierSeries"]
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
    spiking, numbers = given.spiking, [getattr(given, name) for name in ours.names]
    # Nodes ask at every call. Numbers that are equal to others but not the same are made anew.
    plain = type(spiking) is bool and all([type(n) is float and n for n in numbers])  # noqa: C419
    if plain and not is_compiling():
        return _with(ours, spiking, *numbers)
    return ours(*numbers, spiking=spiking)


@lru_cache(256)
def _with(form: Surrogate, spiking: bool, *numbers: float) -> Surrogate:
    return form(*numbers, spiking=spiking)
