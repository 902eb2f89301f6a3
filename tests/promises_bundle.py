"""Bundles as experiments: there and back, archives that want to escape; malformed kernels."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import tarfile
import zlib
from pathlib import Path

from cachekit import heard, key, put, toy, use

from neuronjit.cache import bundles, entries
from neuronjit.errors import BundleError


def tar(*members, kind=tarfile.USTAR_FORMAT):
    """An ordinary tar file of (name, data, TarInfo's attributes)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        for name, data, attributes in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pack(*members):
    """A bundle with these (name, data), as export would write it."""
    blocks = [
        bundles._header(name, len(data)) + data + bytes(-len(data) % 512) for name, data in members
    ]
    return b"".join(blocks) + bytes(1024)


def signed(body):
    """With the checksum that belongs to it."""
    return body + hashlib.sha256(body).digest()


def _with_source(entry, packed):
    """The entry as a file whose packed source is another; its checksum and key are right."""
    head, tail = entries.encode(entry)[:-32].split(zlib.compress(entry.source.encode()))
    sizes = entries._HEADER.unpack_from(head)
    meta = head[entries._HEADER.size :]
    head = entries._HEADER.pack(*sizes[:3], len(packed), *sizes[4:])
    return signed(head + meta + packed + tail)


def _bomb():
    """A kernel whose source unpacks to 256 MB, which is more than it may."""
    packed = zlib.compressobj(9)
    source = b"".join(packed.compress(bytes(1 << 20)) for _ in range(256)) + packed.flush()
    return _with_source(toy(1), source)


def bombs(number):
    """(name, data) of sound kernels whose 16 KB of source unpack to 16 MB each."""
    packed = zlib.compress(bytes((16 << 20) - 1))
    for index in range(number):
        yield key(index), _with_source(toy(index), packed)


def hostile():
    """Archives by what is wrong with them."""
    good, name = entries.encode(toy(1)), key(1)
    flipped = good[:500] + bytes([good[500] ^ 1]) + good[501:]
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    hard = {"type": tarfile.LNKTYPE, "linkname": key(2)}
    pax = {"pax_headers": {"path": "../../escaped"}}
    sized = {"pax_headers": {"size": str(1 << 40)}}
    sparse = bytearray(pack((name, good)))
    sparse[156:157] = b"S"
    suid = bytearray(pack((name, good)))
    suid[100:108] = b"0004755\0"
    huge = bytearray(pack((name, good)))
    huge[124:136] = b"77777777777\0"
    negative = bytearray(pack((name, good)))
    negative[124:136] = b"\xff" * 12  # base 256
    other = entries.encode(toy(2))
    foreign_key = bytearray(good[:-32])
    foreign_key[28:60] = bytes.fromhex(key(2))
    return {
        "name that climbs": tar(("../../escaped", good, {})),
        "climbing name in our header": pack(("../" * 21 + "x", good)),
        "absolute name": tar(("/tmp/escaped", good, {})),  # noqa: S108 (nothing may write it)
        "name that is no key": pack(("x" * 64, good)),
        "symbolic link": tar((name, b"", link), (name, good, {})),
        "hard link to a link": tar((key(2), b"", link), (name, b"", hard)),
        "device": tar((name, b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})),
        "pipe": tar((name, b"", {"type": tarfile.FIFOTYPE})),
        "directory": tar((name, b"", {"type": tarfile.DIRTYPE})),
        "the same twice": pack((name, good), (name, good)),
        "sparse file": bytes(sparse),
        "PAX path": tar((name, good, pax), kind=tarfile.PAX_FORMAT),
        "PAX size": tar((name, good, sized), kind=tarfile.PAX_FORMAT),
        "GNU long name": tar(("a" * 300, good, {}), kind=tarfile.GNU_FORMAT),
        "setuid": bytes(suid),
        "size beyond the end": bytes(huge),
        "negative size": bytes(negative),
        "kernel of 8 GB": bundles._header(name, (8 << 30) - 1) + good,
        "compressed": gzip.compress(pack((name, good))),
        "source that unpacks to 256 MB": pack((name, _bomb())),
        "wrong digest": pack((name, flipped)),
        "another kernel's name": pack((name, other)),
        "key that its metadata do not give": pack((key(2), signed(bytes(foreign_key)))),
        "cut in a kernel": pack((name, good))[:700],
        "cut before its end": pack((name, good))[:-512],
        "goes on after its end": pack((name, good)) + b"more",
        "empty file": b"",
        "no archive": os.urandom(4096),
    }


def p14_bundles(directory, kernels=50):
    """A bundle there and back; and every hostile one, which must leave nothing behind."""
    source, target, out = (Path(directory, name) for name in ("from", "to", "kernels.njc"))
    use(source)
    source.mkdir(mode=0o700)
    files = {key(number): put(number, source).read_bytes() for number in range(kernels)}
    carried = bundles.export_bundle(str(out))
    bundles.import_bundle(str(out), sha256=carried.sha256, to=str(target))
    same = sum((target / name).read_bytes() == data for name, data in files.items())
    archives = hostile()
    refused, escaped, files_before = 0, 0, _everything(directory)
    for name, data in archives.items():
        bad = Path(directory, "bad.njc")
        bad.write_bytes(data)
        into = Path(directory, "into")
        try:
            with heard():
                bundles.import_bundle(str(bad), trust=True, to=str(into))
        except BundleError as error:
            refused += str(bad) in str(error)
        bad.unlink()
        outside = os.path.exists("/tmp/escaped")  # noqa: S108
        if outside or _everything(directory) != files_before:
            escaped += 1
            print(f"{name!r} left something behind")
    return {
        "kernels": kernels,
        "restored byte for byte": same,
        "archives": len(archives),
        "refused": refused,
        "escaped": escaped,
    }


def _everything(directory):
    return sorted(str(path) for path in Path(directory).rglob("*"))


def fuzz(times, seed=0):
    """Malformed files with the right checksum, so that every check behind it is reached."""
    generator = random.Random(seed)
    entry = toy(1, size=50)
    body = entries.encode(entry)[:-32]
    outcomes = {"refused": 0, "as it was": 0, "wrong": 0}
    for _ in range(times):
        data = bytearray(body)
        for _ in range(generator.choice((1, 1, 2, 8))):
            at = generator.randrange(len(data) if generator.random() < 0.5 else 60)
            what = generator.random()
            if what < 0.6:
                data[at] = generator.randrange(256)
            elif what < 0.8:
                data[at : at + generator.randrange(9)] = generator.randbytes(generator.randrange(9))
            else:
                data[at : at + 4] = generator.choice((b"\xff" * 4, bytes(4), b"[[[[", b'"}{"'))
        try:
            entries.read_meta(bytes(data))
            found = entries.decode(signed(bytes(data)), entry.key)
        except entries.Damaged:
            outcomes["refused"] += 1
        else:
            # who can write checksums can write code: what must not be is a crash or another key
            outcomes["as it was" if found.key == entry.key else "wrong"] += 1
    return outcomes
