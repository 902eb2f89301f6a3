"""CUDA kernels beside those of neurons: numbers as bits, statistics of batch norms, max pooling."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

from ..errors import SpecError, expect_known
from .spec import DTYPES, KernelSpec, _renderer


class _Helper(NamedTuple):
    """A kernel's template, and the sizes and lanes that it is made for."""

    template: str
    sizes: tuple[int, ...]
    lanes: tuple[int, ...]


HELPERS = {
    "pack": _Helper("bits.cu.j2", (1, 2, 4, 8), (32,)),  # size: the bits of a number
    "unpack": _Helper("bits.cu.j2", (1, 2, 4, 8), (32,)),
    "moments": _Helper("statistics.cu.j2", (1, 2, 4), (1, 2, 4, 8)),  # size: rows loaded together
    "statistics": _Helper("statistics.cu.j2", (1,), (1,)),
    "max_pool": _Helper("pooling.cu.j2", (2, 3), (1, 2, 4, 8)),  # size: of a window; channels_last
    "max_pool_back": _Helper("pooling.cu.j2", (2, 3), (1, 2, 4, 8)),
    "max_pool_rows": _Helper("pooling.cu.j2", (2, 3), (1, 2, 4)),  # rows of one channel
    "max_pool_rows_back": _Helper("pooling.cu.j2", (2, 3), (1, 2, 4)),
}


@dataclass(frozen=True)
class HelperSpec:
    """Everything that selects one of them. It has what the cache asks of a `KernelSpec`."""

    helper: str  # of HELPERS
    dtype: str  # of the numbers; sums are float32, or float64 for float64
    size: int
    lanes: int  # numbers handled by a thread

    target = "cuda"
    is_large = False

    def __post_init__(self) -> None:
        """Raise SpecError for all that no call would use."""
        expect_known(self.helper, HELPERS, "helper")
        expect_known(self.dtype, DTYPES, "dtype")
        row = HELPERS[self.helper]
        if self.size not in row.sizes or self.lanes not in row.lanes:
            raise SpecError(
                f"{self.helper} has the sizes {list(row.sizes)} and lanes {list(row.lanes)}, not"
                f" size={ascii(self.size)[:80]}, lanes={ascii(self.lanes)[:80]}"
            )

    @property
    def template(self) -> str:
        """The file that prints it."""
        return HELPERS[self.helper].template

    @property
    def symbol(self) -> str:
        """The readable, unique name."""
        return f"{self.helper}_{self.dtype}_s{self.size}_l{self.lanes}"

    @cached_property
    def request(self) -> str:
        """Digest of all that decides the rendered text."""
        text = json.dumps([asdict(self), _renderer()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


Spec = KernelSpec | HelperSpec
