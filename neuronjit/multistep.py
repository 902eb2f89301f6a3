"""The front end: check a call, find its kernel, launch it, and differentiate it for autograd."""

from __future__ import annotations

import math
import os
import struct
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import engine, reference, source, targets
from .errors import BackendError, DifferentiationError, InputTypeError, SpecError, known
from .neurons import NeuronModel, as_model
from .source import KernelSpec
from .surrogates import ATan, Surrogate, as_surrogate

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}
BACKENDS = ("auto", "cuda", "cpu", "eager")
_MEMO_LIMIT = 4096  # launches remembered; shapes that never come back must not fill the memory


class Output(NamedTuple):
    """What `multistep` returns."""

    spikes: Tensor  # [T, N, *], dtype of x_seq
    state: dict[str, Tensor]  # each [N, *], arithmetic dtype
    record: dict[str, Tensor]  # each [T, N, *], dtype of x_seq


def multistep(
    model: NeuronModel,
    x_seq: Tensor,
    state: Mapping[str, Tensor | float] | None = None,
    *,
    surrogate: Surrogate = ATan,
    reset: str = "hard",
    detach_reset: bool = False,
    record: Sequence[str] = (),
    backend: str | None = None,
    **params: Any,
) -> Output:
    """Run `model` over all time steps of `x_seq` in one kernel, differentiably.

    Args:
        model: a `NeuronModel`, e.g. `neuronjit.neurons.LIF`.
        x_seq: input `[T, N, *]`, time first; float32, float16, bfloat16 or float64. Arithmetic is in float32
            (float64 for float64).
        state: initial states by name, each a number or a floating tensor `[N, *]`; the model's own where missing.
            Pass the `state` of an earlier output to go on from there.
        surrogate: replaces the derivative of the step function; `spiking=False` gives its smooth primitive.
        reset: "hard" (v becomes v_reset) or "soft" (v_threshold is subtracted; v_reset is then 0 unless given).
            A model that assigns v itself keeps its own.
        detach_reset: cut the gradient through the spike in the reset.
        record: names of sequences to return as well: any state, or "h", the charged membrane potential.
        backend: "cuda", "cpu", "eager", or "auto" (the default; also NEURONJIT_BACKEND): the kernel for
            x_seq's device, else eager PyTorch with one warning.
        **params: the model's parameters: a number, a one-element tensor, or a tensor that broadcasts to `[N, *]`.
            Tensors that require grad get their gradient.

    Returns:
        `Output(spikes, state, record)`.

    Raises:
        SpecError (a ValueError): unknown names, wrong shapes or devices, numbers out of range.
        InputTypeError (a TypeError): wrong types or dtypes.
        BackendError, CompileError, MissingKernelError: no kernel can be had; see `neuronjit.errors`.
    """
    if type(model) is not NeuronModel:
        model = as_model(model)
    if type(surrogate) is not Surrogate:
        surrogate = as_surrogate(surrogate)
    x = _check_input(x_seq)
    names = (*model.state, *model.params)
    reset, given = _settle(model, reset, state, params)
    record = _check_record(model, record)
    values, tensors = _check_values(model, names, given, reset, x)
    target = _target(backend, x)
    if target != "eager" and x.numel():
        call = _Call(model, surrogate, reset, bool(detach_reset), record, target, x, names, values, tuple(tensors))
        try:
            outputs = call.run(x, tuple(tensors.values()))
        except BackendError as error:
            if backend not in (None, "auto") or _environment_backend() != "auto":
                raise
            _warn_once(f"neuronjit runs in eager PyTorch, which is slow: {error}")
        else:
            states = len(model.state)
            return Output(
                outputs[0],
                dict(zip(model.state, outputs[1 : 1 + states], strict=True)),
                dict(zip(record, outputs[1 + states :], strict=True)),
            )
    everything = dict(zip(names, values, strict=True)) | tensors
    return Output(*reference.run(model, x, everything, surrogate, reset, bool(detach_reset), record))


# --- checks --------------------------------------------------------------------------------------


def _check_input(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise InputTypeError(f"x_seq must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise InputTypeError(f"x_seq must be one of {', '.join(DTYPES.values())}, got {x.dtype}; use x_seq.float()")
    if x.layout != torch.strided or x.is_nested:
        raise InputTypeError(f"x_seq must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}; use .to_dense()")
    if not x.dim():
        raise SpecError("x_seq needs a time dimension: [T, N, *], got a 0-dim tensor")
    return x


def _settle(model: NeuronModel, reset: str, state: Any, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The reset to use, and what was given by name, states and parameters together."""
    for name in params:
        if name not in model.params:
            raise SpecError(f"unknown parameter '{name}' of model '{model.name}'. {known(model.params)}")
    if reset not in ("hard", "soft"):
        raise SpecError(f"unknown reset {ascii(reset)[:80]}. {known(['hard', 'soft'])}")
    if params.get("v_reset", 0.0) is None:
        reset = "soft"
        del params["v_reset"]
    if reset == "soft":
        params.setdefault("v_reset", 0.0)
    if state is not None:
        if not isinstance(state, Mapping):
            raise InputTypeError(f"state must be a mapping from names to tensors or numbers, got {type(state).__name__}")
        for name in state:
            if name not in model.state:
                raise SpecError(f"unknown state {ascii(name)[:80]} of model '{model.name}'. {known(model.state)}")
        params = {**params, **state}
    return "own" if model.own_reset else reset, params


def _check_record(model: NeuronModel, record: Any) -> tuple[str, ...]:
    if not record:
        return ()
    record = (record,) if isinstance(record, str) else tuple(record)
    for name in record:
        if name != "h" and name not in model.state:
            raise SpecError(f"cannot record {ascii(name)[:80]}. {known([*model.state, 'h'])}")
    return tuple(n for n in (*model.state, "h") if n in record)


def _check_values(
    model: NeuronModel, names: tuple[str, ...], given: dict[str, Any], reset: str, x: Tensor
) -> tuple[tuple[float, ...], dict[str, Tensor]]:
    """Split what was given into numbers (0.0 where a tensor takes its place) and checked tensors."""
    numbers: list[float | None] = []
    tensors: dict[str, Tensor] = {}
    for name in names:
        value = given.get(name)
        if value is None:
            value = model.state[name] if name in model.state else model.params[name]
        if isinstance(value, Tensor):
            tensors[name] = _check_tensor(name, value, x, is_state=name in model.state)
            numbers.append(None)
        else:
            numbers.append(_as_number(name, value))
    return _check_numbers(model, names, tuple(numbers), reset, x.dtype), tensors


def _as_number(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise InputTypeError(f"{name} must be a number or a tensor, got {type(value).__name__}") from None


@lru_cache(maxsize=_MEMO_LIMIT)
def _check_numbers(
    model: NeuronModel, names: tuple[str, ...], numbers: tuple[float | None, ...], reset: str, dtype: torch.dtype
) -> tuple[float, ...]:
    largest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max
    for name, value in zip(names, numbers, strict=True):
        if value is None:
            continue
        if not abs(value) <= largest:
            raise SpecError(f"{name} must be finite (and fit float32 unless x_seq is float64), got {value}")
        if name in model.positive and not value > 0:
            raise SpecError(f"{name} must be finite and > 0, got {value}")
    by_name = dict(zip(names, numbers, strict=True))
    threshold, back = by_name["v_threshold"], by_name["v_reset"]
    if reset == "hard" and threshold is not None and back is not None and back >= threshold:
        warnings.warn(f"v_reset={back} is not below v_threshold={threshold}: neurons fire at every step", stacklevel=4)
    return tuple(0.0 if value is None else value for value in numbers)


def _check_tensor(name: str, value: Tensor, x: Tensor, is_state: bool) -> Tensor:
    label = f"{name}_init" if is_state else name
    if not value.dtype.is_floating_point:
        raise InputTypeError(f"{label} must be floating point, got {value.dtype}")
    if value.device != x.device:
        raise SpecError(f"x_seq is on {x.device} but {label} is on {value.device}; move one of them")
    if value.layout != torch.strided:
        raise InputTypeError(f"{label} must be a dense tensor, got {value.layout}")
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    if value.dtype != real:
        value = value.to(real)
    shape = x.shape[1:]
    if is_state:
        if value.dim() == 0:
            return value.expand(shape)
        if value.shape != shape:
            hint = "; use .expand(...) to repeat one value" if value.numel() == 1 else ""
            raise SpecError(f"{label} has shape {tuple(value.shape)}, expected {tuple(shape)} = x_seq.shape[1:]{hint}")
    elif value.numel() != 1:
        try:
            fits = torch.broadcast_shapes(value.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise SpecError(
                f"{name} has shape {tuple(value.shape)}, which does not broadcast to x_seq.shape[1:] = {tuple(shape)}"
            )
    return value


# --- which kernels, and where --------------------------------------------------------------------


def _environment_backend() -> str:
    return os.environ.get("NEURONJIT_BACKEND") or "auto"


def _target(backend: str | None, x: Tensor) -> str:
    """The target that serves x: "cuda", "cpu", or "eager"."""
    backend = backend if backend not in (None, "auto") else _environment_backend()
    device = x.device.type
    if backend not in BACKENDS:
        raise SpecError(f"unknown backend {ascii(backend)[:80]}. {known(BACKENDS)}")
    if backend == "auto":
        if device not in source.TARGETS:
            _warn_once(f"neuronjit runs in eager PyTorch on {device}; kernels exist for {' and '.join(source.TARGETS)}")
            return "eager"
        return device
    if backend not in ("eager", device):
        raise BackendError(f"backend='{backend}' was asked for, but x_seq is on {x.device}; move it or use backend='auto'")
    return backend


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)


class _Launch(NamedTuple):
    kernel: Any
    pack: Any  # struct.Struct(...).pack, in the order of source.arguments


_launches: dict[tuple[Any, ...], _Launch] = {}


def _remember(key: tuple[Any, ...], spec: KernelSpec, device: int) -> _Launch:
    codes = "".join(field.code for field in source.arguments(spec))
    launch = _Launch(engine.load_kernel(spec, device), struct.Struct(f"@{codes}0q").pack)
    if len(_launches) >= _MEMO_LIMIT:
        _launches.clear()
    _launches[key] = launch
    return launch


# --- one call ------------------------------------------------------------------------------------


class _Call:
    """All of one call but its tensors: what backward needs to know of forward."""

    __slots__ = (
        "model", "surrogate", "reset", "detach_reset", "record", "target", "names", "values", "given",
        "steps", "n", "shape", "strides", "dtype", "real", "device", "repeats", "per_neuron", "k",
    )  # fmt: skip

    def __init__(
        self,
        model: NeuronModel,
        surrogate: Surrogate,
        reset: str,
        detach_reset: bool,
        record: tuple[str, ...],
        target: str,
        x: Tensor,
        names: tuple[str, ...],
        values: tuple[float, ...],
        given: tuple[str, ...],
    ) -> None:
        self.model, self.surrogate, self.reset, self.detach_reset = model, surrogate, reset, detach_reset
        self.record, self.target, self.names, self.values, self.given = record, target, names, values, given
        self.steps = x.shape[0]
        self.n = x.numel() // self.steps
        self.dtype = x.dtype
        self.real = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.device = x.device
        self.per_neuron: tuple[str, ...] = ()
        self.repeats: dict[str, _Repeat] = {}

    def run(self, x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = _dense(x)
        self.shape, self.strides = x.shape[1:], x.stride()[1:]
        tensors = tuple(
            _in_layout(t, self.shape, self.strides) if name in self.model.state else t
            for name, t in zip(self.given, tensors, strict=True)
        )
        for name, t in zip(self.given, tensors, strict=True):
            if name in self.model.params and t.numel() != 1:
                self.repeats[name] = _repeat(t.shape, self.shape, self.strides)
        self.per_neuron = tuple(p for p in self.model.params if p in self.repeats)
        if torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors)):
            return _Multistep.apply(self, x, *tensors)  # type: ignore[no-any-return]
        return self.forward(x, tensors, save=False)[0]

    def forward(self, x: Tensor, tensors: tuple[Tensor, ...], save: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The outputs (spikes, last states, recorded sequences), and the checkpoints if there are any."""
        states = self.model.state
        spikes = torch.empty_like(x)
        lasts = [self._empty_state() for _ in states]
        records = [torch.empty_like(x) for _ in self.record]
        pointers, counts, kept = self._inputs(tensors)
        shape = self._shape("forward", [x.data_ptr(), *pointers])
        checkpoints = None
        if save and self.steps > shape.steps:
            count = (self.steps - 1) // shape.steps
            checkpoints = torch.empty((count, len(states), self.n), dtype=self.real, device=self.device)
        key = (self.model, self.reset, self.dtype, self.device, self.per_neuron, self.record, shape)
        smooth = () if self.surrogate.spiking else self.surrogate.values
        if smooth or not self.surrogate.spiking:
            key += (self.surrogate.form,)
        launch = _launches.get(key) or _remember(key, self._spec("forward", self.record, (), shape), self._index())
        launch.kernel.launch(
            launch.pack(
                x.data_ptr(), spikes.data_ptr(), *[t.data_ptr() for t in records], *[t.data_ptr() for t in lasts],
                _pointer(checkpoints), 0, *pointers, *counts, self.n,
                *self._numbers(), *smooth, self.steps,
            ),
            self.n,
            self.steps,
        )  # fmt: skip
        del kept
        return (spikes, *lasts, *records), checkpoints

    def backward(
        self,
        x: Tensor,
        checkpoints: Tensor | None,
        tensors: tuple[Tensor, ...],
        grads: tuple[Tensor | None, ...],
        wanted: tuple[bool, ...],
    ) -> list[Tensor | None]:
        """Gradients of x and of each tensor, as far as `wanted`."""
        states = list(self.model.state)
        sequence_grads = {
            name: _in_layout(grad, x.shape, x.stride())
            for name, grad in zip(("s", *self.record), (grads[0], *grads[1 + len(states) :]), strict=True)
            if grad is not None
        }
        last_grads = [None if g is None else _in_layout(g, self.shape, self.strides) for g in grads[1 : 1 + len(states)]]
        want = dict(zip(self.given, wanted[1:], strict=True))
        learned = tuple(p for p in self.model.params if want.get(p))
        own = [p for p in learned if p in self.repeats]  # a gradient for each neuron
        summed = [p for p in learned if p not in self.repeats]
        x_grad = torch.empty_like(x) if wanted[0] else None
        state_grads = {z: self._empty_state() for z in states if want.get(z)}
        own_grads = {p: self._empty_state() for p in own}
        pointers, counts, kept = self._inputs(tensors)
        arrived = [t.data_ptr() for t in sequence_grads.values()] + [_pointer(g) for g in last_grads]
        shape = self._shape("backward", [x.data_ptr(), *pointers, *arrived])
        sequences = tuple(sequence_grads)
        key = (
            self.model, self.reset, self.dtype, self.device, self.per_neuron, sequences, shape, learned,
            self.surrogate.form, self.surrogate.spiking, self.detach_reset,
        )  # fmt: skip
        launch = _launches.get(key) or _remember(key, self._spec("backward", sequences, learned, shape), self._index())
        partials = (
            torch.empty((len(summed), launch.kernel.blocks(self.n)), dtype=self.real, device=self.device) if summed else None
        )
        launch.kernel.launch(
            launch.pack(
                x.data_ptr(), _pointer(x_grad), *arrived, *[_pointer(state_grads.get(z)) for z in states],
                _pointer(checkpoints), *[t.data_ptr() for t in own_grads.values()],
                _pointer(partials), *pointers, *counts, self.n,
                *self._numbers(), *self.surrogate.values, self.steps,
            ),
            self.n,
            self.steps,
        )  # fmt: skip
        del kept
        results: list[Tensor | None] = [x_grad]
        totals = dict(zip(summed, partials.sum(1), strict=True)) if partials is not None else {}
        for name, tensor in zip(self.given, tensors, strict=True):
            if name in totals:
                results.append(totals[name].reshape(tensor.shape))
            elif name in own_grads:
                results.append(own_grads[name].sum_to_size(tensor.shape))
            else:
                results.append(state_grads.get(name))
        return results

    def _inputs(self, tensors: tuple[Tensor, ...]) -> tuple[list[int], list[int], list[Tensor]]:
        """Pointers of every state and parameter (0: use the number), repeat counts, and what must stay alive."""
        pointers, counts, kept = dict.fromkeys(self.names, 0), [], []
        for name, tensor in zip(self.given, tensors, strict=True):
            if name in self.repeats:
                tensor = self.repeats[name].apply(tensor, self.shape, self.strides)
                kept.append(tensor)
            pointers[name] = tensor.data_ptr()
        for name in self.per_neuron:
            counts += [self.repeats[name].inner, self.repeats[name].count]
        return list(pointers.values()), counts, kept

    def _numbers(self) -> list[float]:
        if not self.per_neuron:
            return list(self.values)
        return [v for name, v in zip(self.names, self.values, strict=True) if name not in self.repeats]

    def _empty_state(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.real, device=self.device)

    def _index(self) -> int:
        return self.device.index or 0

    def _shape(self, direction: str, pointers: list[int]) -> targets.Shape:
        every = 0
        for pointer in pointers:
            every |= pointer
        target = targets.by_name(self.target)
        return target.shape(  # type: ignore[no-any-return]
            direction, self.dtype.itemsize, len(self.model.state), len(self.record), self.n, self.steps, every % 16 == 0
        )

    def _spec(self, direction: str, sequences: tuple[str, ...], learned: tuple[str, ...], shape: targets.Shape) -> KernelSpec:
        backward = direction == "backward"
        evaluated = backward or not self.surrogate.spiking
        return KernelSpec(
            self.model,
            self.target,
            direction,
            DTYPES[self.dtype],
            self.reset,
            surrogate=self.surrogate.form if evaluated else None,
            spiking=self.surrogate.spiking,
            detach_reset=self.detach_reset and backward,
            per_neuron=self.per_neuron,
            learned=learned,
            sequences=sequences,
            **shape._asdict(),
        )


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Multistep(torch.autograd.Function):
    """Forward saves x, the initial states and a checkpoint every K steps; backward runs the steps again."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs, checkpoints = call.forward(x, tensors, save=True)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, checkpoints, *tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, checkpoints, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if all(grad is None for grad in grads):
            return (None, *(None for _ in wanted))
        results = ctx.call.backward(x, checkpoints, tuple(tensors), grads, wanted)
        if torch.is_grad_enabled():  # create_graph=True: say so only if somebody differentiates again
            results = [None if r is None else _Once.apply(r, *(g for g in grads if g is not None), x) for r in results]
        return (None, *results)


class _Once(torch.autograd.Function):
    """The identity, whose own gradient is the error that a second derivative deserves."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *inputs: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise DifferentiationError("the kernels have first derivatives only; use backend='eager' for a second derivative")


# --- layouts -------------------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    """x itself if its steps lie one after the other without gaps, in whatever order of dimensions; else a copy."""
    if x.is_contiguous():
        return x
    if x.shape[0] > 1 and x.stride(0) != x.numel() // x.shape[0]:
        return x.contiguous()
    # (negative and conjugate views and expanded inputs do not get here or are copied by the check below)
    return x if not x.is_neg() and _is_packed(x.shape[1:], x.stride()[1:]) else x.contiguous()


@lru_cache(maxsize=_MEMO_LIMIT)
def _is_packed(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(strides, shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _in_layout(tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The tensor with exactly these strides, copied only if it has others."""
    if tensor.stride() == tuple(strides) and not tensor.is_neg():
        return tensor
    if all(a == b or size == 1 for a, b, size in zip(tensor.stride(), strides, shape, strict=True)) and not tensor.is_neg():
        return tensor
    if torch.is_grad_enabled() and tensor.requires_grad:
        order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
        back = [order.index(d) for d in range(len(shape))]
        return tensor.permute(order).contiguous().permute(back)
    return torch.empty_strided(tuple(shape), tuple(strides), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class _Repeat(NamedTuple):
    """How a broadcast parameter repeats over the neurons of a layout: neuron n reads element n // inner % count."""

    inner: int
    count: int
    order: tuple[int, ...] | None  # its dimensions in the order of the layout; None: expanded to every neuron

    def apply(self, tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        if self.order is None:
            return _in_layout(tensor.detach().expand(tuple(shape)), shape, strides)
        tensor = tensor.reshape((1,) * (len(shape) - tensor.dim()) + tensor.shape)
        return tensor.permute(self.order).contiguous()


@lru_cache(maxsize=_MEMO_LIMIT)
def _repeat(param: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...]) -> _Repeat:
    padded = (1,) * (len(shape) - len(param)) + tuple(param)
    order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
    own = [d for d in order if padded[d] > 1]
    adjacent = all(strides[a] == strides[b] * shape[b] for a, b in zip(own, own[1:], strict=False))
    if not adjacent:
        return _Repeat(1, math.prod(shape), None)
    return _Repeat(strides[own[-1]], math.prod(padded), tuple(order))
