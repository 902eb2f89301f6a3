"""`layer` of SpikingJelly 0.0.0.0.12 (containers, dropout) and 0.0.0.0.14 (`step_mode`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError, expect_known
from ..nn.neuron import STEP_MODES
from .functional import multi_step_forward, seq_to_ann_forward

# torch's own layers, which 0.0.0.0.14 has with a step_mode
_TORCH = (
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "AvgPool1d", "AvgPool2d",
    "AvgPool3d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "Conv1d", "Conv2d", "Conv3d",
    "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Flatten", "GroupNorm", "Linear",
    "MaxPool1d", "MaxPool2d", "MaxPool3d",
)  # fmt: skip


class _Stepped:
    """Before a layer of torch: "s" takes one step `[N, *]`, "m" takes `[T, N, *]`."""

    step_mode: str

    def __init__(self, *args: Any, step_mode: str = "s", **options: Any) -> None:
        super().__init__(*args, **options)
        self.step_mode = step_mode

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "step_mode":
            expect_known(value, STEP_MODES, "step_mode")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Torch's, step by step or for all steps as one batch."""
        run: Any = super().forward  # type: ignore[misc]
        y: Tensor = run(x) if self.step_mode == "s" else seq_to_ann_forward(x, run)
        return y

    def extra_repr(self) -> str:
        """Torch's, and step_mode."""
        shown: str = super().extra_repr()  # type: ignore[misc]
        return ", ".join(filter(None, [shown, f"step_mode={self.step_mode}"]))


for _name in _TORCH:
    _kind = getattr(torch.nn, _name)
    globals()[_name] = type(_name, (_Stepped, _kind), {"__module__": __name__, "__doc__": None})


class MultiStepContainer(torch.nn.Sequential):
    """Modules for one step, run step by step over `[T, N, *]`."""

    takes_sequences = True

    def forward(self, x_seq: Tensor) -> Tensor:
        """`[T, N, *]` to `[T, N, *]`."""
        return multi_step_forward(x_seq, super().forward)


class SeqToANNContainer(torch.nn.Sequential):
    """Modules without state, run over all steps `[T, N, *]` as one batch."""

    takes_sequences = True

    def forward(self, x_seq: Tensor) -> Tensor:
        """`[T, N, *]` to `[T, N, *]`."""
        return seq_to_ann_forward(x_seq, super().forward)


class Dropout(torch.nn.Module):
    """Dropout whose mask stays the same from step to step, until `reset()`."""

    step_mode = "s"
    _mask = staticmethod(torch.nn.functional.dropout)

    def __init__(self, p: float = 0.5, step_mode: str | None = None) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise SpecError(f"{type(self).__name__}: p must be at least 0 and below 1, got {p}")
        if step_mode is not None:
            self.step_mode = step_mode
        self.p = p
        self.mask: Tensor | None = None

    def reset(self) -> None:
        """Draw another mask at the next step."""
        self.mask = None

    def forward(self, x: Tensor) -> Tensor:
        """`[N, *]`, or `[T, N, *]` in step mode "m"; as it is in evaluation."""
        if not self.training:
            return x
        step = x[0] if self.step_mode == "m" else x
        if self.mask is None or self.mask.shape != step.shape:
            self.mask = self._mask(torch.ones_like(step), self.p, training=True)
        return x * self.mask

    def extra_repr(self) -> str:
        """The probability, and step_mode."""
        return f"p={self.p}, step_mode={self.step_mode}"


class Dropout2d(Dropout):
    """`Dropout` of whole channels of `[N, C, H, W]`."""

    _mask = staticmethod(torch.nn.functional.dropout2d)

    def __init__(self, p: float = 0.2, step_mode: str | None = None) -> None:
        super().__init__(p, step_mode)


class MultiStepDropout(Dropout):
    """`Dropout` for `[T, N, *]`."""

    step_mode = "m"


class MultiStepDropout2d(Dropout2d):
    """`Dropout2d` for `[T, N, C, H, W]`."""

    step_mode = "m"

    def __init__(self, p: float = 0.5, step_mode: str | None = None) -> None:
        super().__init__(p, step_mode)


class VotingLayer(_Stepped, torch.nn.Module):
    """Means of groups of `voting_size` neurons: `[N, C * voting_size]` to `[N, C]`."""

    def __init__(self, voting_size: int = 10, step_mode: str = "s") -> None:
        super().__init__()
        self.voting_size, self.step_mode = voting_size, step_mode

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C * voting_size]`, with T before it in step mode "m"."""
        return x.unflatten(-1, (-1, self.voting_size)).mean(-1)  # type: ignore[no-any-return]


__all__ = [
    "Dropout", "Dropout2d", "MultiStepContainer", "MultiStepDropout", "MultiStepDropout2d",
    "SeqToANNContainer", "VotingLayer", *_TORCH,
]  # fmt: skip
