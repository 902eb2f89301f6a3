"""Many kernels in one file, to carry to machines without a compiler.

A bundle is a tar file, so that `tar tf` can look into it, but of one shape only: what `_header`
writes for a name and a size. Import compares each header with that, byte for byte. So links,
paths, devices, sparse files and extensions are not filtered out: there is no word for them.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from typing import IO

from .cache import report, size_cap
from .cachedir import Untrusted, opened, user_dir, walk
from .cachefile import KEY, MAX_ENTRY, Damaged, decode
from .errors import BundleError

_BLOCK = 512
_MAX_BYTES = 1 << 30
_MAX_KERNELS = 100_000
_END = bytes(2 * _BLOCK)


@dataclass(frozen=True)
class Carried:
    """What an export or import wrote, and where.

    skipped: kernels that were not exported, for they are not whole and safe, or not imported, for
    they were there. sha256: of the bundle, for `import_bundle(sha256=...)`.
    """

    path: str
    kernels: int
    skipped: int
    sha256: str


def _header(name: str, size: int) -> bytes:
    """The tar header of a regular file, readable by all, of no one and of no time."""
    fields = (name.encode().ljust(100, b"\0"), b"0000644\0", b"0000000\0" * 2, b"%011o\0" % size)
    head = b"".join(fields) + b"%011o\0" % 0
    tail = b"0" + bytes(100) + b"ustar\00000" + bytes(247)
    return head + b"%06o\0 " % (sum(head) + sum(tail) + 8 * ord(" ")) + tail


def export_bundle(path: str, *, keys: Collection[str] | None = None) -> Carried:
    """Writes the kernels of all directories, or those of `keys`, to a new file at `path`. OSError.

    The same kernels give the same bytes.
    """
    digest, skipped, done = hashlib.sha256(), 0, set()
    found = ((key, folder.path) for folder, key in walk(report) if keys is None or key in keys)
    temporary = f"{path}.{os.urandom(8).hex()}"
    try:
        with open(temporary, "xb") as out:

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
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return Carried(path, len(done), skipped, digest.hexdigest())


def import_bundle(
    path: str, *, trust: bool = False, sha256: str | None = None, to: str | None = None
) -> Carried:
    """Puts a bundle's kernels into directory `to`, for all users, or else into the user's own.

    A bundle is code. It is taken only with its expected `sha256`, or with `trust=True` from where
    you would run a program. Nothing is written unless all of it is sound. BundleError, OSError.
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
        try:
            return _publish(file, members, into, digest, site=to is not None)
        except Untrusted as error:
            raise BundleError(f"nothing is imported into {into!r}: {error}") from None


def _survey(file: IO[bytes]) -> tuple[str, dict[str, tuple[int, int, bytes]]]:
    """SHA-256 of the bundle; of each kernel in it offset, size and SHA-256. Raises Damaged."""
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
        try:
            decode(data[:size], name)
        except Damaged as error:
            raise Damaged(f"kernel {name}: {error}") from None
        members[name] = at + _BLOCK, size, hashlib.sha256(data[:size]).digest()
        at += _BLOCK + len(data)
    if (end := header + file.read(_BLOCK + 1)) != _END:
        raise Damaged("it is cut short, or goes on after its end")
    digest.update(end)
    return digest.hexdigest(), members


def _publish(
    file: IO[bytes],
    members: dict[str, tuple[int, int, bytes]],
    into: str,
    digest: str,
    *,
    site: bool,
) -> Carried:
    present = 0
    with opened(into, create=0o755 if site else 0o700) as folder:
        for name, (offset, size, check) in members.items():
            try:
                decode(folder.read(name)[0], name)
                present += 1
                continue
            except (OSError, Untrusted, Damaged):
                pass
            file.seek(offset)
            data = file.read(size)
            if hashlib.sha256(data).digest() != check:
                raise BundleError("the bundle was changed while it was being read")
            folder.write(name, data, 0o644 if site else 0o600)
        if not site:
            folder.tidy(size_cap())
    return Carried(into, len(members) - present, present, digest)
