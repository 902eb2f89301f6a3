"""The kernel cache: verified on every load, published by rename, locked per key, bounded.

It knows keys, metadata, sources and binaries, and nothing of compilers or tensors. No error of it
ever fails a call: what cannot be read is built, what cannot be written stays in memory, and one
warning a process and cause tells why.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..settings import cache_size, warn_once
from .entries import HEAD, KEY, Damaged, Entry, decode, encode, key_of, make_key, read_meta
from .folders import Folder, Untrusted, is_shared, opened, search_path, user_dir, walk
from .locks import key_lock

__all__ = ["Entry", "find", "load", "load_or_make", "make_key", "size_cap"]

DEFAULT_SIZE = 1 << 30
_memory: dict[str, Entry] = {}  # what no directory would take
_counts: Counter[str] = Counter()
_counting = threading.Lock()
# for find: directory -> key -> (request, target, arch)
_known: dict[str, dict[str, tuple[Any, ...]]] = {}
_unlisted: dict[str, int] = {}  # directory -> bytes written since it was last tidied


def load(key: str) -> Entry | None:
    """The kernel of this key from the first directory that has it whole and safe, else None."""
    entry, _ = _lookup(key)
    _count("misses" if entry is None else "hits")
    return entry


def load_or_make(
    key: str, build: Callable[[], Entry], why_not: Callable[[Entry], str] = lambda entry: ""
) -> Entry:
    """The kernel of this key: loaded, or built here or by a process that this one waits for.

    `why_not` says what keeps a whole entry from being used, "" if nothing does: it is then built
    again, as a damaged one is, and replaced.
    What `build` raises passes through and is never remembered. ValueError if it returns an entry
    whose metadata ("request", "fingerprint") does not make up `key`: none could verify it later.
    """
    entry, _ = _lookup(key, why_not)
    _count("misses" if entry is None else "hits")
    if entry is not None:
        return entry
    user = _writable()  # where nothing can be published, nothing comes of waiting
    with key_lock(user, key, processes=bool(user)) as holding:
        entry, reason = _lookup(key, why_not)
        if entry is not None:
            _count("hits after waiting")
            return entry
        entry = build()
        if not key == entry.key == key_of(entry.meta):
            raise ValueError(f"the entry built for {key} has {entry.key}, {key_of(entry.meta)}")
        _count("builds")
        if reason:
            _count(f"rebuilds: {reason}")
        holding.fruitless = True  # until it is published: a warning may be an error (-W error)
        holding.fruitless = not _publish(entry, reason, user)
    return entry  # our own bytes: on NFS the new file may stay invisible for a minute


def find(request: str, target: str, arch: str) -> Entry | None:
    """A kernel for this request, target and arch whatever compiler made it, or None.

    For machines without a compiler. The metadata of each file is read once a process.
    """
    wanted = (request, target, arch)
    entry = next((entry for entry in [*_memory.values()] if _triple(entry.meta) == wanted), None)
    for folder, key in walk(report) if entry is None else ():
        known = _known.setdefault(folder.path, {})
        if key not in known:
            with suppress(OSError, Damaged, Untrusted):
                known[key] = _triple(read_meta(folder.read(key, HEAD)[0]))
        if known.get(key) == wanted:
            entry, _ = _read(folder, key)
            if entry is not None:
                break
    _count("misses" if entry is None else "hits")
    return entry


def size_cap() -> int:
    """Bytes the user's directory may hold: NEURONJIT_CACHE_SIZE (200M, 2G), 1 GiB; 0: no writes."""
    text = cache_size()
    if match := re.fullmatch(r"([0-9]{1,15})([KMGT]?)(I?B)?", text.upper()):
        return int(match[1]) << 10 * " KMGT".index(match[2] or " ")
    if text:
        what = f"NEURONJIT_CACHE_SIZE={text!r} is no size such as 200M or 2G; the cap is 1G"
        warn_once(("NEURONJIT_CACHE_SIZE", text), what)
    return DEFAULT_SIZE


def _lookup(
    key: str, why_not: Callable[[Entry], str] = lambda entry: ""
) -> tuple[Entry | None, str]:
    """The entry, and if there is one that could not be used, why not."""
    if not KEY.fullmatch(key):
        raise ValueError(f"a key has 64 hex digits, not {ascii(key)[:80]}")
    entry, reason = _memory.get(key), ""
    for path in search_path() if entry is None else ():
        try:
            with opened(path) as folder:
                entry, why = _read(folder, key, why_not)
                reason = reason or why
        except FileNotFoundError:
            continue
        except (OSError, Untrusted) as error:
            report(path, error)
        if entry is not None:
            break
    return entry, reason


def _read(
    folder: Folder, key: str, why_not: Callable[[Entry], str] = lambda entry: ""
) -> tuple[Entry | None, str]:
    """A verified entry, or why there is none ("" for a plain miss)."""
    try:
        data, st = folder.read(key)
        entry = decode(data, key)
        if why := why_not(entry):
            raise Damaged(why)
    except FileNotFoundError:
        return None, ""
    except (OSError, Untrusted, Damaged) as error:
        return None, report(folder.path, error, key)
    folder.touch(key, st)
    _count("bytes read", len(data))
    return entry, ""


def _writable() -> str:
    """The user's directory, made if need be; "" where nothing can be kept."""
    user = user_dir() if size_cap() else ""
    try:
        if user:
            with opened(user, create=0o700) as folder:
                if not folder.writable():
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return user
    except (OSError, Untrusted) as error:
        report(user, error)
        return ""


def _publish(entry: Entry, rebuilt: str, user: str) -> bool:
    """Writes the entry to the user's directory, else keeps it in memory; says which."""
    _memory[entry.key] = entry
    if not user:
        return False
    try:
        if rebuilt:  # for `stats`, of any process
            entry = replace(entry, meta={**entry.meta, "rebuilt": rebuilt})
        data, cap = encode(entry), size_cap()
        if len(data) > cap:
            what = f"a kernel of {len(data)} bytes is larger than all may be ({cap})"
            raise ValueError(f"{what}; see NEURONJIT_CACHE_SIZE")
        with opened(user, create=0o700) as folder:
            st = os.fstat(folder.fd)
            shared = st.st_mode & 0o020 and is_shared(st)
            folder.write(entry.key, data, 0o660 if shared else 0o600)
            _memory.pop(entry.key, None)  # a thread that waited too long may have done so too
            _count("bytes written", len(data))
            note_written(user, len(data))
            if _unlisted[user] > cap // 64:  # the first time, and then not for every one
                _unlisted[user] = 0
                folder.tidy(cap, keep=entry.key)
        return True
    except (OSError, Untrusted, ValueError) as error:
        report(user, error)
        return False


def note_written(path: str, size: int) -> None:
    """So many bytes more lie in a directory: once they are enough, it is tidied."""
    _unlisted[path] = _unlisted.get(path, size_cap()) + size


def report(path: str, error: Exception, key: str = "") -> str:
    """Warns once a process of each kind of trouble with a directory; names the kind."""
    kind, what = "unreadable", f"kernel {key} in {path!r}" if key else f"directory {path!r}"
    then = "it is compiled again" if key else "kernels that are compiled stay in memory"
    text = f"neuronjit cannot use the {what}: {error}; {then}"
    if isinstance(error, Untrusted):
        kind, text = "untrusted", f"neuronjit takes no code from where others could put it: {error}"
        text += f"; {then}. See `neuronjit-cache info`"
    elif isinstance(error, Damaged):
        kind = "damaged"
    cause = errno.errorcode.get(error.errno or 0, kind) if isinstance(error, OSError) else kind
    warn_once((path, cause), text)
    return kind


def _triple(meta: dict[str, Any]) -> tuple[Any, ...]:
    return meta.get("request"), meta.get("target"), meta.get("arch")


def counts() -> dict[str, int]:
    """What this process did: hits, misses, builds, rebuilds by reason, bytes read and written."""
    return dict(_counts)


def _count(what: str, number: int = 1) -> None:
    with _counting:
        _counts[what] += number


def _after_fork() -> None:
    global _counting
    _counting = threading.Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
