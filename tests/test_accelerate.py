"""`accelerate` on SpikingJelly's networks: its own classes are what everything is compared with."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import networks
import pytest
import torch
from support import assert_near, assert_same_bits, each_device, inputs
from torch import Tensor

import neuronjit as nj
from neuronjit import settings
from neuronjit.integrations import proof as proof_module
from neuronjit.nn import batch_norm

pytestmark = pytest.mark.peers("spikingjelly")

T, SHAPE = 5, (3, 7)
# constructors' arguments that are not the defaults, so that no parameter can be forgotten
NODES: dict[str, dict[str, Any]] = {
    "IFNode": dict(v_threshold=0.9),
    "LIFNode": dict(tau=1.7, v_threshold=0.8),
    "ParametricLIFNode": dict(init_tau=1.6, v_threshold=0.8),
    "QIFNode": dict(tau=1.8, v_c=0.7, a0=0.9, v_threshold=0.8, v_rest=0.05),
    "EIFNode": dict(tau=1.7, delta_T=0.8, theta_rh=0.7, v_threshold=0.9, v_rest=0.05),
    "IzhikevichNode": dict(
        tau=1.6, v_c=0.7, a0=0.9, v_threshold=0.7, v_rest=-0.05, w_rest=0.1, tau_w=1.9, a=0.2, b=0.1
    ),
}
OTHERS: dict[str, dict[str, Any]] = {  # their kernels are compiled in slow tests only
    "CUBALIFNode": dict(c_decay=0.6, v_decay=0.7, v_threshold=0.9),
    "RAFNode": dict(b=-0.3, omega=0.9, dt=0.8, v_threshold=0.3),
    "KLIFNode": dict(tau=1.7, v_threshold=0.8),
    "TernaryIFNode": dict(v_threshold=0.6),
    "TernaryLIFNode": dict(tau=1.7, v_threshold=0.3),
    "HalfThresholdIFNode": dict(v_threshold=0.8),
    "ActivationAwareIFNode": dict(
        v_threshold=torch.linspace(0.6, 1.0, 3), v_offset=torch.tensor(0.1), channel_dim=0
    ),
    "LIAFNode": dict(act=torch.tanh, threshold_related=True, tau=1.7, v_threshold=0.8),
}
LEAKY = ("LIFNode", "ParametricLIFNode", "KLIFNode", "TernaryLIFNode", "LIAFNode")


def node(name: str, **options: Any) -> Any:
    from spikingjelly.activation_based import neuron

    options = {**NODES, **OTHERS}[name] | options
    if name == "HalfThresholdIFNode":  # its reset is always soft
        options.pop("v_reset", None)
    if name != "CUBALIFNode":
        return getattr(neuron, name)(**options)
    kept = {n: options.pop(n) for n in ("step_mode", "store_v_seq", "detach_reset") if n in options}
    made = neuron.CUBALIFNode(**options)
    for option, value in kept.items():  # its constructor does not take them
        setattr(made, option, value)
    return made


def pair(name: str, device: str = "cpu", **options: Any) -> tuple[Any, Any]:
    """A node and the same accelerated."""
    theirs = node(name, **options).to(device)
    ours = copy.deepcopy(theirs)
    assert [layer.why for layer in nj.accelerate(ours).layers] == [None]
    return theirs, ours


def train(net: Any, x_seq: Tensor, single: bool = False) -> dict[str, Tensor]:
    """Spikes, last states and every gradient, from random gradients of spikes and states."""
    x = x_seq.clone().requires_grad_()
    spikes = torch.stack([net(step) for step in x]) if single else net(x)
    outputs = {"spikes": spikes, **dict(net.named_memories())}
    if getattr(net, "v_seq", None) is not None:
        outputs["v_seq"] = net.v_seq
    generator = torch.Generator().manual_seed(5)
    loss = 0.0
    for out in outputs.values():
        loss = loss + (out * torch.randn(out.shape, generator=generator).to(out)).sum()
    net.zero_grad()
    loss.backward()
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    found = {**outputs, "grad of x": x.grad, **{f"grad of {n}": g for n, g in grads.items()}}
    return {name: value.detach().cpu() for name, value in found.items()}


def compare(theirs: Any, ours: Any, x: Tensor, single: bool = False, exact: bool = True) -> None:
    want, got = train(theirs, x, single), train(ours, x, single)
    assert want.keys() == got.keys()
    assert 0.1 < want["spikes"].abs().mean() < 0.9
    if exact or not hasattr(theirs, "act"):  # LIAFNode's are no spikes
        assert_same_bits(got["spikes"], want["spikes"], "spikes")
    for name, value in want.items():
        if exact and "grad" not in name:
            torch.testing.assert_close(got[name], value, rtol=0, atol=0)
        else:
            summed = name.startswith("grad of ") and name != "grad of x"
            assert_near(got[name], value, 2e-5, name, floor=1.0 if summed else 0.1)


# --- nodes x options ------------------------------------------------------------------------------


def check_node(name: str, device: str, soft: bool, detach: bool, **options: Any) -> None:
    if soft:
        options["v_reset"] = None
    exact = name != "EIFNode" and device == "cpu"  # exp; and GPUs contract in the peer's kernels
    x = inputs((T, *SHAPE)).to(device) * 1.3
    theirs, ours = pair(name, device, detach_reset=detach, step_mode="m", **options)
    compare(theirs, ours, x, exact=exact)
    for net in (theirs, ours):
        net.reset()
        net.step_mode = "s"
    compare(theirs, ours, x, single=True, exact=exact)


@each_device
@pytest.mark.parametrize("name", NODES)
def test_nodes_equal_spikingjellys(name: str, device: str) -> None:
    check_node(name, device, soft=False, detach=False)


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("store", [False, True], ids=["", "store_v_seq"])
@pytest.mark.parametrize("detach", [False, True], ids=["", "detach"])
@pytest.mark.parametrize("reset", ["hard", "back", "soft"])
@pytest.mark.parametrize("name", [*NODES, *OTHERS])
def test_all_options(name: str, reset: str, detach: bool, store: bool, device: str) -> None:
    options: dict[str, Any] = dict(v_reset=-0.2) if reset == "back" else {}
    for decay in [True, False] if name in LEAKY else [True]:
        if name in LEAKY:
            options["decay_input"] = decay
        check_node(name, device, reset == "soft", detach, store_v_seq=store, **options)


@pytest.mark.parametrize("name", [*NODES, *OTHERS])
def test_options_in_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, without compiling: what each option is handed on as."""
    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    for soft, detach, store in [(True, True, True), (False, True, True), (True, False, False)]:
        for extra in [{"decay_input": False}, {}] if name in LEAKY else [{}]:
            check_node(name, "cpu", soft, detach, store_v_seq=store, **extra)
            if name == "KLIFNode":
                check_node(name, "cpu", soft, detach, scale_reset=True, **extra)


@pytest.mark.parametrize("single", [False, True], ids=["m", "s"])
@pytest.mark.parametrize("kind", ["CLIF", "CLIF in eval", "ILIF", "ILIF detached"])
def test_nodes_with_options_of_their_own(
    kind: str, single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spikingjelly.activation_based import neuron, surrogate

    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    mode = dict(step_mode="s" if single else "m")
    if "CLIF" in kind:
        theirs = neuron.ComplementaryLIFNode(tau=1.7, v_threshold=0.8, **mode)
        theirs.train(kind == "CLIF")
    else:
        count = surrogate.MultiLevelSpikeCount(3)
        theirs = neuron.ILIFNode(1.7, 0.4, count, detach_reset=kind != "ILIF", **mode)
    ours = copy.deepcopy(theirs)
    assert nj.accelerate(ours).accelerated
    x = inputs((T, *SHAPE)) * 1.3
    want, got = train(theirs, x, single), train(ours, x, single)
    for name, value in want.items():
        assert_near(got[name], value, 2e-5, name)
    if kind in ("CLIF", "ILIF"):
        assert want["spikes"].unique().tolist() == ([0, 1] if kind == "CLIF" else [0, 1, 2, 3])
        assert_same_bits(got["spikes"], want["spikes"], "spikes")


def gated(device: str, channels: bool, **options: Any) -> tuple[Any, Any]:
    """A GatedLIFNode with numbers of its own everywhere, and the same accelerated."""
    from spikingjelly.activation_based import neuron

    theirs = neuron.GatedLIFNode(T, 3 if channels else None, **options)
    generator = torch.Generator().manual_seed(4)
    for parameter in theirs.parameters():
        number = torch.randn(parameter.shape, generator=generator) * 0.5
        parameter.data = (parameter.data + number).to(device)
    ours = copy.deepcopy(theirs)
    (layer,) = nj.accelerate(ours).layers
    assert layer.how is not None and layer.how.startswith("gated_lif_steps, own reset, ")
    return theirs, ours


def check_gated(device: str, channels: bool, **options: Any) -> None:
    theirs, ours = gated(device, channels, **options)
    x = inputs((T, 2, 3, 4, 5)).to(device) * 1.5
    exact = device == "cpu"
    if exact:  # float32 sums of shared parameters differ by up to 5e-5 with the number of threads
        theirs, ours, x = theirs.double(), ours.double(), x.double()
    compare(theirs, ours, x, exact=exact)
    for net in (theirs, ours):
        net.detach()
    compare(theirs, ours, x, exact=exact)  # from where it was, but for the last spike
    longer = torch.cat([x, x])
    for net in (theirs, ours):
        net.reset()
    compare(theirs, ours, longer, exact=exact)  # of which it takes T steps


@pytest.mark.parametrize("channels", [False, True])
def test_gated_lif(channels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from spikingjelly.activation_based import surrogate

    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    numbers = dict(init_tau=0.4, init_v_threshold=0.6, init_conduct=0.3, init_linear_decay=0.1)
    check_gated("cpu", channels, init_v_subreset=0.7, **numbers)
    check_gated("cpu", channels, surrogate_function=surrogate.ATan())


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("channels", [False, True])
def test_gated_lif_in_kernels(channels: bool, device: str) -> None:
    check_gated(device, channels)


def test_a_gated_lif_on_its_threshold_fires(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all numbers 1/2, h = 3/4 x - 1/4 in the first step."""
    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    theirs, ours = gated("cpu", False)
    for parameter in (*theirs.parameters(), *ours.parameters()):
        parameter.data.zero_()
    x = torch.zeros(T, 1, 1, 1, 3)
    x[0] = torch.tensor([1.0, 0.999, 1.001])
    for net in (theirs, ours):
        assert net(x)[0].flatten().tolist() == [1, 0, 1]


@pytest.fixture
def warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings that were given once are given again."""
    monkeypatch.setattr(settings, "_warned", {})


def test_what_a_gated_lif_does_not_take_spikingjelly_runs_or_refuses(warns: None) -> None:
    theirs, ours = gated("cpu", False)
    x = inputs((T, *SHAPE))
    with pytest.warns(UserWarning, match=r"itself: its input is not \[T, N, C, H, W\] with T >= 5"):
        got = ours(x)
    assert got.shape == (T, 1, 1, *SHAPE) and torch.equal(got, theirs(x))
    ours.reset()
    with pytest.raises(IndexError):
        ours(torch.zeros(2, 1, 3, 4, 5))
    ours.step_mode = "s"
    with pytest.warns(UserWarning, match="step_mode='s'"), pytest.raises(NotImplementedError):
        ours(torch.zeros(1, 3, 4, 5))


@pytest.mark.parametrize("related", [False, True])
@pytest.mark.parametrize(
    "act", [torch.relu, lambda h: torch.softmax(h, 1)], ids=["relu", "softmax"]
)
def test_liaf_with_any_activation(
    act: Callable[[Tensor], Tensor], related: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sequences put out spikes in SpikingJelly 2.0.0, but where they store v."""
    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    x = inputs((T, *SHAPE)) * 2
    for store in (False, True):
        theirs, ours = pair(
            "LIAFNode", act=act, threshold_related=related, store_v_seq=store, step_mode="m"
        )
        compare(theirs, ours, x)
        binary = set(ours(x).unique().tolist()) == {0.0, 1.0}
        assert binary != store
    for net in (theirs, ours):
        net.reset()
        net.step_mode = "s"
    compare(theirs, ours, x, single=True)


@pytest.mark.parametrize("dim", [0, 1, -1, -2, 2])
def test_thresholds_by_channel(dim: int, monkeypatch: pytest.MonkeyPatch, warns: None) -> None:
    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    x = inputs((T, 2, 3, 4)) * 1.3
    numbers = torch.linspace(0.6, 1.0, x.shape[1:][dim])
    theirs, ours = pair(
        "ActivationAwareIFNode", v_threshold=numbers, v_offset=numbers - 0.7, channel_dim=dim
    )
    compare(theirs, ours, x, single=True)
    for net in (theirs, ours):
        net.reset()
        net.step_mode = "m"
    compare(theirs, ours, x)
    ours.channel_dim = 3
    with pytest.warns(UserWarning, match="channel_dim=3"), pytest.raises(ValueError, match="range"):
        ours(x)


def surrogates() -> list[tuple[str, Any]]:
    return [
        ("Sigmoid", dict(alpha=3.0)), ("ATan", dict(alpha=1.5)), ("PiecewiseQuadratic", {}),
        ("PiecewiseExp", dict(alpha=1.2)), ("SoftSign", {}), ("SuperSpike", dict(alpha=1.1)),
        ("Erf", dict(alpha=1.5)), ("NonzeroSignLogAbs", {}), ("PiecewiseLeakyReLU", dict(w=0.6)),
        ("SquarewaveFourierSeries", dict(n=3)), ("S2NN", {}), ("QPseudoSpike", {}),
        ("LeakyKReLU", dict(leak=0.1)), ("FakeNumericalGradient", {}), ("Rect", dict(alpha=0.8)),
        ("LogTailedReLU", dict(alpha=0.1)), ("DeterministicPass", {}),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "numbers"), surrogates(), ids=lambda value: str(value)[:24])
def test_surrogates(name: str, numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from spikingjelly.activation_based import surrogate

    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    function = getattr(surrogate, name)(**numbers)
    theirs, ours = pair("LIFNode", surrogate_function=function, step_mode="m")
    compare(theirs, ours, inputs((T, *SHAPE)) * 1.3 + 1e-3)


@pytest.mark.parametrize("name", ["Sigmoid", "ATan", "Erf", "SoftSign"])
def test_surrogates_that_do_not_spike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from spikingjelly.activation_based import surrogate

    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    function = getattr(surrogate, name)(spiking=False)
    theirs, ours = pair("LIFNode", surrogate_function=function, step_mode="m")
    want, got = train(theirs, inputs((T, *SHAPE))), train(ours, inputs((T, *SHAPE)))
    for key, value in want.items():
        assert_near(got[key], value, 2e-5, key)


@each_device
@pytest.mark.parametrize("single", [False, True])
def test_a_neuron_on_its_threshold_fires(device: str, single: bool) -> None:
    theirs, ours = pair("IFNode", device, v_threshold=1.0, step_mode="s" if single else "m")
    x = torch.tensor([[0.5, 1.0, 0.25], [0.5, 0.999, 0.25], [0.5, 1.0, 0.5]], device=device)
    want, got = train(theirs, x, single), train(ours, x, single)
    assert want["spikes"].tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 1]] == got["spikes"].tolist()


# --- what must go on working ----------------------------------------------------------------------


class Residual(torch.nn.Module):
    def __init__(self, conv: torch.nn.Module, sn: torch.nn.Module) -> None:
        super().__init__()
        self.conv, self.sn = conv, sn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sn(self.conv(x))


def network() -> Any:
    """A small convolutional network with four kinds of nodes, one of them inside a module."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    torch.manual_seed(3)
    leaky = neuron.LIFNode(v_threshold=0.3, surrogate_function=surrogate.ATan(), detach_reset=True)
    net = torch.nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1), layer.BatchNorm2d(4), neuron.IFNode(v_threshold=0.5),
        Residual(layer.Conv2d(4, 4, 3, padding=1), leaky), layer.AvgPool2d(2),
        neuron.ParametricLIFNode(v_threshold=0.3), layer.Flatten(),
        layer.Linear(64, 5), neuron.LIFNode(v_threshold=0.2, v_reset=None),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


NEURONS = ["2", "3.sn", "5", "8"]


def images(device: str = "cpu", batch: int = 2) -> Tensor:
    return inputs((4, batch, 2, 8, 8), seed=2).to(device)


def losses(net: Any, count: int = 3, step: Callable[[Any], None] | None = None) -> list[float]:
    """Some steps of SGD; the state is reset before each, or what `step` does is."""
    from spikingjelly.activation_based import functional

    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = []
    for i in range(count):
        (step or functional.reset_net)(net)
        optimizer.zero_grad()
        target = torch.arange(2, device=device) + i
        loss = torch.nn.functional.cross_entropy(net(images(str(device))).mean(0), target)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert len(set(found)) > 1
    return found


@each_device
def test_a_network_trains_alike(device: str) -> None:
    theirs, ours = network().to(device), network().to(device)
    report = nj.accelerate(ours)
    assert [layer.path for layer in report.accelerated] == NEURONS and not report.skipped
    assert "4 of 4 neurons accelerated (spikingjelly 2.0.0" in str(report)
    assert repr(ours) == repr(theirs)
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-5)
    assert nj.restore(ours) == 4
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert nj.restore(ours) == 0
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-4, atol=0)


@each_device
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (networks.cifar10net, 32),
        pytest.param(networks.sew_resnet18, 64, marks=pytest.mark.slow),
        pytest.param(networks.spikformer, 32, marks=pytest.mark.slow),
    ],
    ids=["CIFAR10Net", "SEW-ResNet-18", "Spikformer"],
)
def test_spikingjellys_networks(make: Any, size: int, device: str) -> None:
    """Its own models, trained with and without: the same losses, to rounding."""
    _, neuron, _ = networks.spikingjelly()
    data = networks.batches(3, device, size)
    ours = make(neurons=neuron).to(device)
    report = nj.accelerate(ours, data[0][0], strict=True)
    assert len(report.layers) > 6
    # cuDNN's TF32 would round what differs in the last bit to what differs in the tenth
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        want = networks.train(theirs := make(neurons=neuron).to(device), theirs, data)
        assert networks.train(ours, ours, data) == pytest.approx(want, rel=1e-4)


def test_only_the_instance_is_swapped() -> None:
    from spikingjelly.activation_based import neuron

    before = dict(vars(neuron.LIFNode))
    net, other = network(), network()
    nj.accelerate(net)
    assert dict(vars(neuron.LIFNode)) == before
    assert type(other[8]) is neuron.LIFNode is not type(net[8])
    assert isinstance(net[8], neuron.LIFNode)
    again = nj.accelerate(net)
    assert len(again.accelerated) == 4 and nj.restore(net) == 4


def test_state_carried_and_detached() -> None:
    from spikingjelly.activation_based import functional

    theirs, ours = network(), network()
    nj.accelerate(ours)
    want, got = (losses(net, step=functional.detach_net) for net in (theirs, ours))
    assert got == pytest.approx(want, rel=2e-5)
    assert_near(ours[8].v, theirs[8].v, 1e-4, "v")
    ours(images(batch=3))  # a batch of another size starts anew, as theirs does
    theirs(images(batch=3))
    assert_near(ours[8].v, theirs[8].v, 1e-4, "v")
    functional.reset_net(ours)
    assert ours[8].v == 0.0 and ours[2].v == 0.0


def test_evaluation_in_inference_mode_then_training() -> None:
    """Autograd cannot save a state that was made in inference mode."""
    found = []
    for accelerated in (False, True):
        net, x = network().double(), images().double()
        if accelerated:
            nj.accelerate(net)
        with torch.inference_mode(accelerated), torch.no_grad():
            net(x)
        net(x).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # a bias before a norm: 0


def test_a_forgotten_reset_is_named() -> None:
    net = network()
    nj.accelerate(net)
    with pytest.raises(RuntimeError, match=r"the state of \w+Node was carried over .* reset_net"):
        losses(net, step=lambda net: None)


def test_state_dict_deepcopy_and_pickle() -> None:
    net = network()
    plain = network()
    nj.accelerate(net)
    assert net.state_dict().keys() == plain.state_dict().keys()
    net.load_state_dict(plain.state_dict())
    saved = io.BytesIO()
    torch.save(net, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),  # noqa: S301 our own
        torch.load(saved, weights_only=False),
    ]
    want = losses(plain)
    for copied in copies:
        assert type(copied[8]) is type(net[8])
        assert losses(copied) == pytest.approx(want, rel=2e-5)
        assert nj.restore(copied) == 4
    assert net[2].v == 0.0  # the copies kept states of their own


def test_monitors(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("tensorboard") is None:  # the module imports it for other monitors
        stub = types.ModuleType("torch.utils.tensorboard")
        stub.SummaryWriter = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    from spikingjelly.activation_based import monitor, neuron

    seen = []
    for accelerated in (False, True):
        net = network()
        if accelerated:
            nj.accelerate(net)
        net[8].store_v_seq = True
        with (
            monitor.OutputMonitor(net, neuron.BaseNode) as spikes,
            monitor.AttributeMonitor("v_seq", False, net[8], neuron.LIFNode) as v_seq,
            monitor.GradInputMonitor(net, neuron.LIFNode) as grads,
        ):
            net(images()).sum().backward()
            assert spikes.monitored_layers == NEURONS
            seen.append([*spikes.records, *v_seq.records, *grads.records])
    for theirs, ours in zip(*seen, strict=True):
        assert_near(ours, theirs, 2e-5, "a record")


def test_explicit_states_and_checkpoints() -> None:
    """`to_functional_forward` and memopt, which runs each chunk of a sequence again in backward."""
    from spikingjelly.activation_based import base, functional, memopt

    theirs, ours = network(), network()
    nj.accelerate(ours)
    for net in (theirs, ours):
        states = base.extract_memories(net)
        (out,), last = base.to_functional_forward(net)((images(),), states)
        assert base.extract_memories(net) == states
        functional.reset_net(net)
        assert_same_bits(out, net(images()), "out")
        for a, b in zip(last, base.extract_memories(net), strict=True):
            assert_same_bits(a, b, "state")
        functional.reset_net(net)
        for place in (2, 5, 8):
            net[place] = memopt.checkpoint_module(net[place], chunks=2)
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-5)


def test_layers_in_data_parallel_replicas_keep_states_apart() -> None:
    net = network()
    nj.accelerate(net)
    replica = net[8]._replicate_for_data_parallel()
    replica(torch.ones(3, 2, 5))
    assert type(replica) is type(net[8]) and net[8].v == 0.0


def test_ddp(tmp_path: Any) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    want = losses(network())
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = DistributedDataParallel(network())
        assert [layer.path for layer in nj.accelerate(net).layers] == [
            f"module.{n}" for n in NEURONS
        ]
        assert losses(net) == pytest.approx(want, rel=2e-5)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """As SpikingJelly would with the same numbers in float32; it rounds every operation."""
    theirs, ours = pair("LIFNode", step_mode="m")
    x = inputs((T, *SHAPE), dtype)
    for start in (0, T):
        assert_same_bits(ours(x), theirs(x.float()).to(dtype), f"spikes from {start}")
        assert_same_bits(ours.v, theirs.v, "v")
    nj.restore(ours)
    assert ours(x).dtype == dtype == ours.v.dtype


def test_autocast() -> None:
    net = network()
    nj.accelerate(net)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(images())
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and net[5].v.dtype == torch.float32
    assert net[5].w.grad is not None and net[0].weight.grad.abs().sum() > 0


def test_thresholds_as_tensors() -> None:
    """`functional.set_threshold_margin` sets one for each class.

    SpikingJelly runs them with the surrogates of which its fused operators know nothing.
    """
    from spikingjelly.activation_based import functional, surrogate

    slow = surrogate.PiecewiseLeakyReLU()
    theirs, ours = pair("IFNode", step_mode="m", surrogate_function=slow)
    labels = torch.eye(7)[:3]
    for net in (theirs, ours):
        functional.set_threshold_margin(net, labels)
    compare(theirs, ours, inputs((T, *SHAPE)) * 1.3)


@pytest.mark.slow
def test_torch_compile_makes_one_graph() -> None:
    torch.compiler.reset()
    net = network()
    nj.accelerate(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert losses(compiled) == pytest.approx(losses(network()), rel=2e-5)


@pytest.mark.cuda
def test_spikingjellys_cuda_graph() -> None:
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based._cuda_graph import StaticCudaGraph

    net = network().cuda().eval()
    want = net(images("cuda"))
    functional.reset_net(net)
    nj.accelerate(net)

    def step(x: Tensor) -> Tensor:
        functional.reset_net(net)
        with torch.no_grad():
            return net(x)

    graph = StaticCudaGraph(step)
    for _ in range(6):
        out = graph(images("cuda"))
    assert graph.stats.captures == 1 and graph.stats.replays >= 1
    torch.testing.assert_close(out, want)


# --- the proof on a sample ------------------------------------------------------------------------


def test_a_sample_proves_it_and_leaves_the_model_as_it_was() -> None:
    net = network()
    net(images()).sum().backward()  # states with a history, gradients, statistics
    state, grads = copy.deepcopy(net.state_dict()), [p.grad.clone() for p in net.parameters()]
    memories = dict(net[8].named_memories())
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    report = nj.accelerate(net, images(), strict=True)
    assert torch.equal(torch.rand(3), expected)
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    for parameter, grad in zip(net.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)
    assert all(value is memories[name] for name, value in net[8].named_memories())
    proof = report.proof
    assert proof is not None and proof.same and proof.differing == 0 and proof.first is None
    # the nodes put out 4 * 2 * (4 * 64 + 4 * 64 + 4 * 16 + 5) values
    assert proof.spikes == 8 * 581 and 0.05 < proof.fired < 0.8
    assert 0 < proof.gradients < 2e-5 and proof.tolerance == 2e-5
    assert min(proof.ms) > 0 and proof.mb is None
    said = str(report)
    assert "sample: the same; 4,648 spikes" in said and "a training step: " in said


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_a_sample_under_autocast(dtype: torch.dtype) -> None:
    net = network()
    with torch.autocast("cpu", dtype):
        report = nj.accelerate(net, images())
    assert report.proof is not None and report.proof.half
    assert report.proof.differing == 0, str(report)
    assert report.proof.tolerance == {torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    assert "half precision" in str(report)


class Loop(torch.nn.Module):
    """Single steps; the sample is two arguments."""

    def __init__(self, sn: torch.nn.Module) -> None:
        super().__init__()
        self.fc, self.sn = torch.nn.Linear(7, 6), sn

    def forward(self, x: Tensor, times: int = 3) -> dict[str, Any]:
        spikes = [self.sn(self.fc(x)) for _ in range(times)]
        return {"rate": torch.stack(spikes).mean(0), "steps": times}


def test_samples_of_several_arguments_and_single_steps() -> None:
    for sample in [(torch.ones(2, 7), 4), {"x": torch.ones(2, 7), "times": 4}]:
        net = Loop(node("LIFNode", v_threshold=0.2))
        proof = nj.accelerate(net, sample, strict=True).proof
        assert proof is not None and proof.spikes == 4 * 12 and proof.gradients is not None


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a wrong row in the table."""
    from neuronjit.integrations import accelerate, spikingjelly

    def change(**fields: Any) -> None:
        row = spikingjelly.NODES["LIFNode"]
        monkeypatch.setitem(spikingjelly.NODES, "LIFNode", row._replace(**fields))
        accelerate.swapped.cache_clear()

    yield change
    accelerate.swapped.cache_clear()


def test_wrong_spikes_are_found(wrong: Callable[..., None]) -> None:
    wrong(params=lambda node: {"tau": node.tau * 1.5})
    net = network()
    before = [type(module) for module in net.modules()]
    with pytest.raises(nj.AccelerationError, match=r"differ, first in 3\.sn") as raised:
        nj.accelerate(net, images(), strict=True)
    assert [type(module) for module in net.modules()] == before
    proof = raised.value.report.proof
    assert not proof.same and proof.differing > 0 and proof.outputs > 1e-2
    assert nj.accelerate(net, images()).proof.first == "3.sn"
    assert nj.restore(net) == 4


def test_wrong_gradients_are_found(wrong: Callable[..., None]) -> None:
    wrong(surrogate=lambda node: nj.surrogates.ATan(alpha=2.1))
    net = network()
    proof = nj.accelerate(net, images()).proof
    assert proof is not None and not proof.same and proof.differing == 0
    assert proof.outputs == 0 and proof.gradients > 1e-3
    assert proof.worst in {*dict(net.named_parameters()), "input 0"}
    assert "DIFFERENT" in str(proof) and proof.worst in str(proof)


# --- batch norms in the nodes' kernels ------------------------------------------------------------


@pytest.fixture
def fused_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too, where small sequences are not worth it."""
    monkeypatch.setattr(batch_norm, "_pays", lambda x: True)


def normed() -> Any:
    """`network()`, and a batch norm in its block, at the end of a Sequential."""
    from spikingjelly.activation_based import layer

    net = network()
    net[3].conv = torch.nn.Sequential(net[3].conv, layer.BatchNorm2d(4, step_mode="m"))
    return net


FUSED = {"2": "1", "3.sn": "3.conv.1"}


def exact_losses(
    net: Any, x: Tensor, count: int, reset: Callable[[Any], None] | None = None
) -> list[Tensor]:
    """Losses in float64, then gradients, parameters and statistics after some steps of SGD."""
    from spikingjelly.activation_based import functional

    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    found = []
    for i in range(count):
        (reset or functional.reset_net)(net)
        optimizer.zero_grad()
        target = (torch.arange(x.shape[1], device=x.device) + i) % 5
        loss = torch.nn.functional.cross_entropy(net(x).mean(0), target)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    assert len({loss.item() for loss in found}) > count / 2 and found[0].dtype == torch.float64
    grads = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    assert all(grad.any() for grad in grads)
    return [*found, *grads, *(value.clone() for value in net.state_dict().values())]


def assert_equal(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        largest = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(largest, 1e-3))


@each_device
@pytest.mark.usefixtures("fused_always")
def test_fused_networks_train_as_spikingjellys(device: str) -> None:
    theirs, ours = normed().to(device).double(), normed().to(device).double()
    x = images(device).double()
    report = nj.accelerate(ours, fuse=True)
    assert {layer.path: layer.norm for layer in report.layers if layer.norm} == FUSED
    assert all("none stands directly before" in layer.apart for layer in report.layers[2:])
    assert "if, hard reset, Sigmoid(4), with batch norm 1\n" in str(report)
    assert "no batch norm fused: none stands" in str(report)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    assert_equal(exact_losses(ours, x, 10), exact_losses(theirs, x, 10))
    for net in (theirs.eval(), ours.eval()):
        net[8].store_v_seq = net[2].store_v_seq = True
        net(x)
    assert_equal([ours[2].v_seq, ours[8].v_seq], [theirs[2].v_seq, theirs[8].v_seq])
    assert nj.restore(ours) == 4
    for module in ours.modules():
        assert not {"forward", "_norm"} & vars(module).keys()
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert_equal(exact_losses(ours.train(), x, 2), exact_losses(theirs.train(), x, 2))


@pytest.mark.parametrize("kind", ["GatedLIFNode", "ActivationAwareIFNode"])
def test_nodes_whose_input_is_made_ready_keep_their_norms_apart(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch norm in their kernels would come after what is done to the input."""
    from spikingjelly.activation_based import layer, neuron

    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    monkeypatch.setattr(batch_norm, "_pays", lambda x: True)
    torch.manual_seed(0)
    node = neuron.GatedLIFNode(T, 3) if kind == "GatedLIFNode" else getattr(neuron, kind)()
    theirs = torch.nn.Sequential(layer.BatchNorm2d(3, step_mode="m"), node.train())
    node.step_mode = "m"
    ours = copy.deepcopy(theirs)
    (told,) = nj.accelerate(ours, fuse=True).accelerated
    assert told.norm is None
    assert told.apart is not None
    assert nj.nn.fuse(ours) == 0
    x = inputs((T, 2, 3, 4, 5))
    assert torch.equal(ours(x), theirs(x))


def test_fused_nodes_in_single_steps_copies_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from spikingjelly.activation_based import functional

    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    x = images().double()
    theirs, ours = normed().double(), normed().double()
    assert not [layer for layer in nj.accelerate(ours).layers if layer.norm or layer.apart]
    again = nj.accelerate(ours, fuse=True)  # accelerated before
    assert {layer.path: layer.norm for layer in again.layers if layer.norm} == FUSED
    assert again.layers == nj.accelerate(ours, fuse=True).layers
    assert [layer.norm for layer in nj.accelerate(ours).layers] == ["1", "3.conv.1", None, None]
    want = exact_losses(copy.deepcopy(theirs), x, 3)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for net in (copy.deepcopy(ours), torch.load(saved, weights_only=False)):
        assert net[2]._norm.norm is net[1]
        assert_equal(exact_losses(net, x, 3), want)
        assert nj.nn.unfuse(net) == 2 and nj.restore(net) == 4
    carried = [exact_losses(n, x, 3, functional.detach_net) for n in (copy.deepcopy(ours), theirs)]
    assert_equal(*carried)
    functional.set_step_mode(ours, "s")  # fused for sequences; then each step is one of its own
    functional.set_step_mode(theirs, "s")
    for net in (ours, theirs):
        functional.reset_net(net)
    ours.load_state_dict(theirs.state_dict())
    assert_equal([torch.stack([ours(step) for step in x])], [torch.stack([theirs(s) for s in x])])
    single = nj.accelerate(theirs, fuse=True)
    assert "single steps" in single.layers[0].apart or "folded" in single.layers[0].apart


def test_what_a_fused_node_cannot_become(monkeypatch: pytest.MonkeyPatch) -> None:
    from spikingjelly.activation_based import functional, memopt, surrogate

    class Own(surrogate.ATan):
        pass

    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    net = normed()
    nj.accelerate(net, fuse=True)
    assert nj.restore(torch.nn.Sequential(net[2])) == 1 and "forward" not in vars(net[1])
    assert nj.restore(net) == 3
    nj.accelerate(net, fuse=True)
    with pytest.raises(nj.SpecError, match=r"IFNode is no layer of neuronjit\.nn"):
        nj.nn.NormedNeuron(torch.nn.BatchNorm2d(4), net[2])
    before = net[2]
    net[2] = memopt.checkpoint_module(before, chunks=2)
    with pytest.raises(nj.SpecError, match=r"without its batch norm .*unfuse\(net\)"):
        net(images())
    net[2] = before
    functional.reset_net(net)
    net(images())
    before.surrogate_function = Own()
    with pytest.raises(nj.SpecError, match=r"IFNode was changed.* unknown surrogate 'Own'.*unfuse"):
        net(images())


class Narrow(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_sample_of_a_fused_network(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    monkeypatch.setattr(proof_module, "_SECONDS", 0.0)
    net = normed()
    before = copy.deepcopy(net.state_dict())
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        report = nj.accelerate(net, images(), strict=True, fuse=True)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    proof = report.proof
    assert proof is not None and proof.same and proof.differing == 0 and proof.tolerance == 1e-7
    assert 0 < proof.gradients < 1e-10 and proof.spikes == 8 * 581
    assert proof.rounded is not None and proof.rounded < 0.05 * proof.spikes
    assert "compared in float64" in str(report) and "own dtype" in str(report)
    if dtype is None:
        narrow = torch.nn.Sequential(Narrow(), normed())
        with pytest.raises(nj.AccelerationError, match=r"the model in float64 .* does not run"):
            nj.accelerate(narrow, images(), fuse=True)
        assert not any("forward" in vars(module) for module in narrow.modules())
    # what was accelerated before is compared with what it was
    plain = normed()
    nj.accelerate(plain)
    proof = nj.accelerate(plain, images(), fuse=True).proof
    assert proof is not None and proof.same and proof.rounded is not None


def test_a_wrong_batch_norm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    monkeypatch.setattr(proof_module, "_SECONDS", 0.0)
    right = batch_norm.multistep_normed

    def wrong(*args: Any, mean: Tensor, **options: Any) -> Any:
        return right(*args, mean=mean * 1.001, **options)

    monkeypatch.setattr(batch_norm, "multistep_normed", wrong)
    net = normed().eval()
    with torch.no_grad():
        net[1].running_mean.fill_(0.3)
    with pytest.raises(nj.AccelerationError, match="the sample shows a difference"):
        nj.accelerate(net, images(), strict=True, fuse=True)
    assert not any("forward" in vars(module) for module in net.modules())


def test_fused_networks_in_ddp(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")
    x = images().double()
    want = exact_losses(normed().double(), x, 3)
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = DistributedDataParallel(normed().double())
        assert [layer.norm for layer in nj.accelerate(net, fuse=True).layers[:2]] == [
            "module.1", "module.3.conv.1",
        ]  # fmt: skip
        assert_equal(exact_losses(net, x, 3), want)
    finally:
        distributed.destroy_process_group()


@each_device
@pytest.mark.slow
@pytest.mark.usefixtures("fused_always")
@pytest.mark.parametrize(
    ("make", "size", "count", "threshold"),
    [
        (networks.cifar10net, 32, 6, 0.1),
        (networks.sew_resnet18, 64, 20, 1.0),
        (networks.spikformer, 32, 11, 0.5),
    ],
    ids=["CIFAR10Net", "SEW-ResNet-18", "Spikformer"],
)
def test_spikingjellys_networks_fused(
    make: Any, size: int, count: int, threshold: float, device: str
) -> None:
    """Its own models in float64: losses, gradients, statistics; evaluated; and restored."""
    _, neuron, _ = networks.spikingjelly()
    theirs, ours = (make(neurons=neuron).to(device).double() for _ in range(2))
    for net in (theirs, ours):
        for module in net.modules():
            if isinstance(module, neuron.BaseNode):
                module.v_threshold = threshold
    x = networks.batches(1, device, size)[0][0].double()
    layers = nj.accelerate(ours, fuse=True).layers
    assert len([layer for layer in layers if layer.norm]) == count
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        assert_equal(exact_losses(ours, x, 10), exact_losses(theirs, x, 10))
        outs = [net.eval()(x) for net in (ours, theirs)]
        assert_equal(*([out.detach()] for out in outs))
        assert nj.restore(ours) == len(layers) and list(ours.state_dict()) == [*theirs.state_dict()]
        assert_equal(exact_losses(ours.train(), x, 2), exact_losses(theirs.train(), x, 2))


@pytest.mark.slow
@pytest.mark.parametrize("copied", [False, True])
def test_fused_networks_compile(copied: bool, fused_always: None) -> None:
    """Each norm within its neuron's kernels in the graph, too."""
    torch.compiler.reset()
    net = normed()
    nj.accelerate(net, fuse=True)
    net = copy.deepcopy(net) if copied else net
    graphs: list[str] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(net, backend=compiler, fullgraph=True)
    assert losses(compiled) == pytest.approx(losses(normed()), rel=2e-5)
    assert graphs and all(code.count("neuronjit.statistics") == 2 for code in graphs)


# --- bad input ------------------------------------------------------------------------------------


def skipped(net: Any) -> str:
    """Why the only neuron of `net` is skipped, without any change."""
    before = [type(module) for module in net.modules()]
    report = nj.accelerate(net)
    with pytest.raises(nj.AccelerationError, match="strict=True"):
        nj.accelerate(net, strict=True)
    assert [type(module) for module in net.modules()] == before and not report.accelerated
    (layer,) = report.skipped
    assert layer.why and f"skipped: {layer.why}" in str(report)
    return layer.why


def test_what_is_skipped_and_why() -> None:
    from spikingjelly.activation_based import neuron, surrogate

    class Mine(neuron.LIFNode):
        def single_step_functional_forward(self, inputs: Any, states: Any, **kwargs: Any) -> Any:
            return super().single_step_functional_forward(inputs, states, **kwargs)

    class Named(neuron.LIFNode):
        """Overrides nothing of the dynamics."""

        def extra_repr(self) -> str:
            return "mine"

    assert "over time, no loop" in skipped(neuron.PSN(T=3))
    assert "it learns online" in skipped(neuron.SLTTLIFNode())
    assert "methods to override; use IFNode" in skipped(neuron.SimpleLIFNode(2.0, True))
    assert "store_state_seqs" in skipped(neuron.ComplementaryLIFNode(store_state_seqs=True))
    window = surrogate.MultiLevelSpikeCount(4, grad_window=(0.0, 2.0))
    assert "gradient's window" in skipped(neuron.ILIFNode(surrogate_function=window))
    assert "Mine overrides single_step_functional_forward" in skipped(Mine())
    patched = neuron.IFNode()
    patched.forward = lambda x: x
    assert "overrides forward" in skipped(patched)
    odd = neuron.IFNode(surrogate_function=surrogate.PoissonPass())
    assert "unknown surrogate 'PoissonPass'. Known: ATan" in skipped(odd)
    smooth = neuron.IFNode(surrogate_function=surrogate.SuperSpike(spiking=False))
    assert "no primitive" in skipped(smooth)
    precise = neuron.LIFNode()
    precise._neuron_precision = (torch.float16, "fp32", "fp32")
    assert "precision" in skipped(precise)
    assert nj.accelerate(Named()).accelerated


def test_every_class_of_spikingjellys_has_a_row_or_a_reason() -> None:
    from spikingjelly.activation_based import base, neuron

    from neuronjit.integrations import spikingjelly

    found = {
        name: kind
        for name, kind in vars(neuron).items()
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module) and name[0] != "_"
    }
    assert len(found) > 40 and "LIFNode" in found
    for name, kind in found.items():
        families = {k.__name__ for k in kind.__mro__ if k.__module__ != base.__name__}
        assert families & {*spikingjelly.NODES, *spikingjelly._REASONS} or "Base" in name, name


def test_models_without_a_known_neuron() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    report = nj.accelerate(net, torch.ones(4, 2))
    assert not report.layers and report.proof is None
    assert "no neuron that is known was found" in str(report) and "spikingjelly 2.0.0" in str(
        report
    )
    with pytest.raises(nj.AccelerationError, match="no neuron that is known"):
        nj.accelerate(net, strict=True)
    for call in (nj.accelerate, nj.restore):
        with pytest.raises(nj.InputTypeError, match=r"must be a torch\.nn\.Module, got list"):
            call([net])


def test_a_wrong_sample_says_so_and_changes_nothing() -> None:
    net = network()
    before = [type(module) for module in net.modules()]
    for sample in (torch.ones(4, 2, 3, 8, 8), (images(), 1), {"y": images()}, "images"):
        with pytest.raises(nj.AccelerationError, match="the model does not run on the sample"):
            nj.accelerate(net, sample)
    assert [type(module) for module in net.modules()] == before
    net.lock = io.BufferedReader(io.BytesIO())  # what deepcopy refuses
    with pytest.raises(nj.AccelerationError, match="cannot copy it"):
        nj.accelerate(net, images())
    assert [type(module) for module in net.modules()] == before


def test_a_node_changed_later_goes_back_to_spikingjelly() -> None:
    from spikingjelly.activation_based import surrogate

    class Own(surrogate.ATan):
        pass

    theirs, ours = pair("LIFNode", step_mode="m")
    for net in (theirs, ours):
        net.surrogate_function = Own()
    x = inputs((T, *SHAPE)) * 1.3
    with pytest.warns(UserWarning, match="an accelerated LIFNode itself: unknown surrogate 'Own'"):
        got = ours(x)
    assert_same_bits(got, theirs(x), "spikes")
    assert "SpikingJelly again: unknown surrogate 'Own'" in str(nj.accelerate(ours))
    ours.surrogate_function = theirs.surrogate_function = surrogate.ATan()
    compare(theirs, ours, x)


# --- our own layers among SpikingJelly's ----------------------------------------------------------


def hybrid() -> Any:
    from spikingjelly.activation_based import layer, neuron

    torch.manual_seed(4)
    return torch.nn.Sequential(
        layer.Linear(6, 8, step_mode="m"), nj.nn.LIF(v_threshold=0.3), neuron.IFNode(step_mode="m"),
        layer.Linear(8, 5, step_mode="m"), nj.nn.ParametricLIFNode(step_mode="m", v_threshold=0.2),
        nj.nn.Neuron("izhikevich", v_threshold=0.1),
    )  # fmt: skip


def test_our_layers_under_spikingjellys_functions_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from spikingjelly.activation_based import functional
    from spikingjelly.logger import logger

    said: list[str] = []
    handle = logger.add(said.append, level="WARNING")
    logger.enable("spikingjelly")  # off unless it is asked for
    net = hybrid()
    formatted: list[str] = []
    monkeypatch.setattr(type(net[1]), "extra_repr", lambda self: formatted.append("") or "")
    try:
        net(inputs((T, 3, 6))).sum().backward()
        assert net[5].v.abs().sum() > 0
        functional.detach_net(net)
        assert not net[5].v.requires_grad
        for _ in range(2):
            functional.reset_net(net)
            assert (net[1].v, net[4].v, net[5].w) == (0.0, 0.0, 0.0)
        functional.set_step_mode(net, "s")
        assert net(inputs((3, 6))).shape == (3, 5) and net[1].step_mode == "s"
        functional.set_step_mode(net, "m")
    finally:
        logger.disable("spikingjelly")
        logger.remove(handle)
    assert not said and not formatted


def test_our_layers_with_explicit_states_and_in_checkpoints() -> None:
    from spikingjelly.activation_based import base, functional, memopt

    net = hybrid()
    x = inputs((T, 3, 6))
    (out,), last = base.to_functional_forward(net)((x,), base.extract_memories(net))
    assert net[1].v == 0.0 and len(last) == 5
    assert_same_bits(out, net(x), "out")
    for a, b in zip(last, base.extract_memories(net), strict=True):
        assert_same_bits(a, b, "a state")
    functional.reset_net(net)
    net(x).sum().backward()
    want = net[0].weight.grad.clone()
    functional.reset_net(net)
    net.zero_grad()
    for place in (1, 4, 5):
        net[place] = memopt.checkpoint_module(net[place], chunks=2)
    net(x).sum().backward()
    assert_near(net[0].weight.grad, want, 2e-5, "gradient")


def test_our_layers_stay_what_they_are() -> None:
    layer = hybrid()[4]
    assert (
        isinstance(layer, nj.nn.ParametricLIFNode) and type(layer).__name__ == "ParametricLIFNode"
    )
    plain = pickle.dumps(layer)
    assert b"spikingjelly.activation_based" not in plain  # it can be read without
    x = inputs((T, 3, 5)) * 1.3
    want = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(plain)):  # noqa: S301 our own
        nj.nn.reset_net(copied)
        assert type(copied) is type(layer)
        assert_same_bits(copied(x), want, "spikes")
    layer.double()
    assert layer.v.dtype == torch.float64 == layer.w.dtype
    net = hybrid()
    report = nj.accelerate(net)
    assert [found.path for found in report.accelerated] == ["2"] and not report.skipped
