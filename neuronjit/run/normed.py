"""Batch norm within the neuron's kernels: normalised, charged, fired and reset in one pass.

What a batch norm does before a neuron is an affine map of each channel, so it stands in the
neuron's equations, with parameters by channel. Its gradient by x has two more terms, through the
batch's mean and variance, which need sums over the whole batch first. So backward goes twice over
the sequence: the first time for the sums (they are the gradients of weight and bias), the second
time for x's gradient. What is kept is what any call keeps: its inputs and the checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import settings
from ..errors import BackendError, CompileError, SpecError
from ..language.parse import plain
from ..models.model import NeuronModel
from ..torch_private import tracing, transformed
from . import packed
from .autograd import apply, find, multistep
from .call import Output
from .plan import KernelPlan, fall_back, output
from .statistics import by_channel
from .two_passes import AFFINE, SUMS, two_passes

_NORMED = """
norm_scale = norm_invstd * norm_weight
norm_through = norm_sum + (x - norm_mean) * norm_invstd * norm_sum_scaled
norm_x = (add_grad(x, norm_through * norm_scale * norm_share) - norm_mean) * norm_scale + norm_bias
"""


def why_not(model: NeuronModel, residual: str | None) -> str:
    """Why no batch norm, or none with this residual, can stand before the model; "" if it can."""
    if len(model.inputs) > 1:
        return f"model '{model.name}' has several inputs"
    for name in (*model.arguments, *model.recordable):
        if name.startswith("norm_") or (residual and name == "skip"):
            return f"model '{model.name}' has '{name}', a name that the batch norm has; rename it"
    return ""


@cache
def normed(model: NeuronModel, residual: str | None) -> NeuronModel:
    """The model behind a batch norm, and beside a residual `skip` before or after the neuron.

    What it adds to x's gradient (by norm_sum, norm_sum_scaled) is 0 until backward knows it.
    """
    if why := why_not(model, residual):
        raise SpecError(why)
    block = re.sub(r"\bx\b", "norm_x", "\n".join(plain(model.equations)))
    lines = [_NORMED.strip() + (" + skip" if residual == "before" else ""), block]
    if residual == "after":
        out = "y" if any(s.target == "y" for s in model.statements) else "s"
        lines.append(f"y = {out} + skip")
    return NeuronModel(
        f"{model.name}_normed{f'_skip_{residual}' if residual else ''}",
        "\n".join(lines),
        state=model.state,
        params={**model.params, **dict.fromkeys((*AFFINE, *SUMS), 0.0), "norm_share": 0.0},
        inputs=("x", "skip") if residual else ("x",),
        strict=model.strict,
        positive=model.positive,
    )


def multistep_normed(
    own: NeuronModel,
    x: Tensor,
    state: Mapping[str, Any] | None,
    *,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    skip: Tensor | None = None,
    residual: str | None = None,
    surrogate: Any,
    reset: str,
    detach_reset: bool,
    record: Sequence[str] = (),
    backend: str | None = None,
    params: Mapping[str, Any],
    in_graph: Callable[..., Output] | None = None,
) -> Output:
    """`multistep` of a normalised x: `(x - mean) * invstd * weight + bias`, by channel.

    Args:
        own: `normed(model, residual)`.
        x: `[T, N, C, *]`; mean, invstd, weight and bias: a number a channel, `[C]` or `[1, C, *]`.
        eps: where mean and invstd are those of x, and x's gradient goes through them too; else
            None.
        skip: what `residual` adds, in x's shape: "before" the neuron's charge, or "after" it fired.
        in_graph: `graph.multistep`, where a compiler traces.

    Raises:
        As `multistep`.
    """
    backend = backend or settings.backend()
    sizes = by_channel(x)
    ones = torch.ones_like(mean) if weight is None else weight
    zeros = torch.zeros_like(mean) if bias is None else bias
    channels = [t if t.shape == sizes else t.reshape(sizes) for t in (mean, invstd, ones, zeros)]
    given = dict(params)
    if skip is not None:
        given["skip"] = skip
    given.update(zip(AFFINE, channels, strict=True))
    asked: dict[str, Any] = dict(
        surrogate=surrogate, reset=reset, detach_reset=detach_reset, record=record, backend=backend
    )
    if eps is None or not (torch.is_grad_enabled() and x.requires_grad):
        return multistep(own, x, state, **asked, **given)
    later = dict.fromkeys(SUMS, channels[0])  # backward gives the sums
    share = -x.shape[2] / x.numel() if x.numel() else 0.0
    twice = {**given, **later, "norm_share": share}
    if in_graph is not None:
        return in_graph(
            own, x, state, surrogate, reset, detach_reset, record, True, backend, twice, twice=True
        )
    plan, tensors = find(
        own, x, {} if state is None else dict(state), surrogate, reset, detach_reset,
        tuple(record), True, backend, twice,
    )  # fmt: skip
    if isinstance(plan, KernelPlan):
        if tracing() or transformed():
            raise BackendError("a fused batch norm is no part of torch.jit.trace and torch.func")
        try:
            both = two_passes(plan, plan.given, residual)
            out = output(plan.call, apply(both, x, tensors))
        except (BackendError, CompileError) as error:
            fall_back(plan, error)
        else:
            if packed.here.contexts:
                packed.note(plan.call, out.spikes, {} if skip is None else {"skip": skip})
            return out
    return _followed(own, x, state, eps, {**asked, "backend": "eager"}, given)


def _followed(
    own: NeuronModel, x: Tensor, state: Any, eps: float, asked: dict[str, Any], given: Any
) -> Output:
    """The same, where autograd follows the statistics back to x."""
    flat, sizes = x.flatten(0, 1), given["norm_mean"].shape
    over = (0, *range(2, flat.dim()))
    var, mean = torch.var_mean(flat.to(given["norm_mean"].dtype), over, correction=0)
    own_stats = dict(
        norm_mean=mean.reshape(sizes), norm_invstd=torch.rsqrt(var + eps).reshape(sizes)
    )
    return multistep(own, x, state, **asked, **{**given, **own_stats})
