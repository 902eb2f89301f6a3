"""Numerical differentiation of the kernels themselves: float64, smooth spikes (spiking=False).

What gradcheck accepts is the exact gradient of what forward computed, with respect to x, every
initial state and every parameter. That forward computed the right thing is compared to the oracle.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from support import check, each_device, library_model, library_surrogate, slow
from torch import Tensor

import neuronjit as nj

STEPS, NEURONS = 5, 3
PRIMITIVES = [name for name, shape in oracle.SURROGATES.items() if shape.primitive]
MODELS = [name for name in oracle.MODELS if name != "classic_izhikevich"]  # spikes every 20 steps


def leaves(
    model: str, reset: str, shape: tuple[int, ...]
) -> tuple[list[Tensor], list[str], list[str]]:
    """x, the states and the parameters (each of `shape`), all requiring grad; and their names."""
    own = oracle.MODELS[model]
    generator = torch.Generator().manual_seed(3)

    def around(value: float, size: tuple[int, ...], spread: float) -> Tensor:
        noise = torch.rand(size, generator=generator, dtype=torch.float64) * spread
        return (value + noise).requires_grad_()

    states = list(own.state)
    params = [name for name in own.params if not (name == "v_reset" and reset == "soft")]
    tensors = [around(-0.2, (STEPS, NEURONS), 1.6)]
    tensors += [around(own.state[name] + 0.05, (NEURONS,), 0.4) for name in states]
    tensors += [around(own.params[name] + 0.02, shape, 0.1) for name in params]
    return tensors, states, params


def gradcheck(
    model: str, surrogate: oracle.Surrogate, reset: str, shape: tuple[int, ...], device: str
) -> None:
    tensors, states, params = leaves(model, reset, shape)

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        out = nj.multistep(
            library_model(model), x, dict(zip(states, rest, strict=False)),
            surrogate=library_surrogate(surrogate), reset=reset, record=(*states, "h"),
            **dict(zip(params, rest[len(states) :], strict=True)),
        )  # fmt: skip
        # as one tensor: else every output would need a kernel for its gradient alone (those are
        # tested in test_multistep_gradients.py)
        return torch.cat(
            [y.flatten() for y in (out.spikes, *out.state.values(), *out.record.values())]
        )

    moved = [t.detach().to(device).requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, moved)
    named = dict(zip(params, tensors[1 + len(states) :], strict=True))
    state = dict(zip(states, tensors[1:], strict=False))
    check(
        model,
        tensors[0],
        state,
        surrogate=surrogate,
        reset=reset,
        device=device,
        exact=False,
        **named,
    )


@each_device
@pytest.mark.parametrize(
    ("model", "reset"),
    [
        (m, r) if oracle.MODELS[m].own_reset or r == ("hard", "soft")[i % 2] else slow(m, r)
        for i, m in enumerate(MODELS)
        for r in ("hard", "soft")
        if r == "hard" or not oracle.MODELS[m].own_reset
    ],
)
def test_every_model_and_parameter(model: str, reset: str, device: str) -> None:
    """Parameters as one number for all neurons: the kernel sums their gradients.

    Resets take turns, in the slow suite each model meets both.
    """
    gradcheck(model, oracle.Surrogate("Sigmoid", spiking=False), reset, (), device)


@each_device
@pytest.mark.parametrize(
    ("model", "reset"),
    [
        ("LIF", "hard"), ("IZHIKEVICH", "soft"),
        slow("LIF", "soft"), slow("IZHIKEVICH", "hard"), slow("adex", "hard"), slow("adex", "soft"),
    ],
)  # fmt: skip
def test_every_parameter_of_its_own_for_each_neuron(model: str, reset: str, device: str) -> None:
    gradcheck(model, oracle.Surrogate("Sigmoid", spiking=False), reset, (NEURONS,), device)


@each_device
@pytest.mark.parametrize("name", PRIMITIVES)
def test_every_primitive(name: str, device: str) -> None:
    """Resets take turns: what a primitive is does not depend on them."""
    reset = ("hard", "soft")[PRIMITIVES.index(name) % 2]
    gradcheck("LIF", oracle.Surrogate(name, spiking=False), reset, (), device)


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("name", PRIMITIVES)
@pytest.mark.parametrize("model", oracle.SEED)
def test_every_model_with_every_primitive(model: str, name: str, device: str) -> None:
    """Resets take turns."""
    turn = list(oracle.SEED).index(model) + PRIMITIVES.index(name)
    reset = ("hard", "soft")[turn % 2]
    gradcheck(model, oracle.Surrogate(name, spiking=False), reset, (), device)


@each_device
def test_steps_across_checkpoints(device: str) -> None:
    x = (torch.rand(37, 2, dtype=torch.float64, device=device) * 2).requires_grad_()
    tau = torch.tensor([1.7, 2.2], dtype=torch.float64, device=device, requires_grad=True)

    def function(x: Tensor, tau: Tensor) -> Tensor:
        smooth = nj.surrogates.ATan(spiking=False)
        out = nj.multistep(nj.neurons.LIF, x, surrogate=smooth, tau=tau)
        return torch.cat([out.spikes.flatten(), out.state["v"]])

    assert torch.autograd.gradcheck(function, [x, tau])


@pytest.mark.parametrize("name", [n for n in oracle.SURROGATES if n not in PRIMITIVES])
def test_no_primitive_no_smooth_output(name: str) -> None:
    with pytest.raises(nj.SpecError, match="primitive"):
        getattr(nj.surrogates, name)(spiking=False)


@pytest.mark.parametrize("model", ["LIF", "IZHIKEVICH", "clif"])
def test_second_derivatives_in_eager_pytorch(model: str) -> None:
    """What the kernels refuse, the eager reference gives: gradgradcheck accepts it."""
    tensors, states, _ = leaves(model, "hard", ())

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        out = nj.multistep(
            library_model(model), x, dict(zip(states, rest, strict=True)), backend="eager",
            surrogate=nj.surrogates.Sigmoid(spiking=False),
        )  # fmt: skip
        return out.spikes, *out.state.values()

    assert torch.autograd.gradgradcheck(function, tensors[: 1 + len(states)])
