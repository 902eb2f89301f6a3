"""Directories of kernels: which to search, whether their code can be trusted, reading and writing.

A checksum says that bytes are whole, not whose they are: whoever can write a file can write its
checksum. So code is taken only from where nobody else can write. Every directory from / down is
opened through its parent's descriptor, never through a link, and judged by its own: what was
judged is what is used.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache

from .. import settings
from ..settings import warn_once
from .entries import KEY, MAX_ENTRY, Damaged

STALE_TEMP_S = 600.0  # publishing takes milliseconds: a temporary file this old is a dead process's
TOUCH_AFTER_S = 3600.0  # how finely "last used" is kept, so that a hit seldom writes
_TEMP = "tmp."  # and 32 hex digits
# Windows has no owners and modes to judge, and no names relative to an open directory.
_POSIX = hasattr(os, "geteuid") and os.open in os.supports_dir_fd
_SAFE, _DIRECTORY, _PARENT = 0, 0, 0
if _POSIX:
    _SAFE = os.O_NOFOLLOW | os.O_CLOEXEC
    _DIRECTORY = _SAFE | os.O_DIRECTORY
    _PARENT = _DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)  # O_PATH: it need not be readable
_ALL_IDS, _USUAL_STAND_IN = (1 << 32) - 1, 65534


class Untrusted(Exception):
    """Somebody else could have put code here."""


def user_dir() -> str:
    """The directory that is read and written, "" where there is none."""
    if path := settings.cache_dir():
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
    return [path for path in (user_dir(), *map(_absolute, settings.cache_path())) if path]


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


def distrust(st: os.stat_result, *, parent: bool = False, fd: int | None = None) -> str:
    """Why others could put code here, "" if nobody can: the rule of ssh's StrictModes.

    fd: an open directory, whose private group is then known to be private.
    """
    mode, owner = stat.S_IMODE(st.st_mode), st.st_uid
    shared = mode & 0o020 and is_shared(st)
    unknown = _unmapped("uid", owner)
    if stat.S_ISLNK(st.st_mode):
        why = "is a symbolic link"
    elif unknown and not parent and not shared:  # even if it is our own number, or it looks so
        why = "belongs to somebody whom this user namespace does not map"
    elif owner not in (0, os.geteuid()) and not unknown and not shared:
        why = "belongs to another user"
    elif parent and mode & stat.S_ISVTX:  # sticky: others cannot rename or remove what is ours
        return ""
    elif mode & 0o002:
        why = "can be written by everybody"
    elif mode & 0o020 and not shared and not (fd is not None and _is_private(st, fd)):
        why = "can be written by its group"
    else:
        return ""
    return f"{why} (owner {owner}, mode {mode:04o}; this process is user {os.geteuid()})"


def is_shared(st: os.stat_result) -> bool:
    """Whether the user trusts this file's group: one of theirs, with NEURONJIT_SHARED_GROUP=1."""
    ours = st.st_gid in {os.getegid(), *os.getgroups()} and not _unmapped("gid", st.st_gid)
    return ours and settings.trusts_groups()


def _lenient(path: str, st: os.stat_result, fd: int) -> str:
    """For `info`: what ssh would refuse in this trusted directory, and why it is harmless."""
    if _unmapped("uid", st.st_uid):
        return f"{path!r} belongs to somebody outside this user namespace: taken for root"
    if st.st_mode & 0o020 and not st.st_mode & stat.S_ISVTX and _is_private(st, fd):
        return f"the group that can write {path!r} is this user's alone"
    return ""


def _unmapped(kind: str, number: int) -> bool:
    """Whether a "uid" or "gid" may stand for any number that this user namespace does not map.

    The kernel shows all of those as one, 65534. In a rootless container that is root, whose / and
    /home are seen from inside; but it may be any other user as well. So it is taken for root in
    directories above a cache only: there an owner could put another directory in its place, which
    must then be ours too, and no kernel. It is never taken for this process's own number.
    """
    try:
        return number == _stand_in(kind)
    except FileNotFoundError:  # no Linux, or one without namespaces: all are mapped
        return False
    except (OSError, ValueError, IndexError):  # no descriptor is free, say: it might be
        return number == _USUAL_STAND_IN


@cache  # only what was read: not an error
def _stand_in(kind: str) -> int:
    """The number under which the kernel shows all "uid" or "gid" that are not mapped, else -1."""
    with open(f"/proc/self/{kind}_map") as file:
        mapped = sum(int(line.split()[2]) for line in file)
    if mapped >= _ALL_IDS:
        return -1
    with open(f"/proc/sys/kernel/overflow{kind}") as file:
        return int(file.read())


def _is_private(st: os.stat_result, fd: int) -> bool:
    """Whether an open directory's group holds this user alone, as where the umask is 002.

    An access list would show its other writers as the group's: there must be none.
    """
    if not _private_group(st.st_gid, os.geteuid()):
        return False
    try:
        names = os.listxattr(f"/proc/self/fd/{fd}")  # the descriptor may be O_PATH
    except AttributeError:  # this system has no such call: access lists cannot be seen
        return False
    except OSError as error:
        return error.errno == errno.ENOTSUP  # a file system that has no access lists
    return not any("acl" in name for name in names)


@cache
def _private_group(gid: int, uid: int) -> bool:
    """Whether a group is the private one that a system makes for each user.

    It has the user's number and name, is the user's first group and lists no other member. Users
    whose first group it is besides could be found by reading all users only, which directory
    services refuse; but number and name are those of no group that is made for several. Not for
    root, whose group is that of other accounts on some systems.
    """
    try:
        import grp
        import pwd

        group, user = grp.getgrgid(gid), pwd.getpwuid(uid)
    except (ImportError, KeyError, OSError):
        return False
    named = group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    return named and 0 != gid == uid == user.pw_gid


@contextmanager
def opened(path: str, *, create: int | None = None) -> Iterator[Folder]:
    """A directory that nobody else can write, made with mode `create` if given.

    OSError, and Untrusted with the path, owner and mode at fault.
    """
    if not _POSIX:
        raise OSError(errno.ENOTSUP, "this system cannot show that nobody else writes there", path)
    parts = [part for part in os.path.realpath(path).split("/") if part]  # itself may be a link
    fd, at = os.open("/", _PARENT), ""
    lenient: list[str] = []
    try:
        while True:
            st = os.fstat(fd)
            if why := distrust(st, parent=bool(parts), fd=fd):
                raise Untrusted(f"{at or '/'!r} {why}")
            if st.st_mode & 0o020 or st.st_uid not in (0, os.geteuid()):
                lenient += filter(None, [_lenient(at or "/", st, fd)])
            if not parts:
                break
            part, parent = parts.pop(0), fd
            try:
                fd = _open_child(part, parent, create, last=not parts)
            finally:
                if fd != parent:
                    os.close(parent)
            at = f"{at}/{part}"
        yield Folder(fd, path, lenient)
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

    def __init__(self, fd: int, path: str, lenient: Sequence[str] = ()) -> None:
        self.fd, self.path = fd, path
        self.lenient = lenient  # what was judged less strictly on the way to it, and why

    def open(self, name: str, flags: int) -> int:
        """A descriptor that no program inherits; O_NONBLOCK, as a planted pipe has no writer."""
        return os.open(name, flags | _SAFE | os.O_NONBLOCK, 0o600, dir_fd=self.fd)

    def stat(self, name: str) -> os.stat_result:
        """Of the name itself, be it a link."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def read(self, name: str, size: int = MAX_ENTRY) -> tuple[bytes, os.stat_result]:
        """The first bytes of a file that nobody else can write. OSError, Untrusted, Damaged."""
        st = self.stat(name)  # of the name: it could be a pipe, or a link
        if why := distrust(st):
            raise Untrusted(f"{os.path.join(self.path, name)!r} {why}")
        if stat.S_ISDIR(st.st_mode):
            raise Damaged("it is a directory")
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
            try:
                os.replace(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            except IsADirectoryError:
                self._move_away(name)
                os.replace(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:  # an interrupt too leaves nothing behind
            self.unlink(temporary)
            raise
        with suppress(OSError):
            os.fsync(self.fd)  # so that the name outlives a power cut as well

    def _move_away(self, name: str) -> None:
        """Gives a directory that took a kernel's name another one; an empty one is removed."""
        if not self.unlink(name):  # the "/": should it be a file by now, that one stays
            aside = f"{name}.was-a-directory.{os.urandom(4).hex()}"
            os.rename(f"{name}/", aside, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def unlink(self, name: str, seen: os.stat_result | None = None) -> bool:
        """Removes a file or an empty directory, but none that has changed since `seen`.

        Says whether; no error.
        """
        with suppress(OSError):
            st = self.stat(name)
            if seen and (st.st_ino, st.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):
                return False
            (os.rmdir if stat.S_ISDIR(st.st_mode) else os.unlink)(name, dir_fd=self.fd)
            return True
        return False

    def scan(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every name, but those that other processes remove meanwhile."""
        for name in os.listdir(self.fd):
            with suppress(FileNotFoundError):
                yield name, self.stat(name)

    def tidy(self, cap: float, keep: str = "") -> None:
        """Sweeps temporary files of the dead; least recently used entries until the rest fits."""
        with suppress(OSError):
            now = self.stat(keep).st_mtime if keep else time.time()  # the file system's own clock
            entries = []
            for name, st in self.scan():
                if KEY.fullmatch(name):
                    entries.append((st.st_mtime_ns, name, st))
                elif name.startswith(_TEMP) and abs(now - st.st_mtime) > STALE_TEMP_S:
                    self.unlink(name)
            total = sum(st.st_size for _, _, st in entries)
            goal = cap * 0.9 if total > cap else total  # a tenth more, not to do it again at once
            for _, name, st in sorted(entries, key=lambda entry: entry[:2]):
                if total > goal and name != keep and self.unlink(name, st):
                    total -= st.st_size
