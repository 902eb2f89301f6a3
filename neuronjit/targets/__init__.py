"""The two targets. Each module has the same verbs: arch, fingerprint, compile, load and shape."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from ..errors import SpecError, known

NAMES = ("cuda", "cpu")


@cache
def by_name(name: str) -> Any:
    """The target's module. Raises SpecError."""
    if name not in NAMES:
        raise SpecError(f"unknown target {ascii(name)[:80]}. {known(NAMES)}")
    return importlib.import_module(f".{name}", __package__)
