"""From a spec to a loaded kernel: from memory, else from the on-disk cache, else compiled."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

from . import cache, manifest, source, targets
from .errors import BackendError, MissingKernelError
from .rendering import render_specs
from .source import KernelSpec

_kernels: dict[tuple[KernelSpec, int], Any] = {}
_lock = threading.Lock()
_counts = {"compiled": 0, "loaded": 0}


def stats() -> dict[str, int]:
    """How many kernels this process compiled, and how many it loaded from the on-disk cache."""
    return dict(_counts)


def load_kernel(spec: KernelSpec, device: int = 0) -> Any:
    """The kernel of `spec` on CUDA device `device` (ignored on the CPU), ready to launch.

    Raises:
        CompileError: the compiler refused the source.
        BackendError: there is neither a cached binary nor a compiler.
        MissingKernelError: NEURONJIT_NO_COMPILE=1 and the kernel is in no cache; or a CUDA graph
            is being captured, which loading would end.
    """
    key = (spec, device if spec.target == "cuda" else 0)
    kernel = _kernels.get(key)
    if kernel is None:
        target = targets.by_name(spec.target)
        arch = target.arch(key[1])
        manifest.record(spec, arch)  # also what turns out to be missing: that is to be shipped
        target.check_loadable(spec.symbol)  # before the compiler goes to work
        entry = build(spec, arch)
        kernel = _kernels.setdefault(
            key, target.load(entry.binary, spec.symbol, spec.lanes, key[1])
        )
    return kernel


def build(spec: KernelSpec, arch: str) -> cache.Entry:
    """The cache's entry for `spec` on `arch`, compiled if it is not there. Needs no device."""
    target = targets.by_name(spec.target)
    compiled = False

    def compile_now() -> cache.Entry:
        nonlocal compiled
        compiled = True
        text = render_specs([spec])
        binary = target.compile(text, spec.symbol, arch)
        return cache.Entry(key, _meta(spec, arch, fingerprint), text, binary)

    key, lacking = "", "NEURONJIT_NO_COMPILE is set."
    try:
        fingerprint = target.fingerprint(arch)
        key = cache.make_key(spec.request, fingerprint)
    except BackendError as error:
        lacking = str(error)
    entry: cache.Entry | None
    if key and not no_compile():
        entry = cache.load_or_build(key, compile_now)
    else:  # any compiler's binary of the very same source will do, and any that runs here
        entry = (cache.load(key) if key else None) or _find(spec, arch)
        if entry is None:
            missing = MissingKernelError if no_compile() else BackendError
            raise missing(f"{lacking}\n{_missing(spec, arch)}")
    with _lock:
        _counts["compiled" if compiled else "loaded"] += 1
    return entry


def _find(spec: KernelSpec, arch: str) -> cache.Entry | None:
    archs = targets.by_name(spec.target).serving(arch)
    found = (cache.find(spec.request, spec.target, other) for other in archs)
    return next(filter(None, found), None)


def no_compile() -> bool:
    """Whether NEURONJIT_NO_COMPILE forbids compiling."""
    return os.environ.get("NEURONJIT_NO_COMPILE", "0") not in ("", "0")


def version() -> str:
    """The library's version, and a digest of all that renders: what makes an older kernel stale."""
    package = sys.modules[__name__.partition(".")[0]]
    return f"{package.__version__}+{source._renderer()[:12]}"


def _missing(spec: KernelSpec, arch: str) -> str:
    return (
        f"No cache holds kernel {spec.symbol} (target {spec.target}, {arch}). Where there is a"
        f" compiler, run: {manifest.command(spec, arch)}"
    )


def _meta(spec: KernelSpec, arch: str, fingerprint: dict[str, str]) -> dict[str, Any]:
    return {
        "spec": spec.symbol,
        "symbol": spec.symbol,
        "request": spec.request,
        "target": spec.target,
        "arch": arch,
        "fingerprint": fingerprint,
        "versions": {"neuronjit": version()},
        "model": spec.model.name,
        "direction": spec.direction,
        "dtype": spec.dtype,
        "reset": spec.reset,
        "surrogate": spec.surrogate.name if spec.surrogate else None,
    }
