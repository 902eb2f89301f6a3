"""What both targets need: the shape of a kernel's work, debug output, and a compiler's words."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import NamedTuple


class Shape(NamedTuple):
    """How a kernel walks its work: the fields of a KernelSpec that follow from sizes alone."""

    steps: int  # K: steps between checkpoints
    lanes: int
    loads: int
    prefetch: bool


def steps_between_checkpoints(steps: int, states: int) -> int:
    """K: as many steps as registers hold, no more than there are; the same forward and backward."""
    return 4 if steps <= 4 else 8 if steps <= 8 or states > 2 else 16


def debug(line: str, source: str = "", suffix: str = "") -> None:
    """One line on stderr where NEURONJIT_DEBUG=1, and the place where the source was kept."""
    if os.environ.get("NEURONJIT_DEBUG", "0") not in ("", "0"):
        kept = f"; source: {keep_source(source, suffix)}" if source else ""
        sys.stderr.write(f"neuronjit: {line}{kept}\n")


def first_lines(log: str, most: int = 40) -> str:
    """A compiler's words, short enough for an error."""
    lines = [line[:500] for line in log[:100_000].strip().splitlines()]
    more = [f"... {len(lines) - most} more lines"] if len(lines) > most else []
    return "\n".join(lines[:most] + more)


def keep_source(source: str, suffix: str) -> str:
    """Write a rendered source where its reader finds it; the path, or why there is none."""
    try:
        handle, path = tempfile.mkstemp(prefix="neuronjit-", suffix=suffix)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(source)
    except OSError as error:
        return f"(the source could not be kept: {error.strerror})"
    return path
