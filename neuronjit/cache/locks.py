"""One builder per kernel and machine: a mutex between threads, a file lock between processes.

Only the number of compilations depends on it: it is given up after a while, and where there is
none. The file lock is a POSIX record lock rather than a flock: it ends with its process, whereas
a flock lives on in every child that was forked while it was held.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from ..settings import warn_once
from .entries import KEY
from .folders import STALE_TEMP_S, Folder, Untrusted, opened

TIMEOUT_S = 120.0  # after waiting this long, for one that was stopped say, one builds for oneself
TELL_AFTER_S = 5.0
FRUITLESS_S = 60.0  # for so long nobody waits for a kernel that could not be published
_FRUITLESS = b"not published"
_RECORD = 96  # bytes of "pid host", or of the above

_log = logging.getLogger("neuronjit")
_mutexes: dict[str, threading.Lock] = {}


class Holding:
    """What key_lock yields. fruitless: set where the holder built what it could not publish."""

    fruitless = False


def lock_folders() -> list[str]:
    """Where locks may lie: in this machine's memory, and never where a lock daemon is needed."""
    if not hasattr(os, "geteuid"):
        return []
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    folders = ["/dev/shm", runtime] if os.path.isabs(runtime) else ["/dev/shm"]  # noqa: S108 (judged)
    return [f"{folder}/neuronjit-{os.geteuid()}" for folder in folders if os.path.isdir(folder)]


@contextmanager
def key_lock(scope: str, key: str, *, processes: bool = True) -> Iterator[Holding]:
    """Holds the lock on `key` of the cache `scope`, or goes on without: it never fails or hangs."""
    name = hashlib.sha256(os.fsencode(f"{scope}\n{key}")).hexdigest()
    deadline = time.monotonic() + TIMEOUT_S
    mutex = _mutexes.setdefault(name, threading.Lock())
    mine = mutex.acquire(timeout=TIMEOUT_S)
    holding = Holding()
    try:
        # A process that opens and closes a file loses its record locks on it: only under the mutex.
        with _file_lock(name, key, deadline, holding) if mine and processes else nullcontext():
            yield holding
    finally:
        if mine:
            mutex.release()


@contextmanager
def _file_lock(name: str, key: str, deadline: float, holding: Holding) -> Iterator[None]:
    held, process = None, os.getpid()
    try:
        for path in lock_folders():
            try:
                with opened(path, create=0o700) as folder:
                    held = _acquire(folder, name, key, deadline)
                break
            except Untrusted as error:
                warn_once((path, "untrusted"), f"neuronjit keeps no locks in {path!r}: {error}")
            except (OSError, ImportError) as error:  # ImportError: a system without fcntl
                _log.debug("neuronjit keeps no locks in %r: %s", path, error)
        yield
    finally:
        if held is not None and os.getpid() == process:  # else a child of the holder ends here
            _release(path, name, held, fruitless=holding.fruitless)


def _acquire(folder: Folder, name: str, key: str, deadline: float) -> int | None:
    """The locked file's descriptor, or None where waiting for it is of no use any more."""
    start, pause, told = time.monotonic(), 0.002, False
    while True:
        fd, mine, holder = folder.open(name, os.O_RDWR | os.O_CREAT), False, []
        try:
            _lock(fd)
            st, record = os.fstat(fd), os.pread(fd, _RECORD, 0)
            if os.path.samestat(st, folder.stat(name)):
                if record.startswith(_FRUITLESS) and abs(time.time() - st.st_mtime) < FRUITLESS_S:
                    return None  # all who waited build at once, instead of one after the other
                record = f"{os.getpid()} {os.uname().nodename}".encode()
                os.pwrite(fd, record[:_RECORD].ljust(_RECORD), 0)
                mine = True
                return fd
        except FileNotFoundError:  # its last holder has removed it meanwhile
            continue
        except BlockingIOError:  # held
            holder = os.pread(fd, _RECORD, 0).decode(errors="replace").split()
        finally:
            if not mine:
                os.close(fd)
        waited, over = time.monotonic() - start, time.monotonic() >= deadline
        if over or (waited > TELL_AFTER_S and not told):
            told, then = True, "builds it too" if over else "waits"
            whose = "process {} on {}".format(*holder) if len(holder) == 2 else "another process"
            text = "after %.0f s kernel %s is still being built by %s; process %d %s"
            _log.warning(text, waited, key, whose, os.getpid(), then)
        if over:
            return None
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)


def _release(path: str, name: str, held: int, *, fruitless: bool) -> None:
    try:
        with suppress(OSError, Untrusted), opened(path) as folder:
            if fruitless:  # the file stays, and tells those who waited
                os.pwrite(held, _FRUITLESS.ljust(_RECORD), 0)
            else:  # still locked: who waits for it will see that it is gone
                folder.unlink(name)
    finally:
        os.close(held)
    with suppress(OSError, Untrusted), opened(path) as folder:
        _sweep(folder)


def _sweep(folder: Folder) -> None:
    """Removes lock files that killed processes left: old ones that nobody has locked."""
    for name, seen in folder.scan():
        if not KEY.fullmatch(name) or abs(time.time() - seen.st_mtime) < STALE_TEMP_S:
            continue
        mutex = _mutexes.setdefault(name, threading.Lock())
        if mutex.acquire(blocking=False):  # else a thread of this process may hold its file
            try:
                with suppress(OSError):
                    _remove_unless_locked(folder, name, seen)
            finally:
                mutex.release()


def _remove_unless_locked(folder: Folder, name: str, seen: os.stat_result) -> None:
    fd = folder.open(name, os.O_RDWR)
    try:
        _lock(fd)
        if os.path.samestat(os.fstat(fd), seen):
            folder.unlink(name, seen)
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    """Raises BlockingIOError if another process holds it."""
    import fcntl  # here, because Windows has none

    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


if hasattr(os, "register_at_fork"):
    # A mutex that another thread held during the fork would stay locked in the child for ever.
    os.register_at_fork(after_in_child=_mutexes.clear)
