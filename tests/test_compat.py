"""Scripts for SpikingJelly 0.0.0.0.12 and 0.0.0.0.14: with an old, the current, or none of it."""

from __future__ import annotations

import copy
import io
import math
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_near, each_device
from torch import Tensor
from torch.nn import functional as F

import neuronjit as nj
import neuronjit.compat
from neuronjit.compat import functional, layer, neuron, surrogate

DIALECTS = Path(__file__).parent / "dialects"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# an old version: no kernels without CuPy, and a module that fails on today's libraries
OLD = {
    "__init__.py": "",
    "clock_driven/__init__.py": "",
    "clock_driven/neuron.py": """
class BaseNode: pass
class GeneralNode: pass
class MultiStepLIFNode(BaseNode):
    def __init__(self, *args, backend="torch", **options):
        assert backend == "torch", "CuPy is not installed"
""",
    "clock_driven/functional.py": """
def reset_net(net):
    for m in net.modules():
        if hasattr(m, "reset"):
            m.reset()
""",
    "clock_driven/layer.py": "raise AttributeError('numpy has no attribute int')",
}


class Nowhere:
    """Before all finders: there is no SpikingJelly."""

    def find_spec(self, name: str, *rest: Any) -> None:
        if name.split(".")[0] == "spikingjelly":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def imported() -> dict[str, Any]:
    return {name: m for name, m in sys.modules.items() if name.split(".")[0] == "spikingjelly"}


ENVIRONMENTS = ["none", "old", pytest.param("current", marks=pytest.mark.peers("spikingjelly"))]


@pytest.fixture
def around(request: Any, tmp_path: Path, monkeypatch: Any) -> Iterator[str]:
    """An environment with SpikingJelly as named by `request.param`; nothing installed in it yet."""
    before = imported()
    if request.param != "current":
        for name in before:
            del sys.modules[name]
    if request.param == "none":
        monkeypatch.setattr(sys, "meta_path", [Nowhere(), *sys.meta_path])
    if request.param == "old":
        for name, text in OLD.items():
            path = tmp_path / "spikingjelly" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
    yield request.param
    neuronjit.compat.uninstall()
    if request.param != "current":
        for name in imported():
            del sys.modules[name]
        sys.modules.update(before)


each_environment = pytest.mark.parametrize("around", ENVIRONMENTS, indirect=True)

# --- the same networks in plain PyTorch ----------------------------------------------------------


class Fire(torch.autograd.Function):
    """1 where u >= 0; backward multiplies with the slope at u."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(slope(u))
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.saved_tensors[0], None


def atan(alpha: float = 2.0) -> Callable[[Tensor], Tensor]:
    return lambda u: alpha / 2 / (1 + (math.pi / 2 * alpha * u) ** 2)


def sigmoid(u: Tensor) -> Tensor:
    return 4 * torch.sigmoid(4 * u) * (1 - torch.sigmoid(4 * u))


def run(
    x_seq: Tensor,
    charge: Callable[[Tensor, Tensor], Tensor],
    slope: Callable[[Tensor], Tensor] = sigmoid,
    theta: float = 1.0,
    detach: bool = True,
    soft: bool = False,
) -> tuple[Tensor, Tensor]:
    """Spikes and v after each step, of a neuron that charges so; it starts from v = 0."""
    v, spikes, vs = torch.zeros_like(x_seq[0]), [], []
    for x in x_seq:
        h = charge(v, x)
        s = Fire.apply(h - theta, slope)
        r = s.detach() if detach else s
        v = h - r * theta if soft else h * (1 - r)
        spikes.append(s)
        vs.append(v)
    return torch.stack(spikes), torch.stack(vs)


def integrate(v: Tensor, x: Tensor) -> Tensor:
    return v + x


def leak(v: Tensor, x: Tensor) -> Tensor:
    return v + (x - v) / 2.0


def over_time(module: Any, x_seq: Tensor) -> Tensor:
    return module(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


def sew_style(net: Any, x: Tensor) -> Tensor:
    block = net.block
    y = run(over_time(block.conv1[1], over_time(block.conv1[0], x)), integrate, atan())[0]
    y = run(over_time(block.conv2[1], over_time(block.conv2[0], y)), integrate, atan())[0]
    currents = torch.stack([net.fc(step) for step in (x + y).flatten(2)])
    return run(currents, leak, detach=False)[0].mean(0)


def spikformer_style(net: Any, x: Tensor) -> Tensor:
    def branch(name: str, x: Tensor) -> Tensor:
        conv, bn = getattr(net, f"{name}_conv"), getattr(net, f"{name}_bn")
        return run(over_time(bn, over_time(conv, x)), leak)[0]

    T, B, C, N = x.shape
    heads = (T, B, 2, C // 2, N)
    q, k, v = (branch(name, x).reshape(heads) for name in "qkv")
    y = torch.einsum("tbhdn,tbhdm,tbhem->tbhen", q, k, v) * 0.125
    return x + branch("proj", run(y.reshape(x.shape), leak, theta=0.5)[0])


def qkformer_style(net: Any, x: Tensor) -> Tensor:
    q = run(over_time(net.q_bn, over_time(net.q_conv, x)), leak)[0]
    k = run(over_time(net.k_bn, over_time(net.k_conv, x)), leak)[0]
    T, B, C, N = x.shape
    fires = run(q.reshape(T, B, 2, C // 2, N).sum(3) - 1, leak, theta=0.5)[0]
    y = k * fires.repeat_interleave(C // 2, dim=2)
    y = over_time(net.proj_bn, over_time(net.proj_conv, y))
    decay = net.proj_lif.w.sigmoid()
    spikes = run(y, lambda v, x: v + (x - v) * decay, atan(3.0), detach=False, soft=True)[0]
    return x + spikes


def version_14_style(net: Any, x: Tensor) -> Tensor:
    y = torch.stack([F.conv2d(step, net[0].weight, padding=1) for step in x])
    y = over_time(lambda z: F.batch_norm(z, None, None, net[1].weight, net[1].bias, True), y)
    y = run(y, integrate, atan(), detach=False)[0]
    y = torch.stack([F.max_pool2d(step, 2).flatten(1) for step in y]) @ net[5].weight.T
    decay = net[6].w.sigmoid()
    y = run(y, lambda v, x: v + (x - v) * decay)[0]
    spikes, v = run(y, leak, theta=0.6, detach=False)
    y = spikes + 0.1 * v
    return torch.stack([y[..., :10].mean(-1), y[..., 10:].mean(-1)], -1)


# --- the scripts ---------------------------------------------------------------------------------


@each_device
@each_environment
@pytest.mark.parametrize(
    "reference", [sew_style, spikformer_style, qkformer_style, version_14_style]
)
def test_a_script_as_it_is(around: str, reference: Callable[..., Tensor], device: str) -> None:
    """Outputs bit for bit, gradients within 2e-5, a second batch after reset_net too."""
    neuronjit.compat.install()
    script = runpy.run_path(str(DIALECTS / f"{reference.__name__}.py"))
    net, x = script["build"]()
    net, x = net.to(device), x.to(device)
    plain = copy.deepcopy(net)
    for batch in (x, x.flip(1)):
        results = []
        for call, module in ((net, net), (lambda x: reference(plain, x), plain)):
            module.zero_grad()
            leaf = batch.clone().requires_grad_()
            out = call(leaf)
            weight = torch.linspace(-1, 1, out.numel(), device=device).reshape(out.shape)
            (out * weight).sum().backward()
            grads = {name: p.grad for name, p in module.named_parameters()}
            results.append((out, {"x": leaf.grad, **grads}))
        (out, grads), (wanted, plain_grads) = results
        assert out.requires_grad and out.detach().abs().mean() > 0
        assert_near(out, wanted.cpu(), 1e-6, "output")
        for name, grad in plain_grads.items():
            assert_near(grads[name], grad.cpu(), 2e-5, f"gradient of {name}")
        script["reset_net"](net)


@each_environment
def test_uninstall_puts_everything_back(around: str) -> None:
    def seen() -> dict[str, Any]:
        return {name: dict(vars(module)) for name, module in imported().items()}

    theirs = {
        "none": [],
        "old": ["clock_driven.neuron", "clock_driven.functional"],
        "current": [f"activation_based.{leaf}" for leaf in ("neuron", "layer", "functional")],
    }
    for name in theirs[around]:
        import_module(f"spikingjelly.{name}")
    before = seen()
    neuronjit.compat.install()
    assert seen() != before
    neuronjit.compat.install()
    neuronjit.compat.uninstall()
    assert seen() == before


@each_environment
def test_install_says_what_it_did(around: str) -> None:
    done = neuronjit.compat.install()
    assert list(done) == list(neuronjit.compat.MODULES)
    if around == "none":
        assert set(done.values()) == {"ours"}
    if around == "old":
        assert "MultiStepLIFNode" in done["spikingjelly.clock_driven.neuron"]
        assert "numpy has no attribute int" in done["spikingjelly.clock_driven.layer"]
        theirs = sys.modules["spikingjelly.clock_driven.neuron"]
        assert theirs.GeneralNode.__module__ == "spikingjelly.clock_driven.neuron"
        assert theirs.BaseNode is not neuron.BaseNode
    if around == "current":
        assert done["spikingjelly.activation_based.functional"].endswith("with our set_backend")
        assert done["spikingjelly.clock_driven.neuron"] == "ours"


@pytest.mark.parametrize("around", ["none"], indirect=True)
def test_importing_it_changes_nothing(around: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="spikingjelly"):
        import_module("spikingjelly")


def test_a_script_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("value = 3\n")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, beside\n"
        "from spikingjelly.clock_driven.neuron import MultiStepIFNode\n"
        "print(__name__, sys.argv[1:], beside.value, MultiStepIFNode(backend='cupy').backend)\n"
    )
    start = [sys.executable, "-m", "neuronjit.compat"]
    here = str(Path(__file__).parent.parent)
    out = subprocess.run([*start, script, "--lr", "1"], cwd=here, capture_output=True, text=True)
    assert out.stdout == "__main__ ['--lr', '1'] 3 cupy\n", out.stderr
    out = subprocess.run([*start, "no.py"], cwd=here, capture_output=True, text=True)
    assert out.returncode == 1 and "no file no.py. Usage" in out.stderr


# --- nodes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", neuron.NODES)
def test_every_node_is_the_layer_of_its_name(name: str) -> None:
    """Numbers, spikes and v of each step as of neuronjit.nn, which its own tests compare."""
    multi = name.startswith("MultiStep")
    node = getattr(neuron, name)(backend="cupy", **({} if multi else {"step_mode": "m"}))
    layer = getattr(nj.nn, name.removeprefix("MultiStep"))(step_mode="m", store_v_seq=True)
    x = torch.rand(5, 2, 3) * 3
    assert torch.equal(node(x), layer(x))
    assert torch.equal(node.v, layer.v)
    assert (torch.equal(node.v_seq, layer.v_seq)) if multi else node.v_seq is None
    assert isinstance(node, neuron.BaseNode)
    assert node.backend == "cupy" and "backend=cupy" in repr(node)
    assert torch.equal(copy.deepcopy(node).v, node.v)
    saved = io.BytesIO()
    torch.save(node, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False).v, node.v)


def test_arguments_in_the_order_of_the_old_versions() -> None:
    node = neuron.MultiStepLIFNode(3.0, False, 0.7, None, surrogate.ATan(), True, "cupy", 64)
    assert (node.tau, node.decay_input, node.v_threshold, node.v_reset) == (3.0, False, 0.7, None)
    assert (node.detach_reset, node.backend, node.step_mode) == (True, "cupy", "m")
    node = neuron.LIFNode(3.0, True, 0.7, 0.1, surrogate.ATan(), True, "m", "cupy", True)
    assert (node.v_reset, node.step_mode, node.backend, node.store_v_seq) == (0.1, "m", "cupy", 1)
    assert neuron.IFNode(cupy_fp32_inference=True).step_mode == "s"


@pytest.mark.peers("spikingjelly")
@pytest.mark.parametrize("name", [n for n in neuron.NODES if "MultiStep" not in n])
def test_nodes_take_spikingjellys_arguments_in_its_order(name: str) -> None:
    import inspect

    from spikingjelly.activation_based import neuron as theirs

    order = getattr(neuron, name)._order.split()
    order.remove("backend")  # 2.0.0 has it no more
    assert order == list(inspect.signature(getattr(theirs, name).__init__).parameters)[1:]


class OwnNode(neuron.BaseNode):
    _order = ""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: neuron.IFNode(backend="lava"), "unknown backend 'lava'.*cupy, inductor, torch"),
        (lambda: setattr(neuron.IFNode(), "backend", None), "unknown backend None"),
        (lambda: neuron.MultiStepIFNode(1.0, 0.0, surrogate.ATan(), 1, "torch", 64, 2), "got 7"),
        (lambda: neuron.IFNode(1.0, v_threshold=2.0), "v_threshold given twice"),
        (lambda: neuron.LIFNode(tau=1.0), "tau must be finite and > 1"),
        (lambda: neuron.LIFNode(taw=2.0), "taw"),
        (lambda: OwnNode(), "cannot be built on BaseNode.*NeuronModel"),
        (lambda: surrogate.ATan(beta=1.0), "ATan takes alpha, spiking; unknown beta"),
        (lambda: surrogate.ATan(1.0, True, 2), "ATan takes alpha, spiking; got 3"),
        (lambda: surrogate.ATan(alpha="2"), "alpha"),
        (lambda: layer.Dropout(1.0), "p must be at least 0 and below 1"),
        (lambda: layer.Linear(2, 2, step_mode="x"), "unknown step_mode 'x'"),
        (lambda: functional.set_step_mode(torch.nn.ReLU(), "x"), "unknown step_mode 'x'"),
        (lambda: functional.set_backend(neuron.IFNode(), "lava"), "no module supports.*'lava'"),
        (lambda: functional.seq_to_ann_forward(torch.ones(3), abs), r"\[T, N, \*\].*got \[3\]"),
        (lambda: functional.multi_step_forward(torch.ones(3, 2), 1), "expected a module.*int"),
    ],
)
def test_bad_input(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(nj.NeuronJitError, match=said):
        make()


# --- surrogates, layers, functions ---------------------------------------------------------------


@pytest.mark.peers("spikingjelly")
@pytest.mark.parametrize("name", surrogate._CLASSES)
def test_surrogates_are_spikingjellys(name: str) -> None:
    """Its class with its defaults, and with other numbers."""
    from spikingjelly.activation_based import surrogate as theirs

    defaults = {k: v for k, v in surrogate._CLASSES[name].items() if k != "spiking"}
    u = torch.tensor([[-1.7, -0.6, -0.2, 0.0], [0.1, 0.45, 0.9, 1.3]])
    for numbers in ({}, {key: value + 1 for key, value in defaults.items()}):
        results = []
        for module in (surrogate, theirs):
            x = u.clone().requires_grad_()
            y = getattr(module, name)(**numbers)(x)
            results.append((y, torch.autograd.grad(y.sum(), x)[0]))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-5, atol=1e-6)


def test_a_surrogate_on_a_tensor() -> None:
    u = torch.tensor([-0.3, 0.0, 2.0], requires_grad=True)
    function = surrogate.ATan(alpha=3.0)
    s = function(u)
    assert s.tolist() == [0, 1, 1] == surrogate.heaviside(u).tolist()
    torch.testing.assert_close(torch.autograd.grad(s.sum(), u)[0], atan(3.0)(u.detach()))
    function.set_spiking_mode(False)
    torch.testing.assert_close(function(u), torch.atan(math.pi / 2 * 3 * u) / math.pi + 0.5)


def test_layers_take_steps_or_sequences() -> None:
    x = torch.rand(3, 2, 4, 6, 6)
    for module in (
        layer.Conv2d(4, 5, 3), layer.AvgPool2d(2), layer.Flatten(), layer.GroupNorm(2, 4),
        layer.AdaptiveAvgPool2d(1), layer.ConvTranspose2d(4, 2, 2),
    ):  # fmt: skip
        steps = torch.stack([module(step) for step in x])
        functional.set_step_mode(module, "m")
        torch.testing.assert_close(module(x), steps)
        assert "step_mode=m" in repr(module)
    norm, plain = layer.BatchNorm2d(4, step_mode="m"), torch.nn.BatchNorm2d(4)
    torch.testing.assert_close(norm(x).flatten(0, 1), plain(x.flatten(0, 1)))
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_containers_keep_their_modules_step_modes() -> None:
    inner, outer = layer.Linear(3, 3), layer.Linear(3, 3)
    net = torch.nn.Sequential(layer.SeqToANNContainer(inner), layer.MultiStepContainer(outer))
    functional.set_step_mode(net, "m")
    assert inner.step_mode == outer.step_mode == "s"
    x = torch.rand(4, 2, 3)
    torch.testing.assert_close(net(x), torch.stack([outer(inner(step)) for step in x]))


@pytest.mark.parametrize("multi", [False, True])
def test_dropout_keeps_its_mask_until_reset(multi: bool) -> None:
    drop = layer.MultiStepDropout(0.5) if multi else layer.Dropout(0.5)
    x = torch.ones(3, 8, 100)
    run = drop if multi else lambda x: torch.stack([drop(step) for step in x])
    first = run(x)
    assert set(first.unique().tolist()) == {0.0, 2.0} and 0.4 < (first > 0).float().mean() < 0.6
    assert torch.equal(first[0], first[2]) and torch.equal(run(x), first)
    functional.reset_net(drop)
    assert not torch.equal(run(x), first)
    assert torch.equal(drop.eval()(x), x)
    channels = layer.MultiStepDropout2d(0.5)(torch.ones(2, 8, 8, 3, 3))
    assert torch.equal(channels, channels[..., :1, :1].expand_as(channels))
    assert set(channels.unique().tolist()) == {0.0, 2.0}


@pytest.mark.peers("spikingjelly")
def test_functions_are_spikingjellys() -> None:
    from spikingjelly.activation_based import functional as theirs
    from spikingjelly.activation_based import layer as their_layer

    x, target = torch.randn(5, 4, 10), torch.arange(4)
    loss = functional.temporal_efficient_training_cross_entropy(x, target)
    torch.testing.assert_close(loss, theirs.temporal_efficient_training_cross_entropy(x, target))
    for mode, given in (("s", x[0]), ("m", x)):
        torch.testing.assert_close(
            layer.VotingLayer(5, mode)(given), their_layer.VotingLayer(5, mode)(given)
        )
