"""NIR graphs as modules of ours, and back (Pedersen et al. 2024, arXiv:2311.14641).

    import nir
    from neuronjit.integrations.nir import from_nir, to_nir

    net = from_nir(nir.read("graph.nir"), dt=1e-4)  # takes and gives whole sequences [T, N, *]
    nir.write("graph.nir", to_nir(net))

NIR's neurons are differential equations in seconds; `dt` is the length of a step, with which they
are integrated by forward Euler (`nir_lif` and others in docs/neurons.md). Tested with nir 1.0.8.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import neurons
from ..errors import BackendError, InputTypeError, SpecError, known
from ..nn import EachStep, Flatten, Neuron

__all__ = ["Graph", "Scale", "Steps", "from_nir", "to_nir"]


class Steps(EachStep):
    """`neuronjit.nn.EachStep` of one layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__(OrderedDict(layer=layer))


class Scale(torch.nn.Module):
    """The input times `scale`, which broadcasts to `[N, *]` and is learned."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(scale)

    def forward(self, x_seq: Tensor) -> Tensor:
        """`[T, N, *]` to `[T, N, *]`."""
        y: Tensor = x_seq * self.scale
        return y


class Graph(torch.nn.Module):
    """Layers that feed one another without a loop; what several edges bring is added.

    Args:
        layers: the layers by their names.
        edges: pairs (from, to) of names, of these layers and of `ends`.
        ends: the names of the input and of the output.
        input_shape: the shape of one step of one sample, where it is known.

    Raises SpecError for edges that make no such graph.
    """

    def __init__(
        self,
        layers: Mapping[str, torch.nn.Module],
        edges: Sequence[tuple[str, str]],
        ends: tuple[str, str] = ("input", "output"),
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.edges, self.ends, self.input_shape = list(dict.fromkeys(edges)), ends, input_shape
        self.names = _in_order([*layers, *ends], self.edges, ends)
        # a list, because names of NIR may hold dots
        self.layers = torch.nn.ModuleList(layers[name] for name in self.names)

    def named(self) -> dict[str, torch.nn.Module]:
        """The layers by their names, in the order in which they run."""
        return dict(zip(self.names, self.layers, strict=True))

    def forward(self, x_seq: Tensor) -> Tensor:
        """`[T, N, *]` to `[T, N, *]`; neurons go on from their states."""
        values = {self.ends[0]: x_seq}
        for name, layer in zip(self.names, self.layers, strict=True):
            values[name] = layer(self._given(name, values))
        return self._given(self.ends[1], values)

    def _given(self, name: str, values: dict[str, Tensor]) -> Tensor:
        first, *others = [values[source] for source, target in self.edges if target == name]
        for value in others:
            first = first + value
        return first

    def extra_repr(self) -> str:
        """The edges."""
        return ", ".join(f"{source} -> {target}" for source, target in self.edges)


def _in_order(
    names: Sequence[str], edges: Sequence[tuple[str, str]], ends: tuple[str, str]
) -> list[str]:
    """The names besides the ends, each after all that feed it."""
    for edge in edges:
        if unknown := [name for name in edge if name not in names]:
            raise SpecError(f"the edge {' -> '.join(edge)} names no node '{unknown[0]}'")
    sources = {name: {a for a, b in edges if b == name} for name in names}
    if alone := [name for name in names if not sources[name] and name != ends[0]]:
        raise SpecError(f"nothing feeds the node '{alone[0]}'")
    try:
        done = [*TopologicalSorter(sources).static_order()]
    except CycleError as error:
        raise SpecError(
            f"the graph is recurrent: {' -> '.join(error.args[1])}. Whole sequences run layer by"
            " layer, so a layer cannot read what a later one gave in the step before"
        ) from error
    return [name for name in done if name not in ends]


_Layer = TypeVar("_Layer", bound=torch.nn.Module)

# --- reading -------------------------------------------------------------------------------------

# NIR's class: our model; the fields of both have the same names
_NEURONS = {
    "IF": "nir_if",
    "LIF": "nir_lif",
    "CubaLIF": "nir_cuba_lif",
    "LI": "nir_li",
    "CubaLI": "nir_cuba_li",
}
_OTHERS = (
    "Affine", "AvgPool2d", "Conv1d", "Conv2d", "Flatten", "Linear", "NIRGraph", "Scale",
    "SumPool2d", "Threshold",
)  # fmt: skip


def from_nir(
    graph: Any,
    dt: float = 1e-4,
    *,
    surrogate: Any = None,
    detach_reset: bool = False,
    backend: str | None = None,
) -> Graph:
    """The module of a NIR graph, for whole sequences `[T, N, *]`.

    Parameters that are equal for all neurons become numbers, others buffers of one step's shape;
    weights and scales are learned. State is kept from call to call: `neuronjit.nn.reset_net`.

    Args:
        graph: a `nir.NIRGraph` with one input and one output.
        dt: seconds in a step.
        surrogate, detach_reset, backend: of all neurons, as for `neuronjit.nn.Neuron`.

    Raises:
        SpecError: a node that has no counterpart here (Delay, I, ...), a recurrent graph, several
            inputs or outputs.
        InputTypeError: what is no NIR graph.
        BackendError: nir is not installed.
    """
    nir = _library()
    if not isinstance(graph, nir.NIRGraph):
        raise InputTypeError(f"graph must be a nir.NIRGraph, got {type(graph).__name__}")
    if not (isinstance(dt, int | float) and 0 < dt < float("inf")):
        raise SpecError(f"dt must be a number of seconds above 0, got {ascii(dt)[:80]}")
    options = dict(surrogate=surrogate, detach_reset=detach_reset, backend=backend)
    ends, layers = [], {}
    for kind in ("Input", "Output"):
        found = [name for name, node in graph.nodes.items() if type(node).__name__ == kind]
        if len(found) != 1:
            raise SpecError(f"the graph must have one {kind}, but it has {len(found)}: {found}")
        ends += found
    for name, node in graph.nodes.items():
        if name not in ends:
            with _at(f"node '{name}'"):
                layers[name] = _layer(node, dt, options)
    shape = next(iter(graph.nodes[ends[0]].input_type.values()))
    return Graph(
        layers, [(a, b) for a, b in graph.edges], (ends[0], ends[1]),
        None if shape is None else _sizes(shape),
    )  # fmt: skip


def _layer(node: Any, dt: float, options: dict[str, Any]) -> torch.nn.Module:
    kind = type(node).__name__
    if kind in _NEURONS:
        model = neurons.by_name(_NEURONS[kind])
        fields: dict[str, Any] = {
            p: _number(getattr(node, p)) for p in model.params if hasattr(node, p)
        }
        return Neuron(model, dt=dt, **options, **fields)
    match kind:
        case "Threshold":
            return Neuron("nir_threshold", v_threshold=_number(node.threshold), **options)
        case "Linear" | "Affine":
            weight = _tensor(node.weight)
            if weight.dim() != 2:
                raise SpecError(f"{kind} has a weight {list(weight.shape)}; 2 dimensions are known")
            out, inputs = weight.shape
            return _filled(torch.nn.Linear(inputs, out, kind == "Affine"), node)
        case "Conv1d" | "Conv2d":
            out, inputs, *kernel = node.weight.shape
            padding = node.padding if isinstance(node.padding, str) else _sizes(node.padding)
            convolution = getattr(torch.nn, kind)(
                inputs * int(node.groups), out, tuple(kernel), _sizes(node.stride), padding,
                _sizes(node.dilation), int(node.groups),
            )  # fmt: skip
            return Steps(_filled(convolution, node))
        case "SumPool2d" | "AvgPool2d":
            return Steps(
                torch.nn.AvgPool2d(
                    _sizes(node.kernel_size), _sizes(node.stride), _sizes(node.padding),
                    divisor_override=1 if kind == "SumPool2d" else None,
                )
            )  # fmt: skip
        case "Flatten":  # NIR counts without T and N
            start, end = int(node.start_dim), int(node.end_dim)
            return Flatten(start + 2 * (start >= 0), end + 2 * (end >= 0))
        case "Scale":
            return Scale(_tensor(node.scale))
        case "NIRGraph":
            return from_nir(node, dt, **options)
    raise SpecError(f"{kind} has no counterpart here. {known([*_NEURONS, *_OTHERS])}")


def _filled(layer: _Layer, node: Any) -> _Layer:
    with torch.no_grad():
        for name, value in layer.named_parameters():  # weight, and bias where there is one
            value.copy_(_tensor(getattr(node, name)))
    return layer


def _tensor(array: Any) -> Tensor:
    return torch.as_tensor(array).to(torch.get_default_dtype(), copy=True)


def _number(array: Any) -> float | Tensor:
    """The one number of an array whose values are all equal: kernels read no memory for it."""
    values = _tensor(array)
    first = values.flatten()[0]
    return float(first) if (values == first).all() else values


def _sizes(value: Any) -> Any:
    return tuple(int(size) for size in torch.as_tensor(value).reshape(-1))


# --- writing -------------------------------------------------------------------------------------


def to_nir(
    module: torch.nn.Module, dt: float = 1e-4, *, input_shape: Sequence[int] | None = None
) -> Any:
    """The NIR graph of a module: one of `from_nir`, a `torch.nn.Sequential`, or one layer.

    Known layers: those of `from_nir`; `torch.nn.Linear`, `Flatten` of `[T, N, *]`, and
    `EachStep(...)` of a Conv1d, Conv2d or AvgPool2d; the layers IF, LIF, PLIF of `neuronjit.nn` and
    `Neuron` of the models li, cuba_lif and nir_*. Identity and Dropout are left out. The surrogate
    and the state are no part of NIR. Ours fire at the threshold too, NIR's only above it.

    Args:
        module: a copy of it, without its neurons' dynamics, runs once on zeros, because NIR stores
            the shape of every layer.
        dt: seconds in a step, for neurons whose time constants count steps.
        input_shape: the shape of one step of one sample, e.g. (2, 34, 34); not needed where
            `from_nir` made the module.

    Raises:
        SpecError: a layer that NIR cannot say (soft reset, batch norm, ...), no input_shape.
        BackendError: nir is not installed.
    """
    nir = _library()
    if input_shape is None:
        input_shape = getattr(module, "input_shape", None)
    if input_shape is None:
        raise SpecError(
            "to_nir needs input_shape, the shape of one step of one sample, e.g. (2, 34, 34)"
        )
    copied = copy.deepcopy(module).eval()
    shapes: dict[torch.nn.Module, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def note(layer: torch.nn.Module, given: Any, out: Any) -> None:
        shapes[layer] = tuple(given[0].shape[2:]), tuple(out.shape[2:])

    for layer in copied.modules():
        layer.register_forward_hook(note)
        if isinstance(layer, Neuron):  # shapes need no spikes, and no kernel
            layer.forward = torch.nn.Identity().forward  # type: ignore[assignment]
    _check(copied.named() if isinstance(copied, Graph) else _chain(copied))
    some = next((p for p in copied.parameters()), torch.zeros(0))
    x_seq = torch.zeros((1, 1, *input_shape), dtype=some.dtype, device=some.device)
    try:
        with torch.no_grad():
            copied(x_seq)
    except RuntimeError as error:
        raise SpecError(
            f"the module does not take [1, 1, *{tuple(input_shape)}]: {error}"
        ) from error
    if not isinstance(copied, Graph):
        chain = _chain(copied)
        names = ["input", *chain, "output"]
        if clash := chain.keys() & {"input", "output"}:
            raise SpecError(f"a layer cannot be called '{min(clash)}' here: rename it")
        edges = list(pairwise(names))
        shapes[wrapped := Graph(chain, edges)] = shapes[copied]
        copied = wrapped
    return _graph(nir, copied, dt, shapes)


def _graph(nir: Any, graph: Graph, dt: float, shapes: Any) -> Any:
    before, after = shapes[graph]
    nodes = {graph.ends[0]: nir.Input({"input": _array(before)})}
    for name, layer in graph.named().items():
        with _at(f"layer '{name}'"):
            nodes[name] = _node(nir, layer, dt, shapes)
    nodes[graph.ends[1]] = nir.Output({"output": _array(after)})
    return nir.NIRGraph(nodes=nodes, edges=graph.edges, type_check=False)


def _chain(module: torch.nn.Module, path: str = "") -> dict[str, torch.nn.Module]:
    if type(module) is torch.nn.Sequential:
        found: dict[str, torch.nn.Module] = {}
        for name, child in module.named_children():
            found |= _chain(child, f"{path}.{name}" if path else name)
        return found
    if isinstance(module, torch.nn.Identity | torch.nn.Dropout):
        return {}
    return {path or "0": module}


_LAYERS = (
    Neuron, Graph, Scale, torch.nn.Linear, torch.nn.Flatten, torch.nn.Conv1d, torch.nn.Conv2d,
    torch.nn.AvgPool2d,
)  # fmt: skip


def _inner(layer: Any) -> Any:
    """The layer itself, or the one that an EachStep runs."""
    return layer[0] if isinstance(layer, EachStep) and len(layer) == 1 else layer


def _check(layers: Mapping[str, torch.nn.Module]) -> None:
    for name, layer in layers.items():
        inner = _inner(layer)
        if not isinstance(inner, _LAYERS):
            kinds = known([kind.__name__ for kind in (*_LAYERS, EachStep)])
            raise SpecError(f"layer '{name}': NIR cannot say {type(inner).__name__}. {kinds}")
        if isinstance(inner, Graph):
            _check(inner.named())


def _node(nir: Any, layer: Any, dt: float, shapes: Any) -> Any:
    if isinstance(layer, Graph):
        return _graph(nir, layer, dt, shapes)
    before = shapes[layer][0]
    inner: Any = _inner(layer)
    match inner:
        case Neuron():
            return _neuron(nir, inner, before, dt)
        case Scale():
            return nir.Scale(_array(inner.scale.broadcast_to(before)))
        case torch.nn.Linear():
            weight = _array(inner.weight)
            return (
                nir.Linear(weight) if inner.bias is None else nir.Affine(weight, _array(inner.bias))
            )
        case torch.nn.Flatten():
            lead = 1 if hasattr(inner, "step_mode") else 2  # SpikingJelly's counts without T
            dims = [dim - lead if dim >= 0 else dim for dim in (inner.start_dim, inner.end_dim)]
            batch = any(0 <= dim < lead for dim in (inner.start_dim, inner.end_dim))
            if batch or any(dim < -len(before) for dim in dims):
                raise SpecError(f"{inner} flattens time or batch, not only what follows them")
            return nir.Flatten({"input": _array(before)}, *dims)
        case torch.nn.AvgPool2d():
            return _pool(nir, inner)
    if inner.padding_mode != "zeros":
        raise SpecError(f"NIR pads with zeros, not with padding_mode='{inner.padding_mode}'")
    bias = torch.zeros(inner.out_channels) if inner.bias is None else inner.bias
    flat = isinstance(inner, torch.nn.Conv1d)
    sizes = [
        size if isinstance(size, str) else size[0] if flat else tuple(size)
        for size in (inner.stride, inner.padding, inner.dilation)
    ]
    return getattr(nir, "Conv1d" if flat else "Conv2d")(
        before[1] if flat else before[1:], _array(inner.weight), *sizes, inner.groups, _array(bias)
    )


def _pool(nir: Any, pool: torch.nn.AvgPool2d) -> Any:
    if pool.ceil_mode or not (pool.count_include_pad or pool.padding in (0, (0, 0))):
        raise SpecError(f"NIR's pools have no ceil_mode, and count what they pad; got {pool}")
    if pool.divisor_override not in (None, 1):
        raise SpecError(f"NIR has sums and averages, not divisor_override={pool.divisor_override}")
    sizes = (
        _array(n if isinstance(n, tuple) else (n, n))
        for n in (pool.kernel_size, pool.stride, pool.padding)
    )
    return (nir.SumPool2d if pool.divisor_override == 1 else nir.AvgPool2d)(*sizes)


def _neuron(nir: Any, layer: Neuron, shape: tuple[int, ...], dt: float) -> Any:
    if layer._norm is not None:
        raise SpecError("NIR cannot say the batch norm that is fused into the neuron")
    p: dict[str, Any] = {}
    for name in layer.model.params:
        value = getattr(layer, name)
        if isinstance(value, Tensor) and layer.channels is not None:
            value = layer._per_channel(value, torch.empty((1, 1, *shape), device="meta"))
        p[name] = value if value is None else torch.as_tensor(value, dtype=torch.float64)
    readout = layer.model in (neurons.LI, neurons.NIR_LI, neurons.NIR_CUBA_LI)
    if not readout and (p["v_reset"] is None or layer.reset_mode == "soft"):
        raise SpecError("NIR has no soft reset; give the neuron a v_reset")
    fires = {} if readout else {name: p[name] for name in ("v_threshold", "v_reset")}
    kinds = {neurons.by_name(ours): kind for kind, ours in _NEURONS.items()}
    one, leak = torch.ones(()), p["v_reset"]
    model = layer.model
    if model in kinds:
        kind = kinds[model]
        fields = {n: p[n] for n in p if n not in ("dt", "v_threshold", "v_reset")}
    elif model == neurons.NIR_THRESHOLD:
        kind, fields, fires = "Threshold", {"threshold": p["v_threshold"]}, {}
    elif model == neurons.IF:
        kind, fields = "IF", dict(r=one / dt)
    elif model in (neurons.LIF, neurons.LIF_NO_DECAY, neurons.PLIF, neurons.PLIF_NO_DECAY):
        tau = p["tau"] if "tau" in p else 1 / p["reciprocal_tau"]
        r = one if model in (neurons.LIF, neurons.PLIF) else tau
        kind, fields = "LIF", dict(tau=tau * dt, r=r, v_leak=leak)
    elif model == neurons.LI:
        kind, fields = "LI", dict(tau=p["tau"] * dt, r=one, v_leak=p["v_leak"])
    elif model == neurons.CUBA_LIF:
        syn, mem = 1 / (1 - p["c_decay"]), 1 / (1 - p["v_decay"])
        fields = dict(tau_syn=syn * dt, tau_mem=mem * dt, r=mem, v_leak=one * 0, w_in=syn)
        kind = "CubaLIF"
    else:
        raise SpecError(f"NIR cannot say the model '{model.name}'")
    return getattr(nir, kind)(**{n: _per_neuron(n, v, shape) for n, v in (fields | fires).items()})


def _per_neuron(name: str, value: Tensor, shape: tuple[int, ...]) -> Any:
    try:
        values = value.broadcast_to((1, *shape))[0]
    except RuntimeError as error:
        given = f"{name} has the shape {list(value.shape)}"
        raise SpecError(f"{given}, which is not one per neuron of {list(shape)}") from error
    return _array(values.to(torch.get_default_dtype()))


def _array(values: Any) -> Any:
    """A NumPy array of its own."""
    return torch.as_tensor(values).detach().cpu().clone().numpy()


@contextmanager
def _at(place: str) -> Iterator[None]:
    try:
        yield
    except SpecError as error:
        raise SpecError(f"{place}: {error}") from error


def _library() -> Any:
    try:
        import nir
    except ImportError as error:
        raise BackendError(f"NIR graphs need the package nir: pip install nir ({error})") from error
    return nir
