"""Max pooling by two on a GPU: a byte a window is kept for backward.

torch keeps eight of each window, and the input. Values and gradients are the same.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from .. import settings
from ..kernels.build import helper
from ..kernels.helpers import HELPERS, HelperSpec
from ..kernels.spec import NAMES
from ..torch_private import direct_apply, has_tangents, is_batched, tracing, transformed
from .checks import no_transforms
from .plan import as_arrived, as_saved, keep, once

SIZES = HELPERS["max_pool"].sizes


def max_pool2d(x: Tensor, size: int, ceil_mode: bool = False) -> Tensor | None:
    """Of `[N, C, H, W]` the greatest of each second window: 2 x 2, or 3 x 3 with a padding of 1.

    None where torch has to do it: no kernel is to be had, or none for such tensors.
    """
    if (
        type(x) is not Tensor
        or not x.is_cuda
        or x.dtype not in NAMES
        or not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
        or not 0 < x.numel() < 1 << 31
        or min(x.shape[2:]) + size + ceil_mode < 4  # nothing would come out
        or not x.data_ptr()
        or x.is_neg()
        or settings.backend() == "eager"
        or transformed()
        or tracing()
        or has_tangents()
    ):
        return None
    key = (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15, size, ceil_mode)
    plan = plans.get(key) or keep(plans, key, _Pooling(x, size, ceil_mode))
    if not plan.has_kernels():
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return _apply(x, plan)  # type: ignore[no-any-return]
    return plan.forward(x, save=False)[0]


_pack = struct.Struct("@3QI4iI").pack  # as templates/pooling.cu.j2 has them


class _Pooling:
    """A kernel forward and one backward, for one shape and layout of x."""

    def __init__(self, x: Tensor, size: int, ceil_mode: bool) -> None:
        n, c, *axes = x.shape
        # no window begins behind the last number
        outs = [min((a + size - 4 + ceil_mode) // 2, (a + size - 3) // 2) + 1 for a in axes]
        last = not x.is_contiguous()
        kind, along = "max_pool", c if last else 1
        aligned = not x.data_ptr() & 15
        most = 16 // x.itemsize if aligned else 1
        if not last and aligned and axes[1] == 2 * outs[1]:
            kind, along, most = "max_pool_rows", outs[1], max(most // 2, 1)
        lanes = max(m for m in HELPERS[kind].lanes if m <= most and not along % m)
        self._specs = [
            HelperSpec(name, NAMES[x.dtype], size, lanes) for name in (kind, f"{kind}_back")
        ]
        self._kernels: list[Any] = []
        y = torch.empty(
            (n, c, *outs),
            device="meta",
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        self._x, self._y = ((t.shape, x.dtype, x.device, t.stride()) for t in (x, y))
        self._places = (torch.Size([y.numel()]), torch.uint8, x.device, (1,))
        # the windows there are, and the places two by two of x, which may be one more an axis
        self._works = y.numel(), n * c * math.prod((a + 1) // 2 for a in axes)
        self._sizes = (*axes, *outs, c // lanes if last else 1)

    def has_kernels(self) -> bool:
        """Whether both are loaded now."""
        if not self._kernels:
            found = [helper(spec, self._x[2].index) for spec in self._specs]
            self._kernels = [] if None in found else found
        return bool(self._kernels)

    def forward(self, x: Tensor, save: bool) -> tuple[Tensor, Tensor | None]:
        """The greatest of each window, and where in it that was."""
        y = _empty(self._y)
        places = _empty(self._places) if save else None
        self._launch(0, x, y, places)
        return y, places

    def backward(self, grad: Tensor, places: Tensor) -> Tensor:
        """The gradient of x."""
        grad = as_arrived(grad, self._y)
        places = as_saved(places, self._places, lambda: "a max pooling's windows")
        x_grad = _empty(self._x)
        self._launch(1, x_grad, grad.clone() if grad.data_ptr() & 15 else grad, places)
        return x_grad

    def _launch(self, back: int, x: Tensor, y: Tensor, places: Tensor | None) -> None:
        kernel, work = self._kernels[back], self._works[back]
        at = x.data_ptr(), y.data_ptr(), 0 if places is None else places.data_ptr()
        packed = _pack(*at, work // self._specs[back].lanes, *self._sizes)
        kernel.launch(packed, kernel.grid(work, None), work, 1)


def _empty(how: Any) -> Tensor:
    shape, dtype, device, strides = how
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


class _MaxPool(torch.autograd.Function):
    """Saves where in its window each greatest number was."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Pooling) -> Tensor:
        y, places = plan.forward(x, save=True)
        ctx.plan = plan
        ctx.save_for_backward(places)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        if is_batched(grad):
            raise no_transforms("is_grads_batched=True")
        x_grad = ctx.plan.backward(grad, places)
        return (*(once([x_grad], [grad]) if torch.is_grad_enabled() else [x_grad]), None)


_apply: Any = direct_apply(_MaxPool)  # outside of torch.func
plans: dict[tuple[Any, ...], _Pooling] = {}
