"""Whole numbers of few bits, packed and unpacked: by kernels on a GPU, else by torch."""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from ..kernels.build import helper
from ..kernels.helpers import HelperSpec
from ..kernels.spec import NAMES

# by the bits of a number: the integer that has as many bytes as a byte has such numbers
_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16, 8: torch.uint8}
WIDTHS = tuple(_WORDS)
_pack_arguments = struct.Struct("@QQq").pack  # as templates/bits.cu.j2 has them


def pack_bits(flat: Tensor, width: int = 1) -> Tensor:
    """Numbers from 0 to 2**width - 1, as many a byte as it holds, the first of them lowest."""
    if flat.is_cuda:
        bits = flat.new_empty(-(-flat.numel() * width // 8), dtype=torch.uint8)
        if _ran(True, flat, bits, width):
            return bits
    # flat.ne(0) takes up to four times as long on a CPU
    whole = flat.bool().view(torch.uint8) if width == 1 else flat.to(torch.uint8)
    each = 8 // width
    if each == 1:
        return whole
    if len(whole) % each:
        whole = torch.nn.functional.pad(whole, (0, -len(whole) % each))
    # the product's highest byte has each number at its place, and no other sum reaches it
    gather = sum(1 << 8 * (each - 1 - i) + width * i for i in range(each))
    return whole.view(_WORDS[width]).mul_(gather).view(torch.uint8)[each - 1 :: each].contiguous()


def unpack_bits(bits: Tensor, dtype: torch.dtype, width: int = 1) -> Tensor:
    """The numbers that `pack_bits` packed, and those of its padding."""
    if bits.is_cuda:
        flat = bits.new_empty(bits.numel() * (8 // width), dtype=dtype)
        if _ran(False, flat, bits, width):
            return flat
    # made anew: what is kept could belong to a captured graph, or to another stream
    shift = torch.arange(0, 8, width, dtype=torch.uint8, device=bits.device)
    ones = (1 << width) - 1
    if bits.is_cuda:  # where looking rows of eight up takes fourteen times as long
        return (bits.unsqueeze(1) >> shift).bitwise_and_(ones).to(dtype).view(-1)
    byte = torch.arange(256, dtype=torch.uint8, device=bits.device)
    table = (byte.unsqueeze(1) >> shift).bitwise_and_(ones).to(dtype)
    return table.index_select(0, bits.int()).view(-1)


def _ran(pack: bool, flat: Tensor, bits: Tensor, width: int) -> bool:
    """Whether a kernel was queued that does it; it reads and writes whole words."""
    count = flat.numel()
    if not count or flat.dtype not in NAMES:
        return False
    numbers, packed = flat.data_ptr(), bits.data_ptr()
    if numbers & 15 or packed & (width - 1) or not flat.is_contiguous():
        return False
    kernel = helper(_spec(pack, NAMES[flat.dtype], width), flat.device.index)
    if kernel is None:
        return False
    kernel.launch(_pack_arguments(numbers, packed, count), kernel.grid(count, None), count, 1)
    return True


@cache
def _spec(pack: bool, dtype: str, width: int) -> HelperSpec:
    return HelperSpec("pack" if pack else "unpack", dtype, width, 32)
