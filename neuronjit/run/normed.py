"""Batch norm within the neuron's kernels: normalised, charged, fired and reset in one pass.

What a batch norm does before a neuron is an affine map of each channel, so it stands in the
neuron's equations, with parameters by channel. Its gradient by x has two more terms, through the
batch's mean and variance, which need sums over the whole batch first. So backward goes twice over
the sequence: the first time for the sums (they are the gradients of weight and bias), the second
time for x's gradient. What is kept is what any call keeps: its inputs and the checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import settings
from ..errors import BackendError, CompileError, SpecError
from ..language.parse import plain
from ..models.model import NeuronModel
from ..surrogates import StraightThrough
from ..torch_private import tracing, transformed
from . import checks, packed
from .autograd import apply, find, multistep
from .call import Output
from .plan import Gradients, KernelPlan, backward, fall_back, output

_NORMED = """
norm_scale = norm_invstd * norm_weight
norm_through = norm_sum + (x - norm_mean) * norm_invstd * norm_sum_scaled
norm_x = (add_grad(x, norm_through * norm_scale * norm_share) - norm_mean) * norm_scale + norm_bias
"""
_AFFINE = ("norm_mean", "norm_invstd", "norm_weight", "norm_bias")
_SUMS = ("norm_sum", "norm_sum_scaled")


@cache
def _moments_model() -> NeuronModel:
    """Its gradients by first and second are the sums over x - shift and its square."""
    return NeuronModel(
        "moments",
        """
        a = add_grad(first, x - shift)
        b = add_grad(second, (x - shift)**2)
        h = v
        v = h
        """,
        state=dict(v=0.0),
        params=dict(shift=0.0, first=0.0, second=0.0),
    )


@cache
def _update_model() -> NeuronModel:
    """What a batch norm makes of the sums over each channel, a neuron a channel."""
    return NeuronModel(
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
    )


@cache
def normed(model: NeuronModel, residual: str | None) -> NeuronModel:
    """The model behind a batch norm, and beside a residual `skip` before or after the neuron.

    What it adds to x's gradient (by norm_sum, norm_sum_scaled) is 0 until backward knows it.
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
        params={**model.params, **dict.fromkeys((*_AFFINE, *_SUMS), 0.0), "norm_share": 0.0},
        inputs=("x", "skip") if residual else ("x",),
        strict=model.strict,
        positive=model.positive,
    )


def batch_statistics(
    x: Tensor,
    eps: float,
    running: tuple[Tensor, Tensor] | None,
    momentum: float,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each channel of `[T, N, C, *]`.

    The running mean and (unbiased) variance, where there are any, are brought on in place.
    """
    flat = x.detach().flatten(0, 1)
    count = flat.numel() // flat.shape[1]
    unbiased = count / max(count - 1, 1)
    sums = _sums(flat, backend or settings.backend()) if x.is_cuda else None
    if sums is not None:
        first, second, shift = sums
        old_mean, old_var = running or (shift, second)
        out = multistep(
            _update_model(), first, second=second, shift=shift, old_mean=old_mean, old_var=old_var,
            share=1 / count, eps=eps, unbiased=unbiased, momentum=momentum, final_state=False,
            record=("mean", "invstd", "new_mean", "new_var"),
        ).record  # fmt: skip
        if running is not None:
            torch._foreach_copy_(list(running), [out["new_mean"][0], out["new_var"][0]])
        return out["mean"][0], out["invstd"][0]
    mean, var = _moments(flat)
    if running is not None:
        running[0].lerp_(mean.to(running[0]), momentum)
        running[1].lerp_((var * unbiased).to(running[1]), momentum)
    return mean, torch.rsqrt(var + eps)


def _sums(flat: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """Of each channel, `[1, C]`: the sums of x - shift and of its square; and shift, an x.

    One pass, where torch.var_mean takes 3 to 18. None where no kernel is to be had.
    """
    channels = flat.shape[1]
    steps = next(n for n in (4, 2, 1) if not flat.shape[0] % n)  # read together by a thread
    x = flat.unflatten(0, (steps, -1))
    shift = flat[0].reshape(channels, -1)[:, 0].to(checks.arithmetic(x.dtype)).contiguous()
    own = shift.reshape(-1, *(1 for _ in flat.shape[2:]))
    asked = dict(shift=own, first=own, second=own)  # the last two are not read
    plan, tensors = find(
        _moments_model(), x, {}, StraightThrough, "hard", False, (), True, backend, asked
    )
    if not isinstance(plan, KernelPlan):
        return None
    wanted = (False, False, True, True)
    try:
        _, _, first, second = plan.backward(x, None, tensors, (None, None), wanted)
    except (BackendError, CompileError) as error:
        fall_back(plan, error)
        return None
    if first is None or second is None:
        return None
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
    own = normed(model, residual)
    sizes = (-1, *(1 for _ in x.shape[3:]))
    ones = torch.ones_like(mean) if weight is None else weight
    offset = torch.zeros_like(mean) if bias is None else bias
    channels = zip(_AFFINE, (mean, invstd, ones, offset), strict=True)
    given = {**params, **{name: t.reshape(sizes) for name, t in channels}}
    given |= {} if skip is None else {"skip": skip}
    asked: dict[str, Any] = dict(
        surrogate=surrogate, reset=reset, detach_reset=detach_reset, record=record, backend=backend
    )
    if eps is None or not (torch.is_grad_enabled() and x.requires_grad):
        return multistep(own, x, state, **asked, **given)
    later = dict.fromkeys(_SUMS, given["norm_mean"])  # backward gives the sums
    share = -x.shape[2] / x.numel() if x.numel() else 0.0
    plan, tensors = find(
        own, x, {} if state is None else dict(state), surrogate, reset, detach_reset,
        tuple(record), True, backend or settings.backend(),
        {**given, **later, "norm_share": share},
    )  # fmt: skip
    if isinstance(plan, KernelPlan):
        if tracing() or transformed():
            raise BackendError("a fused batch norm is no part of torch.jit.trace and torch.func")
        try:
            out = output(plan.call, apply(_TwoPasses(plan, residual), x, tensors))
        except (BackendError, CompileError) as error:
            fall_back(plan, error)
        else:
            if packed.here.contexts:
                packed.note(plan.call, out.spikes)
            return out
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


class _TwoPasses:
    """A plan whose backward goes twice over the sequence: for the sums, then for x's gradient."""

    def __init__(self, plan: KernelPlan, residual: str | None) -> None:
        self.plan, self.call, self.final = plan, plan.call, plan.final
        self.prepare, self.forward = plan.prepare, plan.forward
        self.compiled = None
        at = plan.given.index
        self._weight, self._bias, self._sum, self._scaled = map(at, (*_AFFINE[2:], *_SUMS))
        self._after = at("skip") if residual == "after" else None

    def backward(
        self,
        x: Tensor,
        checkpoints: Tensor | None,
        tensors: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> Gradients:
        """As a KernelPlan's."""
        of_x, *first = wanted
        first[self._weight] |= of_x
        first[self._bias] |= of_x
        if self._after is not None:  # what arrives at the output, as it is
            first[self._after] = False
        _, *results = backward(self.plan, x, checkpoints, tensors, grads, (False, *first))
        x_grad = None
        if of_x:
            summed: list[Any] = list(tensors)
            summed[self._sum], summed[self._scaled] = results[self._bias], results[self._weight]
            only_x = (True, *(False for _ in tensors))
            x_grad = backward(self.plan, x, checkpoints, summed, grads, only_x)[0]
        if self._after is not None:
            results[self._after] = grads[0]
        given = [x_grad, *results]
        return [grad if want else None for grad, want in zip(given, wanted, strict=True)]
