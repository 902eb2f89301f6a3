"""Max poolings of a network that keep a byte a window for backward, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import MaxPool2d, Module

from ..run.pooling import SIZES, max_pool2d
from .pairs import has_forward

# by kernel_size, stride, padding and dilation: the window of a kernel
_WINDOWS: dict[tuple[Any, ...], int] = {
    ((size, size), (2, 2), (size - 2, size - 2), (1, 1)): size for size in SIZES
}


def poolings(net: Module) -> Iterator[tuple[str, Module]]:
    """The max poolings of `net` that a kernel can do, and their paths: torch's, SpikingJelly's."""
    for path, module in net.named_modules():
        if (
            isinstance(module, MaxPool2d)
            and (type(module).forward is MaxPool2d.forward or has_forward(module, "MaxPool2d"))
            and "forward" not in vars(module)
            and _window(module)
        ):
            yield path, module


def lighten(pool: Module) -> None:
    """Let a kernel do a max pooling, where there is one for what arrives; `restore` undoes it."""
    pool.forward = partial(_forward, pool)


def restore(pool: Module) -> None:
    """Leave a max pooling to torch again."""
    if is_light(pool):
        del pool.forward


def is_light(pool: Module) -> bool:
    """Whether `lighten` was called."""
    return getattr(vars(pool).get("forward"), "func", None) is _forward


def _window(pool: Any) -> int:
    """The size of its windows, if kernels have such; else 0."""
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    pairs = tuple((n, n) if isinstance(n, int) else tuple(n) for n in sizes)
    return 0 if pool.return_indices else _WINDOWS.get(pairs, 0)


def _forward(pool: Any, x: Any) -> Any:
    """As the pooling's own. Its attributes are read at each call, because they may change."""
    if is_compiling():  # compilers keep a byte a window themselves
        return type(pool).forward(pool, x)
    folded = getattr(pool, "step_mode", "s") == "m"  # SpikingJelly's, which is given [T, N, *]
    size = _window(pool)
    if size and isinstance(x, Tensor) and x.dim() == 4 + folded:
        y = max_pool2d(x.flatten(0, 1) if folded else x, size, pool.ceil_mode)
        if y is not None:
            return y.unflatten(0, x.shape[:2]) if folded else y
    return type(pool).forward(pool, x)
