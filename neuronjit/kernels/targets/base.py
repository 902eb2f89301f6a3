"""What a target is, and what all need: the shape of a kernel's work, a compiler's words."""

from __future__ import annotations

import os
import sys
import tempfile
from functools import cache
from typing import NamedTuple, Protocol

from ...language.functions import OPERATIONS
from ...language.tree import Node
from ...models.model import NeuronModel
from ...settings import debugging

# Compilers take longer than linearly for longer functions. A step counts its terms, and a function
# that is a page of code as many; GPU kernels contain it K times.
MOST_TERMS = 1000
_TERMS_OF_FUNCTION = 8


class Shape(NamedTuple):
    """How a kernel walks its work: the fields of a KernelSpec that follow from sizes alone."""

    interval: int  # K: steps between checkpoints
    lanes: int
    loads: int
    prefetch: bool = False
    whole: bool = False


class Channels(NamedTuple):
    """How parameters repeat: neuron n has those of channel n // inner % period."""

    inner: int
    period: int


class Grid(NamedTuple):
    """The pieces of a kernel's work."""

    blocks: int  # so many partial sums has the gradient of a parameter that all neurons share
    slices: int  # so many has that of a channel, where a kernel sums it


class Raw(NamedTuple):
    """A loaded kernel for those who launch it from C++."""

    function: int  # its address on the CPU, the driver's handle on a GPU
    threads: int  # of a block
    parallel: bool  # whether so much work is for several threads of the CPU


class Kernel(Protocol):
    """A loaded kernel."""

    def grid(self, n: int, channels: Channels | None, /) -> Grid:
        """Into how many pieces its work is cut; `channels` are those that it walks, if it does."""

    def launch(self, packed: bytes, grid: Grid, n: int, steps: int, /) -> None:
        """Run it, or queue it on the current stream. `packed` is its argument struct."""

    def raw(self, n: int, steps: int, /) -> Raw:
        """What `launch` knows, for so much work."""


class Target(Protocol):
    """What a module of this folder has: facts, and verbs."""

    BLOCK: int  # threads of a block
    KEEPS_RECIPROCALS: bool  # of parameters that states are divided by

    def walks_channels(self, n: int, channels: Channels, /) -> bool:
        """Whether kernels of n neurons, whose parameters repeat so, stay with their channels."""

    def why_unavailable(self) -> str | None:
        """What is missing for running kernels here, and how to get it; None where nothing is."""

    def arch(self, device: int = 0, /) -> str:
        """The architecture that kernels are compiled for on this device."""

    def serving(self, arch: str, /) -> list[str]:
        """The architectures whose kernels run on this one, the best first."""

    def check_arch(self, name: str, /, *, recorded: bool = False) -> str:
        """`name`, if kernels for it can be compiled. Raises SpecError."""

    def fingerprint(self, arch: str, /) -> dict[str, str]:
        """All that decides the binary besides the source. Raises BackendError."""

    def compile(self, source: str, symbol: str, arch: str, large: bool = False, /) -> bytes:
        """The binary. Raises CompileError with the compiler's words."""

    def measure(
        self, source: str, symbol: str, arch: str, large: bool = False, /
    ) -> dict[str, int]:
        """What the compiler made of it: bytes of "code", and what else it tells. As `compile`."""

    def check(self, binary: bytes, symbol: str, arch: str, /) -> str:
        """Why this cannot be the kernel's binary; "" if nothing is wrong with it."""

    def check_loadable(self, symbol: str, /) -> None:
        """Raise MissingKernelError where a kernel cannot be loaded now."""

    def load(self, binary: bytes, symbol: str, lanes: int, device: int, /) -> Kernel:
        """The loaded kernel. Raises BackendError."""

    def shape(
        self, direction: str, itemsize: int, model: NeuronModel, sequences: int, n: int, steps: int,
        aligned: bool, /,
    ) -> Shape:  # fmt: skip
        """How a kernel walks `n` neurons and `steps` time steps."""


def steps_between_checkpoints(steps: int, model: NeuronModel) -> int:
    """K: as many steps as registers hold, no more than there are; the same forward and backward.

    Fewer where a step is long. That is one limit for all T, so that of a longer T, too, K says how
    many checkpoints there are: a graph with a symbol for T relies on it.
    """
    k = 4 if steps <= 4 else 8 if steps <= 8 or len(model.state) > 2 else 16
    while k > 1 and k * terms_of(model) > MOST_TERMS:
        k //= 2
    return k


def is_long(model: NeuronModel) -> bool:
    """Whether a step of the model is so long that it does not stand in a kernel many times."""
    return terms_of(model) > MOST_TERMS // 8


@cache
def terms_of(model: NeuronModel) -> int:
    """Return how long a step of the model is: its states, and the terms of its statements."""
    return len(model.state) + sum(terms(s.expression) for s in model.statements)


def terms(tree: Node) -> int:
    """Return how many operations there are in a tree; a function that is a page of code is 8."""
    long = {op for op, operation in OPERATIONS.items() if operation.long}
    return sum(_TERMS_OF_FUNCTION if node.op in long else 1 for node in tree.walk())


def debug(line: str, source: str = "", suffix: str = "") -> None:
    """One line on stderr where NEURONJIT_DEBUG=1, and the place where the source was kept."""
    if debugging():
        kept = f"; source: {keep_source(source, suffix)}" if source else ""
        sys.stderr.write(f"neuronjit: {line}{kept}\n")


def first_lines(log: str, most: int = 40) -> str:
    """A compiler's words, short enough for an error."""
    lines = [line[:500] for line in log[:100_000].strip().splitlines()]
    more = [f"... {len(lines) - most} more lines"] if len(lines) > most else []
    return "\n".join(lines[:most] + more)


def keep_source(source: str, suffix: str) -> str:
    """Write a rendered source where its reader finds it; the path, or why there is none."""
    try:
        handle, path = tempfile.mkstemp(prefix="neuronjit-", suffix=suffix)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(source)
    except OSError as error:
        return f"(the source could not be kept: {error.strerror or error})"
    return path
