"""The statistics of a batch norm in training: one pass over x on a GPU, else by torch."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import settings
from ..kernels.build import helper
from ..kernels.helpers import HELPERS, HelperSpec
from ..kernels.spec import DTYPES, NAMES
from ..kernels.targets.base import Channels
from ..torch_private import transformed
from . import checks, layout
from .plan import keep


class Running(NamedTuple):
    """What a batch norm brings on in training."""

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None  # how many there were
    momentum: float | None = None  # None: the statistics are the mean of those of all batches


def batch_statistics(
    x: Tensor, eps: float, running: Running, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each channel of `[T, N, C, *]`, as `[1, C, *]`.

    What is running, the variance unbiased, is brought on in place.
    """
    x = x.detach()
    backend = backend or settings.backend()
    if x.is_cuda and backend != "eager" and x.dtype in NAMES and not transformed():
        if not layout.is_sequence(x.shape, x.stride()) or x.is_neg():
            x = x.resolve_neg().contiguous()
        key = (x.shape, x.stride(), x.dtype, x.device, not x.data_ptr() & 15)
        plan = plans.get(key) or keep(plans, key, _Statistics(x))
        if (found := plan.run(x, eps, running)) is not None:
            return found
    if running.batches is not None:
        running.batches.add_(1)
    momentum = running.momentum
    if momentum is None:
        momentum = 0.0 if running.batches is None else 1.0 / float(running.batches)
    mean, var = _moments(x.flatten(0, 1))
    if running.mean is not None and running.var is not None:
        count = x.numel() // x.shape[2]
        unbiased = var * (count / max(count - 1, 1))
        running.mean.lerp_(mean.to(running.mean), momentum)
        running.var.lerp_(unbiased.to(running.var), momentum)
    sizes = by_channel(x)
    return mean.view(sizes), torch.rsqrt(var + eps).view(sizes)


def _moments(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of `[N, C, *]`, by torch.

    By sums about each channel's first number, because torch.var_mean takes 14 times as long on a
    CPU, and torch's own batch norm up to 5 times; but that is fast in half precision.
    """
    real, share = checks.arithmetic(flat.dtype), flat.shape[1] / flat.numel()
    if flat.dtype is not real:
        # with running statistics of float32, or the batch's were rounded to half precision
        some = torch.zeros(2, flat.shape[1], dtype=real, device=flat.device)
        _, mean, invstd = torch.native_batch_norm(
            flat, None, None, some[0], some[1], True, 0.0, 1e-30
        )
        return mean, invstd.pow(-2)
    over = (0, *range(2, flat.dim()))
    shift = flat[:1]
    for dim in over[1:]:
        shift = shift.narrow(dim, 0, 1)
    off = flat - shift
    offset = off.sum(over) * share
    var = off.square_().sum(over).mul_(share).sub_(offset.square()).clamp_(min=0)
    return shift.flatten() + offset, var


def by_channel(x: Tensor) -> tuple[int, ...]:
    """The shape in which a number for each channel of `[T, N, C, *]` broadcasts to a step."""
    return (1, x.shape[2], *(1 for _ in x.shape[3:]))


# --- on a GPU -------------------------------------------------------------------------------------

_pack_moments = struct.Struct("@QQqqq").pack  # as templates/statistics.cu.j2 has them


class _Statistics:
    """Two kernels for one shape and layout of x: sums over parts of each channel, then the rest."""

    def __init__(self, x: Tensor) -> None:
        """x lies in memory without gaps, one step after the other."""
        self._real, self._sizes = checks.arithmetic(x.dtype), by_channel(x)
        inner = x.stride(2) if x.shape[2] > 1 else x[0, 0].numel()
        self._channels = channels = Channels(inner, x.shape[2])
        self._count = x.numel() // channels.period
        frames, together = x.shape[0] * x.shape[1], HELPERS["moments"].sizes
        rows = max(n for n in together if not frames % n)
        # numbers next to each other that a thread loads at once: of one channel, or of several
        most = 1 if x.data_ptr() & 15 else 16 // x.itemsize
        next_to = channels.inner if channels.inner > 1 else channels.period
        lanes = max(n for n in HELPERS["moments"].lanes if n <= most and not next_to % n)
        dtype = NAMES[x.dtype]
        self._specs = (
            HelperSpec("moments", dtype, rows, lanes),
            HelperSpec("statistics", dtype, 1, 1),
        )
        self._n = x.numel() // rows
        self._pack = struct.Struct(f"@8Q3q4{DTYPES[dtype].code}").pack

    def run(self, x: Tensor, eps: float, running: Running) -> tuple[Tensor, Tensor] | None:
        """As `batch_statistics`; None where no kernel is to be had, or not for these tensors."""
        old_mean, old_var, batches, momentum = running
        given = [(old_mean, self._real), (old_var, self._real), (batches, torch.int64)]
        if any([t is not None and not _is_plain(t, dtype, x) for t, dtype in given]):  # noqa: C419
            return None
        sums, rest = (helper(spec, x.device.index) for spec in self._specs)
        if sums is None or rest is None:
            return None
        inner, period = self._channels
        grid = sums.grid(self._n, self._channels)
        parts = torch.empty(2 * period * grid.slices, dtype=self._real, device=x.device)
        mean = torch.empty(self._sizes, dtype=self._real, device=x.device)
        invstd = torch.empty_like(mean)
        at, counts, counted = x.data_ptr(), 0, 0
        if not at:
            checks.check_memory(["x_seq"], [x])
        if batches is not None:
            counts = batches.data_ptr()
            if momentum is None and old_mean is not None:  # read by all channels: counted before
                batches.add_(1)
                counts, counted = 0, counts
        where = _pack_moments(at, parts.data_ptr(), inner, period, self._n)
        sums.launch(where, grid, self._n, 1)
        old = [0 if t is None else t.data_ptr() for t in (old_mean, old_var)]
        count = self._count
        where = self._pack(
            at, parts.data_ptr(), mean.data_ptr(), invstd.data_ptr(), *old, counts, counted,
            inner, period, grid.slices,
            1 / count, eps, momentum or 0.0, count / max(count - 1, 1),
        )  # fmt: skip
        rest.launch(where, rest.grid(32 * period, None), period, 1)
        return mean, invstd


def _is_plain(tensor: Tensor, dtype: torch.dtype, x: Tensor) -> bool:
    """Whether kernels can bring the tensor on."""
    return tensor.dtype is dtype and tensor.device == x.device and tensor.is_contiguous()


plans: dict[tuple[Any, ...], _Statistics] = {}
