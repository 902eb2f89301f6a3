"""Batch norm and neuron as one layer, and the fold of time into the batch before them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
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
from ..run.normed import multistep_normed, normed, why_not
from ..run.statistics import Running, batch_statistics
from ..torch_private import current_backward, has_hooks
from .neuron import Neuron
from .pairs import has_forward, preceding
from .pooling import lighten, poolings, restore

# bytes of x_seq: below, a GPU takes longer for the launches that a fused batch norm has more
FUSED_FROM = 12 << 20
# whose forward is torch's, but that time may be folded into the batch: SpikingJelly's, and ours for
# its old scripts
_FORWARDS = (
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "_ThresholdDependentBatchNormBase", "_Stepped",
)  # fmt: skip
_CURE = "call neuronjit.nn.unfuse(net) before such changes, and fuse again after them"


def _pays(x: Tensor) -> bool:
    """Whether kernels do both: on a GPU where that is faster (on an H100), on a CPU for memory."""
    if not x.is_cuda:
        return not is_compiling()  # compilers fuse batch norms of their own
    return x.numel() * x.itemsize >= FUSED_FROM


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
        if isinstance(neuron, Module) and not isinstance(neuron, Neuron):
            raise SpecError(f"{type(neuron).__name__} is no layer of neuronjit.nn")
        self.norm, self.neuron = norm, neuron
        neuron._norm = Norm(norm, neuron, residual)

    def forward(self, x_seq: Tensor, *skip: Tensor) -> Tensor:
        """`[T, N, C, *]` to spikes of that shape; `skip`, where there is a residual, is alike.

        It is used in x_seq's dtype.

        Raises SpecError where `norm` or `neuron` was replaced since, where `norm` has hooks, and as
        the neuron does.
        """
        if getattr(getattr(self.neuron, "_norm", None), "norm", None) is not self.norm:
            raise SpecError(
                "the norm or the neuron of a NormedNeuron was replaced (convert_sync_batchnorm does"
                " so), and its kernels know the two that it was made of; make a new NormedNeuron"
                " of a new norm and neuron"
            )
        if has_hooks(self.norm):
            raise SpecError(
                "the norm of a NormedNeuron has hooks (torch.nn.utils.prune makes some), and they"
                " would not run, because the neuron's kernels do its work; hook the NormedNeuron,"
                " or use norm and neuron as two layers"
            )
        return self.neuron(x_seq, *skip)  # type: ignore[no-any-return]


class Norm:
    """What a neuron that was fused knows of the batch norm before it.

    `hide` makes the norm hand its input on as it is, and the neuron expects that input from then.
    """

    def __init__(self, norm: Module, neuron: Module, residual: str | None = None) -> None:
        if residual not in (None, "before", "after"):
            raise SpecError(
                f"unknown residual {ascii(residual)[:80]}. Known: None, 'before', 'after'"
            )
        if why := _why_not(norm, neuron, residual):
            raise SpecError(f"cannot be fused: {why}")
        self.norm: Any = norm
        self.residual = residual
        # the neuron's model, and the same behind the norm: no compiler could trace how it is made
        self._model = _model_of(neuron)
        self._traced = self._model and normed(
            self._model, None if residual == "after" else residual
        )
        self.inputs = () if residual is None else ("skip",)
        self.hidden = False
        self.passed: int | None = None  # elements of what the hidden norm handed on
        self.again = False  # it did so in a backward, where checkpoints run it again

    def hide(self) -> None:
        """Leave the norm of a network to the neuron that follows it there."""
        self.norm.forward = partial(Norm._pass_on, self)
        self.hidden = True

    def _pass_on(self, x: Tensor) -> Tensor:
        """The forward of a hidden norm. Raises SpecError if the last one's neuron did not run."""
        again = not is_compiling() and current_backward() != -1
        missed = self.passed is not None and not (again or self.again)
        self.passed, self.again = None if missed else x.numel(), again
        if missed:
            raise SpecError(
                "the neuron of a fused batch norm was not called after it, the last time, and x"
                " went on as it was. If an error ended that call, call again. If the neuron was"
                f" replaced or only a part of the network called, {_CURE}"
            )
        return x

    def multistep(
        self,
        model: NeuronModel,
        x: Tensor,
        state: Any,
        *,
        surrogate: Any,
        reset: str = "hard",
        detach_reset: bool = False,
        record: tuple[str, ...] = (),
        backend: str | None = None,
        skip: Tensor | None = None,
        **params: Any,
    ) -> Output:
        """As `neuronjit.multistep`, of the normalised x."""
        self._check(x)
        asked: dict[str, Any] = dict(
            surrogate=surrogate, reset=reset, detach_reset=detach_reset, record=record,
            backend=backend,
        )  # fmt: skip
        compiling = is_compiling() or checks.is_traced(x)
        own = self._traced
        if not compiling:
            own = normed(model, self.residual)
        elif not (self._model is model or self._model == model):  # equal in copies
            own = None
        # what is empty, torch answers
        if own is None or not x.numel() or not _pays(x):
            return self._apart(model, x, state, skip, {**asked, **params})
        statistics: Callable[..., tuple[Tensor, Tensor]] = batch_statistics
        in_graph: Callable[..., Output] | None = None
        residual = self.residual
        later = None  # what a compiler adds to the spikes, by a kernel of its own
        if compiling:
            from ..run import graph  # registers operators: eager calls need none

            statistics, in_graph = graph.statistics, graph.multistep
            if residual == "after" and skip is not None:
                residual, later, skip = None, skip.to(x.dtype), None
        mean, invstd, eps = self._statistics(x, backend, statistics)
        out = multistep_normed(
            own, x, state, mean=mean, invstd=invstd, weight=self.norm.weight, bias=self.norm.bias,
            eps=eps, skip=skip, residual=residual, params=params, in_graph=in_graph, **asked,
        )  # fmt: skip
        return out if later is None else _added(out, later)

    def _apart(
        self, model: NeuronModel, x: Tensor, state: Any, skip: Any, given: dict[str, Any]
    ) -> Output:
        """The batch norm, the neuron and the residual one after the other."""
        # torch's: the instance's may be hidden, and SpikingJelly's asks for its step_mode
        x = _BatchNorm.forward(self.norm, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.residual is not None:
            skip = skip.to(x.dtype)  # as kernels use it
        out = multistep(model, x + skip if self.residual == "before" else x, state, **given)
        if self.residual != "after":
            return out
        return _added(out, skip)

    def _check(self, x: Tensor) -> None:
        norm = self.norm
        passed, self.passed = self.passed, None
        if x.dim() < 3 or x.shape[2] != norm.num_features:
            raise SpecError(
                f"the batch norm has {norm.num_features} features, so x_seq must be"
                f" [T, N, {norm.num_features}, *], got {list(x.shape)}"
            )
        if self.hidden and passed != x.numel():
            raise SpecError(
                "a fused neuron was called without its batch norm right before it, on the same"
                f" sequence (was the norm replaced, or the neuron wrapped in checkpoints?); {_CURE}"
            )

    def _statistics(
        self, x: Tensor, backend: str | None, statistics: Callable[..., tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, float | None]:
        """As torch.nn.BatchNorm's forward: what normalises x; running statistics are brought on."""
        norm = self.norm
        if not norm.training and norm.running_mean is not None:
            real = checks.arithmetic(x.dtype)
            # a copy for backward, because training brings the running mean on in place
            mean = norm.running_mean.to(real, copy=torch.is_grad_enabled())
            return mean, torch.rsqrt(norm.running_var.to(real) + norm.eps), None
        if x.numel() == norm.num_features:
            raise SpecError(
                f"a batch norm in training needs more than one value a channel, got {list(x.shape)}"
            )
        running = Running()
        if norm.training and norm.track_running_stats:
            running = Running(
                norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum
            )
        return *statistics(x, norm.eps, running, backend), norm.eps


def fuse(net: Module) -> int:
    """Run each batch norm of `net` that a neuron follows in that neuron's kernels; how many.

    Where they follow each other is read off the forwards of `net` and of all modules in it, by
    torch.fx: the neuron is called right after the norm, and nothing else takes the norm's output.
    The norm may be the last in containers (Sequential, `EachStep`, SpikingJelly's
    SeqToANNContainer, blocks with a forward of their own). Left alone are modules that are used
    several times or have hooks, and what stands in a forward that branches on its input or has
    optional arguments; containers in such a one are taken to be called as a whole. Residuals stay
    outside; for them there is `NormedNeuron`.

    Neurons are layers of this module, and nodes of SpikingJelly after `neuronjit.accelerate`.
    Parameters, buffers and the keys of `state_dict` stay; `unfuse` undoes it.

    On a GPU, max poolings by two (windows of 2, or of 3 with a padding of 1) are kernels of ours as
    well, which keep a byte a window for backward, where torch keeps 8 and the input.
    """
    for _, pool in poolings(net):
        lighten(pool)
    neurons = {module for module in net.modules() if hasattr(module, "_norm")}
    pairs = [(n, norm) for n, norm in fusable(net, neurons).items() if isinstance(norm, Module)]
    for neuron, norm in pairs:
        join(norm, neuron)
    return len(pairs)


def unfuse(net: Module) -> int:
    """Undo `fuse`; how many batch norms were fused."""
    for module in net.modules():
        restore(module)
    return sum([part(module) for module in net.modules()])


def fusable(net: Module, neurons: Collection[Module]) -> dict[Module, Module | str]:
    """For each of `neurons` in `net` the batch norm that it can do, or why it can do none."""
    return {
        neuron: norm if isinstance(norm, str) else _why_not(norm, neuron) or norm
        for neuron, norm in preceding(net, neurons).items()
    }


def join(norm: Module, neuron: Any) -> None:
    """Let a neuron of a network do the batch norm that it follows."""
    neuron._norm = Norm(norm, neuron)
    neuron._norm.hide()


def part(neuron: Any) -> bool:
    """Undo `join`, where it was done."""
    norm = getattr(neuron, "_norm", None)
    if norm is None or not norm.hidden:
        return False
    vars(norm.norm).pop("forward", None)
    del neuron._norm
    return True


def _added(out: Output, skip: Tensor) -> Output:
    """With a residual behind the neuron. Older versions of Dynamo cannot trace `_replace`."""
    return Output(out.spikes + skip, out.state, out.record)


def _model_of(neuron: Any) -> NeuronModel | None:
    if isinstance(neuron, Neuron):
        return neuron.model
    row = getattr(neuron, "_neuronjit", None)  # of a node of SpikingJelly
    return None if row is None else row.model(neuron)


def _why_not(norm: Module, neuron: Any, residual: str | None = None) -> str:
    """Why the two cannot be one; "" if they can."""
    if not isinstance(norm, Module) or not isinstance(neuron, Module):
        raise InputTypeError("a batch norm and a neuron are modules")
    if getattr(neuron, "_norm", None) is not None:
        return "the neuron is fused already"
    if not isinstance(norm, _BatchNorm) or isinstance(norm, torch.nn.SyncBatchNorm):
        return f"{type(norm).__name__} is no BatchNorm1d, 2d or 3d of one process"
    if "forward" in vars(norm) or not (
        type(norm).forward is _BatchNorm.forward or has_forward(norm, *_FORWARDS)
    ):
        return f"{type(norm).__name__} has a forward of its own"
    if isinstance(norm, torch.nn.modules.lazy.LazyModuleMixin) and norm.has_uninitialized_params():
        return f"{type(norm).__name__} has not seen an input yet"
    if getattr(getattr(neuron, "_neuronjit", None), "fit", None) is not None:
        return f"the input of {type(neuron).__name__} is made ready for its kernel first"
    if getattr(neuron, "step_mode", "m") != "m":
        return "the neuron takes single steps (step_mode='s')"
    return why_not(neuron.model, residual) if isinstance(neuron, Neuron) else ""
