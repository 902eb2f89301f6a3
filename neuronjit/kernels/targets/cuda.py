"""CUDA: compile with CuPy's NVRTC binding, load cubins from memory, launch on torch's stream.

NVRTC needs no GPU and no driver, so kernels for any GPU can be compiled anywhere.
"""

from __future__ import annotations

import ctypes
import re
import threading
from functools import cache
from typing import Any

import torch

from ...errors import BackendError, CompileError, MissingKernelError, SpecError, known
from ...models.model import NeuronModel
from ...torch_private import current_device, current_raw_stream
from .base import (
    MOST_TERMS,
    Channels,
    Grid,
    Raw,
    Shape,
    debug,
    first_lines,
    is_long,
    keep_source,
    steps_between_checkpoints,
    terms_of,
)
from .binary import CUBIN, CUDA, code_size, cubin_arch, why_not_elf, why_not_ptx

BLOCK = 128  # threads; small, so that short rows still spread over all multiprocessors
MULTIPROCESSORS = 132  # of an H100, where the shapes of kernels were measured
# below so many threads the next rows are loaded ahead (backward FEW, forward VERY_FEW); with fewer
# than VERY_FEW left, threads are not made wider
FEW, VERY_FEW = 1024 * MULTIPROCESSORS, 512 * MULTIPROCESSORS
TERMS_OF_FOUR = 400  # of K steps in backward: with more, four lanes take too many registers
KEEPS_RECIPROCALS = True  # of parameters: a division takes ten times as long as a product
# --fmad=false and IEEE division keep spikes bit-identical to the CPU's; kernels wait for memory,
# not for these.
FLAGS = ("--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")
LARGE = ("--define-macro=LARGE_",)  # functions that are a page of code are called, not inlined


def why_unavailable() -> str | None:
    """What is missing for launching kernels here, and how to get it; None where nothing is."""
    try:
        _nvrtc()
    except BackendError as error:
        return str(error)
    if torch.cuda.is_available():
        return None
    return "torch finds no CUDA device (torch.cuda.is_available() is False)"


@cache
def _nvrtc() -> Any:
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # CuPy fails in many ways where libraries are missing
        raise BackendError(
            f"the cuda target needs CuPy with NVRTC ({type(error).__name__}: {error}). Install it"
            " with pip install 'neuronjit[cuda12]', or [cuda13] for CUDA 13"
        ) from None
    return nvrtc


@cache
def arch(device: int = 0) -> str:
    """The device's architecture, e.g. "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def serving(arch: str) -> list[str]:
    """The architectures whose cubins run on this one, the best first: minors up to its own."""
    if not arch[-1].isdigit():  # sm_90a runs on that alone
        return [arch]
    return [f"{arch[:-1]}{minor}" for minor in range(int(arch[-1]), -1, -1)]


def check_arch(name: str, *, recorded: bool = False) -> str:
    """`name` if it is an architecture, such as sm_90, that NVRTC knows. Raises SpecError.

    `recorded`: by a run on such a GPU, which may be newer than NVRTC (and than this one).
    """
    try:
        numbers = [int(number) for number in _nvrtc().getSupportedArchs()]
    except BackendError:  # which the compiler's user will hear of
        numbers = []
    named = re.fullmatch(r"sm_(\d{2,3})[af]?", name, re.ASCII)
    if not named or (numbers and int(named[1]) not in numbers and not recorded):
        expected = known(f"sm_{number:03}" for number in numbers).replace("sm_0", "sm_")
        expected = expected if numbers else "Expected sm_75, sm_80, sm_90, ..."
        raise SpecError(f"unknown CUDA architecture {ascii(name)[:80]}. {expected}")
    return name


def fingerprint(arch: str) -> dict[str, str]:
    """All that decides the binary besides the source. Raises BackendError without NVRTC."""
    nvrtc = "nvrtc " + ".".join(map(str, _nvrtc().getVersion()))
    flags = " ".join([*FLAGS, f"large {MOST_TERMS}:", *LARGE])
    return {"target": "cuda", "arch": arch, "compiler": nvrtc, "flags": flags}


def compile(source: str, symbol: str, arch: str, large: bool = False) -> bytes:
    """A cubin for `arch`; from an NVRTC older than the GPU, PTX for the newest one it knows.

    Raises CompileError with the compiler's words and the place of the source.
    """
    return _compiled(source, symbol, arch, large)[0]


VERBOSE = "--ptxas-options=-v"  # tells what `usage` reads


def measure(source: str, symbol: str, arch: str, large: bool = False) -> dict[str, int]:
    """Bytes of machine code and `usage`; nothing of PTX, of which the driver makes the code.

    Raises CompileError, BackendError as `compile`.
    """
    binary, log = _compiled(source, symbol, arch, large, VERBOSE)
    return {"code": code_size(binary), **usage(log)} if binary[:4] == b"\x7fELF" else {}


def usage(log: str) -> dict[str, int]:
    """From what ptxas said: registers of a thread, and bytes that it keeps in memory instead."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    local = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    spilled = max(int(n) for found in local for n in found)
    return {"registers": max(registers), "spilled": spilled}


def _compiled(source: str, symbol: str, arch: str, large: bool, *more: str) -> tuple[bytes, str]:
    """The binary, and what the compiler said."""
    nvrtc = _nvrtc()
    newest = max(nvrtc.getSupportedArchs())
    as_ptx = _number(arch) > newest
    options = [f"--gpu-architecture={f'compute_{newest}' if as_ptx else arch}", *FLAGS, *more]
    options += LARGE if large else ()
    debug(f"nvrtc {' '.join(options)} {symbol}.cu", source, ".cu")
    program = nvrtc.createProgram(source, f"{symbol}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        made = nvrtc.getPTX(program) if as_ptx else nvrtc.getCUBIN(program)
        said = nvrtc.getProgramLog(program) if more else ""
    except nvrtc.NVRTCError as error:
        log = first_lines(nvrtc.getProgramLog(program))
        raise CompileError(
            f"NVRTC failed ({error})\nkernel {symbol}, source: {keep_source(source, '.cu')}\n"
            f"{' '.join(options)}\n{log}"
        ) from None
    finally:
        nvrtc.destroyProgram(program)
    binary = made.encode("ascii") if isinstance(made, str) else bytes(made)  # text in older CuPy
    if check(binary, symbol, arch):  # CuPy drops the last byte, a zero, of texts and of cubins too
        binary += b"\0"
    if why := check(binary, symbol, arch):
        raise CompileError(f"NVRTC gave no kernel: {why}\nkernel {symbol}\n{' '.join(options)}")
    return binary, said


def check(binary: bytes, symbol: str, arch: str) -> str:
    """Why this cannot be the kernel's cubin (or PTX) on `arch`; "" if nothing is wrong with it."""
    if binary[:4] != b"\x7fELF":
        return why_not_ptx(binary, symbol)
    why = why_not_elf(binary, CUBIN, CUDA, symbol)
    runs = {_number(other) for other in serving(arch)}
    if not why and (number := cubin_arch(binary)) not in runs:
        return f"it is for sm_{number}, not {arch}"
    return why


def _number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


class _Contexts(threading.local):
    """The devices whose context this thread has: autograd's threads start with none."""

    def __init__(self) -> None:
        self.devices: set[int] = set()

    def enter(self, device: int) -> None:
        from cupy_backends.cuda.api import runtime

        runtime.setDevice(device)  # the device that is current already; this makes its context so
        self.devices.add(device)


_contexts = _Contexts()


class Kernel:
    """One loaded kernel on one device. Never unloaded: a launch may be queued, or in a graph."""

    def __init__(self, function: int, lanes: int, wave: int, device: int, launch: Any) -> None:
        """`wave`: blocks that the device runs at once."""
        self._function = function
        self._lanes = lanes
        self._wave = wave
        self._device = device
        self._launch = launch

    def grid(self, n: int, channels: Channels | None) -> Grid:
        """How many blocks there are; with `channels`, each walks some neurons of its channels.

        As many of those as run at once: a block reads its parameters and adds up its sums once,
        however long it walks. Where a wave cannot be shared out evenly, several of them.
        """
        if channels is None:
            return Grid(-(-n // (self._lanes * BLOCK)), 0)
        inner, period = channels
        if inner > 1:  # a channel a block
            tiles, work = period, -(-(n // period) // (self._lanes * BLOCK))
        else:  # some channels next to each other a block, and some rows of them
            columns = period // self._lanes
            tiles = -(-columns // BLOCK)
            work = -(-(n // period) // (BLOCK // -(-columns // tiles)))
        most = self._wave if self._wave >= 4 * tiles else 4 * self._wave
        turns = -(-work // max(most // tiles, 1))  # of a thread
        slices = -(-work // turns)
        return Grid(tiles * slices, slices)

    def launch(self, packed: bytes, grid: Grid, n: int, steps: int) -> None:
        """Queue the kernel on torch's current stream of its device; `packed` is its argument."""
        device = self._device
        if current_device() != device:
            with torch.cuda.device(device):
                return self.launch(packed, grid, n, steps)
        if device not in _contexts.devices:
            _contexts.enter(device)
        pointer = (ctypes.c_char_p * 1)(packed)  # the driver copies what this points to
        self._launch(
            self._function, grid.blocks, 1, 1, BLOCK, 1, 1, 0,
            current_raw_stream(device), ctypes.addressof(pointer), 0,
        )  # fmt: skip

    def raw(self, n: int, steps: int) -> Raw:
        """The driver's handle."""
        return Raw(self._function, BLOCK, False)


def check_loadable(symbol: str) -> None:
    """Raise MissingKernelError while a CUDA graph is captured: loading would end the capture."""
    if torch.cuda.is_current_stream_capturing():
        raise MissingKernelError(
            f"{symbol} is not loaded yet, and cannot be while a CUDA graph is captured. Run the"
            " same call once before the capture (`neuronjit-cache prebuild` spares the compiling)"
        )


def load(binary: bytes, symbol: str, lanes: int, device: int) -> Kernel:
    """Load a cubin (or PTX) into the context of `device`, from memory.

    Raises BackendError where it is damaged, or the driver refuses it.
    """
    from cupy_backends.cuda.api import driver

    if why := check(binary, symbol, arch(device)):
        raise BackendError(f"a kernel cannot be loaded: {why}\nkernel {symbol}")
    try:
        with torch.cuda.device(device):
            _contexts.enter(device)
            module = driver.moduleLoadData(binary)
            function = driver.moduleGetFunction(module, symbol)
            spilled = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function)
            registers = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_NUM_REGS, function)
            at_once = driver.occupancyMaxActiveBlocksPerMultiprocessor(function, BLOCK, 0)
    except driver.CUDADriverError as error:
        raise BackendError(f"a kernel cannot be loaded: {error}\nkernel {symbol}") from None
    debug(f"loaded {symbol} on cuda:{device}: {registers} registers, {spilled} bytes spilled")
    wave = at_once * torch.cuda.get_device_properties(device).multi_processor_count
    return Kernel(function, lanes, wave, device, driver.launchKernel)


def walks_channels(n: int, channels: Channels) -> bool:
    """Whether a channel has work for a block, or channels lie next to each other."""
    of_one = n // channels.period
    return of_one > 1 and (channels.inner == 1 or of_one >= 2 * BLOCK)


def shape(
    direction: str,
    itemsize: int,
    model: NeuronModel,
    sequences: int,
    n: int,
    steps: int,
    aligned: bool,
) -> Shape:
    """Lanes, checkpoint distance and loads in flight for `n` neurons and `steps` time steps.

    Measured on an H100: wide accesses pay while there are enough threads to fill the device; with
    few threads and long chains the next rows must be on their way before the current ones are used
    (forward, that pays below half as many). Four lanes leave no registers for rows ahead, and
    backward waits for instructions: those for any number of steps are spared where there are K.
    """
    k = steps_between_checkpoints(steps, model)
    if is_long(model):
        return Shape(k, 1, 1)
    widest = max(min(8 // itemsize, 4 // len(model.state)), 1)
    much = direction == "backward" and k * terms_of(model) > TERMS_OF_FOUR
    if sequences + len(model.inputs) - 1 > 1 and (much or k > 4):
        widest = 1  # many rows of several sequences at once want all registers
    elif much:
        widest = min(widest, 2)
    lanes = 1
    while lanes < widest and aligned and n % (lanes * 2) == 0 and n // (lanes * 2) >= VERY_FEW:
        lanes *= 2
    few, very_few = n // lanes < FEW, n // lanes < VERY_FEW
    if direction == "forward":
        return Shape(k, lanes, k if few else min(k, 8), steps > k and very_few)
    return Shape(k, lanes, k, steps > k and few and lanes <= 2, steps == k and lanes > 2)
