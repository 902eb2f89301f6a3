"""`surrogate` of SpikingJelly 0.0.0.0.12 and 0.0.0.0.14: classes, as it had them, of our data.

Called on a tensor u, an instance gives 1 where u >= 0, with the surrogate's slope as gradient; our
layers take it as their `surrogate_function`. Arguments come in SpikingJelly's order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import surrogates
from ..errors import InputTypeError
from ..neurons import IF
from ..run.autograd import multistep

# the arguments in their order, with their defaults
_CLASSES: dict[str, dict[str, Any]] = {
    **{
        name: {**getattr(surrogates, name).params, "spiking": True}
        for name in (
            "ATan", "Erf", "FakeNumericalGradient", "LogTailedReLU", "NonzeroSignLogAbs",
            "PiecewiseExp", "PiecewiseLeakyReLU", "PiecewiseQuadratic", "QPseudoSpike", "S2NN",
            "Sigmoid", "SoftSign",
        )
    },
    "LeakyKReLU": dict(spiking=True, leak=0.0, k=1.0),
    "SquarewaveFourierSeries": dict(n=2, T_period=8.0, spiking=True),
}  # fmt: skip


class SurrogateFunctionBase(torch.nn.Module):
    """A surrogate with its numbers as attributes, and `spiking`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        name = type(self).__name__
        defaults = _CLASSES[name]
        wrong = [key for key in options if key not in defaults]
        if len(args) > len(defaults) or wrong:
            given = f"unknown {', '.join(wrong)}" if wrong else f"got {len(args)}"
            raise InputTypeError(f"{name} takes {', '.join(defaults)}; {given}")
        self.__dict__.update(defaults, **dict(zip(defaults, args, strict=False)) | options)
        surrogates.as_surrogate(self)  # its errors, here and not when it is called

    def set_spiking_mode(self, spiking: bool) -> None:
        """False: the smooth primitive is the output."""
        self.spiking = spiking

    def forward(self, u: Tensor) -> Tensor:
        """1 where u >= 0, in u's shape and dtype; one step of IF from v = 0, threshold 0."""
        out = multistep(
            IF, u.reshape(1, -1), surrogate=surrogates.as_surrogate(self), v_threshold=0.0,
            v_reset=None, final_state=False,
        )  # fmt: skip
        return out.spikes.reshape(u.shape)

    def extra_repr(self) -> str:
        """The numbers."""
        return ", ".join(f"{key}={getattr(self, key)}" for key in _CLASSES[type(self).__name__])


def heaviside(x: Tensor) -> Tensor:
    """1 where x >= 0, in x's dtype; without a gradient."""
    return (x >= 0).to(x)


for _name in _CLASSES:
    globals()[_name] = type(
        _name,
        (SurrogateFunctionBase,),
        {"__module__": __name__, "__doc__": f"`neuronjit.surrogates.{_name}`, with numbers."},
    )
__all__ = ["SurrogateFunctionBase", "heaviside", *_CLASSES]
