"""The second call: what is remembered of the first must not change what the next one means."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from support import each_device, inputs, library_model
from torch import Tensor

import neuronjit as nj
from neuronjit.run.plan import plans

SURROGATE = oracle.Surrogate("ATan")
NEAR = {  # values that each parameter may have
    "v_threshold": (0.6, 1.2), "v_reset": (-0.5, 0.4), "tau": (1.2, 3.0), "tau_w": (1.2, 3.0),
    "a0": (0.5, 1.5), "v_c": (0.5, 0.9), "v_rest": (-0.2, 0.1), "a": (-0.3, 0.3), "b": (-0.3, 0.3),
    "v": (-0.5, 0.5), "w": (-0.3, 0.3),
}  # fmt: skip


def drawn(rng: random.Random, name: str, device: str) -> Any:
    """A number, or a tensor of one element: neither compiles a kernel of its own."""
    value = round(rng.uniform(*NEAR[name]) * 16) / 16
    kind = rng.choice(["number", "number", "0-dim", "one", "parameter"])
    if kind == "number":
        return value
    shape = () if kind == "0-dim" or name in "vw" else (1,)
    tensor = torch.full(shape, value, device=device)
    return torch.nn.Parameter(tensor) if kind == "parameter" else tensor


def shuffled(rng: random.Random, given: dict[str, Any]) -> dict[str, Any]:
    return dict(rng.sample(list(given.items()), len(given)))


def on_cpu(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in given.items()}


@each_device
@pytest.mark.parametrize("model", ["LIF", "IZHIKEVICH"])
def test_names_keep_their_tensors(model: str, device: str) -> None:
    """Random choices and orders of states and parameters, called three times in other orders."""
    rng, own, x = random.Random(model), library_model(model), inputs((6, 9)).to(device)
    for _ in range(120):
        params = {n: drawn(rng, n, device) for n in own.params if rng.random() < 0.6}
        state = {n: drawn(rng, n, device) for n in own.state if rng.random() < 0.6}
        reset = rng.choice(["hard", "soft"])
        want = oracle.run(
            model, x.cpu(), on_cpu(state), surrogate=SURROGATE, reset=reset, **on_cpu(params)
        )
        for _ in range(3):
            out = nj.multistep(
                own, x, shuffled(rng, state), reset=reset, record=("h",), **shuffled(rng, params)
            )
            said = f"{model}, {reset}, state={state}, params={params}"
            assert torch.equal(out.record["h"].detach().cpu(), want.record["h"]), said
            assert torch.equal(out.spikes.detach().cpu(), want.spikes), said
            for name in own.state:
                assert torch.equal(out.state[name].detach().cpu(), want.state[name]), said


@each_device
@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("names", [("tau", "v_reset"), ("v_reset", "tau"), ("v_threshold", "tau")])
def test_gradients_keep_their_names(names: tuple[str, ...], reset: str, device: str) -> None:
    """With unequal shapes, where a swap would read out of bounds."""
    x = inputs((6, 4, 9)).to(device)
    shapes = dict(zip(names, [(9,), ()], strict=True))
    given = {
        n: torch.full(s, 1.3 if n == "tau" else 0.25, device=device) for n, s in shapes.items()
    }
    given = {n: t.requires_grad_() for n, t in given.items()}
    theirs = {n: t.detach().cpu().requires_grad_() for n, t in given.items()}
    loss = oracle.run("LIF", x.cpu(), surrogate=SURROGATE, reset=reset, **theirs).record["v"].sum()
    want = torch.autograd.grad(loss, list(theirs.values()))
    for turn in range(3):
        order = names if turn != 1 else names[::-1]
        out = nj.multistep(
            "lif", x, reset=reset, record=("v",), **{name: given[name] for name in order}
        )
        got = torch.autograd.grad(out.record["v"].sum(), list(given.values()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_and_graphs_keep_names(compiled: bool) -> None:
    x = inputs((6, 3, 4, 5))
    layer = nj.nn.Neuron(
        "lif", tau=1.5, v_reset=-0.25, reset="soft", learnable=("tau", "v_reset"), channels=4
    )
    with torch.no_grad():
        layer.tau += torch.arange(4.0) / 4
        layer.v_reset -= torch.arange(4.0) / 8
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    tau, back = (p.detach()[:, None] for p in (layer.tau, layer.v_reset))
    want = oracle.run("LIF", x, surrogate=SURROGATE, reset="soft", tau=tau, v_reset=back)
    for _ in range(3):
        layer.reset()
        assert torch.equal(run(x), want.spikes)


def test_an_iterator_is_read_once() -> None:
    """The key of a plan and the plan itself are made from the same names."""
    plans.clear()
    x = inputs((5, 3))
    for names in ((n for n in ("v", "h")), iter(["h"]), map(str, ["v"]), {"v": 1}, {"h"}):
        want = set(names) if isinstance(names, dict | set) else None
        record = nj.multistep("lif", x, record=names).record
        assert set(record) == (want or set(record)) and record
    assert set(nj.multistep("lif", x, record=iter(["h", "v"])).record) == {"v", "h"}
    assert nj.multistep("lif", x, record=iter([])).record == {}
    assert set(nj.multistep("lif", x).record) == set()


def test_a_text_is_one_name_cold_and_warm() -> None:
    x = inputs((5, 3))
    for _ in range(2):
        assert set(nj.multistep("izhikevich", x, record=("v", "w")).record) == {"v", "w"}
        with pytest.raises(nj.SpecError, match="cannot record 'vw'"):
            nj.multistep("izhikevich", x, record="vw")
        assert set(nj.multistep("izhikevich", x, record="w").record) == {"w"}


class Changing:
    """A number that is another one at each look."""

    def __init__(self) -> None:
        self.values = iter([1.5, 3.0, 1.5, 3.0])

    def __float__(self) -> float:
        return next(self.values)


class Flags:
    """Pairs of equal values that do not mean the same."""

    REFUSED = (True, False, "1", b"1", 1j, None, [1.0])


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("value", Flags.REFUSED, ids=repr)
def test_what_is_refused_cold_is_refused_warm(value: Any, warm: bool) -> None:
    plans.clear()
    x = inputs((5, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if warm:
            for number in (1.0, 0.0, 1, 0):
                nj.multistep("lif", x, {"v": number}, v_threshold=number)
    with pytest.raises(nj.InputTypeError, match="v_threshold"):
        nj.multistep("lif", x, v_threshold=value)
    with pytest.raises(nj.InputTypeError, match="v"):
        nj.multistep("lif", x, {"v": value})


@pytest.mark.parametrize("option", ["detach_reset", "final_state"])
def test_flags_are_flags(option: str) -> None:
    x = inputs((5, 3))
    for _ in range(2):
        for good in (True, False, 1, 0):
            nj.multistep("lif", x, **{option: good})
        for bad in ("False", 2, None, 0.5, torch.tensor(True), []):
            with pytest.raises(nj.InputTypeError, match=option):
                nj.multistep("lif", x, **{option: bad})


@each_device
def test_zeros_keep_their_sign(device: str) -> None:
    """v_reset = -0.0 leaves -0.0 behind, and neither sign takes the plan of the other."""
    x = torch.full((1, 3), 2.0, device=device)
    for zero in (0.0, -0.0, 0.0, 0, -0.0):
        out = nj.multistep("if", x, {"v": -0.0}, v_reset=zero)
        signs = torch.signbit(out.state["v"]).tolist()
        want = oracle.run("IF", x.cpu(), {"v": -0.0}, surrogate=SURROGATE, v_reset=zero)
        assert signs == torch.signbit(want.state["v"]).tolist()
        silent = nj.multistep("if", -x * 0, {"v": zero}, record=("h",)).record["h"][0]
        assert torch.signbit(silent).tolist() == [str(zero).startswith("-")] * 3


def test_numbers_are_read_at_every_call() -> None:
    x, tau = inputs((5, 3)), Changing()
    for value in (1.5, 3.0, 1.5):
        got = nj.multistep("lif", x, tau=tau).state["v"]
        assert torch.equal(got, nj.multistep("lif", x, tau=value).state["v"])


def test_a_mapping_is_read_once() -> None:
    class Odd(dict):  # type: ignore[type-arg]
        """Another value under the same key each time it is asked."""

        def get(self, *_: Any) -> Any:
            raise AssertionError("what was read is what is used")

    class Names(dict):  # type: ignore[type-arg]
        def keys(self) -> Any:
            return super().keys()

        def __iter__(self) -> Iterator[str]:
            return super().__iter__()

    x = inputs((5, 3))
    for kind in (Odd, Names):
        for v in (0.25, torch.full((3,), 0.25), 0.5):
            got = nj.multistep("lif", x, kind(v=v)).state["v"]
            assert torch.equal(got, nj.multistep("lif", x, {"v": v}).state["v"])


def test_a_state_that_was_not_returned_cannot_be_gone_on_from() -> None:
    """It used to start anew in silence."""
    x = inputs((5, 3))
    out = nj.multistep("lif", x, final_state=False)
    assert not out.state
    for _ in range(2):
        with pytest.raises(nj.SpecError, match="final_state=False"):
            nj.multistep("lif", x, out.state)
    with pytest.raises(nj.SpecError, match=r"'v'.*final_state=False"):
        _ = out.state["v"]

    def run(x: Tensor) -> Tensor:
        return nj.multistep("lif", x, nj.multistep("lif", x, final_state=False).state).spikes

    with pytest.raises(Exception, match="final_state=False"):
        torch.compile(run, fullgraph=True, backend="eager")(x)


def test_surrogates_of_others_are_read_at_every_call() -> None:
    class ATan:
        spiking = True
        alpha = 2.0

    x, other = inputs((5, 3)).requires_grad_(), ATan()
    for alpha in (2.0, 5.0, 2.0):
        other.alpha = alpha
        got = torch.autograd.grad(nj.multistep("lif", x, surrogate=other).spikes.sum(), x)[0]
        ours = nj.multistep("lif", x, surrogate=nj.surrogates.ATan(alpha=alpha))
        assert torch.equal(got, torch.autograd.grad(ours.spikes.sum(), x)[0])


@pytest.mark.parametrize("name", ["x_seq", "v", "tau"])
def test_a_sparse_tensor_is_no_dense_one_seen_before(name: str) -> None:
    """They may be alike in shape, strides and dtype."""
    given: dict[str, Tensor] = {
        "x_seq": torch.ones(4, 9),
        "v": torch.ones(9),
        "tau": torch.ones(9) * 2,
    }

    def call() -> None:
        nj.multistep(nj.neurons.LIF, given["x_seq"], {"v": given["v"]}, tau=given["tau"])

    call()
    given[name] = given[name].to_sparse()
    with pytest.raises(nj.InputTypeError, match="must be a dense tensor"):
        call()
