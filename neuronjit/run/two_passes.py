"""Backward of a neuron behind a batch norm, which goes twice over the sequence: see `normed`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .plan import EagerPlan, Gradients, KernelPlan, backward

# parameters of its model, by channel: the affine map, and the sums that backward finds
AFFINE = ("norm_mean", "norm_invstd", "norm_weight", "norm_bias")
SUMS = ("norm_sum", "norm_sum_scaled")


def two_passes(
    plan: KernelPlan | EagerPlan, given: Sequence[str], residual: str | None = None
) -> TwoPasses:
    """The plan with such a backward, made once; `given` are the names of its tensors."""
    if plan.twice is None:
        plan.twice = TwoPasses(plan, given, residual)
    made: TwoPasses = plan.twice
    return made


class TwoPasses:
    """A plan whose backward goes twice over the sequence: for the sums, then for x's gradient."""

    def __init__(
        self, plan: KernelPlan | EagerPlan, given: Sequence[str], residual: str | None
    ) -> None:
        self.plan, self.call = plan, plan.call
        self.prepare, self.forward = plan.prepare, plan.forward
        at = given.index
        self._weight, self._bias, self._sum, self._scaled = map(at, (*AFFINE[2:], *SUMS))
        self._after = at("skip") if residual == "after" else None
        self.final: tuple[str, ...] = ()
        self.compiled: Any = None
        if isinstance(plan, KernelPlan):
            self.final, self.compiled = plan.final, plan.compiled
        if self.compiled is not None:
            own = self._weight, self._bias, self._sum, self._scaled, self._after
            self.compiled.twice(*own)

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
