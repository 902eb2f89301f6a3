"""Running a compiler: in a private folder, in a process group of its own, for so long and no more.

What a compiler writes is code that this process will run. So it writes, its temporary files
included, below a directory that nobody else can change: the cache's rule for directories, applied
to TMPDIR.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ...cache.entries import MAX_ENTRY
from ...cache.folders import Folder, Untrusted, opened, user_dir
from ...settings import env, warn_once

TIMEOUT_S = 600.0  # of one run of a compiler
STALE_S = 2 * TIMEOUT_S  # a folder this old belongs to a process that is dead
_NAME = re.compile(r"neuronjit-[0-9a-f]{32}")
_WORDS = 100_000  # bytes of a compiler's words that are kept


def _places() -> list[str]:
    """Where temporary folders may lie, the best first; not yet judged."""
    found = [env(name) for name in ("TMPDIR", "TEMP", "TMP")]
    found += ["/tmp", "/var/tmp", "/dev/shm", user_dir()]  # noqa: S108 (each is judged)
    real = (os.path.realpath(path) for path in found if os.path.isabs(path))
    return [path for path in dict.fromkeys(real) if os.path.isdir(path)]


@contextmanager
def scratch(*, executable: bool = False) -> Iterator[Folder]:
    """A new folder that nobody else can reach, removed at the end; no link leads to its path.

    Raises OSError, with what is wrong with each place, where there is none for such a folder.
    """
    name = f"neuronjit-{os.urandom(16).hex()}"
    places = _places()
    try:
        with opened(_make(places, name, executable)) as folder:
            yield folder
    finally:  # wherever an interrupt came
        for place in places:
            _remove(os.path.join(place, name))


def _make(places: Sequence[str], name: str, executable: bool) -> str:
    """Make a folder of this name in the first place that will do. Raises OSError."""
    distrusted: list[str] = []
    failed: list[str] = []
    for place in places:
        path = os.path.join(place, name)
        try:
            with opened(path, create=0o700) as folder:
                if executable and os.fstatvfs(folder.fd).f_flag & os.ST_NOEXEC:
                    raise OSError("it is mounted noexec")
                _sweep(place, os.fstat(folder.fd).st_mtime)
            for reason in distrusted:
                text = f"neuronjit does not compile in a folder of others, but in {place!r}: "
                warn_once((reason, "scratch"), f"{text}{reason}")
            return path
        except Untrusted as error:
            distrusted.append(str(error))
        except OSError as error:  # silently the next, as in Python's own tempfile
            failed.append(f"{place!r}: {error.strerror or error}")
    reasons = "; ".join([*distrusted, *failed]) or "none of the usual folders is there"
    raise OSError(f"no folder for temporary files can be had ({reasons}); set TMPDIR")


def _remove(path: str) -> None:
    """Remove a folder, if it is there; an interrupt goes on after that."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _sweep(place: str, now: float) -> None:
    """Remove the folders that killed processes of this user left; `now` by the disk's clock."""
    with suppress(OSError), os.scandir(place) as found:
        for entry in found:
            if _NAME.fullmatch(entry.name):
                st = entry.stat(follow_symlinks=False)
                old = stat.S_ISDIR(st.st_mode) and now - st.st_mtime > STALE_S
                if old and st.st_uid == os.geteuid():
                    _remove(entry.path)


def write(folder: Folder, name: str, data: bytes) -> str:
    """Make a new file in the folder; returns its path."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with open(folder.open(name, flags), "wb") as file:
        file.write(data)
    return os.path.join(folder.path, name)


def read(folder: Folder, name: str) -> bytes:
    """A file that a compiler wrote into the folder, b"" if it wrote none."""
    try:
        descriptor = folder.open(name, os.O_RDONLY)
    except FileNotFoundError:
        return b""
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{name} is no file")
        return file.read(MAX_ENTRY)  # no cache keeps a larger one


def run(
    command: Sequence[str], folder: Folder, timeout: float, *, errors: int = subprocess.STDOUT
) -> tuple[int, str]:
    """The exit code of a command, and what it said. Raises OSError, TimeoutError among them.

    It has a process group of its own: all of the compiler's processes end with it, after the
    timeout and after Ctrl-C, too.
    """
    environment = {**os.environ, "TMPDIR": folder.path, "LC_ALL": "C"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        words = _listen(process, time.monotonic() + timeout)
    except BaseException as error:
        with suppress(OSError):  # it is not waited for yet, so the number is still its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, TimeoutError):
            raise TimeoutError(f"it was stopped after {timeout:.0f} s") from None
        raise
    finally:
        if process.stdout:
            process.stdout.close()
    return process.returncode, words.decode("utf-8", "replace")


def _listen(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """What a process says until it ends: the first bytes, whatever it says after them.

    The pipe need not end with it: a compiler may leave a server running that holds it open.
    """
    words, ready = b"", select.poll()
    pipe = process.stdout.fileno() if process.stdout else -1  # poll passes over -1
    ready.register(pipe, select.POLLIN)
    while time.monotonic() <= deadline:
        ended = process.poll() is not None
        if ready.poll(0 if ended else 50):  # milliseconds
            chunk = os.read(pipe, 1 << 16)
            words = (words + chunk)[:_WORDS]
            if not chunk:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
                    return words
        elif ended:
            return words
    raise TimeoutError
