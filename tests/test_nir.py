"""NIR graphs as modules and back: against forward Euler in PyTorch, and SpikingJelly's reader."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_near, each_device
from torch import Tensor
from torch.nn import functional as F

import neuronjit as nj
from neuronjit.integrations.nir import Graph, Scale, Steps, from_nir, to_nir

pytestmark = pytest.mark.peers("nir", "h5py")
DT = 1e-3


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def array(*shape: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.rand(shape, generator=generator) * (high - low) + low).numpy()


def full(value: float, *shape: int) -> Any:
    return torch.full(shape, value).numpy()


def neurons(shape: tuple[int, ...]) -> dict[str, Any]:
    """One of each kind, with parameters of each neuron's own."""
    import nir

    tau, r = array(*shape, low=3e-3, high=9e-3), array(*shape, low=1.0, high=3.0, seed=1)
    leak, reset = array(*shape, high=0.1, seed=2), array(*shape, low=-0.2, seed=3)
    theta, syn = array(*shape, low=0.4, high=0.7, seed=4), array(*shape, low=2e-3, high=5e-3)
    return {
        "IF": nir.IF(r * 200, theta, reset),
        "LIF": nir.LIF(tau, r, leak, theta, reset),
        "CubaLIF": nir.CubaLIF(syn, tau, r, leak, theta, reset, w_in=r),
        "LI": nir.LI(tau, r, leak),
        "CubaLI": nir.CubaLI(syn, tau, r, leak, w_in=r),
        "Threshold": nir.Threshold(theta),
    }


# --- the equations, step by step ------------------------------------------------------------------


class Fire(torch.autograd.Function):
    """1 where u > 0; backward multiplies with ATan(2)'s slope."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(1 / (1 + (math.pi * u) ** 2))
        return (u > 0).to(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


def euler(node: Any, x_seq: Tensor) -> Tensor:
    """NIR's differential equations in steps of DT; the current is updated before the potential."""
    kind, out = type(node).__name__, []
    p = {
        name: torch.as_tensor(value, device=x_seq.device)
        for name, value in vars(node).items()
        if not isinstance(value, dict)
    }
    v = current = torch.zeros_like(x_seq[0])
    for x in x_seq:
        if kind == "Threshold":
            out.append(Fire.apply(x - p["threshold"]))
            continue
        if "Cuba" in kind:
            current = current + DT / p["tau_syn"] * (-current + p["w_in"] * x)
            v = v + DT / p["tau_mem"] * (p["v_leak"] - v + p["r"] * current)
        elif kind == "IF":
            v = v + DT * p["r"] * x
        else:
            v = v + DT / p["tau"] * (p["v_leak"] - v + p["r"] * x)
        if kind in ("LI", "CubaLI"):
            out.append(v)
        else:
            s = Fire.apply(v - p["v_threshold"])
            v = v * (1 - s) + s * p["v_reset"]
            out.append(s)
    return torch.stack(out)


def compare(net: Any, reference: Callable[[Tensor], Tensor], x: Tensor, device: str) -> None:
    """Outputs and the gradient of x; whole sequences in two pieces give the same."""
    results = []
    for run in (net, reference):
        leaf = x.to(device, copy=True).requires_grad_()
        out = run(leaf)
        weight = torch.linspace(-1, 1, out.numel(), device=device).reshape(out.shape)
        results.append((out, torch.autograd.grad((out * weight).sum(), leaf)[0]))
        nj.nn.reset_net(net)
    (out, grad), (wanted, wanted_grad) = results
    assert (wanted != 0).double().mean() > 0.02 and wanted.std() > 0.01
    assert_near(out, wanted.cpu(), 2e-5, "output")
    assert_near(grad, wanted_grad.cpu(), 2e-5, "gradient of x")
    with torch.no_grad():
        pieces = torch.cat([net(x[:3].to(device)), net(x[3:].to(device))])
    assert_near(pieces, out.detach().cpu(), 1e-6, "in two pieces")


@each_device
@pytest.mark.parametrize("kind", ["IF", "LIF", "CubaLIF", "LI", "CubaLI", "Threshold"])
def test_neurons_with_parameters_of_their_own(kind: str, device: str) -> None:
    import nir

    node = neurons((3, 5))[kind]
    net = from_nir(nir.NIRGraph.from_list(node), dt=DT).to(device)
    compare(net, lambda x: euler(node, x), torch.rand(8, 2, 3, 5) * 3, device)


def images() -> Any:
    """Every layer without a loop: [2, 6, 6] to 4 leaky integrators."""
    import nir

    of = neurons((3, 6, 6)), neurons((8,)), neurons((4,))
    nodes = {
        "in": nir.Input({"input": torch.tensor([2, 6, 6]).numpy()}),
        "conv.0": nir.Conv2d((6, 6), array(3, 2, 3, 3, low=-0.3), 1, 1, 1, 1, array(3)),
        "lif": of[0]["LIF"],
        "pool": nir.SumPool2d(*torch.tensor([[2, 2], [2, 2], [0, 0]]).numpy()),
        "flatten": nir.Flatten({"input": torch.tensor([3, 3, 3]).numpy()}, 0, -1),
        "affine": nir.Affine(array(8, 27, low=-0.2, high=0.4), array(8)),
        "cuba": of[1]["CubaLIF"],
        "scale": nir.Scale(array(8, low=1, high=2)),
        "linear": nir.Linear(array(4, 8, low=-1)),
        "li": of[2]["LI"],
        "out": nir.Output({"output": torch.tensor([4]).numpy()}),
    }
    edges = list(zip(list(nodes)[:-1], list(nodes)[1:], strict=True))
    return nir.NIRGraph(nodes=nodes, edges=edges)


@each_device
def test_a_convolutional_graph(device: str) -> None:
    graph = images()

    def plain(x_seq: Tensor) -> Tensor:
        n = graph.nodes
        t = lambda value: torch.as_tensor(value, device=device)  # noqa: E731
        y = torch.stack(
            [F.conv2d(x, t(n["conv.0"].weight), t(n["conv.0"].bias), 1, 1) for x in x_seq]
        )
        y = euler(n["lif"], y)
        y = torch.stack([4 * F.avg_pool2d(step, 2) for step in y]).flatten(2)
        y = euler(n["cuba"], y @ t(n["affine"].weight).T + t(n["affine"].bias))
        return euler(n["li"], (y * t(n["scale"].scale)) @ t(n["linear"].weight).T)

    net = from_nir(graph, dt=DT).to(device)
    compare(net, plain, torch.rand(7, 2, 2, 6, 6) * 3, device)
    assert len(list(net.parameters())) == 6 and net.input_shape == (2, 6, 6)


def branches() -> Any:
    """Two paths that meet: their sum; and a graph within the graph."""
    import nir

    inner = nir.NIRGraph.from_list(nir.Linear(array(5, 5, low=-1, high=2)), neurons((5,))["IF"])
    nodes = {
        "input": nir.Input({"input": torch.tensor([5]).numpy()}),
        "output": nir.Output({"output": torch.tensor([5]).numpy()}),
        "inner": inner,
        "cut": nir.Threshold(full(0.9, 5)),
        "scale": nir.Scale(full(1.5, 5)),
    }
    edges = [("input", "inner"), ("inner", "cut"), ("scale", "cut"), ("input", "scale")]
    return nir.NIRGraph(nodes=nodes, edges=[*edges, ("cut", "output")], type_check=False)


def test_edges_that_meet_are_added() -> None:
    graph = branches()
    linear, fires = (graph.nodes["inner"].nodes[name] for name in ("linear", "if"))

    def plain(x: Tensor) -> Tensor:
        y = euler(fires, x @ torch.as_tensor(linear.weight).T)
        return euler(graph.nodes["cut"], y + 1.5 * x)

    compare(from_nir(graph, dt=DT), plain, torch.rand(7, 2, 5), "cpu")


def one_dimension() -> Any:
    import nir

    return nir.NIRGraph.from_list(
        nir.Conv1d(9, array(4, 2, 3, low=-0.3), 2, 1, 1, 1, array(4)),
        nir.Conv1d(5, array(4, 4, 3), 1, "same", 1, 1, array(4)),
        nir.Flatten({"input": torch.tensor([4, 5]).numpy()}, 0, 1),
    )


def test_one_dimension() -> None:
    graph = one_dimension()
    first, second = (
        (torch.as_tensor(graph.nodes[name].weight), torch.as_tensor(graph.nodes[name].bias))
        for name in ("conv1d", "conv1d_1")
    )
    x = torch.rand(3, 2, 2, 9)
    y = F.conv1d(F.conv1d(x.flatten(0, 1), *first, 2, 1), *second, padding=1)
    torch.testing.assert_close(from_nir(graph)(x), y.reshape(3, 2, 20))


def groups_and_mean() -> Any:
    """nir 1.0.8 takes the input of a grouped convolution for that of one group, so: no check."""
    import nir

    nodes = {
        "i": nir.Input({"input": torch.tensor([4, 5, 5]).numpy()}),
        "conv": nir.Conv2d((5, 5), array(6, 2, 3, 3), (2, 1), (1, 0), (1, 2), 2, array(6)),
        "pool": nir.AvgPool2d(*torch.tensor([[2, 1], [1, 1], [1, 0]]).numpy()),
        "o": nir.Output({"output": torch.tensor([6, 4, 1]).numpy()}),
    }
    edges = [("i", "conv"), ("conv", "pool"), ("pool", "o")]
    return nir.NIRGraph(nodes=nodes, edges=edges, type_check=False)


def test_groups_and_mean() -> None:
    graph = groups_and_mean()
    conv = graph.nodes["conv"]
    x = torch.rand(3, 2, 4, 5, 5)
    weight, bias = torch.as_tensor(conv.weight), torch.as_tensor(conv.bias)
    y = F.conv2d(x[2], weight, bias, (2, 1), (1, 0), (1, 2), 2)
    net = from_nir(graph)
    torch.testing.assert_close(net(x)[2], F.avg_pool2d(y, (2, 1), 1, (1, 0)))
    same_graph(to_nir(net), graph)


# --- there and back ------------------------------------------------------------------------------


def same_graph(ours: Any, theirs: Any) -> None:
    assert {*ours.nodes} == {*theirs.nodes} and {*ours.edges} == {*theirs.edges}
    for name, node in theirs.nodes.items():
        assert type(ours.nodes[name]) is type(node), name
        if hasattr(node, "nodes"):
            same_graph(ours.nodes[name], node)
            continue
        for key, value in vars(node).items():
            mine = getattr(ours.nodes[name], key)
            if key not in ("input_type", "output_type", "metadata"):
                if isinstance(value, str):
                    assert mine == value
                else:
                    torch.testing.assert_close(
                        torch.as_tensor(mine), torch.as_tensor(value), rtol=0, atol=0,
                        check_dtype=False, msg=f"{name}.{key}",
                    )  # fmt: skip


@pytest.mark.parametrize("make", [images, branches, one_dimension])
def test_written_back_it_is_the_same_graph(make: Callable[[], Any], tmp_path: Any) -> None:
    """In memory, and through a file, which nir's own reader checks."""
    import nir

    graph = make()
    again = to_nir(from_nir(graph, dt=DT), dt=7.0)  # its neurons are in seconds: no matter
    same_graph(again, graph)
    nir.write(str(tmp_path / "graph.nir"), again)
    read = nir.read(str(tmp_path / "graph.nir"))
    same_graph(read, graph)
    x = torch.rand(4, 2, *from_nir(graph).input_shape)
    assert torch.equal(from_nir(read, dt=DT)(x), from_nir(graph, dt=DT)(x))


def own_network() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        Steps(torch.nn.Conv2d(2, 3, 3, bias=False)),
        nj.nn.LIF(tau=2.5, v_threshold=0.3, v_reset=-0.1),
        torch.nn.Sequential(nj.nn.EachStep(torch.nn.AvgPool2d(2)), nj.nn.Flatten()),
        torch.nn.Dropout(0.5),
        torch.nn.Linear(12, 6),
        nj.nn.PLIF(init_tau=3.0, decay_input=False, v_threshold=0.4),
        torch.nn.Linear(6, 6, bias=False),
        nj.nn.IF(v_threshold=0.3),
        nj.nn.Neuron("cuba_lif", v_threshold=0.8),
        nj.nn.LIF(tau=2.0, channels=6, learnable=["v_threshold"], v_threshold=0.2),
        nj.nn.Neuron("li", tau=4.0),
    ).eval()


def test_a_network_of_our_layers_as_a_graph() -> None:
    """Our own layers keep their outputs, through dt and back; learned parameters too."""
    net = own_network()
    for layer in (net[5], net[9]):
        for parameter in layer.parameters():
            parameter.data += torch.linspace(0, 0.1, max(parameter.numel(), 1)).view_as(parameter)
    x = torch.rand(9, 2, 2, 6, 6) * 2
    graph = to_nir(net, dt=DT, input_shape=(2, 6, 6))
    kinds = [type(graph.nodes[name]).__name__ for name in graph.nodes]
    assert kinds == [
        "Input", "Conv2d", "LIF", "AvgPool2d", "Flatten", "Affine", "LIF", "Linear", "IF",
        "CubaLIF", "LIF", "LI", "Output",
    ]  # fmt: skip
    assert graph.nodes["1"].tau.shape == (3, 4, 4)
    again = from_nir(graph, dt=DT)
    want = net(x)
    assert want.std() > 0.01
    torch.testing.assert_close(again(x), want, rtol=1e-4, atol=1e-5)
    assert net[1].v.shape == (2, 3, 4, 4), "the network itself did not run"
    graph.infer_types()
    graph.check_types()


def test_layers_of_old_spikingjelly_are_written_too() -> None:
    from neuronjit.compat import layer, neuron

    net = torch.nn.Sequential(
        layer.Conv2d(2, 3, 3, step_mode="m"),
        neuron.MultiStepLIFNode(tau=4.0, backend="cupy"),
        layer.Flatten(step_mode="m"),
        layer.Linear(48, 4, step_mode="m"),
        neuron.IFNode(v_threshold=0.5, step_mode="m"),
    )
    torch.nn.init.uniform_(net[0].weight, -0.3, 0.5)
    torch.nn.init.uniform_(net[3].weight, -0.3, 0.3)
    x = torch.rand(5, 2, 2, 6, 6) * 4
    graph = to_nir(net, dt=DT, input_shape=(2, 6, 6))
    assert (graph.nodes["1"].tau == torch.full((3, 4, 4), 4 * DT).numpy()).all()
    want = net(x)
    assert 0.02 < want.mean() < 0.98
    assert torch.equal(from_nir(graph, dt=DT)(x), want)


@pytest.mark.peers("nir", "h5py", "nirtorch", "spikingjelly")
def test_spikingjelly_reads_what_we_write() -> None:
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based.nir_exchange import import_from_nir as theirs

    net = own_network()[:9]
    net[5] = nj.nn.LIF(tau=3.0, decay_input=False, v_threshold=0.4)
    x = torch.rand(9, 2, 2, 6, 6) * 2
    want = net(x)
    assert 0.05 < want.mean() < 0.95
    other = theirs(to_nir(net, dt=DT, input_shape=(2, 6, 6)), dt=DT, step_mode="m")
    functional.reset_net(other)
    out = other(x)
    assert torch.equal((out[0] if isinstance(out, tuple) else out), want)


# --- what cannot be ------------------------------------------------------------------------------


def looped(*edges: tuple[str, str]) -> Any:
    import nir

    shape = torch.tensor([5]).numpy()
    nodes = {"i": nir.Input({"input": shape}), "o": nir.Output({"output": shape})}
    nodes |= {"a": neurons((5,))["LIF"], "b": nir.Linear(array(5, 5))}
    return nir.NIRGraph(nodes=nodes, edges=list(edges), type_check=False)


LINE = (("i", "a"), ("a", "b"), ("b", "o"))


def test_graphs_that_cannot_be_read() -> None:
    import nir

    with pytest.raises(nj.SpecError, match=r"recurrent: (a -> b -> a|b -> a -> b)\. Whole"):
        from_nir(looped(*LINE, ("b", "a")))
    with pytest.raises(nj.SpecError, match="recurrent: a -> a"):
        from_nir(looped(*LINE, ("a", "a")))
    with pytest.raises(nj.SpecError, match="nothing feeds the node 'a'"):
        from_nir(looped(("i", "b"), ("a", "b"), ("b", "o")))
    delay = nir.NIRGraph.from_list(nir.Delay(array(5)))
    with pytest.raises(nj.SpecError, match=r"node 'delay': Delay has no counterpart.*CubaLIF"):
        from_nir(delay)
    with pytest.raises(nj.SpecError, match="node 'i': I has no counterpart"):
        from_nir(nir.NIRGraph.from_list(nir.I(array(5))))
    deep = nir.NIRGraph(nodes={"d": delay}, edges=[], type_check=False)
    with pytest.raises(nj.SpecError, match="one Input, but it has 0"):
        from_nir(deep)
    with pytest.raises(nj.SpecError, match=r"weight \[2, 3, 4\]"):
        from_nir(nir.NIRGraph.from_list(nir.Linear(array(2, 3, 4))))
    with pytest.raises(nj.InputTypeError, match=r"must be a nir\.NIRGraph, got str"):
        from_nir("graph.nir")
    for dt in (0, -1.0, math.nan, "1"):
        with pytest.raises(nj.SpecError, match="dt must be"):
            from_nir(looped(*LINE), dt=dt)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (lambda: nj.nn.LIF(v_reset=None), "layer '0': NIR has no soft reset"),
        (
            lambda: nj.nn.NormedNeuron(torch.nn.BatchNorm1d(3), nj.nn.LIF()).neuron,
            "layer '0': NIR cannot say the batch norm that is fused",
        ),
        (lambda: nj.nn.Neuron("alif"), "cannot say the model 'alif'"),
        (lambda: Steps(torch.nn.BatchNorm2d(2)), "cannot say BatchNorm2d.*Conv2d"),
        (lambda: nj.nn.EachStep(*[torch.nn.Conv2d(2, 2, 1)] * 2), "cannot say EachStep.*EachStep"),
        (lambda: torch.nn.ReLU(), "cannot say ReLU"),
        (lambda: torch.nn.Flatten(), "flattens time or batch"),
        (lambda: Steps(torch.nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular")), "circular"),
        (lambda: Steps(torch.nn.AvgPool2d(3, ceil_mode=True)), "no ceil_mode"),
        (lambda: torch.nn.Linear(3, 3), r"does not take \[1, 1, \*\(2, 4, 4\)\]"),
    ],
)
def test_layers_that_cannot_be_written(layer: Callable[[], Any], said: str) -> None:
    with pytest.raises(nj.SpecError, match=said):
        to_nir(torch.nn.Sequential(layer()), input_shape=(2, 4, 4))


def test_other_mistakes(monkeypatch: Any) -> None:
    with pytest.raises(nj.SpecError, match="needs input_shape"):
        to_nir(nj.nn.LIF())
    with pytest.raises(nj.SpecError, match="names no node 'c'"):
        Graph({"a": Scale(torch.ones(2))}, [("input", "a"), ("a", "c")])
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(nj.BackendError, match="pip install nir"):
        to_nir(nj.nn.LIF(), input_shape=(2,))
