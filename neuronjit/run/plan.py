"""Plans: all of a call but its tensors, checked once. A warm call allocates and launches.

`KernelPlan` runs kernels, `EagerPlan` the same equations in eager PyTorch. Both have `run` for a
call, and `forward` and `backward` for those who differentiate themselves.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from operator import or_
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import BackendError, CompileError, DifferentiationError, SpecError
from ..kernels import build, targets
from ..kernels.spec import NAMES, KernelSpec
from ..kernels.targets import TARGETS
from ..kernels.targets.base import Channels, Grid, Kernel, steps_between_checkpoints
from ..settings import warn_once
from ..torch_private import autograd_again, is_batched, is_zero_tensor
from . import front_end, layout, reference
from .call import NO_STATE, Call, Output, Values
from .checks import arithmetic, check_memory, label_of, no_transforms

Gradients = list[Tensor | None]


Kept = TypeVar("Kept")

plans: dict[tuple[Any, ...], KernelPlan | EagerPlan] = {}
_KEPT = 4096  # shapes that never come back must not fill the memory


def keep(kept: dict[tuple[Any, ...], Kept], key: tuple[Any, ...], plan: Kept) -> Kept:
    """Remember a plan; where there are too many, forget the others."""
    if len(kept) >= _KEPT:
        kept.clear()
    kept[key] = plan
    return plan


def fall_back(plan: KernelPlan, error: BackendError | CompileError) -> EagerPlan:
    """The plan to use where the kernel cannot be had, remembered; one warning for each reason.

    Raises the error where the backend was asked for by name.
    """
    if plan.call.backend != "auto":
        raise error
    for key, kept in list(plans.items()):
        if kept is plan:
            plans[key] = plan.eager
    why = str(error).partition("\n")[0]  # the rest names the kernel
    warn_once(why, f"neuronjit runs in eager PyTorch, which is slow: {why}", UserWarning)
    return plan.eager


def backward(
    plan: KernelPlan | EagerPlan,
    x: Tensor,
    checkpoints: Tensor | None,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Gradients:
    """As the plan's; in eager PyTorch where its kernel cannot be had (see `fall_back`)."""
    try:
        return plan.backward(x, checkpoints, tensors, grads, wanted)
    except (BackendError, CompileError) as error:
        if isinstance(plan, EagerPlan):
            raise
        return fall_back(plan, error).backward(x, None, tensors, grads, wanted)


def gradients(
    plan: KernelPlan,
    x: Tensor,
    checkpoints: Tensor | None,
    tensors: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> Sequence[Tensor | None]:
    """What autograd's node of a call gives: `backward`, of which there is no second derivative."""
    if any([is_batched(grad) for grad in grads if grad is not None]):  # noqa: C419 a list is faster
        raise no_transforms("is_grads_batched=True")
    results = backward(plan, x, checkpoints, tensors, grads, wanted)
    if torch.is_grad_enabled():  # create_graph: an error only if somebody differentiates again
        arrived = [grad for grad in grads if grad is not None]
        return once(results, [x, *arrived, *tensors])
    return results


def is_gone(plan: Any, layer: str, grads: Sequence[Tensor | None], said: str) -> None:
    """Raise RuntimeError where a state that `layer` carried over is what leads to a freed graph.

    `said` is torch's error: what was saved may be there, but changed in place.
    """
    last = 1 + len(plan.final)
    others = (grads[0], *grads[last:])
    alone = any(g is not None for g in grads[1:last]) and all(g is None for g in others)
    if alone and "second time" in said:
        raise RuntimeError(
            f"the state of {layer} was carried over from the last call and its graph is gone: call"
            " reset_net(net) (or detach_net(net)) between batches"
        )


def once(results: Sequence[Any], inputs: Sequence[Tensor]) -> list[Any]:
    """Gradients that depend on these inputs, but raise where somebody differentiates them."""
    return [r if r is None else _Once.apply(r, *inputs) for r in results]  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    """Identity whose backward raises: the kernels have no second derivative."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *inputs: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise DifferentiationError(
            "the kernels have first derivatives only; use backend='eager' for a second derivative"
        )


def plan_for(call: Call, x: Tensor, values: Values) -> KernelPlan | EagerPlan:
    """The plan of a call that was checked. Raises BackendError."""
    target = choose_target(call.backend, x)
    if target == "eager" or not x.numel():
        return EagerPlan(call, values)
    return KernelPlan(call, target, x, values)


def choose_target(backend: str, x: Tensor) -> str:
    """The target that serves x: "cuda", "cpu", or "eager"."""
    device = x.device.type
    if backend == "auto":
        if device not in TARGETS:
            where = " and ".join(TARGETS)
            text = f"neuronjit runs in eager PyTorch on {device}; there are kernels for {where}"
            warn_once(device, text, UserWarning)
            return "eager"
        return device
    if backend not in ("eager", device):
        raise BackendError(
            f"backend='{backend}' was asked for, but x_seq is on {x.device}; move it, or use"
            " backend='auto'"
        )
    return backend


def output(call: Call, outputs: Sequence[Tensor]) -> Output:
    """The outputs of `forward` by name."""
    record = call.record
    if not call.final_state:
        return Output(outputs[0], NO_STATE, dict(zip(record, outputs[1:], strict=True)))
    states = dict(call.model.state)
    last = 1 + len(states)
    return Output(
        outputs[0],
        dict(zip(states, outputs[1:last], strict=True)),
        dict(zip(record, outputs[last:], strict=True)) if record else {},
    )


class EagerPlan:
    """The equations in eager PyTorch, operation by operation."""

    twice: Any = None  # the same with a backward of two passes, once it was asked for: `two_passes`

    def __init__(self, call: Call, values: Values) -> None:
        self.call = call
        # without the tensors: a plan that is kept must not keep them alive
        self._values: dict[str, float | None] = {
            name: None if isinstance(value, Tensor) else value for name, value in values.items()
        }

    def prepare(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """As a KernelPlan's: torch's operations take any dtype and layout."""
        return x, tensors

    def run(self, x: Tensor, tensors: Sequence[Tensor]) -> Output:
        """The call; autograd records each operation."""
        call, rest = self.call, iter(tensors)
        most = x.dim() - 1
        values: Values = {}
        for name, number in self._values.items():
            if number is not None:
                values[name] = number
                continue
            tensor = next(rest)
            # one element serves any step, however many dimensions it has
            single = tensor.dim() > most and name not in call.model.inputs
            values[name] = tensor.reshape(()) if single else tensor
        spikes, state, record = reference.run(
            call.model, x, values, call.surrogate, call.reset, call.detach_reset, call.record
        )
        return Output(spikes, state if call.final_state else NO_STATE, record)

    def forward(
        self, x: Tensor, tensors: Sequence[Tensor], save: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """As a KernelPlan's; backward runs the equations once more."""
        out = self.run(x, tensors)
        return [out.spikes, *out.state.values(), *out.record.values()], None

    def backward(
        self,
        x: Tensor,
        checkpoints: Tensor | None,
        tensors: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> Gradients:
        """As a KernelPlan's: by autograd, from the inputs on."""
        with autograd_again(), torch.enable_grad():
            leaves = [
                t.detach().requires_grad_(w) for t, w in zip((x, *tensors), wanted, strict=True)
            ]
            outputs, _ = self.forward(leaves[0], leaves[1:], save=False)
            arrived = [
                (o, g)
                for o, g in zip(outputs, grads, strict=True)
                if g is not None and o.requires_grad
            ]
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            if not arrived:
                return [None for _ in leaves]
            ends, gradients = zip(*arrived, strict=True)
            found = iter(torch.autograd.grad(ends, asked, gradients, allow_unused=True))
        each = [next(found) if leaf.requires_grad else None for leaf in leaves]
        return [None if g is None else g.clone() for g in each]


_Saved = tuple[torch.Size, torch.dtype, torch.device, layout.Strides | None]
Member = tuple[str, str]  # of an argument struct: its group, and whose it is there
_ALONE = ""  # whose a member is that is no array


class _Launch:
    """A loaded kernel, and how a call's argument is packed for it."""

    def __init__(
        self,
        spec: KernelSpec,
        kernel: Kernel,
        given: Sequence[Member],
        fixed: Mapping[str, Mapping[str, float]],
        size: tuple[int, int],
        channels: Channels | None,
    ) -> None:
        """`given` are the members that each call has, `fixed` the last groups, always the same.

        `size` is (N, T); `channels` those that the kernel walks, if it does.
        """
        groups = spec.arguments
        self.kernel, self.size = kernel, size
        self._run = kernel.launch
        self.grid = kernel.grid(size[0], channels)
        self._pack = struct.Struct("@" + "".join(g.count * g.code for g in groups) + "0q").pack
        members = [(g.name, name) for g in groups for name in g.of or (_ALONE,)]
        self.varying = [member for member in members if member[0] not in fixed]
        self._order = [given.index(member) for member in self.varying]
        self._fixed = [fixed[group][name] for group, name in members[len(self.varying) :]]

    @property
    def tail(self) -> bytes:
        """The argument's bytes that are the same in every call: those behind the addresses."""
        return self._pack(*[0] * len(self._order), *self._fixed)[8 * len(self._order) :]

    def run(self, given: Sequence[int]) -> None:
        """Launch the kernel on what lies at these addresses."""
        packed = self._pack(*[given[i] for i in self._order], *self._fixed)
        self._run(packed, self.grid, *self.size)


class _Arriving(NamedTuple):
    """What of a backward call depends on which gradients arrive and which are wanted."""

    asked: tuple[tuple[bool, ...], tuple[bool, ...]]  # of each output, and of x and each tensor
    sequences: tuple[str, ...]  # whose gradients arrive
    learned: tuple[str, ...]  # parameters whose gradient is wanted
    summed: tuple[str, ...]  # those of them that all neurons share
    by_channel: tuple[str, ...]  # those that a kernel sums channel by channel
    to_inputs: bool  # whether the gradient of x or of another input is wanted
    members: tuple[Member, ...]  # of the argument, in the order in which `backward` lists them
    launches: dict[bool, _Launch]  # by whether all addresses are aligned


class KernelPlan:
    """One compiled kernel forward, one backward, for each alignment and set of gradients."""

    twice: Any = None  # as an EagerPlan's

    def __init__(self, call: Call, target: str, x: Tensor, values: Values) -> None:
        self.call, self.target = call, target
        model = call.model
        given = {name: v for name, v in values.items() if isinstance(v, Tensor)}
        numbers = {name: v for name, v in values.items() if not isinstance(v, Tensor)}
        self.eager = EagerPlan(call, values)
        self.final = tuple(model.state) if call.final_state else ()
        self.given = tuple(given)
        self.states, self.params = tuple(model.state), tuple(model.params)
        self.inputs = model.inputs[1:]
        self.dtype, self.real, self.device = x.dtype, arithmetic(x.dtype), x.device
        self.T, self.n, self.shape = x.shape[0], x[0].numel(), x.shape[1:]
        self.copies = x.is_neg() or not layout.is_sequence(x.shape, x.stride())
        self.strides = x[0].contiguous().stride() if self.copies else x.stride()[1:]
        self.repeats = {
            name: layout.repeat(tensor.shape, self.shape, self.strides)
            for name, tensor in given.items()
            if name in model.params and tensor.numel() != 1
        }
        self.per_neuron = tuple(p for p in self.params if p in self.repeats)
        self.channels = self._channels()
        self.per_step = tuple(
            name for name in self.inputs if layout.shared_by_neurons(given[name].shape, x.shape)
        )
        self.numbers = {name: numbers.get(name, 0.0) for name in (*self.states, *self.params)}
        # what kernels read, and backward is given again, whatever hooks did to it in between
        self._x = (x.shape, self.dtype, self.device, (self.n, *self.strides))
        self._state = (self.shape, self.real, self.device, self.strides)
        per_step = (self.T, *(1 for _ in self.shape))
        self.saved: list[_Saved] = []
        for name, t in given.items():
            if name in model.state:
                saved: _Saved = self._state
            elif name in self.per_step:
                saved = (torch.Size(per_step), self.real, self.device, (1,) * len(per_step))
            elif name in self.inputs:
                saved = self._x
            else:  # in any layout: see layout.Repeat
                saved = (t.shape, self.real, self.device, None)
            self.saved.append(saved)
        self._prepared = all(map(_is_read_so, given.values(), self.saved))
        k = steps_between_checkpoints(self.T, model)
        # of the checkpoints: [count, states, n], and two more: see `graph`, which has any T
        size = torch.Size([(self.T - 1) // k * len(self.states) * self.n + 2])
        self.checkpoints = (size, self.real, self.device, (1,)) if k < self.T else None
        self._no_states = (0,) * len(self.states)
        # the members of an argument that a call gives, in the order in which it lists them
        self._members: list[Member] = []
        if given:
            self._members += [("start", z) for z in self.states]
            self._members += [("step" if i in self.per_step else "in", i) for i in self.inputs]
            self._members += [("each" if p in self.repeats else "shared", p) for p in self.params]
        self._forward_members = (
            ("in", "x"),
            *(("out", name) for name in ("s", *call.record)),
            *(("last", z) for z in self.states),
            ("checkpoints", _ALONE),
            *self._members,
        )
        self._launches: dict[bool, _Launch] = {}  # of forward, by whether addresses are aligned
        self._arrivals: dict[Any, _Arriving] = {}
        self.compiled = front_end.compiled(self, x, given, gradients, is_gone)

    def _channels(self) -> Channels | None:
        """Those with which threads stay, where all parameters that have channels repeat alike."""
        alike = set(self.repeats.values())
        if len(alike) != 1 or (repeat := alike.pop()).order is None:
            return None
        channels = Channels(repeat.inner, repeat.period)
        walks = targets.by_name(self.target).walks_channels(self.n, channels)
        return channels if walks else None

    def prepare(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """x and the tensors in the dtype and layout that the kernels read (differentiably)."""
        if self.copies:
            x = x.resolve_neg().contiguous()
        if not self._prepared:
            tensors = [_as_read(t, saved) for t, saved in zip(tensors, self.saved, strict=True)]
        return x, tensors

    def forward(
        self, x: Tensor, tensors: Sequence[Tensor], save: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Spikes, last states, recorded sequences; and backward's checkpoints, if it needs any.

        x and the tensors are prepared; these are those of the values, in the model's order.
        """
        spikes = torch.empty_like(x)
        lasts = [self._empty_state() for _ in self.final]
        records = [torch.empty_like(x) for _ in self.call.record]
        checkpoints = None
        if save and self.checkpoints is not None:
            checkpoints = torch.empty(self.checkpoints[0], dtype=self.real, device=self.device)
        given, alive = self._addresses(tensors)
        pointers = [x.data_ptr(), spikes.data_ptr(), *[t.data_ptr() for t in records]]
        if 0 in pointers:
            check_memory(["x_seq", "the output"], [x, spikes])
        pointers += [t.data_ptr() for t in lasts] if lasts else self._no_states
        pointers += (_pointer(checkpoints), *given)
        aligned = not reduce(or_, pointers) & 15
        launch = self._launches.get(aligned) or self._load(aligned)
        launch.run(pointers)
        del alive
        return [spikes, *lasts, *records], checkpoints

    def backward(
        self,
        x: Tensor,
        checkpoints: Tensor | None,
        tensors: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> Gradients:
        """Gradients of x and of each tensor, as far as `wanted`; `grads` are the outputs'.

        Shapes and layouts of everything given are compared with the plan's.
        """
        if self.compiled is not None:
            found = self.compiled.backward(x, checkpoints, tensors, grads, wanted)
            if found is not None:
                return found  # type: ignore[no-any-return]
        x, tensors = self._as_planned(x, tensors)
        if (checkpoints is None) != (self.checkpoints is None):
            raise SpecError(f"the checkpoints {_CHANGED}")
        if checkpoints is not None and self.checkpoints is not None:
            checkpoints = as_saved(checkpoints, self.checkpoints, lambda: "the checkpoints")
        arriving = self._arriving(tuple([g is not None for g in grads]), tuple(wanted))
        last = 1 + len(self.final)
        arrived = [as_arrived(g, self._x) for g in (grads[0], *grads[last:]) if g is not None]
        ends = [None if g is None else as_arrived(g, self._state) for g in grads[1:last]]
        x_grad = torch.empty_like(x) if wanted[0] else None
        own: dict[str, Tensor] = {}
        for name, want in zip(self.given, wanted[1:], strict=True):
            if want and name not in arriving.summed and name not in arriving.by_channel:
                own[name] = torch.empty_like(x) if name in self.inputs else self._empty_state()
        given, alive = self._addresses(tensors)
        pointers = [x.data_ptr(), *[g.data_ptr() for g in arrived], _pointer(x_grad)]
        pointers += [_pointer(own.get(i)) for i in self.inputs]
        if not pointers[0]:
            check_memory(["x_seq"], [x])
        pointers += [_pointer(g) for g in ends] if ends else self._no_states
        pointers += [_pointer(own.get(z)) for z in self.states] if own else self._no_states
        pointers += (_pointer(checkpoints), *given)
        pointers += [own[p].data_ptr() for p in arriving.learned if p in own]
        aligned = not reduce(or_, pointers) & 15
        launch = arriving.launches.get(aligned) or self._load(aligned, arriving)
        parts = [
            (of, torch.empty(sizes, dtype=self.real, device=self.device))
            for of, sizes in self.partial_sums(arriving, launch.grid)
        ]
        launch.run([*pointers, *[partials.data_ptr() for _, partials in parts]])
        del alive
        if not self.given:
            return [x_grad]
        results: Gradients = [x_grad]
        totals: dict[str, Tensor] = {}
        for names, partials in parts:
            totals.update(zip(names, partials.sum(2).unbind(), strict=True))
        for name, tensor in zip(self.given, tensors, strict=True):
            if name in totals and name in self.repeats:
                back = self.repeats[name].back(totals[name], tensor.shape, self.shape)
                results.append(back)
            elif name in totals:
                results.append(totals[name].reshape(tensor.shape))
            elif name in self.per_step and name in own:
                neurons = tuple(range(1, x.dim()))
                results.append(own[name].sum(neurons, keepdim=True, dtype=self.real))
            else:
                results.append(own[name].sum_to_size(tensor.shape) if name in own else None)
        return results

    def partial_sums(self, arriving: _Arriving, grid: Grid) -> Iterator[tuple[Any, Any]]:
        """The parameters whose gradients a kernel sums in parts, and the sizes of these sums."""
        if of_channels := arriving.by_channel:
            yield of_channels, (len(of_channels), self.repeats[of_channels[0]].period, grid.slices)
        if summed := arriving.summed:
            yield summed, (len(summed), 1, grid.blocks)

    def _arriving(self, arrived: tuple[bool, ...], wanted: tuple[bool, ...]) -> _Arriving:
        key = (arrived, wanted)
        if key not in self._arrivals:
            last = 1 + len(self.final)
            present = zip(("s", *self.call.record), (arrived[0], *arrived[last:]), strict=True)
            want = {name for name, w in zip(self.given, wanted[1:], strict=True) if w}
            learned = tuple(p for p in self.params if p in want)
            summed = tuple(p for p in learned if p not in self.repeats)
            by_channel = tuple(p for p in learned if p in self.repeats and self.channels)
            sequences = tuple(n for n, here in present if here)
            members = (
                *(("in", name) for name in ("x", *sequences)),
                *(("out", name) for name in self.call.model.inputs),
                *(("last_grad", z) for z in self.states),
                *(("start_grad", z) for z in self.states),
                ("checkpoints", _ALONE),
                *self._members,
                *(("each_grad", p) for p in learned if p not in (*summed, *by_channel)),
                *([("channel_partials", _ALONE)] if by_channel else []),
                ("partials", _ALONE),
            )
            to_inputs = wanted[0] or not want.isdisjoint(self.inputs)
            self._arrivals[key] = _Arriving(
                key, sequences, learned, summed, by_channel, to_inputs, members, {}
            )
        return self._arrivals[key]

    def _as_planned(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """What was saved for backward, in the layout in which it was saved.

        Hooks may give it back in another one (save_on_cpu(pin_memory=True) does), which is mended;
        of another shape or dtype, or after `x.data = ...`, it is not what forward saw: SpecError.
        """
        model = self.call.model
        x = as_saved(x, self._x, lambda: "x_seq")
        if not tensors:
            return x, tensors
        saved = zip(self.given, tensors, self.saved, strict=True)
        return x, [as_saved(t, was, partial(label_of, model, name)) for name, t, was in saved]

    def _addresses(self, tensors: Sequence[Tensor]) -> tuple[Sequence[int], list[Tensor]]:
        """Where `_members` lie, 0 for numbers; and what must stay alive until the launch."""
        alive: list[Tensor] = []
        if not self.given:
            return (), alive
        addresses = dict.fromkeys(self.call.model.arguments, 0)
        for name, tensor in zip(self.given, tensors, strict=True):
            if not tensor.data_ptr():
                check_memory([label_of(self.call.model, name)], [tensor])
            if name in self.repeats:
                tensor = self.repeats[name].elements(tensor, self.shape, self.strides)
                alive.append(tensor)
            addresses[name] = tensor.data_ptr()
        return [*addresses.values()], alive

    def _empty_state(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.real, device=self.device)

    def _load(self, aligned: bool, arriving: _Arriving | None = None) -> _Launch:
        """The kernel for these gradients that arrive, the one of forward for None."""
        call, direction, sequences = self.call, "forward", self.call.record
        learned: tuple[str, ...] = ()
        launches, members, to_inputs = self._launches, self._forward_members, True
        if arriving:
            direction, sequences, learned = "backward", arriving.sequences, arriving.learned
            launches, members, to_inputs = arriving.launches, arriving.members, arriving.to_inputs
        wide = aligned
        if self.channels:  # lanes are of one channel, or of channels next to each other
            inner, period = self.channels
            wide = aligned and not (inner if inner > 1 else period) % 4
        shape = targets.by_name(self.target).shape(
            direction, self.dtype.itemsize, call.model, len(sequences), self.n, self.T, wide
        )
        spec = KernelSpec.of(
            call.model, self.target, direction, call.surrogate, call.reset, call.detach_reset,
            NAMES[self.dtype], per_neuron=self.per_neuron, by_channel=self.channels is not None,
            per_step=self.per_step, learned=learned, record=call.record,
            arriving=sequences if arriving else (), to_inputs=to_inputs, **shape._asdict(),
        )  # fmt: skip
        kernel = build.load_kernel(spec, self.device.index or 0)
        size = self.n, self.T
        launch = _Launch(spec, kernel, members, self._fixed(spec), size, self.channels)
        if self.compiled is not None:
            self.compiled.add(launch, aligned, arriving)
        return launches.setdefault(aligned, launch)

    def _fixed(self, spec: KernelSpec) -> dict[str, Mapping[str, float]]:
        """The groups of the argument that are the same in every call of the plan."""
        nowhere = dict.fromkeys(self.numbers, 0)
        return {
            **({} if self.given else {"start": nowhere, "shared": nowhere}),
            "inner": {p: self.repeats[p].inner for p in spec.each},
            "count": {p: self.repeats[p].period for p in spec.each},
            "N": {_ALONE: self.n},
            "start_value": self.numbers,
            "shared_value": self.numbers,
            "surrogate": self.call.surrogate.params,
            "T": {_ALONE: self.T},
        }


_CHANGED = (
    "that backward is given are not what forward saved: a saved-tensor hook, or .data, has changed"
    " them; run forward again, or leave them as they are"
)


def _is_read_so(tensor: Tensor, how: _Saved) -> bool:
    shape, dtype, _, strides = how
    same = (tensor.shape, tensor.dtype) == (shape, dtype) and not tensor.is_neg()
    return same and (strides is None or tensor.stride() == strides)


def _as_read(tensor: Tensor, how: _Saved) -> Tensor:
    """The tensor in the shape, dtype and layout that a kernel reads (differentiably)."""
    shape, dtype, _, strides = how
    tensor = tensor.to(dtype)
    if strides is None:
        return tensor.resolve_neg()
    return layout.in_layout(tensor.expand(shape), shape, strides)


def as_saved(tensor: Tensor, was: tuple[Any, ...], label: Callable[[], str]) -> Tensor:
    """The tensor in the layout that it was saved in, if it still has its shape and dtype."""
    shape, dtype, device, strides = was
    if (
        tensor.shape != shape
        or tensor.dtype is not dtype
        or tensor.device != device
        or tensor.layout is not torch.strided
    ):
        raise SpecError(
            f"the numbers of {label()} {_CHANGED} (saved: {tuple(shape)}, {dtype}, on {device};"
            f" now: {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}, {tensor.layout})"
        )
    if (strides is None or tensor.stride() == strides) and not tensor.is_neg():
        return tensor  # nearly all are so
    return layout.in_layout(tensor, shape, tensor.stride() if strides is None else strides)


def as_arrived(grad: Tensor, how: _Saved) -> Tensor:
    """A gradient that arrives, as a kernel reads it. Raises SpecError where a hook changed it."""
    shape, dtype, device, strides = how
    if (
        grad.layout is torch.strided
        and grad.stride() == strides
        and grad.shape == shape
        and grad.dtype is dtype
        and grad.device == device
        and not grad.is_neg()
        and grad.data_ptr()
    ):
        return grad  # nearly all are so
    if grad.layout is not torch.strided:
        grad = grad.to_dense()
    if grad.dtype != dtype or grad.shape != shape or grad.device != device:
        raise SpecError(
            f"a gradient arrives as {tuple(grad.shape)}, {grad.dtype}, {grad.device}; expected"
            f" {tuple(shape)}, {dtype}, {device}: a hook has changed it"
        )
    if is_zero_tensor(grad):
        grad = torch.zeros_like(grad)
    if grad.stride() != strides or grad.is_neg():
        grad = layout.in_layout(grad, shape, strides or grad.stride())
    if not grad.data_ptr():
        check_memory(["a gradient that arrives"], [grad])
    return grad


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
