"""Scripts written for SpikingJelly 0.0.0.0.12 and 0.0.0.0.14, on our kernels and today's torch.

    import neuronjit.compat

    neuronjit.compat.install()  # before the script imports spikingjelly
    ...
    neuronjit.compat.uninstall()

or, without a change to the script: `python -m neuronjit.compat train.py --its arguments`.
Importing this module changes nothing.

`install` makes what `MODULES` lists importable. A module that the installed SpikingJelly has stays
that module: the nodes of `neuron.NODES` in it are replaced by ours, and names that it lacks are
added. A module that it lacks, or that fails to import, is ours. Works without SpikingJelly too.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import cuda_kernel, functional, layer, neuron, surrogate

__all__ = ["MODULES", "install", "uninstall"]

_CLOCK, _ACTIVATION = "spikingjelly.clock_driven", "spikingjelly.activation_based"
# what a script may import, parents first, and what stands for it; None is a package
MODULES: dict[str, ModuleType | None] = {
    "spikingjelly": None,
    _CLOCK: None,
    f"{_CLOCK}.neuron": neuron,
    f"{_CLOCK}.functional": functional,
    f"{_CLOCK}.surrogate": surrogate,
    f"{_CLOCK}.layer": layer,
    _ACTIVATION: None,
    f"{_ACTIVATION}.neuron": neuron,
    f"{_ACTIVATION}.functional": functional,
    f"{_ACTIVATION}.surrogate": surrogate,
    f"{_ACTIVATION}.layer": layer,
    f"{_ACTIVATION}.cuda_kernel": cuda_kernel,
    f"{_ACTIVATION}.neuron_kernel": cuda_kernel,  # its name in 0.0.0.0.14
}

_ABSENT = object()
_imports: list[str] = []  # names in sys.modules that are ours
_attributes: list[tuple[ModuleType, str, Any]] = []  # what was set, and its value before


def install() -> dict[str, str]:
    """Make the modules of old SpikingJelly importable; again, it changes nothing.

    Returns what became of each module: "ours", or what was replaced and added in SpikingJelly's.
    Modules that were imported by `from ... import IFNode` before keep what they imported.
    """
    if _imports or _attributes:
        uninstall()
    return {name: _provide(name, ours) for name, ours in MODULES.items()}


def uninstall() -> None:
    """Put back all that `install` changed. What scripts imported in between goes on working."""
    while _attributes:
        module, name, before = _attributes.pop()
        if before is _ABSENT:
            delattr(module, name)
        else:
            setattr(module, name, before)
    while _imports:
        sys.modules.pop(_imports.pop(), None)


def _provide(name: str, ours: ModuleType | None) -> str:
    try:
        theirs = importlib.import_module(name)
    except Exception as error:  # an old version may fail on today's libraries in any way
        missing = isinstance(error, ModuleNotFoundError) and name.startswith(error.name or " ")
        if ours is None:
            ours = ModuleType(name, f"Stands for {name}: see neuronjit.compat.")
            ours.__path__ = []
            ours.__spec__ = ModuleSpec(name, None, is_package=True)
        sys.modules[name] = ours
        _imports.append(name)
        parent, _, leaf = name.rpartition(".")
        if parent:
            _set(sys.modules[parent], leaf, ours)
        return "ours" if missing else f"ours: SpikingJelly's fails with {error!r}"
    if ours is None:
        return "SpikingJelly's"
    changed = [key for key in ours.__all__ if key in neuron.NODES or not hasattr(theirs, key)]
    for key in changed:
        _set(theirs, key, getattr(ours, key))
    return f"SpikingJelly's, with our {', '.join(changed)}" if changed else "SpikingJelly's"


def _set(module: ModuleType, name: str, value: Any) -> None:
    _attributes.append((module, name, vars(module).get(name, _ABSENT)))
    setattr(module, name, value)
