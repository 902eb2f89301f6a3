"""`accelerate` on Norse's modules: its own classes are what everything is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import assert_near, assert_same_bits, each_device, inputs
from torch import Tensor

import neuronjit as nj

pytestmark = pytest.mark.peers("norse")

T, SHAPE = 12, (3, 7)
# parameters that are not the defaults, so that none can be forgotten, and what to multiply x with
LEAKY = dict(tau_syn_inv=300.0, tau_mem_inv=150.0, v_leak=0.1, v_th=0.6, v_reset=-0.1)
ADAPTIVE = dict(adaptation_current=3.0, adaptation_spike=0.05, tau_ada_inv=3.0)
NODES: dict[str, tuple[str, dict[str, Any], float]] = {
    "LIF": ("lif.LIFParameters", LEAKY, 3.0),
    "LIFEx": ("lif_ex.LIFExParameters", LEAKY | dict(delta_T=0.4), 2.0),
    "LIFAdEx": ("lif_adex.LIFAdExParameters", LEAKY | ADAPTIVE | dict(delta_T=0.4), 2.0),
    "IAF": ("iaf.IAFParameters", dict(v_th=0.8, v_reset=0.1), 1.0),
    "LI": (
        "leaky_integrator.LIParameters",
        {k: v for k, v in LEAKY.items() if k not in ("v_th", "v_reset")},
        1.0,
    ),
    "LIFBoxCell": (
        "lif_box.LIFBoxParameters",
        {k: v for k, v in LEAKY.items() if k != "tau_syn_inv"},
        4.0,
    ),
    "LSNN": ("lsnn.LSNNParameters", LEAKY | dict(tau_adapt_inv=20.0, beta=0.4), 3.0),
    "LIBoxCell": ("leaky_integrator_box.LIBoxParameters", dict(tau_mem_inv=150.0, v_leak=0.1), 1.0),
    "Izhikevich": ("izhikevich.IzhikevichParameters", {}, 60.0),
}
METHODS = {"super": 100.0, "triangle": 0.4, "tanh": 2.0, "circ": 0.3, "heavi_erfc": 1.5}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiling: what each option is handed on as."""
    monkeypatch.setenv("NEURONJIT_BACKEND", "eager")


def node(name: str, learn: bool = False, dt: float = 0.0015, **options: Any) -> Any:
    """A layer or a cell; `learn` makes leaves of its tensors that require gradients."""
    import importlib

    import norse.torch as norse

    where, numbers, _ = NODES[name.removesuffix("Cell")] if name not in NODES else NODES[name]
    if "Izhikevich" in name:
        behaviour = norse.functional.izhikevich.create_izhikevich_spiking_behavior(
            0.03, 0.25, -60.0, 4.0, -64.0, -64.0, tau_inv=200
        )
        p = behaviour.p._replace(mn=5.1, bias=141.0, v_th=25.0, **options)
        state = type(behaviour.s)(*(z.detach().clone() for z in behaviour.s))
        return getattr(norse, name)(behaviour._replace(p=p, s=state), dt=dt)
    module, kind = where.split(".")
    values = {k: torch.tensor(v).requires_grad_(learn) for k, v in numbers.items()}
    p = getattr(importlib.import_module(f"norse.torch.functional.{module}"), kind)
    recorded = {"record_states": True} if options.pop("record_states", False) else {}
    return getattr(norse, name)(p(**values, **options), dt=dt, **recorded)


def pair(make: Callable[[], Any]) -> tuple[Any, Any]:
    """Two that are the same, the second accelerated: its parameters are tensors of its own."""
    theirs, ours = make(), make()
    assert [layer.why for layer in nj.accelerate(ours).layers] == [None]
    return theirs, ours


def train(module: Any, x_seq: Tensor, start: Any = None) -> dict[str, Tensor]:
    """Spikes, states and every gradient, from random gradients of spikes and states."""
    x = x_seq.clone().requires_grad_()
    leaves = [] if start is None else [z.clone().requires_grad_() for z in start]
    state = None if start is None else type(start)(*leaves)
    if type(module).__name__.endswith("Cell"):
        steps = []
        for step in x:
            out, state = module(step, state)
            steps.append(out)
        out = torch.stack(steps)
    else:
        out, state = module(x, state)
    outputs = {"out": out, **state._asdict()}
    generator = torch.Generator().manual_seed(5)
    weighed = [
        (o * torch.randn(o.shape, generator=generator).to(o)).sum() for o in outputs.values()
    ]
    torch.stack(weighed).sum().backward()
    found = {**outputs, "grad of x": x.grad}
    found |= {f"grad of start {i}": z.grad for i, z in enumerate(leaves)}
    named = {name: getattr(module.p, name) for name in module.p._fields}
    found |= {
        f"grad of {n}": p.grad
        for n, p in named.items()
        if isinstance(p, Tensor) and p.grad is not None
    }
    found["kind of state"] = torch.tensor([ord(c) for c in type(state).__name__])
    return {name: value.detach().cpu() for name, value in found.items()}


def compare(make: Callable[[], Any], x: Tensor, start: Any = None, exact: bool = True) -> None:
    theirs, ours = pair(make)
    want, got = train(theirs, x, start), train(ours, x, start)
    assert want.keys() == got.keys()
    if type(theirs).__name__ not in ("LI", "LICell", "LIBoxCell"):
        assert 0.01 < want["out"].mean() < 0.95
        assert_same_bits(got["out"], want["out"], "spikes")
    for name, value in want.items():
        if exact and "grad" not in name:
            torch.testing.assert_close(got[name], value, rtol=0, atol=0)
        else:
            summed = value.numel() == 1
            assert_near(got[name], value, 2e-5, name, floor=2.0 if summed else 0.1)


def scaled(name: str, device: str = "cpu") -> Tensor:
    key = name if name in NODES else name.removesuffix("Cell")
    return inputs((T, *SHAPE)).to(device) * NODES[key][2]


def check(name: str, device: str = "cpu", **options: Any) -> None:
    exact = device == "cpu" and "Ex" not in name  # exp
    for learn in (False, True):
        compare(partial(node, name, learn, **options), scaled(name, device), exact=exact)


# --- modules x options ----------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("name", ["LIF", "LI", "Izhikevich"])
def test_modules_equal_norses(name: str, device: str) -> None:
    check(name, device)


@pytest.mark.slow
@each_device
@pytest.mark.parametrize(
    "name", ["LIFEx", "LIFAdEx", "IAF", "LSNN", "LIFCell", "LIFBoxCell", "LIBoxCell"]
)
def test_all_modules(name: str, device: str) -> None:
    check(name, device)


@pytest.mark.parametrize(
    "name",
    ["LIFEx", "LIFAdEx", "IAF", "LSNN", "LIFBoxCell", "LIBoxCell", "LIFCell", "LICell", "LSNNCell"],
)
def test_modules_in_eager(name: str, eager: None) -> None:
    check(name)


@pytest.mark.parametrize("name", ["LIFExCell", "LIFAdExCell", "IAFCell", "IzhikevichCell"])
def test_cells_in_eager(name: str, eager: None) -> None:
    compare(lambda: node(name), scaled(name), exact="Ex" not in name)


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, eager: None) -> None:
    check("LIF", method=method, alpha=torch.tensor(METHODS[method]))


def test_a_reset_by_subtraction(eager: None) -> None:
    from norse.torch.functional.reset import reset_subtract

    check("LIFBoxCell", reset_method=reset_subtract)


@pytest.mark.parametrize("name", ["LIF", "LIFAdEx", "LSNN", "Izhikevich"])
def test_states_that_are_passed(name: str, eager: None) -> None:
    kind = type(node(name).state_fallback(scaled(name)))
    start = kind(*(inputs(SHAPE, seed=s) * 0.3 for s in range(len(kind._fields))))
    compare(lambda: node(name), scaled(name), start, exact="Ex" not in name)


def test_states_of_every_step(eager: None) -> None:
    compare(lambda: node("LIF", record_states=True), scaled("LIF"))


def test_without_a_slope(eager: None) -> None:
    """The method "heaviside": nothing comes back through a spike, and v's reset has no slope."""
    compare(lambda: node("LIF", method="heaviside"), scaled("LIF"))


@each_device
def test_a_neuron_on_its_threshold_does_not_fire(device: str) -> None:
    import norse.torch as norse

    _, ours = pair(norse.IAF)
    x = torch.tensor([[0.5, 1.0, 1.5], [0.5, 0.25, 0.5], [0.25, 0.0, 0.5]], device=device)
    assert ours(x)[0].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]] == norse.IAF()(x)[0].tolist()


# --- networks, and what is left alone -------------------------------------------------------------


def network() -> Any:
    import norse.torch as norse

    torch.manual_seed(2)
    return norse.SequentialState(
        torch.nn.Linear(6, 12), node("LIF"), torch.nn.Linear(12, 4), node("LI")
    )


def test_a_network(eager: None) -> None:
    import norse.torch as norse

    net = network()
    x = inputs((T, 3, 6)) * 8
    want, state = net(x)
    report = nj.accelerate(net, x, strict=True)
    assert report.proof is not None and report.proof.same and report.proof.spikes == T * 3 * 16
    assert [layer.how for layer in report.layers] == [
        "norse_lif, hard reset, SuperSpike(1)", "norse_li, own reset, Heaviside()",
    ]  # fmt: skip
    for one in (net, copy.deepcopy(net)):
        got, last = one(x)
        assert torch.equal(got, want) and torch.equal(last[1].i, state[1].i)
        # Norse writes the new states into the list that it is given
        assert torch.equal(one(x, list(last))[0], network()(x, list(state))[0])
    assert isinstance(net[1], norse.LIF) and nj.restore(net) == 2 and type(net[1]) is norse.LIF


def skipped(net: Any) -> str:
    before = type(net)
    (layer,) = nj.accelerate(net).skipped
    with pytest.raises(nj.AccelerationError, match="strict=True"):
        nj.accelerate(net, strict=True)
    assert type(net) is before and layer.why
    return layer.why


def test_what_is_skipped_and_why() -> None:
    import norse.torch as norse

    class Mine(norse.LIF):
        def forward(self, input_tensor: Tensor, state: Any = None) -> Any:
            return super().forward(input_tensor, state)

    assert "it is recurrent; there are some for LIF" in skipped(norse.LIFRecurrent(2, 2))
    assert "it is recurrent" in skipped(norse.LSNNRecurrent(2, 2))
    assert "no equations for it" in skipped(norse.LIFRefracCell())
    assert "Mine overrides forward" in skipped(Mine())
    assert "its steps are lif_feed_forward_adjoint_step" in skipped(node("LIF", method="adjoint"))
    assert "unknown method 'logistic'; known: super" in skipped(node("LIF", method="logistic"))
    own = node("LIFBoxCell", reset_method=lambda z, v, reset, th: v)
    assert "unknown reset_method '<lambda>'" in skipped(own)


def test_what_only_norse_runs_is_run_by_it_with_a_warning(eager: None) -> None:
    theirs, ours = pair(lambda: node("LIF"))
    x = scaled("LIF").bfloat16()
    with pytest.warns(UserWarning, match="Norse runs an accelerated LIF itself: the input is"):
        got = ours(x)
    assert torch.equal(got[0], theirs(x)[0])
    for module in (theirs, ours):
        module.p = module.p._replace(method="heaviside")
        module.activation = copy.deepcopy(module.activation)
    ours.activation = lambda x, state, p, dt: (x, state)
    with pytest.warns(UserWarning, match="its steps are <lambda>"):
        assert torch.equal(ours(scaled("LIF"))[0], scaled("LIF"))
    assert "Norse again: its steps are <lambda>" in str(nj.accelerate(ours))
