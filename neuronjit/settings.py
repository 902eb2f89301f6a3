"""What users can say to the library as a whole, and how it speaks to them."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Hashable
from contextlib import suppress
from functools import cache


class CacheWarning(UserWarning):
    """Something about the kernel cache that costs time, but no result."""


@cache
def _raised() -> bool:
    """AT_SECURE: this program was given rights that its caller has not (file capabilities)."""
    with suppress(OSError, AttributeError, TypeError):  # no such function but on Linux
        import ctypes

        return bool(ctypes.CDLL(None).getauxval(23))
    return False


def env(name: str) -> str:
    """One of our variables, or "" where the environment may be another user's."""
    other = hasattr(os, "geteuid") and (
        os.geteuid() != os.getuid() or os.getegid() != os.getgid() or _raised()
    )
    return "" if other else os.environ.get(name, "")


def backend() -> str:
    """NEURONJIT_BACKEND, asked at every call: it decides no trust, so it is read without `env`."""
    return os.environ.get("NEURONJIT_BACKEND") or "auto"


def no_compile() -> bool:
    """Whether NEURONJIT_NO_COMPILE forbids compiling."""
    return os.environ.get("NEURONJIT_NO_COMPILE", "0") not in ("", "0")


def debugging() -> bool:
    """Whether NEURONJIT_DEBUG asks for the place of each source and each compiler command."""
    return os.environ.get("NEURONJIT_DEBUG", "0") not in ("", "0")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's that called the library."""
    warnings.warn(message, category, stacklevel=_users_level())


_NOT_THE_USERS = {__name__.partition(".")[0], "torch", "contextlib", "concurrent", "threading"}


def _users_level() -> int:
    """The `stacklevel` of the innermost frame that is neither ours nor what lies between."""
    frame, level = sys._getframe(1).f_back, 2
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    return level if frame else 2


_warned: dict[Hashable, object] = {}


def warn_once(cause: Hashable, message: str, category: type[Warning] = CacheWarning) -> None:
    """Warn at most once a process and cause.

    Raises it where the user turned warnings into errors: so it is called only where nothing is half
    done, and the same call succeeds when it is made again.
    """
    token = object()
    if _warned.setdefault(cause, token) is token:  # atomic: of many threads one warns
        warn(message, category)
