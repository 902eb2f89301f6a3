"""Manifests: the kernels that a run used, written to a file to build them elsewhere.

A manifest has one JSON object a line, one kernel each. It is read as data from a stranger: models
and surrogates pass through their constructors, so all that a line can bring is equations of our
language.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import stat
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from .. import neurons, settings, surrogates
from ..errors import NeuronJitError, SpecError, expect, expect_fields
from ..models.model import NeuronModel
from ..models.surrogate import Surrogate
from ..settings import warn_once
from . import targets
from .helpers import HelperSpec, Spec
from .spec import KernelSpec

MAX_BYTES = 64 << 20  # of a manifest: 100,000 kernels and more
# NEURONJIT_RECORD -> its device and inode, how far it was read, the whole lines up to there
_recorded: dict[str, tuple[tuple[int, int], int, frozenset[bytes]]] = {}


def record(spec: Spec, arch: str) -> None:
    """Adds the kernel to the file NEURONJIT_RECORD, if that is set. Trouble costs a warning."""
    path = settings.record()
    if not path:
        return
    line = json.dumps({**to_json(spec), "arch": arch}).encode()
    try:
        with open(path, "a+b", buffering=0, opener=_at_once) as file:
            st = os.fstat(file.fileno())
            if not stat.S_ISREG(st.st_mode) or st.st_size > MAX_BYTES:
                raise OSError(errno.EINVAL, f"it is no file, or larger than {MAX_BYTES} bytes")
            same = st.st_dev, st.st_ino
            known, end, lines = _recorded.get(path, (same, 0, frozenset()))
            if known != same or end > st.st_size:  # another file by now
                end, lines = 0, frozenset()
            file.seek(end)  # what it held before is known: others only append
            whole, newline, rest = file.read(MAX_BYTES).rpartition(b"\n")
            lines = lines.union(whole.splitlines())
            _recorded[path] = same, end + len(whole + newline), lines
            if line not in lines:  # appended by one write: the lines of several processes never mix
                file.write((b"\n" if rest else b"") + line + b"\n")
    except OSError as error:
        warn_once((path, "record"), f"neuronjit cannot record kernels in {path!r}: {error}")


def _at_once(path: str, flags: int) -> int:
    """Opens without waiting: a pipe may have nobody at its other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def read(path: str) -> list[tuple[Spec, str]]:
    """The kernels of a manifest, each once, with the architecture it was recorded on.

    Raises SpecError, which names the line, and OSError.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise SpecError(f"{path!r} is larger than {MAX_BYTES} bytes; it is no manifest")
    found: dict[tuple[Spec, str], None] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                given = json.loads(line)
                expect(given, dict, "a line")
                arch = expect(given.pop("arch", None), str, "arch")
                spec = from_json(given)
                targets.by_name(spec.target).check_arch(arch, recorded=True)
            except (NeuronJitError, ValueError, RecursionError) as error:
                raise SpecError(f"{path!r}, line {number}: {error}") from None
            found[spec, arch] = None
    return list(found)


# the types of a spec's fields, as JSON has them; models and surrogates check theirs themselves
_IN_JSON = {"str": str, "bool": bool, "int": int, "tuple[str, ...]": list}


def to_json(spec: Spec) -> dict[str, Any]:
    """The spec as JSON. Built-in models and surrogates by name, others in full."""
    data: dict[str, Any] = {f.name: getattr(spec, f.name) for f in fields(spec)}
    for field, by_name in (("model", neurons.by_name), ("surrogate", surrogates.by_name)):
        if given := data.get(field):
            data[field] = given.name if _is_built_in(by_name, given) else given.to_dict()
    return data


def from_json(data: Mapping[str, Any]) -> Spec:
    """The spec that `to_json` described. Raises SpecError or InputTypeError for anything else.

    Types are checked here, because JSON brings any; all rules of a spec are its class's own.
    """
    made = HelperSpec if "helper" in data else KernelSpec
    kinds = {f.name: _IN_JSON.get(str(f.type), type(data.get(f.name))) for f in fields(made)}
    given = expect_fields(data, kinds, "a kernel")
    if made is HelperSpec:
        return HelperSpec(**given)
    lists = {field: tuple(given[field]) for field, kind in kinds.items() if kind is list}
    whole = {"model": _model(given["model"]), "surrogate": _surrogate(given["surrogate"])}
    return KernelSpec(**{**given, **lists, **whole})


def command(spec: Spec, arch: str) -> str:
    """The command that builds this kernel ahead."""
    place = f"--target {spec.target} --arch {arch}"
    recorded = "NEURONJIT_RECORD=kernels.jsonl python ... && "
    recorded += f"neuronjit-cache prebuild --manifest kernels.jsonl {place}"
    if isinstance(spec, HelperSpec):
        return recorded
    own = not _is_built_in(neurons.by_name, spec.model)
    if own or (spec.surrogate and not _is_built_in(surrogates.by_name, spec.surrogate)):
        return recorded  # equations are in no command line
    sequences = [name for name in spec.sequences if name != "s"]
    words = ["--neuron", spec.model.name, "--dtype", spec.dtype]
    words += ["--reset", spec.reset] if spec.reset != "own" else []
    words += ["--surrogate", spec.surrogate.name] if spec.surrogate else []
    words += ["--smooth"] if not spec.spiking else []
    words += ["--detach-reset"] if spec.detach_reset else []
    for flag, names in (
        ("record", sequences),
        ("learn", spec.learned),
        ("per-neuron", spec.per_neuron),
        ("per-step", spec.per_step),
    ):
        words += [f"--{flag}", *names] if names else []
    return f"neuronjit-cache prebuild {shlex.join(words)} {place}"


def _is_built_in(by_name: Callable[[str], Any], given: Any) -> bool:
    try:
        return bool(by_name(given.name) == given)
    except SpecError:
        return False


def _model(given: Any) -> NeuronModel:
    return neurons.by_name(given) if isinstance(given, str) else NeuronModel.from_dict(given)


def _surrogate(given: Any) -> Surrogate | None:
    if given is None:
        return None
    return surrogates.by_name(given).form if isinstance(given, str) else Surrogate.from_dict(given)
