"""Which gradients arrive, which are asked for, and what may be done with the graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import oracle
import pytest
import torch
from support import assert_near, assert_same_bits, check, each_device, inputs, leaf, slow, starts
from torch import Tensor

import neuronjit as nj

IZHIKEVICH_OUTPUTS = ("s", "v_seq", "w_seq", "h_seq", "v_last", "w_last")
TELLING = {"a": 0.3, "b": 0.2, "v_reset": 0.15, "tau_w": 1.9}


def with_grad(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.requires_grad_() for name, value in state.items()}


# --- gradients that arrive -----------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("output", IZHIKEVICH_OUTPUTS)
def test_a_gradient_arriving_at_one_output(output: str, device: str) -> None:
    x = inputs((7, 13)).requires_grad_()
    state = with_grad(starts("IZHIKEVICH", (13,)))
    check("IZHIKEVICH", x, state, device=device, arriving=[output], **TELLING)


@each_device
@pytest.mark.parametrize(
    "outputs",
    [("v_last", "w_last"), ("s", "v_last"), ("w_seq", "h_seq", "w_last")],
    ids="+".join,
)
def test_gradients_arriving_at_some_outputs(outputs: tuple[str, ...], device: str) -> None:
    x = inputs((20, 13)).requires_grad_()
    state = with_grad(starts("IZHIKEVICH", (13,)))
    check("IZHIKEVICH", x, state, device=device, arriving=outputs, reset="soft", a=0.3, b=0.2)


@each_device
@pytest.mark.parametrize("record", [(), ("v",), ("h",), ("h", "w"), ("w", "v", "h")], ids="+".join)
def test_any_choice_of_records(record: tuple[str, ...], device: str) -> None:
    """Recording changes neither the spikes nor the gradients, whatever the order asked for."""
    x = inputs((7, 13)).requires_grad_()
    state = with_grad(starts("IZHIKEVICH", (13,)))
    out = check("IZHIKEVICH", x, state, device=device, record=record, arriving=["s"], **TELLING)
    assert set(out.record) == set(record)


@each_device
def test_no_gradient_is_asked_for_or_arrives(device: str) -> None:
    """A gradient of zero need not be computed, but must not fail."""
    x = inputs((7, 13)).to(device).requires_grad_()
    out = nj.multistep(nj.neurons.LIF, x, record=("v",))
    zero = torch.zeros_like(out.spikes)
    (grad,) = torch.autograd.grad(out.spikes, x, zero, retain_graph=True)
    assert grad.eq(0).all()
    unrelated = torch.ones((), device=device, requires_grad=True)
    loss = unrelated * 2 + out.record["v"].sum() * 0
    assert torch.autograd.grad(loss, [unrelated, x])[1].eq(0).all()


SQUARE_ROOTS = """
z = 0.9 * z + sqrt(x)
h = v + x
q = 0.5 * q + w * sqrt(x)
w = w * b + 0.1 * s
"""


@each_device
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("steps", [slow(1), slow(2), 9])
@pytest.mark.parametrize(
    "arriving",
    ["s", "v_last", "h_seq", "w_last", "w_seq", "z_last", "z_seq", "q_last", "s+z_last", "q_seq"],
)
def test_gradients_flow_along_paths_alone(
    arriving: str, steps: int, backend: str | None, device: str
) -> None:
    """A state that no gradient reaches gives 0, however infinite its slopes are."""
    states = ("v", "z", "q", "w")
    model = nj.NeuronModel("roots", SQUARE_ROOTS, state=dict.fromkeys(states, 0.0), params={"b": 1})
    x = inputs((steps, 13), torch.float64).abs()
    x[:, ::3] = 0.0
    b = torch.full((13,), 0.5, dtype=torch.float64)
    b[1::4] = torch.inf  # an infinite slope that is a parameter
    slopes = []
    for place in ("library", "loop"):
        leaf_x = x.to(device if place == "library" else "cpu").requires_grad_()
        if place == "library":
            out = nj.multistep(
                model, leaf_x, record=(*states, "h"), backend=backend, b=b.to(device),
                surrogate=nj.surrogates.ATan(spiking=False),
            )  # fmt: skip
            outputs = {"s": out.spikes} | {f"{n}_last": t for n, t in out.state.items()}
            outputs |= {f"{n}_seq": t for n, t in out.record.items()}
        else:
            now = {n: torch.zeros(13, dtype=torch.float64) for n in states}
            seen: dict[str, list[Tensor]] = {n: [] for n in (*states, "h", "s")}
            for row in leaf_x:
                z = 0.9 * now["z"] + row.sqrt()
                h = now["v"] + row
                s = torch.atan(torch.pi * (h - 1)) / torch.pi + 0.5
                q = 0.5 * now["q"] + now["w"] * row.sqrt()
                w = now["w"] * b + 0.1 * s
                now = {"v": h * (1 - s) + 0.0 * s, "z": z, "q": q, "w": w}
                for name, value in {**now, "h": h, "s": s}.items():
                    seen[name].append(value)
            outputs = {f"{n}_last": t for n, t in now.items()}
            outputs |= {f"{n}_seq": torch.stack(t) for n, t in seen.items()}
            outputs["s"] = outputs.pop("s_seq")
        chosen = [outputs[name] for name in arriving.split("+")]
        ones = [torch.ones_like(t) for t in chosen]
        slopes.append(torch.autograd.grad(chosen, leaf_x, ones, materialize_grads=True)[0].cpu())
    torch.testing.assert_close(*slopes, equal_nan=True, rtol=1e-9, atol=1e-12)


# --- gradients that are asked for ----------------------------------------------------------------


@each_device
@pytest.mark.parametrize(
    "wanted",
    [s for n in (1, 2, 3) for s in itertools.combinations(("x", "v", "w"), n)],
    ids="+".join,
)
def test_gradients_of_some_inputs(wanted: tuple[str, ...], device: str) -> None:
    x = inputs((7, 13)).requires_grad_("x" in wanted)
    state = starts("IZHIKEVICH", (13,))
    state = {name: value.requires_grad_(name in wanted) for name, value in state.items()}
    check("IZHIKEVICH", x, state, device=device, **TELLING)


SHAPES = {
    "0-dim": (),
    "one": (1,),
    "one_of_full_rank": (1, 1, 1),
    "channel": (3, 1, 1),
    "row": (4, 1),
    "column": (5,),
    "channel_and_column": (3, 1, 5),
    "neuron": (3, 4, 5),
}


def tensor_parameter(value: float, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * 0.3 + value).requires_grad_()


@each_device
@pytest.mark.parametrize("kind", SHAPES)
def test_tensor_parameters(kind: str, device: str) -> None:
    """Each parameter of LIF as a tensor of any broadcasting shape, with its gradient."""
    shape = SHAPES[kind]
    params = {
        name: tensor_parameter(value, shape, i)
        for i, (name, value) in enumerate({"tau": 1.8, "v_threshold": 0.7, "v_reset": 0.1}.items())
    }
    x = inputs((7, 3, 4, 5)).requires_grad_()
    check("LIF", x, with_grad(starts("LIF", (3, 4, 5))), device=device, **params)


@each_device
def test_parameters_of_different_shapes_together(device: str) -> None:
    x = inputs((20, 3, 4, 5)).requires_grad_()
    tau = tensor_parameter(1.8, (3, 1, 1), 0)
    threshold = tensor_parameter(0.7, (4, 5), 1)
    check("LIF", x, device=device, tau=tau, v_threshold=threshold, v_reset=0.1)
    check("LIF", x, device=device, tau=tau.detach(), v_threshold=threshold, v_reset=0.1)
    check("LIF", x, device=device, tau=tau, v_threshold=threshold.detach(), v_reset=0.1)


@each_device
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_parameters_of_inputs_in_other_layouts(layout: str, device: str) -> None:
    """A parameter belongs to a logical channel, however the input lies in memory."""
    x = inputs((7, 3, 4, 5))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    else:
        x = x.transpose(1, 3).contiguous().transpose(1, 3)
    params = {
        "tau": tensor_parameter(1.8, (3, 1, 1), 0),
        "v_threshold": tensor_parameter(0.7, (3, 1, 5), 1),
        "v_reset": tensor_parameter(0.1, (), 2),
    }
    x = x.requires_grad_()
    outputs = []
    for given in (x, x.detach().contiguous().requires_grad_()):
        moved = {name: leaf(value, device) for name, value in params.items()}
        out = nj.multistep(nj.neurons.LIF, given.to(device), record=("v",), **moved)
        loss = (out.spikes + out.record["v"]).sum()
        outputs.append((out.spikes, *torch.autograd.grad(loss, [given, *moved.values()])))
    for view, dense in zip(*outputs, strict=True):
        torch.testing.assert_close(view, dense, rtol=2e-5, atol=1e-5)
    check("LIF", x.detach().contiguous().requires_grad_(), device=device, **params)


@each_device
@pytest.mark.parametrize(
    "model", [slow("PLIF"), "QIF", "EIF", slow("IZHIKEVICH"), slow("alif"), "clif", "refractory"]
)
@pytest.mark.parametrize("reset", ["hard", slow("soft")])
def test_every_parameter_learns(model: str, reset: str, device: str) -> None:
    """Each parameter of each model, as a tensor for all neurons."""
    own = oracle.MODELS[model]
    if own.own_reset and reset == "soft":
        pytest.skip("this model resets itself")
    params = {
        name: torch.tensor(value + 0.03, requires_grad=True)
        for name, value in own.params.items()
        if not (reset == "soft" and name == "v_reset")
    }
    x = inputs((7, 13)).requires_grad_()
    check(model, x, with_grad(starts(model, (13,))), device=device, reset=reset, **params)


@each_device
def test_parameters_and_states_of_other_dtypes(device: str) -> None:
    """Half-precision input with float32 parameters (as autocast leaves them) and the other way."""
    for x_dtype, p_dtype in ((torch.float16, torch.float32), (torch.float32, torch.float16)):
        x = inputs((7, 13), x_dtype)
        tau = torch.tensor([1.75], dtype=p_dtype, requires_grad=True)
        want_tau, got_tau = leaf(tau, "cpu"), leaf(tau, device)
        want = oracle.run("LIF", x, surrogate=oracle.Surrogate("ATan"), tau=want_tau)
        got = nj.multistep(nj.neurons.LIF, x.to(device), tau=got_tau)
        assert_same_bits(got.spikes, want.spikes, "spikes")
        want.spikes.float().sum().backward()
        got.spikes.float().sum().backward()
        assert_near(got_tau.grad, want_tau.grad, 2e-3, "gradient of tau")


@each_device
def test_parameter_gradients_of_many_neurons(device: str) -> None:
    """Sums over 100,003 x 5 terms: near the float64 sum, and the same on every run."""
    x = inputs((5, 100_003))
    grads = []
    for _ in range(3):
        tau = torch.tensor(2.5, device=device, requires_grad=True)
        nj.multistep(nj.neurons.LIF, x.to(device), tau=tau).spikes.sum().backward()
        grads.append(tau.grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    tau = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    out = oracle.run("LIF", x.double(), surrogate=oracle.Surrogate("ATan"), tau=tau)
    out.spikes.sum().backward()
    assert_near(grads[0].double(), tau.grad, 2e-5, "gradient of tau", floor=1.0)


# --- what may be done with the graph --------------------------------------------------------------


def call(device: str, backend: str | None = None) -> tuple[Tensor, Tensor, nj.Output]:
    x = inputs((20, 13)).to(device).requires_grad_()
    v = starts("LIF", (13,))["v"].to(device).requires_grad_()
    return x, v, nj.multistep(nj.neurons.LIF, x, {"v": v}, record=("h",), backend=backend)


@each_device
def test_backward_twice(device: str) -> None:
    """retain_graph=True: recomputation starts from what was saved, and saves it again."""
    x, v, out = call(device)
    first = torch.autograd.grad(out.spikes.sum(), [x, v], retain_graph=True)
    other = torch.autograd.grad(out.record["h"].sum(), [x, v], retain_graph=True)
    second = torch.autograd.grad(out.spikes.sum(), [x, v])
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], other[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out.spikes.sum(), [x, v])


@each_device
def test_no_graph_where_none_is_wanted(device: str) -> None:
    x, v, out = call(device)
    with torch.no_grad():
        without = nj.multistep(nj.neurons.LIF, x, {"v": v}, record=("h",))
    with torch.inference_mode():
        inferred = nj.multistep(nj.neurons.LIF, x, {"v": v}, record=("h",))
    plain = nj.multistep(nj.neurons.LIF, x.detach(), {"v": v.detach()}, record=("h",))
    for other in (without, inferred, plain):
        assert not other.spikes.requires_grad and not other.state["v"].requires_grad
        assert not other.record["h"].requires_grad
        assert torch.equal(other.spikes, out.spikes)
        assert torch.equal(other.record["h"], out.record["h"])


@each_device
def test_double_backward_is_a_clear_error(device: str) -> None:
    """No silent zero: differentiating a gradient raises, taking it with create_graph does not."""
    x, _, out = call(device)
    (grad,) = torch.autograd.grad(out.spikes.sum(), x, create_graph=True)
    again, _, other = call(device)
    assert torch.equal(grad, torch.autograd.grad(other.spikes.sum(), again)[0])
    with pytest.raises(nj.DifferentiationError, match="eager"):
        grad.square().sum().backward()
    assert issubclass(nj.DifferentiationError, NotImplementedError)


@each_device
def test_double_backward_in_eager_pytorch(device: str) -> None:
    """A gradient penalty, against the oracle in float64."""

    def second(run: Callable[[Tensor], Tensor]) -> Tensor:
        x = inputs((5, 4), torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    def ours(x: Tensor) -> Tensor:
        sigmoid = nj.surrogates.Sigmoid(spiking=False)
        x = x.to(device)
        return nj.multistep(nj.neurons.LIF, x, surrogate=sigmoid, backend="eager").spikes.cpu()

    def theirs(x: Tensor) -> Tensor:
        return oracle.run("LIF", x, surrogate=oracle.Surrogate("Sigmoid", spiking=False)).spikes

    assert_near(second(ours), second(theirs), 1e-9, "second derivative")


@each_device
@pytest.mark.parametrize("changed", ["x", "v"])
def test_changing_an_input_before_backward_is_an_error(changed: str, device: str) -> None:
    """Backward computes the steps again from x and v: torch's version counter must guard them."""
    x, v, _ = call(device)
    x2, v2 = x.detach().clone(), v.detach().clone()
    threshold = torch.tensor(1.0, device=device, requires_grad=True)
    out = nj.multistep(nj.neurons.LIF, x2, {"v": v2}, v_threshold=threshold)
    (x2 if changed == "x" else v2).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.spikes.sum().backward()


@each_device
def test_outputs_may_be_changed_in_place(device: str) -> None:
    """Backward needs none of its outputs, so nothing is wrong with reusing their memory."""
    x, v, out = call(device)
    want = torch.autograd.grad(out.spikes.sum(), [x, v], retain_graph=True)
    with torch.no_grad():
        out.spikes.data.zero_()
        out.state["v"].data.fill_(7.0)
    assert all(map(torch.equal, want, torch.autograd.grad(out.spikes.sum(), [x, v])))


@each_device
def test_freeing_the_inputs_is_safe(device: str) -> None:
    """What backward reads is kept alive by the graph, not by the caller."""
    x, v, out = call(device)
    want = torch.autograd.grad(out.spikes.sum(), [x, v])

    def build() -> tuple[Tensor, Tensor]:
        base = inputs((20, 13)).to(device).requires_grad_()
        start = starts("LIF", (13,))["v"].to(device)
        return base, nj.multistep(nj.neurons.LIF, base * 1, {"v": start * 1}).spikes

    base, spikes = build()
    filler = [torch.full((20, 13), 9.0, device=device) for _ in range(20)]
    (grad,) = torch.autograd.grad(spikes.sum(), base)
    assert torch.equal(grad, want[0])
    del filler


@each_device
def test_layers_in_a_row(device: str) -> None:
    """Backward through two layers at once."""
    x, _, _ = call(device)
    first = nj.multistep(nj.neurons.LIF, x).spikes
    second = nj.multistep(nj.neurons.IF, first * 0.9).spikes
    (grad,) = torch.autograd.grad((first * 2 + second).sum(), x)
    mine = inputs((20, 13)).requires_grad_()
    atan = oracle.Surrogate("ATan")
    a = oracle.run("LIF", mine, surrogate=atan).spikes
    b = oracle.run("IF", a * 0.9, surrogate=atan).spikes
    assert_near(grad, torch.autograd.grad((a * 2 + b).sum(), mine)[0], 2e-5, "two layers")
