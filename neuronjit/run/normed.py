"""Batch norm within the neuron's kernels: normalised, charged, fired and reset in one pass.

What a batch norm does before a neuron is an affine map of each channel, so it stands in the
neuron's equations, with parameters by channel. Its gradient by x has two more terms, through the
batch's mean and variance, which need sums over the whole batch first. So backward goes twice over
the sequence: the first time for the sums (they are the gradients of gain and bias), the second time
for x's gradient. Nothing is kept but x and the checkpoints of the states.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..errors import BackendError, CompileError, SpecError, known
from ..language.parse import plain
from ..models.model import NeuronModel
from ..torch_private import direct_apply, has_tangents, tracing, transformed
from . import checks
from .autograd import multistep
from .call import Output, key_of, settle, tensors_of
from .plan import KernelPlan, fall_back, keep, once, output, plan_for, plans

RESIDUALS = (None, "before", "after")
_BATCH = ("norm_gain", "norm_bias", "norm_push", "norm_pull")
_NORMED = (
    "norm_x = (add_grad(x, norm_push + norm_pull * (x - norm_mean)) - norm_mean) * norm_gain"
    " + norm_bias"
)


@cache
def normed(model: NeuronModel, residual: str | None) -> NeuronModel:
    """The model behind a batch norm, and beside a residual `skip` before or after the neuron.

    What it adds to x's gradient (norm_push, norm_pull) is 0 until backward knows it.
    """
    if len(model.inputs) > 1:
        raise SpecError(f"model '{model.name}' has several inputs, and a batch norm has one")
    block = re.sub(r"\bx\b", "norm_x", "\n".join(plain(model.equations)))
    lines = [_NORMED + (" + skip" if residual == "before" else ""), block]
    if residual == "after":
        out = "y" if any(s.target == "y" for s in model.statements) else "s"
        lines.append(f"y = {out} + skip")
    return NeuronModel(
        f"{model.name}_normed{f'_skip_{residual}' if residual else ''}",
        "\n".join(lines),
        state=model.state,
        params={
            **model.params, "norm_mean": 0.0, "norm_gain": 1.0, "norm_bias": 0.0,
            "norm_push": 0.0, "norm_pull": 0.0,
        },
        inputs=("x", "skip") if residual else ("x",),
        strict=model.strict,
        positive=model.positive,
    )  # fmt: skip


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and 1 / sqrt(variance + eps) of each channel of `[T, N, C, *]`."""
    flat = x.detach().flatten(0, 1)
    if x.is_cuda and not is_compiling():  # one pass in either layout; var_mean takes 3 to 18
        mean, invstd = torch.batch_norm_stats(flat, eps)
        return mean, invstd.square().reciprocal() - eps, invstd
    mean, var = _moments(flat)
    return mean, var, torch.rsqrt(var + eps)


def _moments(flat: Tensor) -> tuple[Tensor, Tensor]:
    over = (0, *range(2, flat.dim()))
    var, mean = torch.var_mean(flat.to(checks.arithmetic(flat.dtype)), over, correction=0)
    return mean, var


def multistep_normed(
    model: NeuronModel,
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
) -> Output:
    """`multistep` of a normalised x: `(x - mean) * invstd * weight + bias`, by channel.

    Args:
        x: `[T, N, C, *]`; mean, invstd, weight and bias: `[C]`.
        eps: where mean and invstd are those of x, and x's gradient goes through them too; else
            None.
        skip: what `residual` adds, in x's shape: "before" the neuron's charge, or "after" it fired.

    Raises:
        As `multistep`.
    """
    if residual not in RESIDUALS:
        raise SpecError(f"unknown residual {ascii(residual)[:80]}. {known(map(str, RESIDUALS))}")
    if (skip is None) != (residual is None):
        raise SpecError(f"residual={residual!r}, but skip is {'missing' if residual else 'given'}")
    own = normed(model, residual)
    sizes = (-1, *(1 for _ in x.shape[3:]))
    gain = invstd if weight is None else invstd * weight.to(invstd.dtype)
    offset = torch.zeros_like(mean) if bias is None else bias
    by_channel = dict(
        norm_mean=mean.reshape(sizes), norm_gain=gain.reshape(sizes),
        norm_bias=offset.reshape(sizes),
    )  # fmt: skip
    given = {**params, **by_channel, **({} if skip is None else {"skip": skip})}
    asked: dict[str, Any] = dict(
        surrogate=surrogate, reset=reset, detach_reset=detach_reset, record=record, backend=backend
    )
    wants = torch.is_grad_enabled() and x.requires_grad
    if eps is None or not wants:
        return multistep(own, x, state, **asked, **given)

    def followed() -> Output:
        """The statistics by autograd."""
        mean, var = _moments(x.flatten(0, 1))
        gain = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
        own_gain = dict(norm_mean=mean.reshape(sizes), norm_gain=gain.reshape(sizes))
        return multistep(own, x, state, **asked, **{**given, **own_gain})

    if is_compiling():
        return followed()
    none = torch.zeros_like(by_channel["norm_mean"])
    call, values = settle(
        own, x, state, surrogate, reset, detach_reset, record, True, backend,
        {**given, "norm_push": none, "norm_pull": none},
    )  # fmt: skip
    key = key_of(call, x, values)
    plan = plans.get(key) or keep(key, plan_for(call, x, values))
    if isinstance(plan, KernelPlan):
        if tracing() or transformed():
            raise BackendError("a fused batch norm is no part of torch.jit.trace and torch.func")
        tensors = tensors_of(values)
        if has_tangents():
            checks.check_no_tangents(x, *tensors)
        ready, prepared = plan.prepare(x, tensors)
        try:
            return output(call, _apply(plan, invstd.reshape(sizes), residual, ready, *prepared))
        except (BackendError, CompileError) as error:
            fall_back(plan, error)
    return followed()


class _Normed(torch.autograd.Function):
    """Forward as any call; backward once for the sums over the batch, once for x's gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: KernelPlan,
        invstd: Tensor,
        residual: str | None,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs, checkpoints = plan.forward(x, tensors, save=True)
        ctx.plan, ctx.residual = plan, residual
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, checkpoints, invstd, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, checkpoints, invstd, *tensors = ctx.saved_tensors
        plan: KernelPlan = ctx.plan
        _, _, _, of_x, *wanted = ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return (None,) * (4 + len(wanted))
        place = {name: plan.given.index(name) for name in _BATCH}
        after = plan.given.index("skip") if ctx.residual == "after" else None
        first = list(wanted)
        for name in ("norm_gain", "norm_bias"):
            first[place[name]] = of_x or wanted[place[name]]
        for name in ("norm_push", "norm_pull"):
            first[place[name]] = False
        if after is not None:  # what arrives at the output, as it is
            first[after] = False
        _, *results = plan.backward(x, checkpoints, tensors, grads, (False, *first))
        x_grad = None
        if of_x:
            count = x.numel() // invstd.numel()
            gain, by_gain, by_bias = (
                tensors[place["norm_gain"]], results[place["norm_gain"]],
                results[place["norm_bias"]],
            )  # fmt: skip
            second = list(tensors)
            second[place["norm_push"]] = by_bias * gain / -count
            second[place["norm_pull"]] = by_gain * gain * invstd.square() / -count
            nothing = (False,) * len(tensors)
            x_grad = plan.backward(x, checkpoints, second, grads, (True, *nothing))[0]
        if after is not None and wanted[after]:
            results[after] = grads[0]
        results = [r if want else None for r, want in zip(results, wanted, strict=True)]
        given = [x_grad, *results]
        if torch.is_grad_enabled():
            given = once(given, [x, *(g for g in grads if g is not None), *tensors])
        return (None, None, None, *given)


_apply: Any = direct_apply(_Normed)
