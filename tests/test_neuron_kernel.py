"""The seed's interface: argument order, returns, surrogate objects."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from seedkit import NEURONS, NUMBERS, call, compare
from support import DTYPES, assert_near, each_device, inputs, slow, starts

import neuronjit as nj

OTHERS = ("FastSigmoid", "SpikeRateEscape", "Gaussian", "Tanh")  # of snnTorch and Norse


each_way = pytest.mark.parametrize(
    ("reset", "detach"), [("hard", False), ("soft", True), slow("hard", True), slow("soft", False)]
)


@each_device
@each_way
@pytest.mark.parametrize("neuron", NEURONS)
def test_the_six_functions(neuron: str, reset: str, detach: bool, device: str) -> None:
    """Argument order, shapes and values of every return, and all gradients."""
    returned = compare(neuron, device, reset=reset, detach=detach)
    lengths = {"v": 8 if neuron == "eif" else 7, "reciprocal_tau": None}
    for key, value in returned.items():
        if (steps := lengths.get(key, 7)) is not None:
            assert value.shape == (steps, 4, 5), key


@each_device
@pytest.mark.parametrize(
    ("neuron", "dtype"),
    [
        *(("izhikevich", dtype) for dtype in DTYPES),
        *(("eif", torch.float16), ("plif", torch.bfloat16), ("lif", torch.float64)),
    ],
    ids=str,
)
def test_everything_returned_has_the_dtype_of_x(
    neuron: str, dtype: torch.dtype, device: str
) -> None:
    for key, value in compare(neuron, device, dtype).items():
        assert value.dtype == dtype or key == "reciprocal_tau", key  # that is as it was passed


@each_device
@pytest.mark.parametrize("decay_input", [False, True])
@pytest.mark.parametrize("neuron", ["lif", "plif"])
def test_decay_input(neuron: str, decay_input: bool, device: str) -> None:
    compare(neuron, device, decay_input=decay_input)


def test_plif_returns_reciprocal_tau_as_it_was_passed() -> None:
    rt = torch.tensor(0.4, requires_grad=True)
    _, _, returned = nj.multistep_plif_ptt(
        inputs((4, 5)), torch.zeros(5), rt, True, 1.0, None, False, nj.surrogates.ATan()
    )
    assert returned is rt


def test_eif_v_starts_with_v_init_and_hands_its_gradient_through() -> None:
    v = torch.rand(5, requires_grad=True)
    _, vv, _ = nj.multistep_eif_ptt(
        inputs((4, 5)), v, 2.0, 1.0, -0.1, 0.0, 0.8, 1.0, False, nj.surrogates.ATan()
    )
    assert torch.equal(vv[0], v)
    assert torch.autograd.grad(vv[0].sum(), v)[0].eq(1).all()


# --- surrogate objects of SpikingJelly -----------------------------------------------------------


def lookalike(name: str, **attributes: Any) -> Any:
    """An object like SpikingJelly's: known by the name of its class and its attributes."""
    return type(name, (), {"spiking": True, **attributes})()


@pytest.mark.parametrize("name", [*oracle.SEED_SURROGATES, "SoftSign", "Erf", "SuperSpike", "Rect"])
def test_surrogate_objects_of_spikingjelly(name: str) -> None:
    params = {k: v * 1.25 for k, v in oracle.SURROGATES[name].defaults.items()}
    compare(
        "if", "cpu", surrogate=oracle.Surrogate(name, **params), given=lookalike(name, **params)
    )


def test_smooth_surrogate_object_of_spikingjelly() -> None:
    smooth = oracle.Surrogate("ATan", spiking=False)
    x = inputs((4, 5))
    s, _ = nj.multistep_if_ptt(
        x, torch.zeros(5), 1.0, None, False, lookalike("ATan", alpha=2.0, spiking=False)
    )
    want = oracle.run("IF", x, surrogate=smooth, reset="soft")
    assert_near(s, want.spikes, 1e-5, "smooth spikes")


def test_unknown_surrogate_object_names_the_known() -> None:
    with pytest.raises(nj.SpecError, match=r"PoissonPass.*ATan.*Sigmoid"):
        nj.multistep_if_ptt(
            inputs((4, 5)), torch.zeros(5), 1.0, None, False, lookalike("PoissonPass")
        )


@pytest.mark.peers("spikingjelly")
@each_way
@pytest.mark.parametrize("neuron", NEURONS)
def test_spikingjelly_itself_agrees(neuron: str, reset: str, detach: bool) -> None:
    """SpikingJelly 2's own functions, with the very same surrogate object."""
    from spikingjelly.activation_based import functional, surrogate

    theirs: Callable[..., Any] = getattr(functional, f"{neuron}_multi_step")
    numbers = {k: v for k, v in NUMBERS[neuron].items() if k not in ("reciprocal_tau",)}
    w = torch.tensor(-0.4, requires_grad=True)  # SpikingJelly takes the logit of reciprocal_tau
    if reset == "soft":
        numbers["v_reset"] = None
    results = []
    for run in ("ours", "theirs"):
        x = inputs((7, 6)).requires_grad_()
        state = {k: v.requires_grad_() for k, v in starts(neuron.upper(), (6,)).items()}
        sg = surrogate.ATan(alpha=1.5)
        if run == "ours":
            tau = {"reciprocal_tau": w.sigmoid()} if neuron == "plif" else {}
            s = call(neuron, x, state, reset, detach, sg, **tau)["s"]
        else:
            named = {("delta_t" if k == "delta_T" else k): v for k, v in numbers.items()}
            extra = {"w": w} if neuron == "plif" else {}
            s = theirs(
                x, *state.values(), surrogate_function=sg, detach_reset=detach, **extra, **named
            )[0]
        leaves = [x, *state.values()] + ([w] if neuron == "plif" else [])
        results.append(
            (s, *torch.autograd.grad((s * torch.linspace(-1, 1, 42).view(7, 6)).sum(), leaves))
        )
    for index, (ours, other) in enumerate(zip(*results, strict=True)):
        assert_near(ours, other, 0.0 if index == 0 else 5e-5, f"result {index}", floor=1.0)


@pytest.mark.peers("spikingjelly")
@pytest.mark.parametrize(
    "name",
    [
        n
        for n in oracle.SURROGATES
        if n not in ("FastSigmoid", "SpikeRateEscape", "Gaussian", "Tanh")
    ],
)
def test_every_surrogate_of_spikingjelly_is_accepted(name: str) -> None:
    """Its own backward, at points on both sides of every kink, against ours."""
    from spikingjelly.activation_based import surrogate

    theirs = getattr(surrogate, "DeterministicPass" if name == "StraightThrough" else name)()
    u = torch.tensor([-1.7, -0.6, -0.2, 0.0, 0.1, 0.45, 0.9, 1.3, 2.5])
    grads = []
    for run in ("ours", "theirs"):
        x = u.clone().requires_grad_()
        if run == "ours":
            s, _ = nj.multistep_if_ptt(x[None] + 1, torch.zeros(9), 1.0, None, False, theirs)
        else:
            s = theirs(x)
        grads.append(torch.autograd.grad(s.sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=2e-5, atol=1e-6)


def test_import_of_the_old_name() -> None:
    """`from neuronjit import neuron_kernel` is the drop-in for the seed's module."""
    code = (
        "from neuronjit import neuron_kernel as k; import neuronjit as nj;"
        "assert all(getattr(k, f'multistep_{n}_ptt') is getattr(nj, f'multistep_{n}_ptt')"
        f" for n in {NEURONS}) and k.save_cuda_codes is nj.save_cuda_codes"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
