"""`accelerate` on snnTorch's neurons: its own classes are what everything is compared with."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from support import assert_near, assert_same_bits, each_device, inputs
from torch import Tensor

import neuronjit as nj

pytestmark = pytest.mark.peers("snntorch")

T, SHAPE = 6, (3, 7)
# constructors' arguments that are not the defaults, so that no parameter can be forgotten
NODES: dict[str, dict[str, Any]] = {
    "Leaky": dict(beta=0.8, threshold=0.7),
    "Synaptic": dict(alpha=0.6, beta=0.7, threshold=0.9),
    "Alpha": dict(alpha=0.8, beta=0.6, threshold=0.4),
    "Lapicque": dict(R=1.7, C=1.3, time_step=0.9, threshold=0.6),
}
# recurrent ones: each neuron by itself, with one number for all or for each, and all to all
ONE, EACH = dict(all_to_all=False, V=-0.4), dict(all_to_all=False, V=torch.linspace(-0.6, 0.6, 7))
WIRINGS: dict[str, dict[str, Any]] = {"one": ONE, "each": EACH, "all": dict(linear_features=7)}
RECURRENT: dict[str, dict[str, Any]] = {
    "RLeaky": dict(beta=0.8, threshold=0.7), "RSynaptic": dict(alpha=0.6, beta=0.7, threshold=0.9)
}  # fmt: skip
RESETS = ("subtract", "zero", "none")
CASES = [
    (name, dict(reset_mechanism=reset) | ({} if delay else dict(reset_delay=False)))
    for name, reset, delay in itertools.product(NODES, RESETS, (True, False))
    if delay or name in ("Leaky", "Synaptic")
]
each_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda v: "-".join(map(str, v.values())) if v != str(v) else v
)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling: what each option is handed on as."""
    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")


def node(name: str, **options: Any) -> Any:
    import snntorch

    torch.manual_seed(6)  # weights between recurrent neurons are drawn
    return getattr(snntorch, name)(**{**NODES, **RECURRENT}[name] | copy.deepcopy(options))


def pair(name: str, device: str = "cpu", **options: Any) -> tuple[Any, Any]:
    """A neuron and the same accelerated."""
    theirs = node(name, **options).to(device)
    ours = copy.deepcopy(theirs)
    assert [layer.why for layer in nj.accelerate(ours).layers] == [None]
    return theirs, ours


STATES = ("spk", "syn", "syn_exc", "syn_inh", "mem")


def train(layer: Any, x_seq: Tensor, start: tuple[Tensor, ...] = ()) -> dict[str, Tensor]:
    """Spikes, every state of every step and every gradient, from random gradients of them all."""
    leaves = [z.clone().requires_grad_() for z in start]
    x = x_seq.clone().requires_grad_()
    states: list[Any] = list(leaves)
    outputs: list[tuple[Any, ...]] = []
    for step in x:
        out = layer(step) if layer.init_hidden else layer(step, *states)
        spikes, *states = out if isinstance(out, tuple) else (out,)
        outputs.append((spikes, *(getattr(layer, n) for n in STATES if hasattr(layer, n))))
        if states and hasattr(layer, "spk"):  # the spikes are a state as well
            states.insert(0, spikes)
        for returned, held in zip(states, outputs[-1][1:], strict=bool(states)):
            assert returned is held
    found = {f"output {i}": torch.stack(seq) for i, seq in enumerate(zip(*outputs, strict=True))}
    generator = torch.Generator().manual_seed(5)
    weighed = [
        (out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in found.values()
    ]
    layer.zero_grad()
    torch.stack(weighed).sum().backward()
    found |= {f"grad of {n}": p.grad for n, p in layer.named_parameters() if p.requires_grad}
    for i, z in enumerate(leaves):  # Alpha's potential starts anew from its currents
        found[f"grad of state {i}"] = torch.zeros_like(z) if z.grad is None else z.grad
    return {n: v.detach().cpu() for n, v in {**found, "grad of x": x.grad}.items()}


def compare(
    theirs: Any, ours: Any, x: Tensor, start: tuple[Tensor, ...] = (), exact: bool = True
) -> None:
    want, got = train(theirs, x, start), train(ours, x, start)
    assert want.keys() == got.keys()
    assert 0.05 < want["output 0"].ne(0).float().mean() < 0.95
    assert_same_bits(got["output 0"], want["output 0"], "spikes")
    for name, value in want.items():
        if exact and "grad" not in name:
            torch.testing.assert_close(got[name], value, rtol=0, atol=0)
        else:
            of_state = "grad of x" in name or "state" in name
            assert_near(got[name], value, 2e-5, name, floor=0.1 if of_state else 1.0)


# --- neurons x options ----------------------------------------------------------------------------


def check(name: str, device: str, **options: Any) -> None:
    exact = name != "Alpha" and device == "cpu"  # log; and GPUs divide otherwise in torch
    x = inputs((T, *SHAPE)).to(device)
    theirs, ours = pair(name, device, learn_threshold=True, **options)
    compare(theirs, ours, x, exact=exact)
    count = len([n for n in STATES if hasattr(theirs, n)])
    start = tuple(inputs((count, *SHAPE), seed=3).to(device) * 0.5)
    compare(theirs, ours, x, start, exact=exact)


@each_device
@pytest.mark.parametrize("name", NODES)
def test_neurons_equal_snntorchs(name: str, device: str) -> None:
    check(name, device)


@pytest.mark.slow
@each_device
@each_case
def test_all_resets(name: str, options: dict[str, Any], device: str) -> None:
    check(name, device, **options)


@each_case
def test_resets_in_eager(name: str, options: dict[str, Any], eager: None) -> None:
    check(name, "cpu", **options)
    if name != "Lapicque":  # its C would hold a graph that the first backward frees
        check(name, "cpu", learn_beta=True, **options)
    if name == "Synaptic":  # Alpha refuses learn_alpha
        check(name, "cpu", learn_alpha=True, **options)


@pytest.mark.parametrize("beta", [-0.1, 0.0, 1.0, 1.2])
def test_decays_are_clamped_and_so_are_their_gradients(beta: float, eager: None) -> None:
    for name in ("Leaky", "Synaptic"):
        theirs, ours = pair(name, beta=beta, learn_beta=True)
        x = inputs((T, *SHAPE))
        compare(theirs, ours, x)
        assert (ours.beta.grad != 0) == (0 <= beta <= 1)


@pytest.mark.parametrize("delay", [True, False])
def test_graded_spikes(delay: bool, eager: None) -> None:
    x = inputs((T, *SHAPE))
    for learn in (False, True):
        for reset in RESETS:
            theirs, ours = pair(
                "Leaky", graded_spikes_factor=2.5, learn_graded_spikes_factor=learn,
                reset_delay=delay, reset_mechanism=reset,
            )  # fmt: skip
            compare(theirs, ours, x)
            assert set(ours(x[0])[0].unique().tolist()) <= {0.0, 2.5}


def test_a_number_for_each_neuron_or_channel(eager: None) -> None:
    beta = torch.linspace(0.5, 0.9, 7)
    compare(*pair("Leaky", beta=beta, threshold=beta, learn_beta=True), inputs((T, *SHAPE)))
    channels = torch.tensor([[[0.5]], [[0.9]]])
    compare(*pair("Leaky", beta=channels, learn_beta=True), inputs((T, 3, 2, 2, 2)))


def test_numbers_that_snntorch_keeps_as_integers_or_doubles(eager: None) -> None:
    import numpy as np

    x = inputs((T, *SHAPE))
    compare(*pair("Leaky", threshold=1), x)
    compare(*pair("Leaky", beta=np.float64(0.8)), x)
    compare(*pair("Lapicque", R=2, C=1, time_step=1), x)
    compare(*pair("Lapicque", beta=0.6, R=False, C=False), x)


def surrogates() -> list[tuple[str, dict[str, float]]]:
    return [
        ("atan", dict(alpha=1.5)), ("fast_sigmoid", dict(slope=10)), ("sigmoid", dict(slope=4)),
        ("straight_through_estimator", {}), ("triangular", dict(threshold=0.7)), ("heaviside", {}),
        ("spike_rate_escape", dict(beta=1.2, slope=3)), ("SFS", dict(slope=5, B=-0.2)),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "numbers"), surrogates(), ids=lambda value: str(value)[:24])
def test_surrogates(name: str, numbers: dict[str, float], eager: None) -> None:
    from snntorch import surrogate

    for chosen in (numbers, {}):
        spike_grad = getattr(surrogate, name)(**chosen)
        compare(*pair("Leaky", spike_grad=spike_grad), inputs((T, *SHAPE)))


def test_no_surrogate(eager: None) -> None:
    compare(*pair("Leaky", surrogate_disable=True), inputs((T, *SHAPE)))


@each_device
def test_a_neuron_on_its_threshold_does_not_fire(device: str) -> None:
    theirs, ours = pair("Leaky", device, beta=1.0, threshold=1.0)
    x = torch.tensor([[0.5, 1.0, 1.5], [0.5, 0.25, 0.5], [0.25, 0.0, 0.0]], device=device)
    want, got = train(theirs, x), train(ours, x)
    fired = [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert want["output 0"].tolist() == fired == got["output 0"].tolist()


# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("output", [False, True])
def test_hidden_states(name: str, output: bool, eager: None) -> None:
    theirs, ours = pair(name, init_hidden=True, output=output)
    x = inputs((T, *SHAPE))
    for _ in range(2):
        compare(theirs, ours, x, exact=name != "Alpha")
        assert isinstance(ours(x[0]), tuple) == output == isinstance(theirs(x[0]), tuple)
        for layer in (theirs, ours):
            layer.reset_mem()
            assert not layer.mem.any() and not layer.mem.requires_grad


def test_states_are_kept_without_being_passed_and_start_anew_in_another_shape(eager: None) -> None:
    theirs, ours = pair("Synaptic")
    for x in (*inputs((T, 3, 7)), *inputs((T, 2, 7)), *inputs((T, 4))):
        want, got = theirs(x), ours(x)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0)
    assert want[2].any()
    want, got = theirs(x, mem=want[2] * 0.5), ours(x, mem=got[2] * 0.5)  # syn is kept
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


def test_scalars(eager: None) -> None:
    """Inputs without any axis, as in snnTorch's own first examples."""
    theirs, ours = pair("Leaky", beta=0.5, threshold=1.0)
    for value in (0.6, 0.6, 0.6, 0.0):
        want, got = theirs(torch.tensor(value)), ours(torch.tensor(value))
        assert [t.tolist() for t in got] == [t.tolist() for t in want] and got[0].shape == ()


@each_device
@pytest.mark.parametrize(
    ("name", "options"), [("Leaky", {}), ("RLeaky", ONE), ("RLeaky", WIRINGS["all"])]
)
def test_truncated_backpropagation(name: str, options: dict[str, Any], device: str) -> None:
    """States are detached in place, through the list of neurons that snnTorch keeps."""
    from snntorch import utils

    gradients = []
    for accelerated in (False, True):
        layer = node(name, init_hidden=True, **options)
        torch.manual_seed(2)
        net = torch.nn.Sequential(torch.nn.Linear(7, 7), layer).to(device)
        if accelerated:
            nj.accelerate(net, strict=True)
        utils.reset(net)
        assert not net[1].mem.any()
        for part in inputs((T, *SHAPE)).to(device).split(2):
            torch.stack([net(step) for step in part]).sum().backward()
            type(net[1]).detach_hidden()
            assert not net[1].mem.requires_grad and net[1].mem.any()
        gradients.append(net[0].weight.grad.cpu())
    assert_near(gradients[1], gradients[0], 2e-5, "weight")


# --- networks -------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """A loop over time with states in variables, as in snnTorch's tutorials."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc1, self.fc2 = torch.nn.Linear(6, 12), torch.nn.Linear(12, 4)
        self.lif1, self.lif2 = node("Leaky", learn_beta=True), node("Synaptic")

    def forward(self, x_seq: Tensor) -> tuple[Tensor, Tensor]:
        mem1 = self.lif1.reset_mem()
        syn2, mem2 = self.lif2.reset_mem()
        spikes, potentials = [], []
        for x in x_seq:
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, syn2, mem2 = self.lif2(self.fc2(spk1), syn2, mem2)
            spikes.append(spk2)
            potentials.append(mem2)
        return torch.stack(spikes), torch.stack(potentials)


class Hidden(torch.nn.Module):
    """States inside the neurons, reset by snnTorch's function at the beginning."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = torch.nn.Linear(6, 12)
        self.lif = node("Leaky", init_hidden=True)
        self.last = node("Alpha", init_hidden=True, output=True)

    def forward(self, x_seq: Tensor) -> Tensor:
        from snntorch import utils

        utils.reset(self)
        return torch.stack([self.last(self.lif(self.fc(x)))[-1] for x in x_seq])


@pytest.mark.parametrize("kind", [Net, Hidden])
def test_a_sample_shows_that_a_network_is_the_same(kind: type, eager: None) -> None:
    net = kind()
    x = inputs((T, 3, 6)) * 2
    net(x)
    before = {n: b.clone() for n, b in net.named_buffers()}
    report = nj.accelerate(net, x, strict=True)
    assert len(report.accelerated) == 2 and "snntorch 1.0.0, tested with 1.0.0" in str(report)
    assert report.proof is not None and report.proof.same and report.proof.fired > 0.05
    assert report.proof.spikes == T * 3 * (16 if kind is Net else 24)
    for name, value in net.named_buffers():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)
    assert nj.restore(net) == 2
    assert torch.equal(torch.as_tensor(net(x)[0]), torch.as_tensor(kind()(x)[0]))


def test_a_sample_shows_a_difference(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from neuronjit.integrations import snntorch as table

    wrong = dict(table.NODES["Leaky"].charge, sub="h = clamp(beta, 0, 1) * v + x")
    monkeypatch.setitem(table.NODES, "Leaky", table.NODES["Leaky"]._replace(charge=wrong))
    monkeypatch.setattr(table, "_models", {})
    report = nj.accelerate(Net(), inputs((T, 3, 6)) * 2)
    assert report.proof is not None and report.proof.first == "lif1" and not report.proof.same


def test_what_goes_on_working(eager: None) -> None:
    import snntorch

    net, plain = Net(), Net()
    seen: list[int] = []
    net.lif1.register_forward_hook(lambda *_: seen.append(1))
    nj.accelerate(net)
    assert isinstance(net.lif1, snntorch.Leaky) and type(net.lif1).__name__ == "Leaky"
    assert net.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        plain.lif1.beta.fill_(0.3)
    net.load_state_dict(plain.state_dict())
    copied = copy.deepcopy(net)
    x = inputs((T, 3, 6)) * 2
    for a, b, c in zip(plain(x), net(x), copied(x), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert len(seen) == 2 * T  # a copy keeps its hooks
    assert [layer.how for layer in nj.accelerate(net).layers] == [
        "leaky_sub, ATan(2)", "synaptic_sub, ATan(2)",
    ]  # fmt: skip
    assert net.lif1.reset is None and plain.lif1.reset.shape == (3, 12)
    assert type(plain.lif1) is snntorch.Leaky


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", [None, "one", "all"])
def test_a_compiled_network_has_no_graph_breaks(recurrent: str | None) -> None:
    from neuronjit.integrations.snntorch import Sequence

    torch.compiler.reset()
    net: Any = Net()
    if recurrent is not None:
        net = Sequence(node("RLeaky", **WIRINGS[recurrent]))
    x = inputs((T, 3, 6 if recurrent is None else 7)) * 2
    want = net(x)
    if recurrent is None:
        nj.accelerate(net)
    else:
        net.reset_mem()
    compiled: Any = torch.compile(net, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(x), want, strict=True):
        assert torch.equal(a, b)


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, device: str) -> None:
    """Spikes are float32, as snnTorch's; states float32 for half precision, as kernels keep them.

    snnTorch rounds states to half precision, so these are compared with its neuron in float32.
    """
    theirs, ours = pair("Leaky", device)
    x = inputs((T, *SHAPE)).to(device, dtype)
    wide = x.float() if dtype != torch.float64 else x
    want, got = train(theirs, wide), train(ours, x)
    assert got["grad of x"].dtype == dtype and got["output 0"].dtype == torch.float32
    assert_same_bits(got["output 0"], want["output 0"], "spikes")
    torch.testing.assert_close(got["output 1"], want["output 1"], rtol=0, atol=0)
    tolerance = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float64: 1e-6}[dtype]
    assert_near(got["grad of x"].double(), want["grad of x"].double(), tolerance, "grad of x")


# --- what is left alone ---------------------------------------------------------------------------


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


@pytest.mark.filterwarnings("ignore:Inhibition is an unstable feature")
def test_what_is_skipped_and_why() -> None:
    import snntorch
    from snntorch import surrogate

    class Mine(snntorch.Leaky):
        def _base_sub(self, input_: Tensor) -> Tensor:
            return super()._base_sub(input_)

    class Named(snntorch.Leaky):
        """Overrides nothing of the dynamics."""

        def extra_repr(self) -> str:
            return "mine"

    assert "do not see each other" in skipped(node("Leaky", inhibition=True))
    assert "do not quantise" in skipped(node("Leaky", state_quant=lambda mem: mem))
    assert "no equations for it; there are some for Leaky" in skipped(snntorch.SLSTM(2, 2))
    assert "no equations for it" in skipped(snntorch.LeakyParallel(2, 2))
    assert "DeltaLeaky overrides forward" in skipped(snntorch.DeltaLeaky(0.9, 0.1))
    assert "Mine overrides _base_sub" in skipped(Mine(0.9))
    assert nj.accelerate(Named(0.9)).accelerated
    patched = node("Leaky")
    patched.fire = lambda mem: mem
    assert "overrides fire" in skipped(patched)
    stepped = node("Leaky")
    stepped.state_function = node("Leaky").state_function
    assert "state_function is no method of its own" in skipped(stepped)

    for odd in (surrogate.SSO(), surrogate.LSO(), surrogate.custom_surrogate(print)):
        assert "unknown surrogate" in skipped(node("Leaky", spike_grad=odd))

    @functools.wraps(surrogate.atan())
    def in_disguise(u: Tensor) -> Tensor:
        return u

    assert "unknown surrogate atan.<locals>.inner" in skipped(node("Leaky", spike_grad=in_disguise))
    assert "unknown surrogate of type" in skipped(node("Leaky", spike_grad=torch.nn.ReLU()))
    learned = surrogate.atan(torch.nn.Parameter(torch.tensor(2.0)))
    assert "no plain numbers" in skipped(node("Leaky", spike_grad=learned))


def test_wrong_arguments_are_type_errors_as_snntorchs(eager: None) -> None:
    x = torch.ones(2, 3)
    wrong: list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], str]] = [
        (dict(init_hidden=True), (x, x), {}, "keeps its states itself, and mem cannot be passed"),
        ({}, (x, x, x), {}, r"takes the input and then mem, got 2 states and \[\]"),
        ({}, (x,), dict(spk=x), r"takes the input and then mem, got 0 states and \['spk'\]"),
        ({}, (x, x), dict(mem=x), r"takes the input and then mem, got 1 states and \['mem'\]"),
        ({}, (x, 0.5), {}, "'float'.* buffer 'mem'"),
    ]
    for options, args, kwargs, message in wrong:
        theirs, ours = pair("Leaky", **options)
        with pytest.raises(TypeError):
            theirs(*args, **kwargs)
        with pytest.raises(TypeError, match=message):
            ours(*args, **kwargs)
    _, hidden = pair("Leaky", init_hidden=True)
    assert hidden(x, None).shape == (2, 3) == hidden(x, mem=None).shape


def test_what_only_snntorch_runs_is_run_by_it_with_a_warning(eager: None) -> None:
    from snntorch import surrogate

    theirs, ours = pair("Leaky")
    x = inputs(SHAPE)
    for layer in (theirs, ours):
        layer.spike_grad = surrogate.SSO()
    with pytest.warns(UserWarning, match="runs an accelerated Leaky itself: unknown surrogate SSO"):
        got = ours(x)
    assert torch.equal(got[0], theirs(x)[0])
    assert "snnTorch again: unknown surrogate" in str(nj.accelerate(ours))
    theirs, ours = pair("Leaky", beta=torch.tensor([[0.5], [0.9]], dtype=torch.float64))
    with pytest.warns(UserWarning, match="beta is a float64 tensor"):
        got = ours(torch.ones(2, 3))
    assert torch.equal(got[1], theirs(torch.ones(2, 3))[1]) and got[1].dtype == torch.float64
    theirs, ours = pair("Leaky", beta=torch.full((5,), 0.5))
    with pytest.warns(UserWarning, match="beta has shape"):
        got = ours(torch.ones(2, 1))
    assert torch.equal(got[1], theirs(torch.ones(2, 1))[1]) and got[1].shape == (2, 5)


# --- whole sequences ------------------------------------------------------------------------------


def sequence(layer: Any, x_seq: Tensor, start: tuple[Tensor, ...], loop: bool) -> dict[str, Tensor]:
    """As `train`, with the states of the last step alone; by snnTorch's loop or by `Sequence`."""
    from neuronjit.integrations.snntorch import Sequence

    leaves = [z.clone().requires_grad_() for z in start]
    x = x_seq.clone().requires_grad_()
    states: list[Any] = list(leaves)
    if loop:
        steps = []
        for step in x:
            out = layer(step, *([] if layer.init_hidden else states))
            spikes, *states = out if isinstance(out, tuple) else (out,)
            steps.append(spikes)
            if hasattr(layer, "spk"):
                states.insert(0, spikes)
        spikes = torch.stack(steps)
        states = states[1:] if hasattr(layer, "spk") else states
    else:
        out = Sequence(layer)(x, *states)
        spikes, *states = out if isinstance(out, tuple) else (out,)
    outputs = {"spikes": spikes, **{f"state {i}": z for i, z in enumerate(states)}}
    outputs |= {f"{n} of the layer": getattr(layer, n) for n in STATES if hasattr(layer, n)}
    generator = torch.Generator().manual_seed(5)
    weighed = [
        (out * torch.randn(out.shape, generator=generator).to(out)).sum()
        for out in outputs.values()
    ]
    layer.zero_grad()
    torch.stack(weighed).sum().backward()
    found = {**outputs, "grad of x": x.grad}
    found |= {f"grad of {n}": p.grad for n, p in layer.named_parameters() if p.requires_grad}
    for i, z in enumerate(leaves):
        found[f"grad of start {i}"] = torch.zeros_like(z) if z.grad is None else z.grad
    return {name: value.detach().cpu() for name, value in found.items()}


def check_sequence(name: str, device: str, **options: Any) -> None:
    theirs = node(name, learn_threshold=True, **options).to(device)
    ours = copy.deepcopy(theirs)
    x = inputs((T, *SHAPE)).to(device)
    count = len([n for n in STATES if hasattr(theirs, n)])
    start = () if theirs.init_hidden else tuple(inputs((count, *SHAPE), seed=3).to(device) * 0.5)
    for begin in (start, ()):  # then it goes on from where it was
        for layer in (theirs, ours):
            for n in STATES:
                if hasattr(layer, n):
                    setattr(layer, n, getattr(layer, n).detach())
        want, got = sequence(theirs, x, begin, True), sequence(ours, x, begin, False)
        assert want.keys() == got.keys()
        assert 0.02 < want["spikes"].mean() < 0.99  # without a reset, nearly all fire in the end
        assert_same_bits(got["spikes"], want["spikes"], "spikes")
        for key, value in want.items():
            assert_near(got[key], value, 2e-5, key, floor=0.1 if value.numel() > 1 else 1.0)


@each_device
@pytest.mark.parametrize("wiring", ["one", "all"])
def test_recurrent_neurons(wiring: str, device: str) -> None:
    check("RLeaky", device, **WIRINGS[wiring])
    check_sequence("RLeaky", device, **WIRINGS[wiring])


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("name", RECURRENT)
def test_all_recurrent_neurons(name: str, wiring: str, reset: str, device: str) -> None:
    check(name, device, reset_mechanism=reset, **WIRINGS[wiring])
    check_sequence(name, device, reset_mechanism=reset, **WIRINGS[wiring])


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_neurons_with_all_options(name: str, wiring: str, eager: None) -> None:
    for reset in RESETS:
        options = dict(reset_mechanism=reset, **WIRINGS[wiring])
        check(name, "cpu", learn_beta=True, **options)
        check_sequence(name, "cpu", **options)
        check_sequence(name, "cpu", learn_recurrent=False, init_hidden=True, **options)
        check_sequence(name, "cpu", init_hidden=True, output=True, **options)
        if name == "RLeaky":
            check(name, "cpu", reset_delay=False, **options)
            check_sequence(name, "cpu", reset_delay=False, **options)
        else:
            check(name, "cpu", learn_alpha=True, **options)


def test_recurrent_convolutions(eager: None) -> None:
    from neuronjit.integrations.snntorch import Sequence

    theirs, ours = pair("RLeaky", conv2d_channels=3, kernel_size=3)
    x = inputs((T, 2, 3, 4, 5))
    compare(theirs, ours, x)
    for layer in (theirs, ours):
        layer.reset_mem()
    want = [theirs(step) for step in x]
    spikes, mem = Sequence(ours, every_state=True)(x)
    assert torch.equal(spikes, torch.stack([out[0] for out in want]))
    assert torch.equal(mem, torch.stack([out[1] for out in want]))
    assert Sequence(ours)(x[:0])[0].shape == x[:0].shape and torch.equal(ours.mem, mem[-1])


@each_device
@pytest.mark.parametrize("name", NODES)
def test_a_sequence_is_snntorchs_loop(name: str, device: str) -> None:
    check_sequence(name, device)


@each_case
def test_sequences_with_all_resets(name: str, options: dict[str, Any], eager: None) -> None:
    check_sequence(name, "cpu", **options)
    for output in (False, True):
        check_sequence(name, "cpu", init_hidden=True, output=output, **options)


@pytest.mark.parametrize("name", NODES)
def test_states_of_every_step(name: str, eager: None) -> None:
    from neuronjit.integrations.snntorch import Sequence

    theirs, ours = pair(name)
    x = inputs((T, *SHAPE))
    want = [theirs(step) for step in x]
    got = Sequence(ours, every_state=True)(x)
    for theirs_seq, ours_seq in zip(zip(*want, strict=True), got, strict=True):
        assert_near(ours_seq, torch.stack(theirs_seq), 2e-5, name)
    assert torch.equal(ours.mem, got[-1][-1])


def test_a_sequence_in_a_network(eager: None) -> None:
    from neuronjit.integrations.snntorch import Sequence

    net = torch.nn.Sequential(
        torch.nn.Linear(6, 12), Sequence(node("Leaky", init_hidden=True)), torch.nn.Linear(12, 4),
        Sequence(node("Synaptic", init_hidden=True, output=True, reset_mechanism="zero")),
    )  # fmt: skip
    plain = copy.deepcopy(net)
    x = inputs((T, 3, 6)) * 2
    spikes, syn, mem = net(x)
    steps = []
    for step in x:
        *_, out = (plain[3].layer(plain[2](plain[1].layer(plain[0](step)))),)
        steps.append(out[0])
    assert torch.equal(spikes, torch.stack(steps)) and torch.equal(mem, out[2])
    assert torch.equal(syn, out[1]) and spikes.any()
    assert {n for n, _ in net.named_parameters()} == {n for n, _ in plain.named_parameters()}
    assert not torch.equal(net(x)[2], mem)
    for part in (net[1], net[3]):
        part.reset_mem()
    assert torch.equal(net(x)[2], mem)
    report = nj.accelerate(net)
    assert [layer.path for layer in report.accelerated] == ["1.layer", "3.layer"]
    for part in (net[1], net[3]):
        part.reset_mem()
    assert torch.equal(copy.deepcopy(net)(x)[2], mem) and torch.equal(net(x)[2], mem)


def test_sequences_of_what_no_kernel_runs() -> None:
    import snntorch

    from neuronjit.integrations.snntorch import Sequence

    with pytest.raises(nj.InputTypeError, match=r"must be a snnTorch Leaky or .*, got Linear"):
        Sequence(torch.nn.Linear(2, 2))
    with pytest.raises(nj.SpecError, match="no kernel can run this SLSTM: no equations for it"):
        Sequence(snntorch.SLSTM(2, 2))
    with pytest.raises(nj.SpecError, match="RSynaptic: reset_delay=False, which the RSynaptic"):
        Sequence(node("RSynaptic", reset_delay=False, **ONE))
    seq = Sequence(node("Leaky"))
    with pytest.raises(nj.InputTypeError, match="takes the input and then mem"):
        seq(torch.ones(2, 3), syn=torch.ones(3))
    seq.layer.state_quant = lambda mem: mem
    with pytest.raises(nj.SpecError, match="state_quant is set"):
        seq(torch.ones(2, 3))
