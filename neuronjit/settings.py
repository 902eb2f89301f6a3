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


def cache_dir() -> str:
    """NEURONJIT_CACHE_DIR, the directory of the user's that is read and written; "" if not set."""
    return env("NEURONJIT_CACHE_DIR")


def cache_path() -> list[str]:
    """NEURONJIT_CACHE_PATH: directories that are only read."""
    return env("NEURONJIT_CACHE_PATH").split(os.pathsep)


def cache_size() -> str:
    """NEURONJIT_CACHE_SIZE, as it was written; "" if not set."""
    return env("NEURONJIT_CACHE_SIZE").strip()


def trusts_groups() -> bool:
    """Whether NEURONJIT_SHARED_GROUP says to trust what a group of the user's may write."""
    return env("NEURONJIT_SHARED_GROUP") == "1"


def record() -> str:
    """NEURONJIT_RECORD, the file to which the kernels of this run are added; "" if not set."""
    return env("NEURONJIT_RECORD")


def cxx() -> str:
    """CXX, the command of the host compiler; "" if not set."""
    return os.environ.get("CXX", "").strip()


def backend() -> str:
    """NEURONJIT_BACKEND, asked at every call: it decides no trust, so it is read without `env`."""
    return os.environ.get("NEURONJIT_BACKEND") or "auto"


def front_end() -> str:
    """NEURONJIT_FRONT_END: "compiled" runs warm calls in C++, anything else in Python."""
    asked = os.environ.get("NEURONJIT_FRONT_END") or "python"
    if asked not in ("python", "compiled"):
        what = f"NEURONJIT_FRONT_END={ascii(asked)[:80]} is neither 'python' nor 'compiled'"
        warn_once(("NEURONJIT_FRONT_END", asked), what, UserWarning)
        return "python"
    return asked


def no_compile() -> bool:
    """Whether NEURONJIT_NO_COMPILE forbids compiling."""
    return os.environ.get("NEURONJIT_NO_COMPILE", "0") not in ("", "0")


def debugging() -> bool:
    """Whether NEURONJIT_DEBUG asks for the place of each source and each compiler command."""
    return os.environ.get("NEURONJIT_DEBUG", "0") not in ("", "0")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's that called the library."""
    warnings.warn(message, category, stacklevel=_users_level())


def switches() -> dict[str, str]:
    """Every environment variable of ours that is set, misspelled ones too."""
    ours = sorted(name for name in os.environ if name.startswith("NEURONJIT_") or name == "CXX")
    return {name: os.environ[name] for name in ours}


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
