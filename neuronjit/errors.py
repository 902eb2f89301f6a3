"""Every error raised on purpose: one base class, and the built-in kind that it also is."""

from __future__ import annotations

from collections.abc import Iterable


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


class BundleError(NeuronJitError, ValueError):
    """A bundle of kernels that is damaged, hostile, or not trusted."""


def known(names: Iterable[str]) -> str:
    """The tail of an error about a name: what would have been right."""
    return "Known: " + ", ".join(sorted(names))
