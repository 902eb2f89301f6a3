"""What is asked of another library's classes, whichever library it is."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch

from ..models.surrogate import Surrogate
from ..settings import warn_once

NO_SLOPE = Surrogate("Heaviside", "0")  # of what no gradient passes


def family(kind: type, package: str | tuple[str, ...]) -> list[type]:
    """The class and those that it was derived from, as far as they are the package's."""
    return [base for base in kind.__mro__ if base.__module__.startswith(package)]


def known(kind: type, package: str | tuple[str, ...], rows: Container[str]) -> type | None:
    """The library's class, of which there is a row, that this one is or was derived from."""
    return next((base for base in family(kind, package) if base.__name__ in rows), None)


def own_dynamics(module: torch.nn.Module, base: type, methods: Iterable[str]) -> str | None:
    """Why a module does not compute what its base does: methods of its own, or its instance's."""
    kind = type(module)
    own = [
        name
        for name in methods
        if getattr(kind, name, None) is not getattr(base, name, None) or name in vars(module)
    ]
    return f"dynamics of its own: {kind.__name__} overrides {', '.join(own)}" if own else None


def shown(surrogate: Surrogate) -> str:
    """The name of a surrogate and its numbers, for a report."""
    return f"{surrogate.name}({', '.join(f'{value:g}' for value in surrogate.values)})"


def warn_left(module: torch.nn.Module, library: str, error: Exception) -> None:
    """Warn once that the library runs an accelerated module itself, and why."""
    kind = type(module).__name__
    text = f"{library} runs an accelerated {kind} itself: {error}"
    warn_once(("left", kind, str(error)), text, UserWarning)
