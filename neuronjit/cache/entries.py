"""One kernel as one file: what is in it, how it is named, and how it is checked.

Layout: magic, schema, lengths, key | metadata (JSON) | source (zlib) | binary | SHA-256 over all
before it. One file, so that no two halves can be of different age; the key inside, so that a file
under another's name is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA = 1  # part of every key: raise it whenever the layout below changes
KEY = re.compile(r"[0-9a-f]{64}", re.ASCII)
HEAD = 16 << 10  # bytes: the header and all of the metadata lie within them
MAX_ENTRY = 64 << 20  # bytes of a file; nothing larger is ever read
_MAX_SOURCE = 16 << 20  # bytes once unpacked
_MAGIC = b"neuronjt"
_HEADER = struct.Struct("<8sIIIQ32s")  # magic, schema, sizes of metadata, source and binary, key
_DIGEST = 32


class Damaged(Exception):
    """The bytes are not those that were written."""


class Stale(Damaged):
    """Whole, but of another schema."""


@dataclass(frozen=True)
class Entry:
    """One kernel. `meta` is JSON; its "request" and "fingerprint" make up the key."""

    key: str
    meta: dict[str, Any]
    source: str
    binary: bytes


def make_key(request: str, fingerprint: Mapping[str, str]) -> str:
    """The name, 64 hex digits, of the kernel that this toolchain makes of this request."""
    text = json.dumps([SCHEMA, request, dict(fingerprint)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(meta: Mapping[str, Any]) -> str:
    """The key that metadata stands for; raises ValueError where it stands for none."""
    request, fingerprint = meta.get("request"), meta.get("fingerprint")
    if not isinstance(request, str) or not isinstance(fingerprint, Mapping):
        raise ValueError('its metadata lacks "request" or "fingerprint"')
    return make_key(request, fingerprint)


def encode(entry: Entry) -> bytes:
    """The file's bytes; raises ValueError for an entry that could not be read back."""
    meta = json.dumps(entry.meta, sort_keys=True).encode()
    text = entry.source.encode()
    source = zlib.compress(text)
    sizes = len(meta), len(source), len(entry.binary)
    head = _HEADER.pack(_MAGIC, SCHEMA, *sizes, bytes.fromhex(entry.key)) + meta
    if len(head) > HEAD or len(text) >= _MAX_SOURCE or sum(sizes) >= MAX_ENTRY - HEAD:
        raise ValueError(f"metadata, packed source and binary are too large: {sizes} bytes")
    body = head + source + entry.binary
    return body + hashlib.sha256(body).digest()


def decode(data: bytes, name: str) -> Entry:
    """The entry in a file called `name`; raises Damaged unless every byte of it is right."""
    body = memoryview(data)[:-_DIGEST]
    if hashlib.sha256(body).digest() != data[-_DIGEST:]:
        raise Damaged("its checksum does not fit")
    meta = read_meta(data)
    _, _, meta_size, source_size, binary_size, key = _HEADER.unpack_from(data)
    at = _HEADER.size + meta_size
    if len(body) != at + source_size + binary_size:
        raise Damaged("its lengths do not add up")
    unpack = zlib.decompressobj()
    try:
        if not name == key.hex() == key_of(meta):
            raise Damaged("it holds another kernel than its name says")
        source = unpack.decompress(body[at : at + source_size], _MAX_SOURCE).decode()
    except (ValueError, TypeError, RecursionError, zlib.error) as error:
        raise Damaged(f"it cannot be read: {error}") from None
    if not unpack.eof:
        raise Damaged("its source is cut short or too large")
    return Entry(name, meta, source, bytes(body[at + source_size :]))


def read_meta(data: bytes) -> dict[str, Any]:
    """The metadata alone, not verified, from a file's first HEAD bytes: for lists and choices."""
    if len(data) < _HEADER.size:
        raise Damaged("it is cut short")
    magic, schema, size, *_ = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise Damaged("it is no kernel")
    if schema != SCHEMA:
        raise Stale(f"it has schema {schema}, this version has {SCHEMA}")
    try:
        meta = json.loads(data[_HEADER.size : _HEADER.size + min(size, HEAD)])
    except (ValueError, RecursionError):  # RecursionError: ten thousand brackets
        meta = None
    if not isinstance(meta, dict):
        raise Damaged("its metadata is no JSON object")
    return meta
