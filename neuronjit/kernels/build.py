"""From a spec to a loaded kernel: from memory, else from the on-disk cache, else compiled."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from ..cache import store
from ..cache.folders import Untrusted
from ..errors import BackendError, CompileError, MissingKernelError
from ..settings import no_compile
from ..torch_private import capturing
from . import manifest, spec, targets
from .helpers import HelperSpec, Spec
from .render import render_helper, render_specs
from .targets import TARGETS
from .targets.base import Kernel, Target, debug

if TYPE_CHECKING:  # each module is a target: so mypy compares its functions with them
    from .targets import cpu, cuda

    _targets: list[Target] = [cpu, cuda]

TELL_AFTER_S = 5.0  # of compiling
Used = TypeVar("Used")
_log = logging.getLogger("neuronjit")
_kernels: dict[tuple[Spec, int], Kernel] = {}
_helpers: dict[tuple[HelperSpec, int], Kernel | None] = {}
_lock = threading.Lock()
_counts = {"compiled": 0, "loaded": 0}


def stats() -> dict[str, int]:
    """How many kernels this process compiled, and how many it loaded from the on-disk cache."""
    return dict(_counts)


def load_kernel(spec: Spec, device: int = 0) -> Kernel:
    """The kernel of `spec` on CUDA device `device` (ignored on the CPU), ready to launch.

    Raises:
        CompileError: the compiler refused the source, or could not do its work.
        BackendError: there is neither a cached binary nor a compiler, or it cannot be loaded.
        MissingKernelError: NEURONJIT_NO_COMPILE=1 and the kernel is in no cache; or a CUDA graph
            is being captured, which loading would end.
    """
    key = (spec, device if spec.target == "cuda" else 0)
    kernel = _kernels.get(key)
    if kernel is None:
        with _troubles_named(spec):
            target = targets.by_name(spec.target)
            arch = target.arch(key[1])
            manifest.record(spec, arch)  # also what turns out to be missing: that is to be shipped
            target.check_loadable(spec.symbol)  # before the compiler goes to work

            def load(binary: bytes) -> Kernel:
                return target.load(binary, spec.symbol, spec.lanes, key[1])

            kernel = _kernels.setdefault(key, _obtain(spec, arch, load)[1])
    return kernel


def helper(spec: HelperSpec, device: int) -> Kernel | None:
    """The kernel, or None where there is none to be had, and torch's operations do its work."""
    key = spec, device
    if key not in _helpers:
        try:
            _helpers[key] = load_kernel(spec, device)
        except (BackendError, CompileError, MissingKernelError, Untrusted) as error:
            if isinstance(error, MissingKernelError) and capturing():
                return None  # a graph is being captured, which loading would end: the next call may
            debug(f"torch's operations take the place of a kernel: {error}")
            _helpers[key] = None
    return _helpers[key]


def entry(spec: Spec, arch: str) -> store.Entry:
    """The cache's entry for `spec` on `arch`, compiled if it is not there. Needs no device."""
    with _troubles_named(spec):
        target = targets.by_name(spec.target)

        def check(binary: bytes) -> None:
            if why := target.check(binary, spec.symbol, arch):
                raise BackendError(why)

        return _obtain(spec, arch, check)[0]


@contextmanager
def _troubles_named(spec: Spec) -> Iterator[None]:
    """BackendError for what the machine lacks (memory, descriptors, disk): `auto` goes on without.

    Much of the standard library and of our own stands below, and may need a file.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError) as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise BackendError(f"this machine gives no kernel: {what}\nkernel {spec.symbol}") from error


def _obtain(spec: Spec, arch: str, use: Callable[[bytes], Used]) -> tuple[store.Entry, Used]:
    """The entry and what `use` makes of its binary; compiled where there is none that it takes.

    Only what `use` has taken is published: it raises BackendError for a binary that is none.
    """
    target = targets.by_name(spec.target)
    compiled = False
    used: list[Used] = []  # at most one

    def why_not(entry: store.Entry) -> str:
        try:
            used[:] = [use(entry.binary)]
        except BackendError as error:
            return str(error).partition("\n")[0]
        return ""

    def compile_now() -> store.Entry:
        nonlocal compiled
        compiled = True
        text = render_helper(spec) if isinstance(spec, HelperSpec) else render_specs([spec])
        with told(f"kernel {spec.symbol}"):
            binary = target.compile(text, spec.symbol, arch, spec.is_large)
        used[:] = [use(binary)]
        return store.Entry(key, _meta(spec, arch, fingerprint), text, binary)

    key, lacking = "", "NEURONJIT_NO_COMPILE is set."
    try:
        fingerprint = target.fingerprint(arch)
        key = store.make_key(spec.request, fingerprint)
    except BackendError as error:
        lacking = str(error)
    entry: store.Entry | None
    if key and not no_compile():
        entry = store.load_or_make(key, compile_now, why_not)
    else:  # any compiler's binary of the very same source will do, and any that runs here
        entry = (store.load(key) if key else None) or _find(spec, arch)
        if entry is None:
            missing = MissingKernelError if no_compile() else BackendError
            what = f"No cache holds kernel {spec.symbol} (target {spec.target}, {arch})."
            cure = f"Where there is a compiler, run: {manifest.command(spec, arch)}"
            raise missing(f"{lacking}\n{what} {cure}")
    result = used[0] if used else use(entry.binary)
    with _lock:
        _counts["compiled" if compiled else "loaded"] += 1
    return entry, result


def other_entry(
    request: str,
    symbol: str,
    fingerprint: Callable[[], dict[str, str]],
    place: tuple[str, str],
    compile: Callable[[], tuple[str, bytes]],
    check: Callable[[bytes], str],
    cure: str,
) -> store.Entry:
    """The cache's entry for what is no kernel, compiled if it is not there.

    Args:
        request: what decides the source.
        fingerprint: of the toolchain. Raises BackendError where there is none.
        place: target and architecture.
        compile: source and binary.
        check: why a binary is not what was asked for; "" if it is.
        cure: what gets one where there is no compiler.

    Raises:
        BackendError: there is neither an entry nor a compiler; CompileError: it failed.
    """
    target, arch = place

    def compile_now() -> store.Entry:
        with told(symbol):
            source, binary = compile()
        meta = {
            "symbol": symbol, "request": request, "target": target, "arch": arch,
            "fingerprint": toolchain, "versions": {"neuronjit": version()},
        }  # fmt: skip
        return store.Entry(key, meta, source, binary)

    lacking = "NEURONJIT_NO_COMPILE is set"
    try:
        toolchain = fingerprint()
        key = store.make_key(request, toolchain)
        if not no_compile():
            return store.load_or_make(key, compile_now, lambda found: check(found.binary))
    except BackendError as error:  # there is no compiler
        lacking = str(error)
    found = store.find(request, target, arch)
    if found is None:
        raise BackendError(f"{lacking}; no cache holds it, and {cure}")
    return found


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say so where compiling takes long: somebody waits."""
    text = "compiling %s takes more than %.0f s; it is done once, and kept in the cache"
    timer = threading.Timer(TELL_AFTER_S, _log.warning, (text, what, TELL_AFTER_S))
    timer.daemon = True
    with suppress(RuntimeError):  # no more threads
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _find(spec: Spec, arch: str) -> store.Entry | None:
    archs = targets.by_name(spec.target).serving(arch)
    found = (store.find(spec.request, spec.target, other) for other in archs)
    return next(filter(None, found), None)


def why_no_kernel(meta: Mapping[str, Any], binary: bytes) -> str:
    """What its target says against the binary of a cached entry; "" if nothing."""
    made_by, symbol = meta["fingerprint"], str(meta.get("symbol"))  # decoding has seen to it
    target, arch = made_by.get("target"), str(made_by.get("arch"))
    if target not in TARGETS:
        return ""  # of a version that knows more of them
    return str(targets.by_name(target).check(binary, symbol, arch))


def version() -> str:
    """The library's version, and a digest of all that renders: what makes an older kernel stale."""
    package = sys.modules[__name__.partition(".")[0]]
    return f"{package.__version__}+{spec._renderer()[:12]}"


def _meta(spec: Spec, arch: str, fingerprint: dict[str, str]) -> dict[str, Any]:
    meta = {
        "symbol": spec.symbol,
        "request": spec.request,
        "target": spec.target,
        "arch": arch,
        "fingerprint": fingerprint,
        "versions": {"neuronjit": version()},
        "dtype": spec.dtype,
    }
    if isinstance(spec, HelperSpec):
        return meta
    surrogate = spec.surrogate.name if spec.surrogate else None
    own = {"direction": spec.direction, "reset": spec.reset, "surrogate": surrogate}
    return {**meta, "model": spec.model.name, **own}
