"""One builder per kernel and machine: a mutex between threads, a file lock between processes.

Only the number of compilations depends on it: it is given up after a while, and where there is
none. The file lock is a POSIX record lock rather than a flock: it ends with its process, whereas
a flock lives on in every child that was forked while it was held.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from .cachedir import Folder, Untrusted, opened, warn_once

TIMEOUT_S = 120.0  # after waiting this long, for one that was stopped say, one builds for oneself
TELL_AFTER_S = 5.0
_RECORD = 96  # bytes of "pid host"

_log = logging.getLogger("neuronjit")
_mutexes: dict[str, threading.Lock] = {}


def lock_folders() -> list[str]:
    """Where locks may lie: in this machine's memory, and never where a lock daemon is needed."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    folders = ["/dev/shm", runtime] if os.path.isabs(runtime) else ["/dev/shm"]  # noqa: S108 (judged)
    return [f"{folder}/neuronjit-{os.geteuid()}" for folder in folders if os.path.isdir(folder)]


@contextmanager
def key_lock(scope: str, key: str, *, processes: bool = True) -> Iterator[None]:
    """Holds the lock on `key` of the cache `scope`, or goes on without: it never fails or hangs."""
    name = hashlib.sha256(os.fsencode(f"{scope}\n{key}")).hexdigest()
    deadline = time.monotonic() + TIMEOUT_S
    mutex = _mutexes.setdefault(name, threading.Lock())
    mine = mutex.acquire(timeout=TIMEOUT_S)
    try:
        # A process that opens and closes a file loses its record locks on it: only under the mutex.
        with _file_lock(name, key, deadline) if mine and processes else nullcontext():
            yield
    finally:
        if mine:
            mutex.release()


@contextmanager
def _file_lock(name: str, key: str, deadline: float) -> Iterator[None]:
    held, process = None, os.getpid()
    for path in lock_folders():
        try:
            with opened(path, create=0o700) as folder:
                held = _acquire(folder, name, key, deadline)
            break
        except Untrusted as error:
            warn_once((path, "untrusted"), f"neuronjit keeps no locks in {path!r}: {error}")
        except OSError as error:
            _log.debug("neuronjit keeps no locks in %r: %s", path, error)
    try:
        yield
    finally:
        if held is not None and os.getpid() == process:  # else a child of the holder ends here
            with suppress(OSError, Untrusted), opened(path) as folder:
                folder.unlink(name)  # still locked: who waits for it will see that it is gone
            os.close(held)


def _acquire(folder: Folder, name: str, key: str, deadline: float) -> int | None:
    """The locked file's descriptor, or None once the deadline is over."""
    start, pause, told = time.monotonic(), 0.002, False
    while True:
        fd, mine, holder = folder.open(name, os.O_RDWR | os.O_CREAT), False, []
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            record = f"{os.getpid()} {os.uname().nodename}"
            os.pwrite(fd, record.encode()[:_RECORD].ljust(_RECORD), 0)
            mine = os.path.samestat(os.fstat(fd), folder.stat(name))
            if mine:
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


# A mutex that another thread held during the fork would stay locked in the child for ever.
os.register_at_fork(after_in_child=_mutexes.clear)
