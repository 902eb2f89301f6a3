"""What the cache holds, whether it is sound, and clearing it: safe while others use it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import store
from .entries import HEAD, KEY, Damaged, Stale, decode, read_meta
from .folders import Folder, Untrusted, opened, search_path, user_dir, walk
from .locks import lock_folders


@dataclass(frozen=True)
class Listed:
    """One file of the cache, by its metadata alone: only `verify` reads the rest."""

    key: str
    path: str  # of its directory
    size: int  # bytes
    used: float  # seconds since 1970, to the hour
    meta: dict[str, Any]  # empty where there is a problem
    problem: str = ""

    def stale(self, version: str) -> bool:
        """Whether another version of the library made it; `version` is this one's."""
        versions = self.meta.get("versions")
        made_by = versions.get("neuronjit") if isinstance(versions, dict) else version
        return made_by != version or "schema" in self.problem


@dataclass(frozen=True)
class Finding:
    """A kernel (key "": a directory) that is not used, why, and whether it is removed now."""

    path: str
    key: str
    why: str
    removed: bool = False


@dataclass(frozen=True)
class Directory:
    """One directory, for bug reports. owner, mode: None where there is none yet."""

    path: str
    role: str  # user, site or locks
    trusted: bool
    why: str  # why not trusted, or not there
    lenient: tuple[str, ...]  # what was judged less strictly than ssh would, and why
    owner: int | None
    mode: int | None
    writable: bool
    entries: int  # kernels, or lock files
    bytes: int


def entries() -> Iterator[Listed]:
    """All kernels in all directories."""
    return (listed for folder, key in walk(store.report) for listed in _listed(folder, key))


def _listed(folder: Folder, key: str) -> Iterator[Listed]:
    meta, problem = {}, ""
    try:
        st = folder.stat(key)
        meta = read_meta(folder.read(key, HEAD)[0])
    except FileNotFoundError:  # removed since its name was read
        return
    except (OSError, Untrusted, Damaged) as error:
        problem = str(error)
    yield Listed(key, folder.path, st.st_size, st.st_mtime, meta, problem)


def verify(
    why_not: Callable[[Mapping[str, Any], bytes], str] = lambda meta, binary: "",
    *,
    fix: bool = False,
) -> tuple[int, list[Finding]]:
    """Read every byte of every kernel: how many there are, and which are not whole and safe.

    `why_not` says why a whole entry's binary is no kernel ("" if it is one): a compiler may have
    written half. With `fix`, remove what was found; it is compiled again when it is needed.
    """
    checked, found = 0, []
    for folder, key in walk(lambda path, error: found.append(Finding(path, "", str(error)))):
        checked += 1
        try:
            seen = folder.stat(key)
            entry = decode(folder.read(key)[0], key)
            if why := why_not(entry.meta, entry.binary):
                raise Damaged(why)
        except (FileNotFoundError, Stale):  # removed meanwhile, or another version's
            continue
        except (OSError, Untrusted, Damaged) as error:
            removed = fix and not isinstance(error, OSError) and folder.unlink(key, seen)
            found.append(Finding(folder.path, key, str(error), removed))
    return checked, found


def clear(
    *, older_than: float = 0.0, model: str | None = None, stale_for: str | None = None
) -> tuple[int, int]:
    """Removes kernels from the user's directory; returns how many, and their bytes.

    Those not used for `older_than` seconds, of this `model`, and made by another version of the
    library than `stale_for`; without an argument all. Processes that run them lose nothing.
    """
    removed = []
    for folder, key in walk(store.report):
        for item in _listed(folder, key) if folder.path == user_dir() else ():
            chosen = older_than <= 0 or time.time() - item.used >= older_than
            chosen &= model is None or item.meta.get("model") == model
            chosen &= stale_for is None or item.stale(stale_for)
            if chosen and folder.unlink(key):
                removed.append(item.size)
    return len(removed), sum(removed)


def stats() -> dict[str, Any]:
    """What the directories hold, and what this process did.

    Hits and misses are this process's: counting them for all would make each hit a write. How
    often a kernel had to be built again, and why, is in the files themselves.
    """
    found = list(entries())

    def each(what: str) -> dict[str, int]:
        return dict(Counter(str(item.meta[what]) for item in found if what in item.meta))

    return {
        "kernels": len(found),
        "bytes": sum(item.size for item in found),
        "cap": store.size_cap(),
        "targets": each("target"),
        "models": each("model"),
        "unreadable": sum(bool(item.problem) for item in found),
        "rebuilt": each("rebuilt"),
        "this process": store.counts(),
    }


def directories() -> list[Directory]:
    """Where kernels and locks lie, whether each place is trusted, and why not."""
    found = []
    roles = [(path, "user" if path == user_dir() else "site") for path in search_path()]
    for path, role in [*roles, *((path, "locks") for path in lock_folders())]:
        owner = mode = None
        writable, why, sizes = False, "", []
        lenient: tuple[str, ...] = ()
        try:
            st = os.stat(path)
            owner, mode = st.st_uid, st.st_mode & 0o7777
            with opened(path) as folder:
                writable, lenient = folder.writable(), tuple(folder.lenient)
                sizes = [st.st_size for name, st in folder.scan() if KEY.fullmatch(name)]
        except FileNotFoundError:
            why = "is not there" if role == "site" else "is made when it is needed"
        except (OSError, Untrusted) as error:
            why = str(error)
        size = len(sizes), sum(sizes)
        found.append(Directory(path, role, not why, why, lenient, owner, mode, writable, *size))
    return found
