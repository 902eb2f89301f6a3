"""`accelerate` and `restore`: the neurons of a network that exists, on our kernels.

A neuron is swapped by giving the instance a class of its own: a subclass of the one it had, of the
same name, with other dynamics. So nothing is patched for anyone else, `isinstance` holds, and what
the network keeps (parameters, states, hooks) stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from torch.nn import Module

from ..errors import AccelerationError, InputTypeError
from . import norse, snntorch, spikingjelly
from .proof import Proof, prove

# each: PACKAGE, TESTED (its version), NODES, known, look, describe, Methods
LIBRARIES = (spikingjelly, snntorch, norse)


@dataclass(frozen=True)
class Layer:
    """What became of one neuron of the network."""

    path: str  # in the network, as in `named_modules`
    kind: str  # its class
    how: str | None  # what runs it now; None where it was left alone
    why: str | None  # why it was left alone


@dataclass(frozen=True)
class Report:
    """What `accelerate` did; prints as a table.

    `proof` is None where no sample was given.
    """

    layers: tuple[Layer, ...]
    libraries: str  # the libraries met, with their versions and those that were tested
    proof: Proof | None = None

    @property
    def accelerated(self) -> list[Layer]:
        """The neurons that run on our kernels."""
        return [layer for layer in self.layers if layer.how is not None]

    @property
    def skipped(self) -> list[Layer]:
        """The neurons that were left alone."""
        return [layer for layer in self.layers if layer.how is None]

    def __str__(self) -> str:
        if not self.layers:
            known = ", ".join(f"{lib.PACKAGE} {lib.TESTED}" for lib in LIBRARIES)
            return f"no neuron that is known was found in this model (known: those of {known})"
        counted = f"{len(self.accelerated)} of {len(self.layers)} neurons accelerated"
        rows = [
            (layer.path or "(the model)", layer.kind, layer.how or f"skipped: {layer.why}")
            for layer in self.layers
        ]
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
        table = [f"{path:{wide[0]}}  {kind:{wide[1]}}  {said}" for path, kind, said in rows]
        proof = [] if self.proof is None else [str(self.proof)]
        return "\n".join([f"{counted} ({self.libraries})", *table, *proof])


def accelerate(model: Module, sample: Any = None, *, strict: bool = False) -> Report:
    """Run the neurons of a network that exists on our kernels, in place; `restore` undoes it.

    Each supported neuron gets our dynamics; its parameters, state, hooks and name stay as they are,
    and so does every other instance of its class. What is not supported is left alone, and the
    report says why. Known are neurons of SpikingJelly 2.0.0, snnTorch 1.0.0 and
    Norse 1.1.0 (docs/integrations.md).

    Args:
        model: a network, or a neuron.
        sample: one batch: a tensor, or a tuple or dict of the model's arguments. With it a training
            step is run on a copy of the model before and on one after, and compared: every spike,
            the outputs, all gradients, the time, and the peak of CUDA memory. The model itself, its
            states and the generators of random numbers stay as they are.
        strict: raise where a neuron is skipped, none is found, or the sample shows a difference.

    Returns:
        A report: `print` it, or read `layers`, `accelerated`, `skipped` and `proof`.

    Raises:
        InputTypeError: model is no torch.nn.Module.
        AccelerationError: as `strict` says, or the model does not run on the sample. Nothing was
            changed then. Its `report` is what would have been returned, where there is one.
    """
    _check(model)
    found = list(_find(model))
    paths = [layer.path for layer, _, new in found if new]
    proof = prove(model, paths, _swap, sample) if sample is not None and paths else None
    report = Report(tuple(layer for layer, *_ in found), _libraries(found), proof)
    if strict and (not report.layers or report.skipped):
        raise AccelerationError(f"strict=True, and not all is accelerated: {report}", report)
    if strict and proof is not None and not proof.same:
        raise AccelerationError(f"strict=True, and the sample shows a difference: {report}", report)
    _swap(model, paths)
    return report


def restore(model: Module) -> int:
    """Give every neuron that `accelerate` changed its own class again; the number of them.

    States stay. Under float16 or bfloat16 they are float32 until the next call.
    """
    _check(model)
    changed = [module for module in model.modules() if isinstance(module, _Swapped)]
    for module in changed:
        module.__class__ = module._neuronjit_origin
    return len(changed)


def _check(model: Any) -> None:
    if not isinstance(model, Module):
        raise InputTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _find(model: Module) -> Iterator[tuple[Layer, Any, bool]]:
    """Each neuron as a layer, with its library, and whether it is to be swapped."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _Swapped):
            library = module._neuronjit_library
            yield (
                Layer(path, kind, library.describe(module, module._neuronjit), None),
                library,
                False,
            )
            continue
        for library in LIBRARIES:
            row = library.look(module)
            if isinstance(row, str):
                yield Layer(path, kind, None, row), library, False
            elif row is not None:
                yield Layer(path, kind, library.describe(module, row), None), library, True


def _swap(model: Module, paths: Iterable[str]) -> None:
    """Give the neurons at these paths their new classes; all of them or none."""
    done: list[tuple[Module, type]] = []
    try:
        for path in paths:
            module = model.get_submodule(path)
            origin: Any = type(module)
            module.__class__ = swapped(origin)
            done.append((module, origin))
    except TypeError as error:  # a class with a layout of its own
        for module, origin in done:
            module.__class__ = origin
        raise AccelerationError(f"{path} cannot be changed: {error}; nothing was") from None


def _libraries(found: Any) -> str:
    said = []
    for library in dict.fromkeys(library for _, library, *_ in found):
        try:
            version = metadata.version(library.PACKAGE)
        except metadata.PackageNotFoundError:
            version = "of unknown version"
        said.append(f"{library.PACKAGE} {version}, tested with {library.TESTED}")
    return "; ".join(said)


class _Swapped:
    """The mark of a generated class, and what `pickle` and `deepcopy` need to find it again."""

    _neuronjit: Any  # the row of the library's table
    _neuronjit_library: Any
    _neuronjit_origin: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        _, _, *rest = reduced
        return (_again, (self._neuronjit_origin,), *rest)


def _again(origin: type) -> Any:
    kind: Any = swapped(origin)
    return kind.__new__(kind)


@cache
def swapped(origin: type) -> type:
    """The subclass of a neuron's class that runs on our kernels."""
    for library in LIBRARIES:
        if (known := library.known(origin)) is not None:
            names = ("__module__", "__qualname__", "__doc__")
            own = {name: getattr(origin, name) for name in names}
            own |= dict(_neuronjit=library.NODES[known.__name__], _neuronjit_library=library)
            bases = (_Swapped, library.Methods, origin)
            return type(origin.__name__, bases, {**own, "_neuronjit_origin": origin})
    raise AccelerationError(f"{origin.__name__} is no neuron that is known")
