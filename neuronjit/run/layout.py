"""Memory layouts: a step is N numbers in a row to kernels, whatever the order of dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

Strides = tuple[int, ...]


def is_sequence(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether steps lie one after the other without gaps, in any order of the other dimensions."""
    n = math.prod(shape[1:])
    return (shape[0] == 1 or strides[0] == n) and is_packed(shape[1:], strides[1:])


def is_packed(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether every number has a place of its own and no place is left over."""
    expected = 1
    for stride, size in sorted((a, b) for a, b in zip(strides, shape, strict=True) if b != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def in_layout(tensor: Tensor, shape: Sequence[int], strides: Strides) -> Tensor:
    """The tensor with these strides, copied only if it has others (differentiably)."""
    if not tensor.is_neg() and (
        tensor.stride() == strides
        or all(a == b or n == 1 for a, b, n in zip(tensor.stride(), strides, shape, strict=True))
    ):
        return tensor
    order = outermost_first(strides)
    back = [order.index(d) for d in range(len(order))]
    return tensor.resolve_neg().permute(order).contiguous().permute(back)


def outermost_first(strides: Sequence[int]) -> list[int]:
    """The dimensions in the order of memory."""
    return sorted(range(len(strides)), key=lambda d: (-strides[d], d))


def shared_by_neurons(shape: Sequence[int], sequence: Sequence[int]) -> bool:
    """Whether an input of this shape has one number a step, where x_seq has shape `sequence`."""
    return all(size == 1 for size in padded(shape, sequence)[1:])


class Repeat(NamedTuple):
    """How a broadcast parameter repeats: neuron n reads element n // inner % period."""

    inner: int
    period: int
    order: tuple[int, ...] | None  # its dimensions in memory; None: one element a neuron
    in_order: bool = False  # whether those that it has are in memory as they are in its shape

    def elements(self, tensor: Tensor, shape: Sequence[int], strides: Strides) -> Tensor:
        """The parameter's numbers in the order in which the kernel counts them."""
        if self.in_order and tensor.is_contiguous():
            return tensor
        if self.order is None:
            return in_layout(tensor.expand(tuple(shape)), shape, strides)
        tensor = tensor.reshape(padded(tensor.shape, shape))
        return tensor.permute(self.order).contiguous()

    def back(self, numbers: Tensor, given: Sequence[int], shape: Sequence[int]) -> Tensor:
        """What `elements` puts in the kernel's order, back in the parameter's shape."""
        if self.in_order:
            return numbers.reshape(tuple(given))
        order = self.order or tuple(range(len(shape)))
        sizes = padded(given, shape)
        numbers = numbers.reshape([sizes[d] for d in order])
        return numbers.permute([order.index(d) for d in range(len(order))]).reshape(tuple(given))


def padded(given: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what broadcasts to `shape`, in as many dimensions."""
    return (1,) * (len(shape) - len(given)) + tuple(given)


def repeat(param: Sequence[int], shape: Sequence[int], strides: Sequence[int]) -> Repeat:
    """How a parameter of shape `param` repeats over a step of this shape and layout."""
    sizes = padded(param, shape)
    order = outermost_first(strides)
    own = [d for d in order if sizes[d] > 1]
    if not all(strides[a] == strides[b] * shape[b] for a, b in pairwise(own)):
        return Repeat(1, math.prod(shape), None)
    return Repeat(strides[own[-1]], math.prod(sizes), tuple(order), own == sorted(own))
