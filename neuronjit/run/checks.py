"""What a call of `multistep` may be given; everything else is an error at the caller's line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import neurons
from ..errors import (
    DifferentiationError,
    InputTypeError,
    SpecError,
    expect_known,
    expect_number,
    known,
)
from ..kernels.spec import DTYPES, NAMES
from ..language.parse import nearest
from ..models.block import RESETS
from ..models.model import NeuronModel
from ..settings import warn
from ..torch_private import is_zero_tensor, transformed

MOST_STEPS = 2**31 - 1  # T is an int in kernels


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, parameters and all arithmetic, for sequences of `dtype`."""
    return DTYPES[NAMES[dtype]].arithmetic


def check_input(x: Any) -> None:
    """Raise InputTypeError or SpecError if x cannot be an input sequence."""
    if not isinstance(x, Tensor):
        raise InputTypeError(f"x_seq must be a torch.Tensor, got {type(x).__name__}")
    check_class("x_seq", x)
    if x.dtype not in NAMES:
        raise InputTypeError(
            f"x_seq must be floating point, one of {', '.join(DTYPES)}, got {x.dtype};"
            " use x_seq.float()"
        )
    _check_dense("x_seq", x)
    if not x.dim():
        raise SpecError("x_seq needs a time dimension: [T, N, *], got a 0-dim tensor")
    if isinstance(x.shape[0], int) and x.shape[0] > MOST_STEPS:
        raise SpecError(f"x_seq has {x.shape[0]} time steps; at most {MOST_STEPS} are possible")


def _check_dense(label: str, value: Tensor) -> None:
    if value.is_nested or value.layout != torch.strided:
        layout = "a nested one" if value.is_nested else str(value.layout)
        raise InputTypeError(f"{label} must be a dense tensor, got {layout}; use .to_dense()")


def is_traced(*values: Any) -> bool:
    """Whether one is a tensor without numbers of its own: FakeTensor, FunctionalTensor, ..."""
    plain = Tensor.__torch_dispatch__
    return any(isinstance(v, Tensor) and type(v).__torch_dispatch__ is not plain for v in values)


def check_class(label: str, value: Tensor) -> None:
    """Raise InputTypeError for subclasses other than Parameter.

    Kernels read raw memory and would ignore what the subclass means.
    """
    if type(value) is not Tensor and not isinstance(value, Parameter) and not is_traced(value):
        raise InputTypeError(
            f"{label} must be a plain torch.Tensor, got {type(value).__name__};"
            f" use {label}.as_subclass(torch.Tensor)"
        )


def no_transforms(reason: str) -> DifferentiationError:
    """The error for transforms of torch.func, which would look into kernels."""
    return DifferentiationError(
        "the kernels have no rules for torch.func (vmap, grad, jvp, ...) and batched gradients;"
        f" use backend='eager', or torch.autograd.grad ({reason[:80]})"
    )


def check_memory(labels: Iterable[str], tensors: Iterable[Tensor]) -> None:
    """Raise SpecError, by name, if a tensor has no memory: its address would mean "not given"."""
    for label, tensor in zip(labels, tensors, strict=True):
        if tensor.numel() and not tensor.data_ptr():
            if transformed():
                raise no_transforms(f"{label} has no memory of its own")
            zero = " (it is a zero tensor of torch: use .clone())" if is_zero_tensor(tensor) else ""
            raise SpecError(
                f"{label} has no memory of its own{zero}: its storage was freed, or a transform of"
                " torch stands in for it; give it memory, or use backend='eager'"
            )


def check_no_tangents(*tensors: Tensor) -> None:
    """Raise DifferentiationError if a derivative goes forward through the call.

    Kernels would drop it silently.
    """
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise DifferentiationError(
            "the kernels have no forward-mode derivative (jvp); use backend='eager'"
        )


def check_names(
    model: NeuronModel, reset: Any, state: Mapping[Any, Any], params: Mapping[str, Any]
) -> None:
    """Raise SpecError unless the model has these states and parameters, and there is this reset."""
    expect_known(reset, RESETS, "reset")
    for name in params:
        if name not in model.keywords:
            meant = nearest(name, model.keywords) or "."
            having = [m.name for m in neurons.built_in().values() if name in m.params]
            meant += f" Models that have it: {', '.join(having)}." if having else ""
            raise SpecError(
                f"unknown parameter '{name}' of model '{model.name}'{meant} {known(model.keywords)}"
            )
    for name in model.inputs[1:]:
        if name not in params:
            raise SpecError(
                f"the input '{name}' of model '{model.name}' is missing: give {name}=, a tensor"
                " that broadcasts to x_seq's [T, N, *]"
            )
    for name in state:
        if name not in model.state:
            raise SpecError(
                f"unknown state {ascii(name)[:80]} of model '{model.name}'. {known(model.state)}"
            )


def check_record(model: NeuronModel, record: tuple[Any, ...]) -> tuple[str, ...]:
    """The names to record in the model's order. Raises SpecError."""
    for name in record:
        if name not in model.recordable:
            raise SpecError(f"cannot record {ascii(name)[:80]}. {known(model.recordable)}")
    return tuple(name for name in model.recordable if name in record)


def as_flag(label: str, value: Any) -> bool:
    """True or False, if it is one. Raises InputTypeError."""
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("int", "bool_", "bool") and value in (0, 1):  # numpy's bool too
        return bool(value)
    raise InputTypeError(f"{label} must be True or False, got {ascii(value)[:80]}")


def check_value(model: NeuronModel, name: str, value: Any, x: Tensor) -> float | Tensor:
    """What was given for a state, input or parameter: its tensor or number.

    Raises what says why it cannot be.
    """
    if isinstance(value, Tensor):
        check_tensor(model, name, value, x)
        return value
    if name in model.inputs:
        raise InputTypeError(
            f"{name} is an input: a tensor that broadcasts to x_seq's {list(x.shape)}, got"
            f" {type(value).__name__}"
        )
    return check_number(model, name, value, x.dtype)


def check_number(model: NeuronModel, name: str, value: Any, dtype: torch.dtype) -> float:
    """The number that was given for a state or parameter. Raises InputTypeError, SpecError."""
    real = arithmetic(dtype)
    rule = f"must be finite and fit {real}"
    most = torch.finfo(real).max
    number = expect_number(value, name, kind="a number or a tensor", most=most, rule=rule)
    if name in model.positive and not number > 0:
        raise SpecError(f"{name} must be finite and > 0, got {number}")
    return number


def check_reset(reset: str, values: Mapping[str, Any]) -> None:
    """Warn of a hard reset to where the neuron fires again."""
    threshold, back = values.get("v_threshold"), values.get("v_reset")
    if reset == "hard" and isinstance(threshold, float) and isinstance(back, float):
        if back < threshold:
            return
        warn(
            f"v_reset={back} is not below v_threshold={threshold}: a neuron that fired fires again"
        )


def label_of(model: NeuronModel, name: str) -> str:
    """What errors call a state or parameter."""
    return f"{name}_init" if name in model.state else name


def check_tensor(model: NeuronModel, name: str, value: Tensor, x: Tensor) -> None:
    """Raise what says why a tensor cannot be an initial state, an input or a parameter for x."""
    is_state, label = name in model.state, label_of(model, name)
    check_class(label, value)
    _check_dense(label, value)
    if not value.dtype.is_floating_point:
        raise InputTypeError(f"{label} must be floating point, got {value.dtype}")
    if value.device != x.device:
        raise SpecError(
            f"x_seq is on {x.device} but {label} is on {value.device}; move one of them"
        )
    shape, given = tuple(x.shape[1:]), tuple(value.shape)
    if name in model.inputs:
        if not _broadcasts(given, tuple(x.shape)):
            raise SpecError(
                f"{name} has shape {given}, which does not broadcast to {tuple(x.shape)} ="
                " x_seq.shape"
            )
        return
    if is_state and given and given != shape:
        hint = "; use .expand(...) to repeat one value" if value.numel() == 1 else ""
        raise SpecError(f"{label} has shape {given}, expected {shape} = x_seq.shape[1:]{hint}")
    if not is_state and value.numel() != 1 and not _broadcasts(given, shape):
        raise SpecError(
            f"{name} has shape {given}, which does not broadcast to {shape} = x_seq.shape[1:]"
        )


def _broadcasts(given: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if len(given) > len(shape):
        return False
    last = shape[len(shape) - len(given) :]
    # not `in (1, s)`, for which Dynamo has no answer where s is a symbol
    return all(g == 1 or g == s for g, s in zip(given, last, strict=True))
