"""The two targets: each a module that is a `base.Target`."""

from __future__ import annotations

import importlib
import itertools
from functools import cache
from typing import cast

from ...errors import BackendError, expect_known
from ...models.model import NeuronModel
from .base import Shape, Target

TARGETS = ("cuda", "cpu")  # each is a module here, and a header in templates/


@cache
def by_name(name: str) -> Target:
    """The target's module. Raises SpecError, and BackendError where it cannot be imported."""
    expect_known(name, TARGETS, "target")
    try:
        return cast(Target, importlib.import_module(f".{name}", __package__))
    except (OSError, ImportError) as error:  # out of descriptors, say
        raise BackendError(f"the {name} target cannot be imported: {error}") from error


@cache
def shapes(
    target: str, direction: str, itemsize: int, model: NeuronModel, sequences: int
) -> tuple[Shape, ...]:
    """Every shape that `shape` of this target gives, whatever the sizes: what to build ahead.

    Found by asking it, so that no second table can differ from the first: a few sizes in each
    factor of two, with each power of two that divides them and with none.
    """
    shape = by_name(target).shape
    neurons = {
        max(1, int(2 ** (i / 4)) // 16 * 16 + odd) for i in range(128) for odd in (0, 1, 2, 4, 8)
    }
    steps = [*range(1, 34), 50, 64, 65, 100, 128, 256, 512, 1000, 1024, 4096]
    asked = itertools.product(sorted(neurons), steps, (True, False))
    return tuple(sorted({shape(direction, itemsize, model, sequences, *sizes) for sizes in asked}))
