"""The two targets. Each module has the same verbs: arch, fingerprint, compile, load and shape."""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

from ..errors import SpecError, known


class Shape(NamedTuple):
    """How a kernel walks its work: the fields of a KernelSpec that follow from sizes alone."""

    steps: int  # K: steps between checkpoints
    lanes: int
    loads: int
    prefetch: bool


def by_name(name: str) -> Any:
    """The target's module. Raises SpecError."""
    if name == "cuda":
        from . import cuda

        return cuda
    if name == "cpu":
        from . import cpu

        return cpu
    raise SpecError(f"unknown target {ascii(name)[:80]}. {known(['cuda', 'cpu'])}")


def debug(line: str) -> None:
    """One line on stderr where NEURONJIT_DEBUG=1."""
    if os.environ.get("NEURONJIT_DEBUG", "0") not in ("", "0"):
        print(f"neuronjit: {line}", file=sys.stderr)


def first_lines(log: str, most: int = 40) -> str:
    """A compiler's words, short enough for an error."""
    lines = log.strip().splitlines()
    return "\n".join(lines[:most] + ([f"... {len(lines) - most} more lines"] if len(lines) > most else []))


def keep_source(source: str, suffix: str) -> str:
    """Write a rendered source where its reader finds it; the path, or why there is none."""
    import tempfile

    try:
        handle, path = tempfile.mkstemp(prefix="neuronjit-", suffix=suffix)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(source)
    except OSError as error:
        return f"(the source could not be kept: {error.strerror})"
    return path
