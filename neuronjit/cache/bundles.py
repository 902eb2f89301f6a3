"""Many kernels in one file, to carry to machines without a compiler.

A bundle is a tar file, so that `tar tf` can look into it, but of one shape only: what `_header`
writes for a name and a size. Import compares each header with that, byte for byte. So links,
paths, devices, sparse files and extensions are not filtered out: there is no word for them.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from ..errors import BundleError
from ..settings import warn_once
from .entries import KEY, MAX_ENTRY, Damaged, decode
from .folders import STALE_TEMP_S, Untrusted, opened, user_dir, walk
from .store import note_written, report, size_cap

_BLOCK = 512
_MAX_BYTES = 1 << 30
_MAX_KERNELS = 100_000
_UNFINISHED = ".unfinished"  # how the name ends of what an export writes, until it is done
_END = bytes(2 * _BLOCK)


@dataclass(frozen=True)
class Carried:
    """What an export or import wrote, and where.

    skipped: kernels that were not exported, because they are not whole and safe, or not imported,
    because they were there. sha256: of the bundle, for `import_bundle(sha256=...)`.
    """

    path: str
    kernels: int
    skipped: int
    sha256: str


def _header(name: str, size: int) -> bytes:
    """A regular file's tar header; mode 0644, owner and time 0: equal kernels, equal bytes."""
    fields = (name.encode().ljust(100, b"\0"), b"0000644\0", b"0000000\0" * 2, b"%011o\0" % size)
    head = b"".join(fields) + b"%011o\0" % 0
    tail = b"0" + bytes(100) + b"ustar\00000" + bytes(247)
    return head + b"%06o\0 " % (sum(head) + sum(tail) + 8 * ord(" ")) + tail


def export_bundle(path: str, *, keys: Collection[str] | None = None) -> Carried:
    """Writes the kernels of all directories, or those of `keys`, to a file at `path`.

    The same kernels give the same bytes. A file that is there is replaced. Raises BundleError if
    something else is there (a link, device, pipe or directory), and OSError.
    """
    path = os.path.abspath(path)
    _check_target(path)
    digest, skipped, done = hashlib.sha256(), 0, set()
    found = ((key, folder.path) for folder, key in walk(report) if keys is None or key in keys)
    temporary = f"{path}.{os.urandom(8).hex()}{_UNFINISHED}"
    try:
        with _create(temporary) as out:

            def put(data: bytes) -> None:
                digest.update(data)
                out.write(data)

            for key, place in sorted(found):
                try:
                    with opened(place) as folder:
                        data, _ = folder.read(key)
                    decode(data, key)
                except (OSError, Untrusted, Damaged):
                    skipped += 1
                    continue
                if key not in done:
                    put(_header(key, len(data)) + data + bytes(-len(data) % _BLOCK))
                done.add(key)
            put(_END)
            out.flush()
            os.fsync(out.fileno())
        _check_target(path)  # minutes may have passed
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    _sweep(path)
    return Carried(path, len(done), skipped, digest.hexdigest())


def _check_target(path: str) -> None:
    """Raise BundleError if `path` is there and is no regular file: rename would remove it."""
    with suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            where = os.path.realpath(path)
            raise BundleError(f"{path!r} is a link to {where!r}; name that file to replace it")
        if not stat.S_ISREG(mode):
            raise BundleError(f"{path!r} is there and is no regular file; name another one")


def _create(temporary: str) -> IO[bytes]:
    try:
        return open(temporary, "xb")
    except OSError as error:
        folder = os.path.dirname(temporary)
        what = f"cannot make a new file in the folder: {error.strerror}"
        raise OSError(error.errno, what, folder) from None


def _sweep(path: str) -> None:
    """Removes what killed exports to the same file left beside it."""
    folder, name = os.path.split(path)
    unfinished = re.compile(re.escape(name) + r"\.[0-9a-f]{16}" + re.escape(_UNFINISHED))
    with suppress(OSError), os.scandir(folder) as found:
        for item in found:
            if unfinished.fullmatch(item.name) and item.is_file(follow_symlinks=False):
                age = time.time() - item.stat(follow_symlinks=False).st_mtime
                if abs(age) > STALE_TEMP_S:  # an export in progress writes all the time
                    os.unlink(item.path)


def import_bundle(
    path: str, *, trust: bool = False, sha256: str | None = None, to: str | None = None
) -> Carried:
    """Puts a bundle's kernels into directory `to`, for all users, or else into the user's own.

    A bundle is code. It is taken only with its expected `sha256`, or with `trust=True` from where
    you would run a program; before that, none of it is unpacked. Nothing is written unless all of
    it is sound, and nothing is evicted: if the user's directory is then larger than
    NEURONJIT_CACHE_SIZE, a CacheWarning says so. BundleError, OSError.
    """
    with open(path, "rb") as file:
        try:
            digest, members = _survey(file)
        except Damaged as error:
            raise BundleError(f"{path!r} is no sound bundle of kernels: {error}") from None
        if sha256 is not None and digest != sha256.strip().lower():
            raise BundleError(f"{path!r} has SHA-256 {digest}, and not {ascii(sha256)[:80]}")
        if sha256 is None and not trust:
            raise BundleError(
                f"{path!r} holds code, which runs with all your rights. If you trust where it comes"
                f" from, import it with trust, or with its SHA-256, which is {digest}"
            )
        if not (into := to or user_dir()):
            raise BundleError("there is no home directory to import into; say where to")
        if to is None and not size_cap():
            raise BundleError(
                "NEURONJIT_CACHE_SIZE=0 keeps your directory as it is: set a size to import into"
                f" {into!r}, or say where to (--to)"
            )
        try:
            for name in members:
                decode(_member(file, members, name), name)
        except Damaged as error:
            raise BundleError(f"{path!r} is no sound bundle: kernel {name}: {error}") from None
        try:
            return _publish(file, members, into, digest, site=to is not None)
        except Untrusted as error:
            raise BundleError(f"nothing is imported into {into!r}: {error}") from None


def _survey(file: IO[bytes]) -> tuple[str, dict[str, tuple[int, int, bytes]]]:
    """SHA-256 of the bundle; of each kernel in it offset, size and SHA-256. Raises Damaged.

    Looks at headers only: the kernels are read to be hashed, and whether they are sound is not
    asked before somebody has said that they can be trusted.
    """
    st = os.fstat(file.fileno())
    if not stat.S_ISREG(st.st_mode) or st.st_size > _MAX_BYTES:
        raise Damaged(f"it is no regular file, or larger than {_MAX_BYTES} bytes")
    digest, at = hashlib.sha256(), 0
    members: dict[str, tuple[int, int, bytes]] = {}
    while (header := file.read(_BLOCK)) != _END[:_BLOCK]:
        name = header[:64].decode("ascii", "replace")
        octal = header[124:135]
        size = int(octal, 8) if octal.isdigit() and not set(octal) & set(b"89") else -1
        if not KEY.fullmatch(name) or size < 0 or header != _header(name, size):
            raise Damaged(f"at byte {at} there is no kernel's header")
        if size > MAX_ENTRY or name in members or len(members) >= _MAX_KERNELS:
            raise Damaged(f"kernel {name} is too large, there twice, or one too many")
        data = file.read(size + -size % _BLOCK)
        if len(data) != size + -size % _BLOCK or any(data[size:]):
            raise Damaged(f"kernel {name} is cut short")
        digest.update(header + data)
        members[name] = at + _BLOCK, size, hashlib.sha256(data[:size]).digest()
        at += _BLOCK + len(data)
    if (end := header + file.read(_BLOCK + 1)) != _END:
        raise Damaged("it is cut short, or goes on after its end")
    digest.update(end)
    return digest.hexdigest(), members


def _member(file: IO[bytes], members: dict[str, tuple[int, int, bytes]], name: str) -> bytes:
    """A kernel's bytes, as they were surveyed. Raises BundleError."""
    offset, size, check = members[name]
    file.seek(offset)
    data = file.read(size)
    if hashlib.sha256(data).digest() != check:
        raise BundleError("the bundle was changed while it was being read")
    return data


def _publish(
    file: IO[bytes],
    members: dict[str, tuple[int, int, bytes]],
    into: str,
    digest: str,
    *,
    site: bool,
) -> Carried:
    present, last, cap = 0, "", size_cap()
    with opened(into, create=0o755 if site else 0o700) as folder:
        for name in members:
            try:
                decode(folder.read(name)[0], name)
                present += 1
                continue
            except (OSError, Untrusted, Damaged):
                pass
            folder.write(name, _member(file, members, name), 0o644 if site else 0o600)
            note_written(into, members[name][1])
            last = name
        if last:
            folder.tidy(math.inf, keep=last)  # evicts nothing: sweeps what a killed import left
        total = sum(st.st_size for name, st in folder.scan() if KEY.fullmatch(name))
    if not site and total > cap:
        text = f"{into!r} now holds {total} bytes of kernels, NEURONJIT_CACHE_SIZE allows {cap}"
        then = "the next kernel that is compiled evicts those not used for longest; set a larger"
        warn_once(
            (into, f"over the cap {digest}"), f"{text}: {then} NEURONJIT_CACHE_SIZE to keep all"
        )
    return Carried(into, len(members) - present, present, digest)
