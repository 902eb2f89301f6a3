"""What the cache's tests and benchmarks/cache_torture.py share: toy kernels, processes, strace.

Children are forked and leave with os._exit: they cost milliseconds, so that hundreds can race.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import pytest

from neuronjit import settings
from neuronjit.cache import entries, folders, store

ROOT = Path(__file__).parent.parent
FINGERPRINT = {"compiler": "toy 1.0", "flags": "-O3"}
STRACE = shutil.which("strace")
needs_strace = pytest.mark.skipif(STRACE is None, reason="needs strace, to inject errors")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as other users")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
ALICE, MALLORY = 54321, 54322  # users that no machine has

# A Python without torch: a process starts in 50 ms, and what it does to the disk is the cache's.
BARE = f"""
import sys, types
package = types.ModuleType("neuronjit")
package.__path__ = [{str(ROOT / "neuronjit")!r}]
sys.modules["neuronjit"] = package
sys.path.insert(0, {str(ROOT / "tests")!r})
"""


def request(number):
    return hashlib.sha256(f"toy {number}".encode()).hexdigest()


def key(number):
    return store.make_key(request(number), FINGERPRINT)


def toy(number, size=3000, **meta):
    """A kernel that every process can make, and tell from any other."""
    meta = {"request": request(number), "fingerprint": FINGERPRINT, "target": "cpu", **meta}
    meta = {"arch": "toy", "model": "lif", "symbol": f"toy_{number}", **meta}
    binary = hashlib.shake_256(f"binary {number}".encode()).digest(size)
    return store.Entry(key(number), meta, f"// toy {number}\n" * 50, binary)


def right(entry, number):
    meta = {name: value for name, value in entry.meta.items() if name != "rebuilt"}
    expected = toy(number, len(entry.binary))
    return (entry.key, meta, entry.source, entry.binary) == (
        expected.key,
        expected.meta,
        expected.source,
        expected.binary,
    )


def get(number, size=3000, built=None, pause=0.0):
    """load_or_make; each build adds a byte to the file `built`, whatever process it is in."""

    def build():
        if built:
            with open(built, "ab", buffering=0) as file:
                file.write(b"x")
        time.sleep(pause)
        return toy(number, size)

    return store.load_or_make(key(number), build)


def forget():
    """Makes this process as good as new to the cache."""
    for memory in (store._memory, store._counts, store._known, store._unlisted, settings._warned):
        memory.clear()
    for known in (folders._stand_in, folders._private_group):
        known.cache_clear()


def use(directory, *sites):
    """Points this process, and those it forks, to a cache directory."""
    forget()
    os.environ["NEURONJIT_CACHE_DIR"] = str(directory)
    os.environ["NEURONJIT_CACHE_PATH"] = ":".join(map(str, sites))
    return Path(directory)


def put(number, directory, size=3000, mode=0o600, data=None):
    """Writes a kernel as a stranger to the library would, in no time."""
    path = Path(directory, key(number))
    path.write_bytes(entries.encode(toy(number, size)) if data is None else data)
    path.chmod(mode)
    return path


@contextlib.contextmanager
def heard():
    """The cache's warnings, as texts."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield texts
        finally:
            texts.extend(str(warning.message) for warning in caught)


@contextlib.contextmanager
def for_all_users():
    """A directory that other users can look into, which they cannot below pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="neuronjit-"))
    try:
        path.chmod(0o755)
        yield path
    finally:
        shutil.rmtree(path)


class Died(Exception):
    """A child was killed, raised, or took too long."""


class Child:
    """A forked process that does `work(*args)`, as user `uid` if given; its result is JSON.

    setup: done first of all, with the rights of this process. wait: work is not done before go().
    coded: it writes nothing, and leaves with the integer that work gives as its exit code (60 for
    an exception), for when writing is what fails.
    """

    def __init__(self, work, *args, uid=None, wait=False, setup=None, group=False, coded=False):
        self._result, result = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._result)
            code = 1
            try:
                if group:
                    os.setpgid(0, 0)
                if setup:
                    setup()
                if uid is not None:
                    os.setgroups([])
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER
                if wait:
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
                    os.write(result, b" ")
                    signal.sigwait({signal.SIGUSR1})
                if coded:
                    code = 60
                    code = work(*args)
                    os._exit(code)
                with heard() as texts:
                    value = work(*args)
                os.write(result, json.dumps({"value": value, "warnings": texts}).encode())
                code = 0
            except BaseException:
                if not coded:
                    os.write(result, json.dumps({"error": traceback.format_exc()}).encode())
            finally:
                os._exit(code)
        os.close(result)
        if wait:
            os.read(self._result, 1)

    def go(self):
        os.kill(self.pid, signal.SIGUSR1)

    def finish(self, timeout=60.0):
        """{"value", "warnings"} of the work; raises Died."""
        data, deadline = b"", time.monotonic() + timeout
        try:
            while select.select([self._result], [], [], max(0, deadline - time.monotonic()))[0]:
                chunk = os.read(self._result, 1 << 16)
                if not chunk:
                    break
                data += chunk
            else:
                self.kill()
                raise Died(f"hangs: nothing after {timeout} s")
        finally:
            os.close(self._result)
            _, self.status = os.waitpid(self.pid, 0)
        found = json.loads(data.strip() or b'{"error": "no result"}')
        if "error" in found:
            raise Died(f"status {self.status}: {found['error']}")
        return found

    def result(self, timeout=60.0):
        return self.finish(timeout)["value"]

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def wait_status(self, timeout=60.0):
        """The exit status of one that may die."""
        with contextlib.suppress(Died):
            self.finish(timeout)
        return self.status


def crowd(number, work, *args, timeout=300.0):
    """Runs work(index, *args) in so many processes, started at once; results in order."""
    children = [Child(work, index, *args, wait=True) for index in range(number)]
    for child in children:
        child.go()
    return [child.result(timeout) for child in children]


@contextlib.contextmanager
def traced(pid, *options):
    """strace on a child made with wait=True, from now on; its output is a file's path."""
    with tempfile.NamedTemporaryFile(prefix="strace-") as out:
        command = [STRACE, "-f", "-o", out.name, *options, "-p", str(pid)]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            line = tracer.stderr.readline()
            if "attached" not in line:
                raise Died(f"strace: {line}")
            yield out.name
            tracer.wait(60)
        finally:
            tracer.kill()
            tracer.wait()
            tracer.stderr.close()


class Inotify:
    """Counts changes of a directory."""

    CHANGES = 0x2 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200  # modify, close_write, moved, create, delete

    def __init__(self, path):
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_CLOEXEC)
        if libc.inotify_add_watch(self.fd, os.fsencode(path), self.CHANGES) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def wait(self, changes, timeout):
        """Returns once there were so many changes; whether there were."""
        deadline = time.monotonic() + timeout
        while changes > 0:
            if not select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0]:
                return False
            data, at = os.read(self.fd, 4096), 0
            while at < len(data):
                at += 16 + struct.unpack_from("iIII", data, at)[3]
                changes -= 1
        return True

    def close(self):
        os.close(self.fd)


def kernel_files(directory):
    return [name for name in os.listdir(directory) if re.fullmatch("[0-9a-f]{64}", name)]


def other_files(directory):
    return [name for name in os.listdir(directory) if not re.fullmatch("[0-9a-f]{64}", name)]


@contextlib.contextmanager
def patched(thing, **values):
    before = {name: getattr(thing, name) for name in values}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


@contextlib.contextmanager
def logged():
    """What the library logs, as texts."""
    texts = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    logger = logging.getLogger("neuronjit")
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)
