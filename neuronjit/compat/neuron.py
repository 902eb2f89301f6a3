"""The nodes of SpikingJelly 0.0.0.0.12 (`MultiStep...`) and 0.0.0.0.14 (`backend=`), by our layers.

Each is the layer of `neuronjit.nn` with that name, and accepts what the old versions accepted, in
their order. `backend` is kept and means nothing more: every call runs our kernels, on CPU tensors
too. The `MultiStep...` nodes take `[T, N, *]` and keep `v_seq`, as 0.0.0.0.12 did; with
`node.store_v_seq = False` it is not allocated. `v_seq` of all others is kept with
`store_v_seq=True`. `cupy_fp32_inference` and `lava_s_cale` are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .. import nn
from ..errors import InputTypeError, SpecError, known

BACKENDS = ("torch", "cupy", "triton", "inductor")
_IGNORED = ("cupy_fp32_inference", "lava_s_cale")


class BaseNode:
    """What all of these nodes are instances of. It has no dynamics to build on."""

    supported_backends = BACKENDS
    _order: str  # names of the arguments, in the order of the old versions
    _other: Mapping[str, Any] = MappingProxyType({})  # defaults that are not the layer's

    def __init__(self, *args: Any, **options: Any) -> None:
        name = type(self).__name__
        if not isinstance(self, nn.Neuron):
            raise SpecError(
                f"{name}: neurons with dynamics of their own cannot be built on BaseNode here;"
                " write their equations as a neuronjit.NeuronModel and use neuronjit.nn.Neuron"
            )
        names = self._order.split()
        if len(args) > len(names):
            raise InputTypeError(
                f"{name} takes {len(names)} arguments ({', '.join(names)}), got {len(args)}"
            )
        given = dict(zip(names, args, strict=False))
        if twice := given.keys() & options.keys():
            raise InputTypeError(f"{name}: {', '.join(sorted(twice))} given twice")
        given = {**self._other, "backend": "torch", **given, **options}
        super().__init__(**{key: given[key] for key in given if key not in _IGNORED})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "backend" and value not in BACKENDS:
            raise SpecError(
                f"{type(self).__name__}: unknown backend {ascii(value)[:80]}. {known(BACKENDS)};"
                " all of them run neuronjit's kernels"
            )
        super().__setattr__(name, value)

    def _target(self) -> None:
        """Kernels for wherever the input is, whatever `backend` says."""


_FIRST = "v_threshold v_reset surrogate_function detach_reset"
_LEAKY = f"decay_input {_FIRST}"
_TAIL = "step_mode backend store_v_seq"
_MULTI: Mapping[str, Any] = MappingProxyType(dict(step_mode="m", store_v_seq=True))


class IFNode(BaseNode, nn.IFNode):
    """`neuronjit.nn.IFNode` with the arguments of the old versions."""

    _order = f"{_FIRST} {_TAIL}"


class LIFNode(BaseNode, nn.LIFNode):
    """`neuronjit.nn.LIFNode` with the arguments of the old versions."""

    _order = f"tau {_LEAKY} {_TAIL}"


class ParametricLIFNode(BaseNode, nn.ParametricLIFNode):
    """`neuronjit.nn.ParametricLIFNode` with the arguments of the old versions."""

    _order = f"init_tau {_LEAKY} {_TAIL}"


class QIFNode(BaseNode, nn.QIFNode):
    """`neuronjit.nn.QIFNode` with the arguments of the old versions."""

    _order = f"tau v_c a0 v_threshold v_rest v_reset surrogate_function detach_reset {_TAIL}"


class EIFNode(BaseNode, nn.EIFNode):
    """`neuronjit.nn.EIFNode` with the arguments of the old versions."""

    _order = (
        f"tau delta_T theta_rh v_threshold v_rest v_reset surrogate_function detach_reset {_TAIL}"
    )


class IzhikevichNode(BaseNode, nn.IzhikevichNode):
    """`neuronjit.nn.IzhikevichNode` with the arguments of the old versions."""

    _order = (
        "tau v_c a0 v_threshold v_reset v_rest w_rest tau_w a b surrogate_function detach_reset"
        f" {_TAIL}"
    )


class MultiStepIFNode(IFNode):
    """`IFNode` for `[T, N, *]`, with v after every step in `v_seq`."""

    _order, _other = f"{_FIRST} backend lava_s_cale", _MULTI


class MultiStepLIFNode(LIFNode):
    """`LIFNode` for `[T, N, *]`, with v after every step in `v_seq`."""

    _order, _other = f"tau {_LEAKY} backend lava_s_cale", _MULTI


class MultiStepParametricLIFNode(ParametricLIFNode):
    """`ParametricLIFNode` for `[T, N, *]`, with v after every step in `v_seq`."""

    _order, _other = f"init_tau {_LEAKY} backend", _MULTI


class MultiStepEIFNode(EIFNode):
    """`EIFNode` for `[T, N, *]`, with v after every step in `v_seq`."""

    _order = (
        "tau delta_T theta_rh v_threshold v_rest v_reset surrogate_function detach_reset backend"
    )
    _other = _MULTI


NODES = (
    "EIFNode", "IFNode", "IzhikevichNode", "LIFNode", "MultiStepEIFNode", "MultiStepIFNode",
    "MultiStepLIFNode", "MultiStepParametricLIFNode", "ParametricLIFNode", "QIFNode",
)  # fmt: skip
__all__ = ["BaseNode", *NODES]
