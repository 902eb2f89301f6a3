"""Every error raised on purpose: one base class, and the built-in kind that it also is."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any


class NeuronJitError(Exception):
    """Base class of all errors of this library."""


class SpecError(NeuronJitError, ValueError):
    """A name, number, shape or device that no kernel can serve."""


class EquationError(SpecError):
    """Equations that are outside the language of the equations (docs/equations.md)."""


class InputTypeError(NeuronJitError, TypeError):
    """An argument of the wrong type or dtype."""


class BackendError(NeuronJitError, RuntimeError):
    """A target (compiler, library, device) that was asked for is not there."""


class CompileError(NeuronJitError, RuntimeError):
    """The compiler refused a rendered source; carries its words and the source's path."""


class MissingKernelError(NeuronJitError, RuntimeError):
    """A kernel is not in the cache and compiling it is not allowed."""


class DifferentiationError(NeuronJitError, NotImplementedError):
    """A derivative that the kernels do not provide (double backward, jvp, vmap)."""


class AccelerationError(NeuronJitError, RuntimeError):
    """`accelerate` could not do all that was asked, and changed nothing.

    `report` is what it would have returned, where it got so far.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class BundleError(NeuronJitError, ValueError):
    """A bundle of kernels that is damaged, hostile, or not trusted."""


def known(names: Iterable[str]) -> str:
    """The tail of an error about a name: what would have been right."""
    return "Known: " + ", ".join(sorted(names))


def expect_known(value: Any, names: Collection[str], what: str) -> str:
    """The value, if it is one of these names. Raises SpecError."""
    if not isinstance(value, str) or value not in names:
        raise SpecError(f"unknown {what} {ascii(value)[:80]}. {known(names)}")
    return value


def expect(value: Any, kind: type, what: str) -> Any:
    """The value, if it is of exactly this type: True is no int here. Raises SpecError."""
    if type(value) is not kind:
        raise SpecError(f"{what} must be {kind.__name__}, got {type(value).__name__}")
    return value


def expect_number(
    value: Any,
    what: str,
    *,
    kind: str = "a number",
    most: float = sys.float_info.max,
    rule: str = "must be finite",
) -> float:
    """The value as a float: any number, but no bool and no text, though float() takes them.

    Raises InputTypeError for what is none, SpecError for one that is greater than `most` or NaN.
    """
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = float(value)
    except OverflowError:
        number = math.inf  # an int too large to be a float
    except (TypeError, ValueError):
        given = f"{ascii(value)[:60]} ({type(value).__name__})"
        raise InputTypeError(f"{what} must be {kind}, got {given}") from None
    if not abs(number) <= most:
        raise SpecError(f"{what} {rule}, got {number}")
    return number


def expect_fields(data: Any, kinds: Mapping[str, type], what: str) -> dict[str, Any]:
    """A copy of a JSON object that has these fields and no others. Raises SpecError."""
    expect(data, dict, what)
    if odd := sorted(map(str, data.keys() ^ kinds.keys())):
        raise SpecError(f"{what}: these fields are missing or unknown: {ascii(odd)[:200]}")
    return {field: expect(data[field], kind, field) for field, kind in kinds.items()}
