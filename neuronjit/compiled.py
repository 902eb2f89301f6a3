"""`multistep` in a graph that torch.compile or torch.export makes: one operator, no graph break.

A graph holds tensors, numbers and text, so all of a call that is neither goes into one text, which
says everything: a graph that was saved runs in another process. What is here is traced by Dynamo,
so it is plain Python on names, numbers and tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import symbolic_shapes

from . import checks
from .calls import Output
from .neurons import as_model
from .operators import FORMAT
from .surrogates import as_surrogate

# older versions of torch cannot tell: there, a new number makes a new graph
_is_static = getattr(symbolic_shapes, "has_static_value", lambda number: True)


def multistep(
    model: Any,
    x: Tensor,
    state: Mapping[str, Any] | None,
    surrogate: Any,
    reset: str,
    detach_reset: bool,
    record: Sequence[str],
    final_state: bool,
    backend: str | None,
    params: dict[str, Any],
) -> Output:
    """`neuronjit.multistep`, by operators alone."""
    model, surrogate, state = as_model(model), as_surrogate(surrogate), state or {}
    reset, record, params = checks.settle(model, x, state, reset, record, params)
    names: list[str] = []
    tensors: list[Tensor] = []
    numbers: list[float] = []
    for name, value in {**model.state, **state, **model.params, **params}.items():
        if isinstance(value, Tensor):
            checks.check_tensor(model, name, value, x)
        elif isinstance(value, int | float) and not _is_static(value):
            # a number that changes from call to call: as a tensor, it is no part of the graph
            value = x.new_zeros((), dtype=checks.arithmetic(x.dtype)) + value
        else:
            numbers.append(checks.check_number(model, name, value, x.dtype))
            continue
        names.append(name)
        tensors.append(value)
    changing = []
    for name, number in zip(surrogate.params, surrogate.values, strict=True):
        if _is_static(number):
            numbers.append(number)
        else:  # on the CPU: it becomes an argument of the kernel, whose code reads no tensor for it
            changing.append(name)
            tensors.append(torch.zeros((), dtype=torch.float64) + number)
    call = "\n".join(
        (
            FORMAT, model.token, surrogate.token, "spiking" if surrogate.spiking else "", reset,
            "detach" if detach_reset else "", ",".join(record), "final" if final_state else "",
            backend or "", ",".join(names), ",".join(changing),
        )
    )  # fmt: skip
    save = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))
    outputs = torch.ops.neuronjit.forward(x, tensors, numbers, save, call)
    final = tuple(model.state) if final_state else ()
    last = 1 + len(final)
    return Output(
        outputs[0],
        dict(zip(final, outputs[1:last], strict=True)),
        dict(zip(record, outputs[last:-1], strict=True)),
    )
