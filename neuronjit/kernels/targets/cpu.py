"""The CPU: compile with the host's C++ compiler, load from memory, run on torch's threads."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...cache.folders import Untrusted
from ...errors import BackendError, CompileError, SpecError, known
from ...models.model import NeuronModel
from ...settings import cxx
from . import scratch
from .base import (
    MOST_TERMS,
    Channels,
    Grid,
    Raw,
    Shape,
    debug,
    first_lines,
    keep_source,
    steps_between_checkpoints,
)
from .binary import SHARED, code_size, why_not_elf

BLOCK = 1  # a loop over neurons takes the place of threads
KEEPS_RECIPROCALS = False  # of parameters: a division is hidden behind the memory
# No contraction and no reordering: spikes are bit-identical to eager PyTorch's and to the GPU's.
# The last two flags only drop what the kernels do not use (errno, floating-point traps), so that
# loops vectorise.
FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=default", "-ffp-contract=off",
    "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
OPENMP = "-fopenmp"
# for large kernels, where -O3 takes minutes: loops still vectorise
LARGE = ("-O1", "-ftree-vectorize")
# neurons of one inner loop: whole vectors of any width, and rows long enough for the prefetchers
LANES = 64
_PARALLEL_FROM = 1 << 15  # neuron-steps below which waking threads costs more than it saves

# the x86-64 psABI's levels, with what compilers use of each (F16C in v3)
_X86_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
    "x86-64-v2": {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"},
    "x86-64": set[str](),
}
_MACHINES = {"aarch64": 183, "arm64": 183, "ppc64le": 21, "riscv64": 243, "loongarch64": 258}  # ELF
_VERSION_TIMEOUT_S = 20.0


def why_unavailable() -> str | None:
    """What is missing for compiling kernels here, and how to get it; None where nothing is."""
    try:
        compiler()
    except BackendError as error:
        return str(error)
    return None


def compiler() -> list[str]:
    """The command of the host compiler: $CXX, else g++ or clang++. Raises BackendError."""
    chosen = cxx()
    words, reason = _compiler(chosen, os.environ.get("PATH", os.defpath))
    if reason:
        raise BackendError(reason)
    return [*words]


@cache
def _compiler(chosen: str, path: str) -> tuple[tuple[str, ...], str]:
    """The command, or why there is none: both are remembered, because each call may ask."""
    for command in [chosen] if chosen else ["g++", "clang++"]:
        try:
            words = shlex.split(command)
        except ValueError as error:
            return (), f"CXX={ascii(command)[:200]} cannot be read as a command: {error}"
        found = shutil.which(words[0], path=path) if words else None
        if found:
            return (found, *words[1:]), ""
    looked = f"CXX={ascii(chosen)[:200]}" if chosen else "g++ and clang++"
    return (), (
        f"the cpu target needs a C++17 compiler; looked for {looked} on PATH. Install one"
        " (Debian: apt install g++; conda: conda install gxx), name it in CXX,"
        " or use backend='eager'"
    )


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


@cache
def arch(device: int = 0) -> str:
    """What kernels are compiled for here, e.g. "x86-64-v3": levels, so that hosts can share."""
    return next(name for name in _known() if _features(name) <= _cpu_flags())


def _known() -> list[str]:
    """The architectures of machines such as this one, the newest first."""
    machine = platform.machine().lower()
    return [*_X86_LEVELS] if machine in ("x86_64", "amd64") else [machine]


def _features(name: str) -> set[str]:
    """What a CPU needs for kernels of this architecture: a level includes those below it."""
    return set().union(*(_X86_LEVELS.get(level, ()) for level in serving(name)))


def serving(arch: str) -> list[str]:
    """The architectures whose kernels run on this one, the best first."""
    levels = [*_X86_LEVELS]
    return levels[levels.index(arch) :] if arch in levels else [arch]


def check_arch(name: str, *, recorded: bool = False) -> str:
    """`name` if kernels for it can be compiled here. Raises SpecError."""
    if name not in _known():
        raise SpecError(f"unknown CPU architecture {ascii(name)[:80]}. {known(_known())}")
    return name


@cache
def _version(command: tuple[str, ...]) -> str:
    try:
        with scratch.scratch() as folder:
            version, no_errors = [*command, "--version"], subprocess.DEVNULL
            code, words = scratch.run(version, folder, _VERSION_TIMEOUT_S, errors=no_errors)
    except (OSError, Untrusted) as error:
        reason = f"the C++ compiler {command[0]} does not answer --version: {error}"
        raise BackendError(reason) from None
    if code:
        said = first_lines(words)
        raise BackendError(f"the C++ compiler {command[0]} --version failed ({code}):\n{said}")
    return next(iter(words.splitlines()), "unknown")


def fingerprint(arch: str) -> dict[str, str]:
    """All that decides the binary besides the source. Raises BackendError without a compiler."""
    command = compiler()
    return {
        "target": "cpu",
        "arch": arch,
        "compiler": " ".join([_version(tuple(command)), *command[1:]]),
        "flags": " ".join([*FLAGS, OPENMP, f"large {MOST_TERMS}:", *LARGE]),
        "abi": " ".join([platform.system(), *platform.libc_ver()]),
    }


def compile(source: str, symbol: str, arch: str, large: bool = False) -> bytes:
    """A shared object. Raises CompileError with the compiler's words and the source's place."""
    march = [f"-march={arch}"] if arch.startswith("x86-64") else []
    options = [*FLAGS, *(LARGE if large else ()), *march]
    # without OpenMP's library the kernels run on one thread
    return shared_object(source, symbol, arch, [[*options, OPENMP], options], ["-lm"])


def shared_object(
    source: str, symbol: str, arch: str, ways: Sequence[Sequence[str]], libraries: Sequence[str]
) -> bytes:
    """What the compiler makes with the first of these options that does not lack OpenMP.

    Raises CompileError with the compiler's words and the source's place.
    """
    command, code, words, binary = compiler(), 0, "", b""
    try:
        with scratch.scratch() as folder:
            text = scratch.write(folder, "kernel.cpp", source.encode("ascii"))
            files = ["-o", os.path.join(folder.path, "kernel.so"), text, *libraries]
            for options in ways:
                command = [*compiler(), *options, *files]
                debug(f"{shlex.join(command)} ({symbol})", source, ".cpp")
                code, words = scratch.run(command, folder, scratch.TIMEOUT_S)
                if code == 0 or "openmp" not in words.lower():
                    break
            if code == 0:
                binary = scratch.read(folder, "kernel.so")
    except (OSError, Untrusted) as error:
        reason = f"the C++ compiler could not run: {error}\nkernel {symbol}"
        raise CompileError(reason) from None
    why = check(binary, symbol, arch) if code == 0 else ""
    if code or why:
        ended = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        what = f"the C++ compiler {ended}" if code else f"the C++ compiler gave no kernel: {why}"
        raise CompileError(
            f"{what}\nkernel {symbol}, source: {keep_source(source, '.cpp')}\n"
            f"{shlex.join(command)}\n{first_lines(words)}"
        )
    return binary


def measure(source: str, symbol: str, arch: str, large: bool = False) -> dict[str, int]:
    """Bytes of machine code: "code". Raises CompileError, BackendError as `compile`."""
    return {"code": code_size(compile(source, symbol, arch, large))}


def check(binary: bytes, symbol: str, arch: str) -> str:
    """Why this cannot be the kernel's shared object; "" if nothing is wrong with it."""
    if binary[:4] == b"\xcf\xfa\xed\xfe":  # Mach-O, whose loader checks it
        return ""
    machine = 62 if arch.startswith("x86-64") else _MACHINES.get(arch)
    return why_not_elf(binary, SHARED, machine, symbol)


class Kernel:
    """One loaded kernel."""

    def __init__(self, function: Any, lanes: int) -> None:
        self._function = function
        self._lanes = lanes

    def grid(self, n: int, channels: Channels | None) -> Grid:
        """Into how many pieces the work is cut; they do not follow channels."""
        return Grid(-(-n // self._lanes), 0)

    def launch(self, packed: bytes, grid: Grid, n: int, steps: int) -> None:
        """Run the kernel on torch's number of threads. `packed` is the argument struct."""
        threads = torch.get_num_threads() if _is_parallel(n, steps) and not forked else 1
        self._function(packed, threads)

    def raw(self, n: int, steps: int) -> Raw:
        """The function's address; threads after a fork (`forked`) are the caller's to avoid."""
        address = ctypes.cast(self._function, ctypes.c_void_p).value or 0
        return Raw(address, 1, _is_parallel(n, steps))


def _is_parallel(n: int, steps: int) -> bool:
    return n * steps >= _PARALLEL_FROM


def _is_fork() -> bool:
    """Whether this process was forked and runs no program of its own (PF_FORKNOEXEC)."""
    try:
        return bool(int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6]) & 0x40)
    except (OSError, ValueError, IndexError):  # not Linux
        return False


# GNU OpenMP's threads do not survive a fork, and waiting for them would never end. Its parent may
# have started them before this module was imported: torch does, from the same library.
forked = _is_fork()


def _after_fork() -> None:
    global forked
    forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_loads = itertools.count()


def check_loadable(symbol: str) -> None:
    """Libraries can be loaded at any time."""


def load(binary: bytes, symbol: str, lanes: int, device: int = 0) -> Kernel:
    """Load a shared object from the very bytes that were verified, through a sealed memory file.

    Raises BackendError where it is damaged, or a library that it needs is missing.
    """
    if why := check(binary, symbol, arch()):
        raise BackendError(f"a kernel cannot be loaded: {why}\nkernel {symbol}")
    try:
        function = getattr(dlopen(binary), symbol)
    except (OSError, AttributeError, Untrusted) as error:
        # built where there was OpenMP, and carried to where there is none
        raise BackendError(
            f"a kernel cannot be loaded: {error}. Install the library that it lacks (Debian:"
            f" apt install libgomp1), compile kernels here, or use backend='eager'\nkernel {symbol}"
        ) from None
    function.argtypes = [ctypes.c_char_p, ctypes.c_int]
    function.restype = None
    debug(f"loaded {symbol}")
    return Kernel(function, lanes)


def dlopen(binary: bytes) -> ctypes.CDLL:
    """Load a shared object from these bytes. Raises OSError, Untrusted."""
    if hasattr(os, "memfd_create"):
        try:
            descriptor = os.memfd_create("neuronjit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError:
            return _dlopen_file(binary)
        try:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(binary)
            _seal(descriptor)
            # glibc finds loaded libraries by path, and descriptors are used again: spell a path
            # that no earlier load had, writing its number in binary as /. and //, which both mean
            # "the same directory"
            number = next(_loads)
            spelling = "".join("/." if number >> bit & 1 else "//" for bit in range(24))
            return ctypes.CDLL(f"/proc/self/fd{spelling}/{descriptor}")
        except OSError:
            return _dlopen_file(binary)
        finally:
            os.close(descriptor)
    return _dlopen_file(binary)


def _seal(descriptor: int) -> None:
    import fcntl

    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)


def _dlopen_file(binary: bytes) -> ctypes.CDLL:
    """Where memory files cannot be run: a private file that lives as long as the call."""
    with scratch.scratch(executable=True) as folder:
        return ctypes.CDLL(scratch.write(folder, f"{os.getpid()}-{next(_loads)}.so", binary))


def walks_channels(n: int, channels: Channels) -> bool:
    """Never: a stretch of neurons reads its parameters once, and that is cheap here."""
    return False


def shape(
    direction: str,
    itemsize: int,
    model: NeuronModel,
    sequences: int,
    n: int,
    steps: int,
    aligned: bool,
) -> Shape:
    """How to walk the work; rows are loaded one by one, the CPU's own prefetchers look ahead."""
    return Shape(steps_between_checkpoints(steps, model), LANES, 1)
