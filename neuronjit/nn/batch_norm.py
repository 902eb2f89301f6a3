"""Batch norm and neuron as one layer, and the fold of time into the batch before them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputTypeError, SpecError
from ..models.model import NeuronModel
from ..run import checks
from ..run.autograd import multistep
from ..run.call import Output
from ..run.normed import batch_statistics, multistep_normed
from .neuron import Neuron

# elements of x_seq: below, a GPU takes longer for the launches that a fused batch norm has more
FUSED_FROM = 1 << 23


def _pays(x: Tensor) -> bool:
    """Whether one kernel each way is faster than batch norm and neuron apart, on an H100.

    In half precision torch's own batch norm is as fast where channels lie last in memory.
    """
    return not x.is_cuda or (x.numel() >= FUSED_FROM and (x.itemsize > 2 or x.stride(2) != 1))


class EachStep(torch.nn.Sequential):
    """Layers that know no time: `[T, N, *]` goes through them as `[T * N, *]`, and comes out again.

    `EachStep(Conv2d(...), BatchNorm2d(...))`; statistics are those of all steps together.
    """

    def forward(self, x_seq: Tensor) -> Tensor:
        """`[T, N, *]` to `[T, N, *]`."""
        if not isinstance(x_seq, Tensor) or x_seq.dim() < 3:
            given = list(x_seq.shape) if isinstance(x_seq, Tensor) else type(x_seq).__name__
            raise SpecError(f"EachStep takes sequences [T, N, C, *], got {given}")
        folded: Tensor = super().forward(x_seq.flatten(0, 1))  # type: ignore[no-untyped-call]
        steps: Tensor = folded.unflatten(0, x_seq.shape[:2])
        return steps


class NormedNeuron(Module):
    """A batch norm, a neuron, and perhaps a residual, in the neuron's kernels; exact.

    In training the statistics are those of all time steps and samples. Backward recomputes, so
    what is kept for it is x (and the residual). Parameters and buffers stay those of the modules.
    Where the two apart are as fast, which depends on sizes and layout, they run apart.

    Args:
        norm: a torch.nn.BatchNorm1d, 2d or 3d (SpikingJelly's too), in training or evaluation.
        neuron: a layer of this module, for whole sequences.
        residual: what is added: "before", `neuron(norm(x) + skip)` (as MS-ResNet does), "after",
            `neuron(norm(x)) + skip` (as SEW-ResNet does), or None.

    Raises:
        SpecError, InputTypeError: another kind of norm or neuron.
    """

    def __init__(self, norm: Module, neuron: Neuron, residual: str | None = None) -> None:
        super().__init__()
        self.norm, self.neuron = norm, neuron
        neuron._norm = Norm(norm, neuron, residual)

    def forward(self, x_seq: Tensor, *skip: Tensor) -> Tensor:
        """`[T, N, C, *]` to spikes of that shape; `skip`, where there is a residual, is alike."""
        return self.neuron(x_seq, *skip)  # type: ignore[no-any-return]


class Norm:
    """What a neuron that was fused knows of the batch norm before it."""

    def __init__(self, norm: Module, neuron: Module, residual: str | None = None) -> None:
        if why := _why_not(norm, neuron):
            raise SpecError(f"cannot be fused: {why}")
        if residual not in (None, "before", "after"):
            raise SpecError(
                f"unknown residual {ascii(residual)[:80]}. Known: None, 'before', 'after'"
            )
        self.norm: Any = norm
        self.residual = residual
        self.inputs = () if residual is None else ("skip",)

    def multistep(self, model: NeuronModel, x: Tensor, state: Any, **given: Any) -> Output:
        """As `neuronjit.multistep`, of the normalised x."""
        self._check(x)
        # compilers see two operations, and may fuse their own
        if is_compiling() or checks.is_traced(x) or not _pays(x):
            return self._apart(model, x, state, given)
        names = ("surrogate", "reset", "detach_reset", "record", "backend")
        options = {name: given.pop(name) for name in names}
        mean, invstd, eps = self._statistics(x, options["backend"])
        return multistep_normed(
            model, x, state, mean=mean, invstd=invstd, weight=self.norm.weight,
            bias=self.norm.bias, eps=eps, skip=given.pop("skip", None), residual=self.residual,
            params=given, **options,
        )  # fmt: skip

    def _apart(self, model: NeuronModel, x: Tensor, state: Any, given: dict[str, Any]) -> Output:
        """The batch norm, the neuron and the residual one after the other."""
        skip = given.pop("skip", None)
        # torch's: fuse() has hidden the instance's, and SpikingJelly's asks for its step_mode
        x = _BatchNorm.forward(self.norm, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        out = multistep(model, x + skip if self.residual == "before" else x, state, **given)
        if self.residual != "after":
            return out
        return out._replace(spikes=out.spikes + skip)

    def _check(self, x: Tensor) -> None:
        norm = self.norm
        if x.dim() < 3 or x.shape[2] != norm.num_features:
            raise SpecError(
                f"the batch norm has {norm.num_features} features, so x_seq must be"
                f" [T, N, {norm.num_features}, *], got {list(x.shape)}"
            )

    def _statistics(self, x: Tensor, backend: str | None) -> tuple[Tensor, Tensor, float | None]:
        """As torch.nn.BatchNorm's forward: what normalises x; running statistics are brought on."""
        norm = self.norm
        if not norm.training and norm.running_mean is not None:
            return norm.running_mean, torch.rsqrt(norm.running_var + norm.eps), None
        count = x.numel() // norm.num_features
        if count < 2:
            raise SpecError(
                f"a batch norm in training needs more than one value a channel, got {list(x.shape)}"
            )
        running, momentum = None, norm.momentum
        with torch.no_grad():
            if norm.training and norm.running_mean is not None:
                norm.num_batches_tracked.add_(1)
                running = norm.running_mean, norm.running_var
                if momentum is None:
                    momentum = 1.0 / float(norm.num_batches_tracked)
            mean, invstd = batch_statistics(x, norm.eps, running, momentum or 0.0, backend)
        return mean, invstd, norm.eps


def fuse(net: Module) -> int:
    """Run each batch norm of `net` that a neuron follows in that neuron's kernels; how many.

    Where they follow each other is read off torch.nn.Sequential, and where the norm is the last
    of an `EachStep` (or SpikingJelly's SeqToANNContainer) before the neuron. Containers with a
    forward of their own, and modules that stand in several places, are left alone. Parameters,
    buffers and the keys of `state_dict` stay; `unfuse` undoes it. For blocks and residuals there
    is `NormedNeuron`.
    """
    places = Counter(id(module) for _, module in net.named_modules(remove_duplicate=False))
    pairs = [
        pair
        for pair in _pairs(net)
        if all(places[id(module)] == 1 for module in pair) and not _why_not(*pair)
    ]
    for norm, neuron in pairs:
        neuron._norm = Norm(norm, neuron)
        norm.forward = _as_it_is
    return len(pairs)


def unfuse(net: Module) -> int:
    """Undo `fuse`; how many were undone."""
    undone = 0
    for neuron in (module for module in net.modules() if isinstance(module, Neuron)):
        if neuron._norm and vars(neuron._norm.norm).pop("forward", None) is not None:
            neuron._norm = None
            undone += 1
    return undone


def _as_it_is(x: Tensor) -> Tensor:
    """The forward of a norm that a neuron's kernels do."""
    return x


def _pairs(net: Module) -> Iterator[tuple[Any, Any]]:
    """Batch norms and neurons that follow each other."""
    for container in net.modules():
        if type(container).forward is torch.nn.Sequential.forward:
            # not children(), which leaves out what stands there twice
            for first, second in itertools.pairwise(container._modules.values()):
                folded = [*first._modules.values()] if first and _folds(first) else [first]
                yield (folded or [first])[-1], second


def _folds(module: Module) -> bool:
    """Whether a container folds time into the batch."""
    forward = type(module).forward
    return forward is EachStep.forward or (
        forward.__qualname__ == "SeqToANNContainer.forward" and _is_spikingjellys(forward)
    )


def _is_spikingjellys(method: Any) -> bool:
    return str(method.__module__).startswith("spikingjelly.")


def _why_not(norm: Module, neuron: Module) -> str:
    """Why the two cannot be one; "" if they can."""
    if not isinstance(norm, Module) or not isinstance(neuron, Module):
        raise InputTypeError("a batch norm and a neuron are modules")
    if not isinstance(norm, _BatchNorm) or isinstance(norm, torch.nn.SyncBatchNorm):
        return f"{type(norm).__name__} is no BatchNorm1d, 2d or 3d of one process"
    forward = type(norm).forward
    if "forward" in vars(norm) or not (forward is _BatchNorm.forward or _is_spikingjellys(forward)):
        return f"{type(norm).__name__} has a forward of its own"
    if isinstance(norm, torch.nn.modules.lazy.LazyModuleMixin) and norm.has_uninitialized_params():
        return f"{type(norm).__name__} has not seen an input yet"
    if not isinstance(neuron, Neuron):
        return f"{type(neuron).__name__} is no layer of neuronjit.nn"
    if neuron.step_mode != "m":
        return "the neuron takes single steps (step_mode='s')"
    if len(neuron.model.inputs) > 1:
        return f"model '{neuron.model.name}' has several inputs"
    return "" if neuron._norm is None else "the neuron is fused already"
