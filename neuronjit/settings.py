"""What users can say to the library as a whole, and how it speaks to them."""

from __future__ import annotations

import sys
import warnings


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's that led here: the first outside of neuronjit and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


_PASSED = {"neuronjit", "torch"}
_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warn, unless the same was said before in this process."""
    if message not in _warned:
        _warned.add(message)
        warn(message)
