"""Layers: neurons that remember their state from call to call, in two families.

SpikingJelly's names (`IFNode`, `LIFNode`, `ParametricLIFNode`, `QIFNode`, `EIFNode`,
`IzhikevichNode`) take SpikingJelly's place: its arguments in its order, and all of its defaults.
So `step_mode` is "s", one time step `[N, *]` a call, and the surrogate is Sigmoid(4).

The short names (`IF`, `LIF`, `PLIF`, `QIF`, `EIF`, `Izhikevich`, and `Neuron` for any model) have
the same arguments and run as `neuronjit.multistep`: `step_mode` is "m", whole sequences
`[T, N, *]` in one kernel, and the surrogate is ATan(2).

Every parameter may be a number, a tensor that broadcasts to `[N, *]` (kept as a buffer), or a
`torch.nn.Parameter`. `learnable=("tau", "v_threshold")` makes parameters of numbers; with
`channels=C` there is one for each channel of `[T, N, C, *]`. The other keywords of `Neuron`
(surrogate, learnable, channels, backend, persistent_state) are keywords of every layer.
"""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import neurons
from ..errors import SpecError
from ..models.model import NeuronModel
from .batch_norm import EachStep, NormedNeuron, fuse, unfuse
from .neuron import ATAN, SIGMOID, Neuron, Number, shorten

__all__ = [
    "EIF", "IF", "LIF", "PLIF", "QIF", "EIFNode", "EachStep", "Flatten", "IFNode", "Izhikevich",
    "IzhikevichNode", "LIFNode", "Neuron", "NormedNeuron", "ParametricLIFNode", "QIFNode",
    "detach_net", "fuse", "reset_net", "unfuse",
]  # fmt: skip


class _Node(Neuron):
    """A built-in model as SpikingJelly has it: v starts from v_reset, from 0 with soft reset."""

    def initial_state(self) -> dict[str, Number]:
        """What each state starts from."""
        return {"v": 0.0 if self.v_reset is None else self.v_reset}


class _LeakyNode(_Node):
    """LIF or PLIF: two models, of which decay_input chooses."""

    _models: tuple[NeuronModel, NeuronModel]  # with decay_input, without

    @property
    def decay_input(self) -> bool:
        """Whether the input is scaled by 1 / tau, as the leak is."""
        return self.model == self._models[0]

    @decay_input.setter
    def decay_input(self, value: bool) -> None:
        self.model = self._models[not value]

    def extra_repr(self) -> str:
        """The parameters; decay_input where it is not the default."""
        return super().extra_repr() + ("" if self.decay_input else ", decay_input=False")


class IFNode(_Node):
    """Integrate-and-fire: h = v + x."""

    def __init__(
        self, v_threshold: Number = 1.0, v_reset: Number | None = 0.0,
        surrogate_function: Any = SIGMOID, detach_reset: bool = False, step_mode: str = "s",
        store_v_seq: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            neurons.IF, v_threshold=v_threshold, v_reset=v_reset,
            surrogate_function=surrogate_function, detach_reset=detach_reset, step_mode=step_mode,
            store_v_seq=store_v_seq, **options,
        )  # fmt: skip


class LIFNode(_LeakyNode):
    """Leaky integrate-and-fire: h = v + (x - (v - v_reset)) / tau, or v - (v - v_reset) / tau + x.

    Raises SpecError for a tau that is not above 1.
    """

    _models = neurons.LIF, neurons.LIF_NO_DECAY

    def __init__(
        self, tau: Number = 2.0, decay_input: bool = True, v_threshold: Number = 1.0,
        v_reset: Number | None = 0.0, surrogate_function: Any = SIGMOID, detach_reset: bool = False,
        step_mode: str = "s", store_v_seq: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        _check_tau(self, "tau", tau)
        super().__init__(
            self._models[not decay_input], tau=tau, v_threshold=v_threshold, v_reset=v_reset,
            surrogate_function=surrogate_function, detach_reset=detach_reset, step_mode=step_mode,
            store_v_seq=store_v_seq, **options,
        )  # fmt: skip


class ParametricLIFNode(_LeakyNode):
    """LIF with a learned tau: 1 / tau = sigmoid(w) (Fang et al. 2021, arXiv:2007.05785).

    w is one parameter, or `[C]` with `channels=C`; it starts from -log(init_tau - 1).
    Raises SpecError for an init_tau that is not above 1.
    """

    _models = neurons.PLIF, neurons.PLIF_NO_DECAY
    _derived = ("reciprocal_tau",)

    def __init__(
        self, init_tau: float = 2.0, decay_input: bool = True, v_threshold: Number = 1.0,
        v_reset: Number | None = 0.0, surrogate_function: Any = SIGMOID, detach_reset: bool = False,
        step_mode: str = "s", store_v_seq: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        _check_tau(self, "init_tau", init_tau)
        super().__init__(
            self._models[not decay_input], v_threshold=v_threshold, v_reset=v_reset,
            surrogate_function=surrogate_function, detach_reset=detach_reset, step_mode=step_mode,
            store_v_seq=store_v_seq, **options,
        )  # fmt: skip
        size = () if self.channels is None else (self.channels,)
        self.w = Parameter(torch.full(size, -math.log(init_tau - 1.0)))

    @property
    def reciprocal_tau(self) -> Tensor:
        """1 / tau, between 0 and 1; the gradient goes on to w."""
        return self.w.sigmoid()

    def extra_repr(self) -> str:
        """As SpikingJelly's, which shows tau."""
        return f"{super().extra_repr()}, tau={shorten(1 / self.reciprocal_tau)}"


class QIFNode(_Node):
    """Quadratic integrate-and-fire: h = v + (x + a0 (v - v_rest)(v - v_c)) / tau.

    Raises SpecError for a tau that is not above 1, or a0 not above 0.
    """

    def __init__(
        self, tau: Number = 2.0, v_c: Number = 0.8, a0: Number = 1.0, v_threshold: Number = 1.0,
        v_rest: Number = 0.0, v_reset: Number | None = -0.1, surrogate_function: Any = SIGMOID,
        detach_reset: bool = False, step_mode: str = "s", store_v_seq: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        _check_tau(self, "tau", tau)
        super().__init__(
            neurons.QIF, tau=tau, v_c=v_c, a0=a0, v_threshold=v_threshold, v_rest=v_rest,
            v_reset=v_reset, surrogate_function=surrogate_function, detach_reset=detach_reset,
            step_mode=step_mode, store_v_seq=store_v_seq, **options,
        )  # fmt: skip


class EIFNode(_Node):
    """Exponential integrate-and-fire.

    h = v + (x - (v - v_rest) + delta_T exp((v - theta_rh) / delta_T)) / tau.
    Raises SpecError for a tau that is not above 1, or delta_T not above 0.
    """

    def __init__(
        self, tau: Number = 2.0, delta_T: Number = 1.0, theta_rh: Number = 0.8,
        v_threshold: Number = 1.0, v_rest: Number = 0.0, v_reset: Number | None = -0.1,
        surrogate_function: Any = SIGMOID, detach_reset: bool = False, step_mode: str = "s",
        store_v_seq: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        _check_tau(self, "tau", tau)
        super().__init__(
            neurons.EIF, tau=tau, delta_T=delta_T, theta_rh=theta_rh, v_threshold=v_threshold,
            v_rest=v_rest, v_reset=v_reset, surrogate_function=surrogate_function,
            detach_reset=detach_reset, step_mode=step_mode, store_v_seq=store_v_seq, **options,
        )  # fmt: skip


class IzhikevichNode(_Node):
    """Izhikevich's: QIF with - w inside; w <- w + (a (h - v_rest) - w) / tau_w + b s, from w_rest.

    Raises SpecError for a tau that is not above 1, or a0 or tau_w not above 0.
    """

    def __init__(
        self, tau: Number = 2.0, v_c: Number = 0.8, a0: Number = 1.0, v_threshold: Number = 1.0,
        v_reset: Number | None = 0.0, v_rest: Number = -0.1, w_rest: float = 0.0,
        tau_w: Number = 2.0, a: Number = 0.0, b: Number = 0.0, surrogate_function: Any = SIGMOID,
        detach_reset: bool = False, step_mode: str = "s", store_v_seq: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        _check_tau(self, "tau", tau)
        super().__init__(
            neurons.IZHIKEVICH, tau=tau, v_c=v_c, a0=a0, v_threshold=v_threshold, v_reset=v_reset,
            v_rest=v_rest, tau_w=tau_w, a=a, b=b, surrogate_function=surrogate_function,
            detach_reset=detach_reset, step_mode=step_mode, store_v_seq=store_v_seq, **options,
        )  # fmt: skip
        self.w_rest = w_rest

    def initial_state(self) -> dict[str, Number]:
        """What each state starts from."""
        return {**super().initial_state(), "w": self.w_rest}

    def extra_repr(self) -> str:
        """All parameters, w_rest among them."""
        return f"{super().extra_repr()}, w_rest={self.w_rest}"


_Layer = TypeVar("_Layer", bound=type[_Node])


def _as_multistep(layer: _Layer) -> _Layer:
    """Give a layer `multistep`'s defaults: its parent's arguments, but sequences and ATan.

    The parent's own `__init__` with other defaults: signatures, help and editors show them.
    """
    init: Any = layer.__init__
    names = init.__code__.co_varnames[1 : init.__code__.co_argcount]
    defaults = dict(zip(names, init.__defaults__, strict=True))
    defaults |= dict(surrogate_function=ATAN, step_mode="m")
    own: Any = FunctionType(
        init.__code__, init.__globals__, init.__name__, tuple(defaults.values()), init.__closure__
    )
    own.__annotations__, own.__qualname__ = init.__annotations__, f"{layer.__name__}.__init__"
    layer.__init__ = own  # type: ignore[method-assign]
    return layer


@_as_multistep
class IF(IFNode):
    """`IFNode` for whole sequences, with ATan."""


@_as_multistep
class LIF(LIFNode):
    """`LIFNode` for whole sequences, with ATan."""


@_as_multistep
class PLIF(ParametricLIFNode):
    """`ParametricLIFNode` for whole sequences, with ATan."""


@_as_multistep
class QIF(QIFNode):
    """`QIFNode` for whole sequences, with ATan."""


@_as_multistep
class EIF(EIFNode):
    """`EIFNode` for whole sequences, with ATan."""


@_as_multistep
class Izhikevich(IzhikevichNode):
    """`IzhikevichNode` for whole sequences, with ATan."""


class Flatten(torch.nn.Flatten):
    """`[T, N, *]` to `[T, N, features]`: torch's, but time and batch stay."""

    def __init__(self, start_dim: int = 2, end_dim: int = -1) -> None:
        super().__init__(start_dim, end_dim)


def reset_net(net: torch.nn.Module) -> None:
    """Call `reset()` of every module of `net` that has it: ours, and SpikingJelly's."""
    _call_all(net, "reset")


def detach_net(net: torch.nn.Module) -> None:
    """Call `detach()` of every module of `net` that has it."""
    _call_all(net, "detach")


def _call_all(net: torch.nn.Module, method: str) -> None:
    for module in net.modules():
        if callable(call := getattr(module, method, None)):
            call()


def _check_tau(layer: Neuron, name: str, tau: Any) -> None:
    """SpikingJelly's rule for leaky neurons. Tensors on a GPU are not read: that would wait."""
    if isinstance(tau, Tensor):
        if tau.device.type != "cpu" or not tau.numel():
            return
        tau = tau.detach().min().item()
    if isinstance(tau, int | float) and not (1 < tau < math.inf):
        raise SpecError(f"{type(layer).__name__}: {name} must be finite and > 1, got {tau}")
