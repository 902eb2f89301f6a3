"""What a call of `multistep` may be given; everything else is an error at the caller's line."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .errors import DifferentiationError, InputTypeError, SpecError, known
from .neurons import NeuronModel

DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float64: "float64",
}


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states, parameters and all arithmetic, for sequences of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_input(x: Any) -> None:
    """Whether x can be an input sequence. Raises InputTypeError, SpecError."""
    if not isinstance(x, Tensor):
        raise InputTypeError(f"x_seq must be a torch.Tensor, got {type(x).__name__}")
    check_class("x_seq", x)
    if x.dtype not in DTYPES:
        raise InputTypeError(
            f"x_seq must be floating point, one of {', '.join(DTYPES.values())}, got {x.dtype};"
            " use x_seq.float()"
        )
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise InputTypeError(f"x_seq must be a dense tensor, got {layout}; use .to_dense()")
    if not x.dim():
        raise SpecError("x_seq needs a time dimension: [T, N, *], got a 0-dim tensor")


def is_traced(*values: Any) -> bool:
    """Whether one is a tensor without numbers of its own: FakeTensor, FunctionalTensor, ..."""
    plain = Tensor.__torch_dispatch__
    return any(isinstance(v, Tensor) and type(v).__torch_dispatch__ is not plain for v in values)


def check_class(label: str, value: Tensor) -> None:
    """Whether a tensor is no subclass with a meaning of its own, which kernels would ignore."""
    if type(value) is not Tensor and not isinstance(value, Parameter) and not is_traced(value):
        raise InputTypeError(
            f"{label} must be a plain torch.Tensor, got {type(value).__name__};"
            f" use {label}.as_subclass(torch.Tensor)"
        )


def check_no_tangents(*tensors: Tensor) -> None:
    """Whether no derivative goes forward through the call: kernels would drop it silently."""
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise DifferentiationError(
            "the kernels have no forward-mode derivative (jvp); use backend='eager'"
        )


def check_names(model: NeuronModel, reset: Any, state: Any, params: Mapping[str, Any]) -> None:
    """Whether the model has these states and parameters, and there is such a reset."""
    if not isinstance(reset, str) or reset not in ("hard", "soft"):
        raise SpecError(f"unknown reset {ascii(reset)[:80]}. {known(['hard', 'soft'])}")
    for name in params:
        if name not in model.params:
            raise SpecError(
                f"unknown parameter '{name}' of model '{model.name}'. {known(model.params)}"
            )
    if state is None:
        return
    if not isinstance(state, Mapping):
        raise InputTypeError(
            f"state must be a mapping from names to tensors or numbers, got {type(state).__name__}"
        )
    for name in state:
        if name not in model.state:
            raise SpecError(
                f"unknown state {ascii(name)[:80]} of model '{model.name}'. {known(model.state)}"
            )


def settle(
    model: NeuronModel, x: Any, state: Any, reset: Any, record: Any, params: dict[str, Any]
) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """The reset, the names to record and the parameters of a call, once its names are checked.

    v_reset=None is soft reset; with soft reset, v_reset is 0 unless it is given.
    """
    check_input(x)
    check_names(model, reset, state, params)
    if params.get("v_reset", 0.0) is None:
        reset, params = "soft", {**params, "v_reset": 0.0}
    elif reset == "soft":
        params = {"v_reset": 0.0, **params}
    return reset, check_record(model, record), params


def check_record(model: NeuronModel, record: Any) -> tuple[str, ...]:
    """The names to record, in one order."""
    if not isinstance(record, str | Iterable):
        raise InputTypeError(f"record must be names, got {type(record).__name__}")
    record = (record,) if isinstance(record, str) else tuple(record)
    for name in record:
        if name != "h" and name not in model.state:
            raise SpecError(f"cannot record {ascii(name)[:80]}. {known([*model.state, 'h'])}")
    return tuple(name for name in (*model.state, "h") if name in record)


def check_number(model: NeuronModel, name: str, value: Any, dtype: torch.dtype) -> float:
    """The number that was given for a state or parameter. Raises InputTypeError, SpecError."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        number = float(value)
    except OverflowError:
        number = float("inf")  # an int too large to be a float
    except (TypeError, ValueError):
        raise InputTypeError(
            f"{name} must be a number or a tensor, got {type(value).__name__}"
        ) from None
    if not abs(number) <= torch.finfo(arithmetic(dtype)).max:
        raise SpecError(f"{name} must be finite and fit {arithmetic(dtype)}, got {number}")
    if name in model.positive and not number > 0:
        raise SpecError(f"{name} must be finite and > 0, got {number}")
    return number


def check_reset(reset: str, numbers: Mapping[str, float]) -> None:
    """Warn of a hard reset to where the neuron fires again."""
    threshold, back = numbers.get("v_threshold"), numbers.get("v_reset")
    if reset == "hard" and threshold is not None and back is not None and back >= threshold:
        warnings.warn(
            f"v_reset={back} is not below v_threshold={threshold}: a neuron that fired fires again",
            stacklevel=4,
        )


def check_tensor(model: NeuronModel, name: str, value: Tensor, x: Tensor) -> None:
    """Whether a tensor can be an initial state or a parameter for x. Raises what says why not."""
    is_state = name in model.state
    label = f"{name}_init" if is_state else name
    check_class(label, value)
    if value.layout != torch.strided:
        raise InputTypeError(f"{label} must be a dense tensor, got {value.layout}")
    if not value.dtype.is_floating_point:
        raise InputTypeError(f"{label} must be floating point, got {value.dtype}")
    if value.device != x.device:
        raise SpecError(
            f"x_seq is on {x.device} but {label} is on {value.device}; move one of them"
        )
    shape, given = tuple(x.shape[1:]), tuple(value.shape)
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
    return all(g in (1, s) for g, s in zip(given[::-1], shape[::-1], strict=False))
