"""What a compiled kernel must look like: complete, for the right machine, with its symbol.

Loaders map files without reading them, so a shared object that is cut short ends the process
(SIGBUS) when its missing part is first used. Nothing is loaded or published before `why_not_elf`
or `why_not_ptx` finds no fault with it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

SHARED, CUBIN = 3, 2  # e_type: ET_DYN, ET_EXEC
CUDA = 190  # e_machine
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMBOLS = (2, 11)  # SHT_SYMTAB, SHT_DYNSYM
_WITHOUT_BYTES = (0, 8)  # SHT_NULL, SHT_NOBITS
_FUNCTION = 2  # STT_FUNC


def why_not_elf(data: bytes, kind: int, machine: int | None, symbol: str) -> str:
    """Why these bytes are no whole ELF file with this function; "" if nothing is wrong."""
    try:
        return _why_not_elf(data, kind, machine, symbol.encode("ascii"))
    except (struct.error, OverflowError):  # OverflowError: an offset beyond all memory
        return f"it is cut short, at {len(data)} bytes"


def _why_not_elf(data: bytes, kind: int, machine: int | None, symbol: bytes) -> str:
    if not data:
        return "it is empty"
    if data[:6] != b"\x7fELF\2\1":
        return "it is no 64-bit ELF file"
    header = _HEADER.unpack_from(data)
    found, built_for, segments_at, sections_at = header[1], header[2], header[5], header[6]
    segment_size, segments, section_size, sections = header[9:13]
    if found != kind:
        return f"it is an ELF file of type {found}, not {kind} (an object file is 1)"
    if machine not in (None, built_for):
        return f"it is for machine {built_for}, not {machine}"
    if (segment_size, section_size) != (_SEGMENT.size, _SECTION.size) or not segments:
        return "its headers are damaged"
    for i in range(segments):
        _, _, offset, _, _, size, _, _ = _SEGMENT.unpack_from(data, segments_at + i * segment_size)
        if offset + size > len(data):
            return f"it is cut short: {len(data)} bytes, where a segment ends at {offset + size}"
    rows = [_SECTION.unpack_from(data, sections_at + i * section_size) for i in range(sections)]
    for _, what, _, _, offset, size, *_ in rows:
        if what not in _WITHOUT_BYTES and offset + size > len(data):
            return f"it is cut short: {len(data)} bytes, where a section ends at {offset + size}"
    for _, what, _, _, offset, size, link, *_ in rows:
        if what in _SYMBOLS and link < sections:
            names = data[rows[link][4] : rows[link][4] + rows[link][5]]
            for at in range(offset, offset + size, _SYMBOL.size):
                name, info, _, section, _, _ = _SYMBOL.unpack_from(data, at)
                defined = section and info & 15 == _FUNCTION
                if defined and names[name : name + len(symbol) + 1] == symbol + b"\0":
                    return ""
    return f"it has no function {symbol.decode()}"


def sections(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and contents of each section of an ELF file whose header is whole."""
    header = _HEADER.unpack_from(data)
    start, count, names = header[6], header[12], header[13]
    rows = [_SECTION.unpack_from(data, start + i * _SECTION.size) for i in range(count)]
    for name, kind, _, _, offset, size, *_ in rows:
        at = rows[names][4] + name
        contents = b"" if kind in _WITHOUT_BYTES else data[offset : offset + size]
        yield data[at : data.index(b"\0", at)].decode(), contents


def code_size(data: bytes) -> int:
    """Bytes of instructions in an ELF file; 0 for any other (Mach-O)."""
    if data[:4] != b"\x7fELF":
        return 0
    return sum(len(held) for name, held in sections(data) if re.match(r"\.text\b", name))


def cubin_arch(data: bytes) -> int:
    """The number of the architecture that a cubin (whose header is whole) was compiled for."""
    flags = int(_HEADER.unpack_from(data)[7])
    return (flags >> 8 if data[8] >= 8 else flags) & 0xFF  # moved with ABI version 8, CUDA 13


def why_not_ptx(data: bytes, symbol: str) -> str:
    """Why this is no whole PTX text with this kernel; "" if nothing is wrong."""
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        return "it is no PTX text"
    if not re.search(r"^\.version ", text, re.MULTILINE):
        return "it is no PTX text"
    if not text.endswith("\0") or not text.rstrip("\0\n ").endswith("}"):
        return f"it is cut short, at {len(data)} bytes"
    if not re.search(rf"\.entry\s+{re.escape(symbol)}\s*\(", text):
        return f"it has no kernel {symbol}"
    return ""
