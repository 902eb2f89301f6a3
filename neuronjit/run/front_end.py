"""The compiled front end: a warm call of a KernelPlan in C++, from the tensors to autograd's node.

NEURONJIT_FRONT_END=compiled asks for it. It is built once with the host's C++ compiler, against the
torch that runs, and kept in the kernel cache. It runs what is plain (front_end.cpp says what) and
leaves the rest to the plan, so that results are the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import settings
from ..cache import store
from ..cache.folders import Untrusted
from ..errors import BackendError, CompileError
from ..kernels import build
from ..settings import warn_once
from . import layout

_SYMBOL, _TARGET = "neuronjit_front_end", "front end"
_FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden")
_LIBRARIES = ("-ltorch_python", "-ltorch_cpu", "-lc10", "-ldl")  # those that torch has loaded
_FORWARD = 2**64 - 1  # the key of forward's kernels, to which nothing arrives
_MOST = 31  # tensors of a call, and outputs: each is a bit of a key

_lock = threading.Lock()
_functions: dict[str, Any] | None = None  # {} where they cannot be had


def note_carried(state: Tensor, layer: str) -> None:
    """Remember in the call that made `state`, if it was one of ours, who passes it on."""
    if _functions:
        _functions["note_carried"](state, layer)


def compiled(
    plan: Any,
    x: Tensor,
    given: Mapping[str, Tensor],
    in_python: Callable[..., Any],
    gone: Callable[..., Any],
) -> Compiled | None:
    """The plan in C++, if that was asked for, and can be had, and the plan is plain.

    Args:
        plan: a KernelPlan of x and the tensors given, as kernels read them.
        in_python: what runs a backward that is not plain.
        gone: what explains why a graph was freed.
    """
    if settings.front_end() == "python":
        return None
    outputs = 1 + len(plan.final) + len(plan.call.record)
    scattered = any(repeat.order is None for repeat in plan.repeats.values())
    if scattered or max(1 + len(given), outputs) > _MOST:
        return None
    made = _loaded(in_python, gone)
    return Compiled(plan, x, given, made) if made else None


def _loaded(in_python: Callable[..., Any], gone: Callable[..., Any]) -> Mapping[str, Any]:
    """The functions of the front end; none, after one warning, where it cannot be had."""
    global _functions
    with _lock:
        if _functions is None:
            try:
                _functions = _load(in_python, gone)
            except (BackendError, CompileError, OSError, Untrusted) as error:
                _functions = {}
                text = f"neuronjit's front end stays in Python: {error}"
                warn_once("front end", text, UserWarning)
        return _functions


def _load(in_python: Callable[..., Any], gone: Callable[..., Any]) -> dict[str, Any]:
    # the functions of a PyDLL are called with the interpreter's lock held
    cpu = _cpu()
    library = ctypes.PyDLL(_SYMBOL, handle=cpu.dlopen(entry().binary)._handle)
    start = library[_SYMBOL]
    start.argtypes, start.restype = [ctypes.py_object, ctypes.py_object], ctypes.py_object
    found: dict[str, Any] = start(in_python, gone)
    if cpu.forked:
        found["after_fork"]()
    elif hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=found["after_fork"])
    return found


def _cpu() -> Any:
    from ..kernels.targets import cpu  # not before it is needed

    return cpu


def entry() -> store.Entry:
    """The cache's entry of the front end, compiled if it is not there.

    Raises BackendError where there is neither an entry nor a compiler, CompileError where that
    fails.
    """
    import sysconfig  # not while neuronjit is imported

    cpu = _cpu()
    arch = cpu.arch()
    source = Path(__file__).with_suffix(".cpp").read_text("ascii")
    python = f"{sys.implementation.cache_tag} {sysconfig.get_config_var('SOABI')}"
    # builds of torch 2.6 differ in it
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    asked = {
        "source": hashlib.sha256(source.encode()).hexdigest(), "python": python,
        "torch": torch.__version__, "abi": abi,
    }  # fmt: skip

    def compile_now() -> tuple[str, bytes]:
        folder = Path(torch.__file__).parent
        include = [folder / "include", folder / "include/torch/csrc/api/include"]
        folders = (*include, sysconfig.get_path("include"))
        options = [*_FLAGS, abi, *(f"-I{path}" for path in folders)]
        libraries = [f"-L{folder / 'lib'}", *_LIBRARIES]
        return source, cpu.shared_object(source, _SYMBOL, arch, [options], libraries)

    return build.other_entry(
        json.dumps({"front end": asked}, sort_keys=True),
        _SYMBOL,
        lambda: {**cpu.fingerprint(arch), "target": _TARGET, "flags": " ".join(_FLAGS)},
        (_TARGET, arch),
        compile_now,
        lambda binary: str(cpu.check(binary, _SYMBOL, arch)),
        "`neuronjit-cache prebuild --front-end` builds it where there is a compiler",
    )


class Compiled:
    """A KernelPlan in C++. `call(plan, x, tensors)` gives the outputs, or None: Python's turn."""

    def __init__(self, plan: Any, x: Tensor, given: Mapping[str, Tensor], made: Any) -> None:
        self._plan, self._made = weakref.proxy(plan), made
        strides = (plan.n, *plan.strides) if plan.copies else x.stride()
        kept = -1 if plan.checkpoints is None else plan.checkpoints[0].numel()
        tensors = []
        for (name, tensor), saved in zip(given.items(), plan.saved, strict=True):
            shape, dtype, _, own = saved
            repeat = plan.repeats.get(name)
            padded = () if repeat is None else layout.padded(tensor.shape, plan.shape)
            order = () if repeat is None else repeat.order
            back = [order.index(d) for d in range(len(order))]
            in_order = repeat is not None and repeat.in_order
            how = (shape, own or (), dtype, name in plan.per_step, padded, order, back, in_order)
            tensors.append(how)
        self.call = made["plan"](
            plan.device.index if x.is_cuda else -1, plan.dtype, plan.real, x.shape, strides,
            plan.shape, plan.strides, len(plan.final), len(plan.call.record), kept, tensors,
        )  # fmt: skip

    def backward(self, *given: Any) -> Any:
        """As the plan's, of whose arguments it takes all; None: Python's turn."""
        return self._made["backward"](self.call.__self__, *given)

    def twice(self, weight: int, bias: int, sums: int, scaled: int, after: int | None) -> None:
        """Let autograd's backward of the plan go twice over the sequence, as two_passes.py says."""
        last = -1 if after is None else after
        self._made["twice"](self.call.__self__, weight, bias, sums, scaled, last)

    def add(self, launch: Any, aligned: bool, arriving: Any) -> None:
        """A kernel was loaded: of forward, or of backward for these gradients."""
        plan, raw = self._plan, launch.kernel.raw(*launch.size)
        key, results, parts = _FORWARD, [], []
        if arriving is not None:
            arrived, wanted = arriving.asked
            key = sum(1 << i for i, here in enumerate(arrived) if here)
            key |= sum(1 << (32 + i) for i, want in enumerate(wanted) if want)
            summed = [*plan.partial_sums(arriving, launch.grid)]
            rows = {n: (p, row) for p, (of, _) in enumerate(summed) for row, n in enumerate(of)}
            results = [
                (want, name in plan.call.model.inputs, *rows.get(name, (-1, -1)))
                for name, want in zip(("x", *plan.given), wanted, strict=True)
            ]
            parts = [sizes for _, sizes in summed]
        sources = [self._source(group, name, arriving) for group, name in launch.varying]
        self._made["add"](
            self.call.__self__, key, aligned, raw.function, sources, launch.tail,
            launch.grid.blocks, raw.threads, raw.parallel, parts, results,
        )  # fmt: skip

    def _source(self, group: str, name: str, arriving: Any) -> tuple[int, int]:
        """Where this member of an argument lies: a kind of front_end.cpp, and which of them."""
        plan, kinds = self._plan, self._made["kinds"]
        given = {name: i for i, name in enumerate(plan.given)}
        states = {name: 1 + i for i, name in enumerate(plan.final)}
        sequences = {name: 1 + len(states) + i for i, name in enumerate(plan.call.record)}
        sequences["s"] = 0
        results = {"x": 0, **{name: 1 + i for name, i in given.items()}}
        kind, index = {
            "in": ("given", given) if name in plan.inputs else ("grad", sequences),
            "out": ("result", results) if arriving else ("out", sequences),
            "last": ("out", states),
            "last_grad": ("grad", states),
            "start_grad": ("result", results),
            "each_grad": ("result", results),
            "channel_partials": ("partial", {name: 0}),
            "partials": ("partial", {name: 1 if arriving and arriving.by_channel else 0}),
            "checkpoints": ("checkpoints", {name: 0}),
        }.get(group, ("given", given))
        if (group, name) == ("in", "x"):
            kind, index = "x", results
        return (kinds[kind], index[name]) if name in index else (kinds["nowhere"], 0)
