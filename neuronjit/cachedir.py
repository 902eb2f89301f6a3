"""Directories of kernels: which to search, whether their code can be trusted, reading and writing.

A checksum says that bytes are whole, not whose they are: whoever can write a file can write its
checksum. So code is taken only from where nobody else can write. Every directory from / down is
opened through its parent's descriptor, never through a link, and judged by its own: what was
judged is what is used.
"""

from __future__ import annotations

import os
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

from .cachefile import KEY, MAX_ENTRY, Damaged

STALE_TEMP_S = 600.0  # publishing takes milliseconds: a temporary file this old is a dead process's
TOUCH_AFTER_S = 3600.0  # how finely "last used" is kept, so that a hit seldom writes
_TEMP = "tmp."  # and 32 hex digits
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PARENT = _DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)  # O_PATH: it need not be readable
_warned: dict[tuple[str, str], object] = {}


class CacheWarning(UserWarning):
    """Something about the kernel cache that costs time, but no result."""


class Untrusted(Exception):
    """Somebody else could have put code here."""


def warn_once(cause: tuple[str, str], text: str) -> None:
    """Warns at most once a process and cause."""
    token = object()
    if _warned.setdefault(cause, token) is token:  # atomic: of many threads one warns
        warnings.warn(text, CacheWarning, stacklevel=2)


@cache
def _raised() -> bool:
    """AT_SECURE: this program was given rights that its caller has not (file capabilities)."""
    with suppress(OSError, AttributeError):  # no such function but on Linux
        import ctypes

        return bool(ctypes.CDLL(None).getauxval(23))
    return False


def env(name: str) -> str:
    """One of our variables, or "" where the environment may be another user's."""
    other = os.geteuid() != os.getuid() or os.getegid() != os.getgid() or _raised()
    return "" if other else os.environ.get(name, "")


def user_dir() -> str:
    """The directory that is read and written, "" where there is none."""
    if path := env("NEURONJIT_CACHE_DIR"):
        return _absolute(path)
    with suppress(Exception):  # whatever it stumbles over must not end a computation
        import platformdirs

        path = platformdirs.user_cache_dir("neuronjit")
    if os.path.isabs(path):
        return path
    text = "neuronjit finds no home directory to keep kernels in; set NEURONJIT_CACHE_DIR"
    warn_once(("", "no home"), text)
    return ""


def search_path() -> list[str]:
    """The directories to look into: the user's, then those of the site, which are only read."""
    sites = env("NEURONJIT_CACHE_PATH").split(":")
    return [path for path in (user_dir(), *map(_absolute, sites)) if path]


def _absolute(path: str) -> str:
    try:
        return os.path.abspath(os.path.expanduser(path)) if path else ""
    except OSError:  # relative to a directory that is gone
        warn_once((path, "nowhere"), f"neuronjit finds no directory {path!r}")
        return ""


def walk(trouble: Callable[[str, Exception], object]) -> Iterator[tuple[Folder, str]]:
    """The names of all entries with their open directory; `trouble` hears of what will not open."""
    for path in search_path():
        try:
            with opened(path) as folder:
                for name in sorted(os.listdir(folder.fd)):
                    if KEY.fullmatch(name):  # whatever else lies here is nobody's business
                        yield folder, name
        except FileNotFoundError:  # noqa: PERF203 (once a directory)
            continue
        except (OSError, Untrusted) as error:
            trouble(path, error)


def distrust(st: os.stat_result, *, parent: bool = False) -> str:
    """Why others could put code here, "" if nobody can: the rule of ssh's StrictModes."""
    mode, opted = stat.S_IMODE(st.st_mode), env("NEURONJIT_SHARED_GROUP") == "1"
    shared = opted and mode & 0o020 and st.st_gid in {os.getegid(), *os.getgroups()}
    if stat.S_ISLNK(st.st_mode):
        why = "is a symbolic link"
    elif st.st_uid not in (0, os.geteuid()) and not shared:
        why = "belongs to another user"
    elif parent and mode & stat.S_ISVTX:  # sticky: others cannot rename or remove what is ours
        return ""
    elif mode & 0o002:
        why = "can be written by everybody"
    elif mode & 0o020 and not shared:
        why = "can be written by its group"
    else:
        return ""
    return f"{why} (owner {st.st_uid}, mode {mode:04o}; this process is user {os.geteuid()})"


@contextmanager
def opened(path: str, *, create: int | None = None) -> Iterator[Folder]:
    """A directory that nobody else can write, made with mode `create` if given.

    OSError, and Untrusted with the path, owner and mode at fault.
    """
    parts = [part for part in os.path.realpath(path).split("/") if part]  # itself may be a link
    fd, at = os.open("/", _PARENT), ""
    try:
        while True:
            if why := distrust(os.fstat(fd), parent=bool(parts)):
                raise Untrusted(f"{at or '/'!r} {why}")
            if not parts:
                break
            part, parent = parts.pop(0), fd
            try:
                fd = _open_child(part, parent, create, last=not parts)
            finally:
                if fd != parent:
                    os.close(parent)
            at = f"{at}/{part}"
        yield Folder(fd, path)
    finally:
        os.close(fd)


def _open_child(name: str, parent: int, create: int | None, *, last: bool) -> int:
    flags = _DIRECTORY if last else _PARENT
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        if create is None:
            raise
    with suppress(FileExistsError):  # another process was faster
        os.mkdir(name, create, dir_fd=parent)
        if create != 0o700:  # a site directory is for others to read, whatever the umask
            os.chmod(name, create, dir_fd=parent)
    return os.open(name, flags, dir_fd=parent)


class Folder:
    """A trusted directory's descriptor. Names are looked up in it and never followed."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd, self.path = fd, path

    def open(self, name: str, flags: int) -> int:
        """A descriptor that no program inherits; O_NONBLOCK, as a planted pipe has no writer."""
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(name, flags, 0o600, dir_fd=self.fd)

    def stat(self, name: str) -> os.stat_result:
        """Of the name itself, be it a link."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def read(self, name: str, size: int = MAX_ENTRY) -> tuple[bytes, os.stat_result]:
        """The first bytes of a file that nobody else can write. OSError, Untrusted, Damaged."""
        if why := distrust(self.stat(name)):  # of the name: it could be a pipe, or a link
            raise Untrusted(f"{os.path.join(self.path, name)!r} {why}")
        with open(name, "rb", buffering=0, opener=self.open) as file:
            st = os.fstat(file.fileno())
            if why := distrust(st):  # of what was opened, should it be another by now
                raise Untrusted(f"{os.path.join(self.path, name)!r} {why}")
            if not stat.S_ISREG(st.st_mode) or st.st_size > MAX_ENTRY:
                raise Damaged("it is no file, or too large")
            return file.read(min(size, st.st_size)), st

    def touch(self, name: str, st: os.stat_result) -> None:
        """Notes that a file of ours is in use; no error, and no attempt on a read-only disk."""
        if st.st_uid == os.geteuid() and abs(time.time() - st.st_mtime) > TOUCH_AFTER_S:
            with suppress(OSError, NotImplementedError):
                if not os.fstatvfs(self.fd).f_flag & os.ST_RDONLY:
                    os.utime(name, dir_fd=self.fd, follow_symlinks=False)

    def writable(self) -> bool:
        """Whether files can be made here, by the user whose rights this process has."""
        effective = os.access in os.supports_effective_ids
        return os.access(".", os.W_OK, dir_fd=self.fd, effective_ids=effective)

    def write(self, name: str, data: bytes, mode: int = 0o600) -> None:
        """Publishes a file: others see all of it or none, and who reads an older one keeps it."""
        temporary = _TEMP + os.urandom(16).hex()  # a process's number repeats across containers
        try:
            with open(temporary, "xb", opener=self.open) as file:
                if mode != 0o600:
                    os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:  # an interrupt too leaves nothing behind
            self.unlink(temporary)
            raise
        with suppress(OSError):
            os.fsync(self.fd)  # so that the name outlives a power cut as well

    def unlink(self, name: str, seen: os.stat_result | None = None) -> bool:
        """Removes a file, but not one that has changed since `seen`; says whether. No error."""
        with suppress(OSError):
            st = self.stat(name) if seen else None
            if st and seen and (st.st_ino, st.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
                return False
            os.unlink(name, dir_fd=self.fd)
            return True
        return False

    def scan(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every name, but those that other processes remove meanwhile."""
        for name in os.listdir(self.fd):
            with suppress(FileNotFoundError):
                yield name, self.stat(name)

    def tidy(self, cap: int, keep: str = "") -> None:
        """Sweeps temporary files of the dead; least recently used entries until the rest fits."""
        with suppress(OSError):
            now = self.stat(keep).st_mtime if keep else time.time()  # the file system's own clock
            entries = []
            for name, st in self.scan():
                if KEY.fullmatch(name):
                    entries.append((st.st_mtime_ns, name, st))
                elif name.startswith(_TEMP) and now - st.st_mtime > STALE_TEMP_S:
                    self.unlink(name)
            total = sum(st.st_size for _, _, st in entries)
            goal = cap * 0.9 if total > cap else total  # a tenth more, not to do it again at once
            for _, name, st in sorted(entries, key=lambda entry: entry[:2]):
                if total > goal and name != keep and self.unlink(name, st):
                    total -= st.st_size
