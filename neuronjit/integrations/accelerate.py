"""`accelerate` and `restore`: the neurons of a network that exists, on our kernels.

A neuron is swapped by giving the instance a class of its own: a subclass of the one it had, of the
same name, with other dynamics. So nothing is patched for anyone else, `isinstance` holds, and what
the network keeps (parameters, states, hooks) stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata
from typing import Any

from torch.nn import Module

from ..errors import AccelerationError, InputTypeError, NeuronJitError
from ..nn import pooling
from ..nn.batch_norm import fusable, join, part
from . import classes, norse, snntorch, spikingjelly
from .proof import Proof, prove

# each: NAME, PACKAGE, TESTED (its version), FAMILY (of its modules), NODES, look, describe, Methods
LIBRARIES = (spikingjelly, snntorch, norse)


@dataclass(frozen=True)
class Layer:
    """What became of one neuron of the network."""

    path: str  # in the network, as in `named_modules`
    kind: str  # its class
    how: str | None  # what runs it now; None where it was left alone
    why: str | None  # why it was left alone
    norm: str | None = None  # the path of the batch norm that its kernels do too
    apart: str | None = None  # why they do none, where that was asked for


@dataclass(frozen=True)
class Report:
    """What `accelerate` did; prints as a table.

    `proof` is None where no sample was given.
    """

    layers: tuple[Layer, ...]
    libraries: str  # the libraries met, with their versions and those that were tested
    proof: Proof | None = None
    poolings: tuple[str, ...] = ()  # the paths of max poolings that kernels of ours do on a GPU

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
        rows = []
        for layer in self.layers:
            said = layer.how or f"skipped: {layer.why}"
            if layer.norm is not None:
                said += f", with batch norm {layer.norm}"
            elif layer.apart is not None:
                said += f", no batch norm fused: {layer.apart}"
            rows.append((layer.path or "(the model)", layer.kind, said))
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
        table = [f"{path:{wide[0]}}  {kind:{wide[1]}}  {said}" for path, kind, said in rows]
        if self.poolings:
            where = ", ".join(self.poolings)
            table.append(f"max pooling with a byte a window for backward, on a GPU: {where}")
        proof = [] if self.proof is None else [str(self.proof)]
        return "\n".join([f"{counted} ({self.libraries})", *table, *proof])


def accelerate(
    model: Module, sample: Any = None, *, strict: bool = False, fuse: bool = False
) -> Report:
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
        fuse: nodes of SpikingJelly do the batch norm that they follow, in their kernels, where
            `neuronjit.nn.fuse` would find the two; the report says where not, and why. Max poolings
            become ours as there. The sample is then compared in float64 as well, which decides.

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
    layers, norms = _with_norms(model, [layer for layer, *_ in found], fuse)
    pools = [path for path, _ in pooling.poolings(model)] if fuse and found else []
    swap = partial(_swap, norms=norms, pools=pools)
    changed = [*dict.fromkeys([*paths, *norms])]
    proof = None
    if sample is not None and changed:
        proof = prove(model, changed, swap, sample, fused=bool(norms))
    light = [path for path, module in model.named_modules() if pooling.is_light(module)]
    report = Report(tuple(layers), _libraries(found), proof, (*light, *pools))
    if strict and (not report.layers or report.skipped):
        raise AccelerationError(f"strict=True, and not all is accelerated: {report}", report)
    if strict and proof is not None and not proof.same:
        raise AccelerationError(f"strict=True, and the sample shows a difference: {report}", report)
    swap(model, changed)
    return report


def restore(model: Module) -> int:
    """Give every neuron that `accelerate` changed its own class again; the number of them.

    States stay. Under float16 or bfloat16 they are float32 until the next call.
    """
    _check(model)
    changed = [module for module in model.modules() if isinstance(module, _Swapped)]
    for module in changed:
        part(module)
        module.__class__ = module._neuronjit_origin
    for pool in model.modules():
        pooling.restore(pool)
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
            try:
                how = library.describe(module, module._neuronjit)
            except NeuronJitError as error:  # it was changed since it was swapped
                how = f"{library.NAME} again: {error}"
            yield Layer(path, kind, how, None), library, False
            continue
        for library in LIBRARIES:
            row = library.look(module)
            if isinstance(row, str):
                yield Layer(path, kind, None, row), library, False
            elif row is not None:
                yield Layer(path, kind, library.describe(module, row), None), library, True


def _with_norms(
    model: Module, layers: Sequence[Layer], fuse: bool
) -> tuple[list[Layer], dict[str, str]]:
    """The layers with what becomes of batch norms before them, and the norms to fuse, by neuron."""
    names = {module: path for path, module in model.named_modules()}
    nodes = [None if layer.how is None else model.get_submodule(layer.path) for layer in layers]
    theirs = {node for node in nodes if node is not None and spikingjelly.can_fuse(type(node))}
    found = fusable(model, theirs) if fuse else {}
    told, norms = [], {}
    for layer, node in zip(layers, nodes, strict=True):
        norm = None if node is None else found.get(node)
        if (held := getattr(node, "_norm", None)) is not None:  # by an earlier call
            layer = replace(layer, norm=names.get(held.norm, "of another network"))
        elif isinstance(norm, Module):
            norms[layer.path] = names[norm]
            layer = replace(layer, norm=names[norm])
        elif node is not None and fuse:
            layer = replace(layer, apart=norm or "of SpikingJelly's nodes most can, of others none")
        told.append(layer)
    return told, norms


def _swap(
    model: Module, paths: Iterable[str], norms: Mapping[str, str], pools: Iterable[str]
) -> None:
    """Give the neurons at these paths their new classes, and some their norms; all or none.

    And the max poolings at their paths our kernels.
    """
    done: list[tuple[Module, type]] = []
    try:
        for path in paths:
            module = model.get_submodule(path)
            if isinstance(module, _Swapped):
                continue
            origin: Any = type(module)
            module.__class__ = swapped(origin)
            done.append((module, origin))
    except TypeError as error:  # a class with a layout of its own
        for module, origin in done:
            module.__class__ = origin
        raise AccelerationError(f"{path} cannot be changed: {error}; nothing was") from None
    for path, norm in norms.items():
        join(model.get_submodule(norm), model.get_submodule(path))
    for path in pools:
        pooling.lighten(model.get_submodule(path))


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
        if base := classes.known(origin, library.FAMILY, library.NODES):
            names = ("__module__", "__qualname__", "__doc__")
            own = {name: getattr(origin, name) for name in names}
            own |= dict(_neuronjit=library.NODES[base.__name__], _neuronjit_library=library)
            bases = (_Swapped, library.Methods, origin)
            return type(origin.__name__, bases, {**own, "_neuronjit_origin": origin})
    raise AccelerationError(f"{origin.__name__} is no neuron that is known")
