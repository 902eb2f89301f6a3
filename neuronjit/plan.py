"""A plan: all of a call but its tensors, checked once: a warm call allocates and launches."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import engine, layout, targets
from .checks import DTYPES, arithmetic
from .neurons import NeuronModel
from .source import KernelSpec, arguments
from .surrogates import Surrogate


class _Launch(NamedTuple):
    run: Any  # the kernel's launch(packed, n, steps)
    blocks: Any  # the kernel's blocks(n)
    pack: Any  # struct.Struct(...).pack, in the order of source.arguments
    spacing: int  # steps between checkpoints


class Plan:
    """How to run one model on sequences of one shape, dtype, layout and device.

    `given` has the states and parameters that are tensors, in the order in which tensors come
    later; `numbers` has all others.
    """

    def __init__(
        self,
        model: NeuronModel,
        surrogate: Surrogate,
        reset: str,
        detach_reset: bool,
        record: tuple[str, ...],
        final_state: bool,
        target: str,
        x: Tensor,
        given: dict[str, Tensor],
        numbers: dict[str, float],
    ) -> None:
        self.model, self.surrogate, self.target = model, surrogate, target
        self.reset, self.detach_reset, self.record = reset, detach_reset, record
        self.final = tuple(model.state) if final_state else ()
        self.given, self.numbers = tuple(given), numbers
        self.states, self.params = tuple(model.state), tuple(model.params)
        self.dtype, self.real, self.device = x.dtype, arithmetic(x.dtype), x.device
        self.steps, self.n, self.shape = x.shape[0], x[0].numel(), x.shape[1:]
        self.copies = x.is_neg() or not layout.is_sequence(x.shape, x.stride())
        self.strides = x[0].contiguous().stride() if self.copies else x.stride()[1:]
        self.repeats = {
            name: layout.repeat(tensor.shape, self.shape, self.strides)
            for name, tensor in given.items()
            if name in model.params and tensor.numel() != 1
        }
        self.per_neuron = tuple(p for p in self.params if p in self.repeats)
        self.position = {name: i for i, name in enumerate((*self.states, *self.params))}
        shared = [numbers.get(n, 0.0) for n in self.position if n not in self.repeats]
        counts = [c for p in self.per_neuron for c in self.repeats[p][:2]]
        smooth = [] if surrogate.spiking else surrogate.values
        self._forward_tail = (*counts, self.n, *shared, *smooth, self.steps)
        self._backward_tail = (*counts, self.n, *shared, *surrogate.values, self.steps)
        self._prepared = not any(
            t.dtype != self.real
            or t.is_neg()
            or (name in model.state and t.stride() != self.strides)
            for name, t in given.items()
        )
        self._no_states, self._no_inputs = [0] * len(self.states), [0] * len(self.position)
        self._launches: dict[Any, _Launch] = {}
        self._arrivals: dict[Any, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {}

    def prepare(self, x: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """x and the tensors in the dtype and layout that the kernels read (differentiably)."""
        if self.copies:
            x = x.resolve_neg().contiguous()
        if not self._prepared:
            tensors = [
                layout.in_layout(t.to(self.real).expand(self.shape), self.shape, self.strides)
                if name in self.model.state
                else t.to(self.real).resolve_neg()
                for name, t in zip(self.given, tensors, strict=True)
            ]
        return x, tensors

    def forward(
        self, x: Tensor, tensors: Sequence[Tensor], save: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Spikes, last states, recorded sequences; and backward's checkpoints, if it needs any."""
        spikes = torch.empty_like(x)
        lasts = [self._empty_state() for _ in self.final]
        records = [torch.empty_like(x) for _ in self.record]
        inputs, alive = self._inputs(tensors)
        pointers = [x.data_ptr(), spikes.data_ptr(), *[t.data_ptr() for t in records]]
        if not pointers[1]:
            raise RuntimeError("these tensors have no memory of their own (torch.func, a mode)")
        pointers += [t.data_ptr() for t in lasts] if lasts else self._no_states
        aligned = not reduce(or_, (*pointers, *inputs)) & 15
        launch = self._launches.get(aligned) or self._load(aligned, "forward", self.record, ())
        checkpoints = None
        if save and self.steps > launch.spacing:
            # [count, states, n], and two more: see `operators`, where a graph holds it for any T
            size = (self.steps - 1) // launch.spacing * len(self.states) * self.n + 2
            checkpoints = torch.empty(size, dtype=self.real, device=self.device)
        packed = launch.pack(*pointers, _pointer(checkpoints), 0, *inputs, *self._forward_tail)
        launch.run(packed, self.n, self.steps)
        del alive
        return [spikes, *lasts, *records], checkpoints

    def backward(
        self,
        x: Tensor,
        checkpoints: Tensor | None,
        tensors: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        wanted: tuple[bool, ...],
    ) -> list[Tensor | None]:
        """Gradients of x and of each tensor, as far as `wanted`; `grads` are the outputs'."""
        sequences, learned, summed = self._arriving(tuple([g is not None for g in grads]), wanted)
        strides, last = x.stride(), 1 + len(self.final)
        arrived = [
            g if g.stride() == strides and not g.is_neg() else layout.in_layout(g, x.shape, strides)
            for g in (grads[0], *grads[last:])
            if g is not None
        ]
        ends = [
            None if g is None else layout.in_layout(g, self.shape, self.strides)
            for g in grads[1:last]
        ]
        x_grad = torch.empty_like(x) if wanted[0] else None
        own: dict[str, Tensor] = {}
        for name, want in zip(self.given, wanted[1:], strict=True):
            if want and name not in summed:
                own[name] = self._empty_state()
        inputs, alive = self._inputs(tensors)
        pointers = [x.data_ptr(), _pointer(x_grad), *[g.data_ptr() for g in arrived]]
        pointers += [_pointer(g) for g in ends] if ends else self._no_states
        pointers += [_pointer(own.get(z)) for z in self.states] if own else self._no_states
        pointers.append(_pointer(checkpoints))
        pointers += [own[p].data_ptr() for p in learned if p in own]
        aligned = not reduce(or_, (*pointers, *inputs)) & 15
        key = (aligned, sequences, learned)
        launch = self._launches.get(key) or self._load(key, "backward", sequences, learned)
        partials = None
        if summed:
            size = (len(summed), launch.blocks(self.n))
            partials = torch.empty(size, dtype=self.real, device=self.device)
        packed = launch.pack(*pointers, _pointer(partials), *inputs, *self._backward_tail)
        launch.run(packed, self.n, self.steps)
        del alive
        if not self.given:
            return [x_grad]
        results: list[Tensor | None] = [x_grad]
        totals = {} if partials is None else dict(zip(summed, partials.sum(1), strict=True))
        for name, tensor in zip(self.given, tensors, strict=True):
            if name in totals:
                results.append(totals[name].reshape(tensor.shape))
            else:
                results.append(own[name].sum_to_size(tensor.shape) if name in own else None)
        return results

    def _arriving(
        self, arrived: tuple[bool, ...], wanted: tuple[bool, ...]
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Sequences whose gradients arrive; learned parameters; those that all neurons share."""
        key = (arrived, wanted)
        if key not in self._arrivals:
            last = 1 + len(self.final)
            present = zip(("s", *self.record), (arrived[0], *arrived[last:]), strict=True)
            want = {name for name, w in zip(self.given, wanted[1:], strict=True) if w}
            learned = tuple(p for p in self.params if p in want)
            summed = tuple(p for p in learned if p not in self.repeats)
            self._arrivals[key] = tuple(n for n, here in present if here), learned, summed
        return self._arrivals[key]

    def _inputs(self, tensors: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
        """Pointers to all states and parameters, 0 for numbers; and what must stay alive."""
        alive: list[Tensor] = []
        if not self.given:
            return self._no_inputs, alive
        pointers = self._no_inputs.copy()
        for name, tensor in zip(self.given, tensors, strict=True):
            if name in self.repeats:
                tensor = self.repeats[name].elements(tensor.detach(), self.shape, self.strides)
                alive.append(tensor)
            pointers[self.position[name]] = tensor.data_ptr()
        return pointers, alive

    def _empty_state(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.real, device=self.device)

    def _load(
        self, key: Any, direction: str, sequences: tuple[str, ...], learned: tuple[str, ...]
    ) -> _Launch:
        aligned = key if direction == "forward" else key[0]
        shape = targets.by_name(self.target).shape(
            direction, self.dtype.itemsize, self.model, len(sequences), self.n, self.steps, aligned
        )
        backward = direction == "backward"
        spec = KernelSpec(
            self.model,
            self.target,
            direction,
            DTYPES[self.dtype],
            self.reset,
            surrogate=self.surrogate.form if backward or not self.surrogate.spiking else None,
            spiking=self.surrogate.spiking,
            detach_reset=self.detach_reset and backward,
            per_neuron=self.per_neuron,
            learned=learned,
            sequences=sequences,
            **shape._asdict(),
        )
        codes = "".join(field.code for field in arguments(spec))
        kernel = engine.load_kernel(spec, self.device.index or 0)
        pack = struct.Struct(f"@{codes}0q").pack
        return self._launches.setdefault(
            key, _Launch(kernel.launch, kernel.blocks, pack, spec.steps)
        )


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
