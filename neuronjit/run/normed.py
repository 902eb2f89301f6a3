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

from .. import settings
from ..errors import BackendError, CompileError, SpecError, known
from ..language.parse import plain
from ..models.model import NeuronModel
from ..surrogates import StraightThrough
from ..torch_private import direct_apply, has_tangents, tracing, transformed
from . import checks
from .autograd import find, multistep
from .call import Output
from .plan import KernelPlan, fall_back, once, output

RESIDUALS = (None, "before", "after")
_NORMED = """
norm_scale = norm_invstd * norm_weight
norm_through = norm_sum + (x - norm_mean) * norm_invstd * norm_sum_scaled
norm_x = (add_grad(x, norm_through * norm_scale * norm_share) - norm_mean) * norm_scale + norm_bias
"""
_CHANNELS = ("norm_mean", "norm_invstd", "norm_weight", "norm_bias", "norm_sum", "norm_sum_scaled")
_MOMENTS = NeuronModel(
    "moments",
    """
    a = add_grad(first, x - shift)
    b = add_grad(second, (x - shift)**2)
    h = v
    v = h
    """,
    state=dict(v=0.0),
    params=dict(shift=0.0, first=0.0, second=0.0),
    about="Its gradients by first and second are the sums over x - shift and its square.",
)
_UPDATE = NeuronModel(
    "batch_norm_update",
    """
    offset = x * share
    mean = shift + offset
    var = maximum(second * share - offset * offset, 0)
    invstd = 1 / sqrt(var + eps)
    new_mean = old_mean + (mean - old_mean) * momentum
    new_var = old_var + (var * unbiased - old_var) * momentum
    h = v
    v = h
    """,
    state=dict(v=0.0),
    params=dict(share=1.0, eps=1e-5, unbiased=1.0, momentum=0.1),
    inputs=("x", "second", "shift", "old_mean", "old_var"),
    about="What a batch norm makes of the sums over each channel, a neuron a channel.",
)


@cache
def normed(model: NeuronModel, residual: str | None) -> NeuronModel:
    """The model behind a batch norm, and beside a residual `skip` before or after the neuron.

    What it adds to x's gradient (norm_push, norm_pull) is 0 until backward knows it.
    """
    if len(model.inputs) > 1:
        raise SpecError(f"model '{model.name}' has several inputs, and a batch norm has one")
    block = re.sub(r"\bx\b", "norm_x", "\n".join(plain(model.equations)))
    lines = [_NORMED.strip() + (" + skip" if residual == "before" else ""), block]
    if residual == "after":
        out = "y" if any(s.target == "y" for s in model.statements) else "s"
        lines.append(f"y = {out} + skip")
    return NeuronModel(
        f"{model.name}_normed{f'_skip_{residual}' if residual else ''}",
        "\n".join(lines),
        state=model.state,
        params={**model.params, **dict.fromkeys(_CHANNELS, 0.0), "norm_share": 0.0},
        inputs=("x", "skip") if residual else ("x",),
        strict=model.strict,
        positive=model.positive,
    )


def batch_statistics(
    x: Tensor, eps: float, running: tuple[Tensor, Tensor] | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each channel of `[T, N, C, *]`.

    The running mean and (unbiased) variance, where there are any, are brought on in place.
    """
    flat = x.detach().flatten(0, 1)
    count = flat.numel() // flat.shape[1]
    unbiased = count / max(count - 1, 1)
    if x.is_cuda and not checks.is_traced(x):  # one pass, where var_mean takes 3 to 18
        first, second, shift = _sums(flat)
        old_mean, old_var = running or (shift, second)
        out = multistep(
            _UPDATE, first, second=second, shift=shift, old_mean=old_mean, old_var=old_var,
            share=1 / count, eps=eps, unbiased=unbiased, momentum=momentum, final_state=False,
            record=("mean", "invstd", "new_mean", "new_var"),
        ).record  # fmt: skip
        mean, invstd = out["mean"][0], out["invstd"][0]
        if running is not None:
            torch._foreach_copy_(list(running), [out["new_mean"][0], out["new_var"][0]])
        return mean, invstd
    mean, var = _moments(flat)
    if running is not None:
        running[0].lerp_(mean.to(running[0]), momentum)
        running[1].lerp_((var * unbiased).to(running[1]), momentum)
    return mean, torch.rsqrt(var + eps)


def _sums(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each channel, `[1, C]`: the sums of x - shift and of its square; and shift, an x."""
    channels = flat.shape[1]
    steps = next(n for n in (4, 2, 1) if not flat.shape[0] % n)  # read together by a thread
    x = flat.unflatten(0, (steps, -1))
    real = checks.arithmetic(x.dtype)
    shift = flat[0].reshape(channels, -1)[:, 0].to(real).contiguous()
    own = shift.reshape(-1, *(1 for _ in flat.shape[2:]))
    asked = dict(shift=own, first=own, second=own)  # the last two are not read
    plan, tensors = find(
        _MOMENTS, x, {}, StraightThrough, "hard", False, (), True, "auto", asked
    )  # fmt: skip
    _, _, first, second = plan.backward(x, None, tensors, (None, None), (False, False, True, True))
    if first is None or second is None:
        raise BackendError("a batch norm's sums need kernels, and there are none")
    return first.reshape(1, channels), second.reshape(1, channels), shift.reshape(1, channels)


def _moments(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
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
    ones = torch.ones_like(mean) if weight is None else weight
    offset = torch.zeros_like(mean) if bias is None else bias
    channels = (mean, invstd, ones, offset, offset, offset)  # the sums are known in backward
    named = {n: t.reshape(sizes) for n, t in zip(_CHANNELS, channels, strict=True)}
    given = {**params, **named, **({} if skip is None else {"skip": skip})}
    asked: dict[str, Any] = dict(
        surrogate=surrogate, reset=reset, detach_reset=detach_reset, record=record, backend=backend
    )
    if eps is None or not (torch.is_grad_enabled() and x.requires_grad):
        return multistep(own, x, state, **asked, **given)
    share = -x.shape[2] / x.numel() if x.numel() else 0.0
    plan, tensors = find(
        own, x, {} if state is None else dict(state), surrogate, reset, detach_reset,
        tuple(record), True, backend or settings.backend(), {**given, "norm_share": share},
    )  # fmt: skip
    if isinstance(plan, KernelPlan):
        if tracing() or transformed():
            raise BackendError("a fused batch norm is no part of torch.jit.trace and torch.func")
        if has_tangents():
            checks.check_no_tangents(x, *tensors)
        ready, prepared = plan.prepare(x, tensors)
        try:
            return output(plan.call, _apply(plan, residual, ready, *prepared))
        except (BackendError, CompileError) as error:
            fall_back(plan, error)
    return _followed(own, x, state, eps, {**asked, "backend": "eager"}, given)


def _followed(
    own: NeuronModel, x: Tensor, state: Any, eps: float, asked: dict[str, Any], given: Any
) -> Output:
    """The same, where autograd follows the statistics back to x."""
    mean, var = _moments(x.flatten(0, 1))
    sizes = given["norm_mean"].shape
    own_stats = dict(
        norm_mean=mean.reshape(sizes), norm_invstd=torch.rsqrt(var + eps).reshape(sizes)
    )
    return multistep(own, x, state, **asked, **{**given, **own_stats})


class _Normed(torch.autograd.Function):
    """Forward as any call; backward once for the sums over the batch, once for x's gradient."""

    @staticmethod
    def forward(
        ctx: Any, plan: KernelPlan, residual: str | None, x: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs, checkpoints = plan.forward(x, tensors, save=True)
        ctx.plan, ctx.residual = plan, residual
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, checkpoints, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, checkpoints, *tensors = ctx.saved_tensors
        plan: KernelPlan = ctx.plan
        _, _, of_x, *wanted = ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return (None,) * (3 + len(wanted))
        at = plan.given.index
        weight, bias, sums, scaled = map(at, _CHANNELS[2:])
        after = at("skip") if ctx.residual == "after" else None
        first = list(wanted)
        first[weight], first[bias] = of_x or wanted[weight], of_x or wanted[bias]
        first[sums] = first[scaled] = False
        if after is not None:  # what arrives at the output, as it is
            first[after] = False
        _, *results = plan.backward(x, checkpoints, tensors, grads, (False, *first))
        x_grad = None
        if of_x:
            second: list[Any] = list(tensors)
            second[sums], second[scaled] = results[bias], results[weight]
            nothing = (False,) * len(tensors)
            x_grad = plan.backward(x, checkpoints, second, grads, (True, *nothing))[0]
        if after is not None and wanted[after]:
            results[after] = grads[0]
        given = [x_grad, *(r if want else None for r, want in zip(results, wanted, strict=True))]
        if torch.is_grad_enabled():
            given = once(given, [x, *(g for g in grads if g is not None), *tensors])
        return (None, None, *given)


_apply: Any = direct_apply(_Normed)
