"""The oracle must be right by itself: by hand, and against numerical differentiation."""

from __future__ import annotations

import oracle
import pytest
import torch

SMOOTH = [name for name, shape in oracle.SURROGATES.items() if shape.primitive]


@pytest.mark.parametrize("name", SMOOTH)
def test_derivative_column_is_the_slope_of_the_primitive(name: str) -> None:
    surrogate = oracle.Surrogate(name)
    u = torch.linspace(-3, 3, 602, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(surrogate.smooth(u).sum(), u)
    # S2NN's primitive has a 1e-5 inside its logarithm that its derivative column leaves out
    torch.testing.assert_close(
        slope, surrogate.slope(u.detach()), rtol=2e-5 if name == "S2NN" else 1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", oracle.SURROGATES)
def test_spike_is_the_step_and_backward_the_derivative(name: str) -> None:
    surrogate = oracle.Surrogate(name)
    h = torch.tensor([-1.5, -0.2, 0.0, 0.3, 0.999, 1.0, 1.7], requires_grad=True)
    theta = torch.tensor(0.3, requires_grad=True)
    s = surrogate.fire(h, theta, strict=False)
    assert s.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert surrogate.fire(h, theta, strict=True).tolist() == [0, 0, 0, 0, 1, 1, 1]
    grad_h, grad_theta = torch.autograd.grad(s.sum(), [h, theta])
    expected = surrogate.slope((h - theta).detach())
    torch.testing.assert_close(grad_h, expected)
    torch.testing.assert_close(grad_theta, -expected.sum())


def test_lif_by_hand() -> None:
    """tau 2, x = 1, 3, 0: h = 0.5, 1.75 (fires), then from the reset."""
    x = torch.tensor([[1.0], [3.0], [0.0]])
    hard = oracle.run("LIF", x, surrogate=oracle.Surrogate("ATan"), v_reset=0.25)
    # 0 + (1 - (0 - 0.25)) / 2; 0.625 + (3 - 0.375) / 2, fires; 0.25 + (0 - 0) / 2
    assert hard.record["h"].flatten().tolist() == [0.625, 1.9375, 0.25]
    assert hard.record["v"].flatten().tolist() == [0.625, 0.25, 0.25]
    assert hard.spikes.flatten().tolist() == [0, 1, 0]
    soft = oracle.run("LIF", x, surrogate=oracle.Surrogate("ATan"), reset="soft")
    assert soft.record["h"].flatten().tolist() == [0.5, 1.75, 0.375]  # v_reset is 0 with soft reset
    assert soft.record["v"].flatten().tolist() == [0.5, 0.75, 0.375]
    # ... unless it is given: 0.625 + (3 - (0.625 - 0.25)) / 2, less 1; 0.9375 - (0.9375 - 0.25) / 2
    given = oracle.run("LIF", x, surrogate=oracle.Surrogate("ATan"), reset="soft", v_reset=0.25)
    assert given.record["h"].flatten().tolist() == [0.625, 1.9375, 0.59375]


def test_izhikevich_by_hand() -> None:
    """The w of the last step in both lines, H and not V in the second, and b S added in full."""
    out = oracle.run(
        "IZHIKEVICH", torch.tensor([[3.0]]), {"v": 0.5, "w": 0.25},
        surrogate=oracle.Surrogate("ATan"),
        a=0.5, b=2.0, v_c=0.75, v_rest=-0.5, tau=2.0, tau_w=4.0,
    )  # fmt: skip
    h = 0.5 + (3.0 + 1.0 * (0.5 + 0.5) * (0.5 - 0.75) - 0.25) / 2
    assert out.record["h"].item() == h == 1.75
    assert out.spikes.item() == 1 and out.state["v"].item() == 0
    assert out.state["w"].item() == 0.25 + (0.5 * (h + 0.5) - 0.25) / 4 + 2.0


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize(
    "name", [name for name, model in oracle.MODELS.items() if not model.own_reset]
)
def test_smooth_oracle_passes_gradcheck(name: str, reset: str) -> None:
    model = oracle.MODELS[name]
    torch.manual_seed(0)
    x = torch.rand(4, 3, dtype=torch.float64).mul(2).requires_grad_()
    starts = [
        torch.full((3,), v + 0.1, dtype=torch.float64, requires_grad=True)
        for v in model.state.values()
    ]
    params = [
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in model.params.values()
    ]

    def function(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = dict(zip(model.state, rest, strict=False))
        values = dict(zip(model.params, rest[len(state) :], strict=True))
        out = oracle.run(
            model,
            x,
            state,
            surrogate=oracle.Surrogate("Sigmoid", spiking=False),
            reset=reset,
            **values,
        )
        return out.spikes, *out.record.values(), *out.state.values()

    assert torch.autograd.gradcheck(function, [x, *starts, *params])


def test_detach_reset_cuts_the_reset_and_nothing_else() -> None:
    """T = 1: d v / d x through the spike vanishes, that of the spike and of w's b S stays."""
    x = torch.tensor([[1.9]], requires_grad=True)
    surrogate = oracle.Surrogate("StraightThrough")
    grads = {}
    for detach in (False, True):
        out = oracle.run(
            "IZHIKEVICH", x, surrogate=surrogate, detach_reset=detach, b=1.0, a=0.0, v_reset=0.3
        )
        outputs = {"s": out.spikes, "v": out.state["v"], "w": out.state["w"]}
        grads[detach] = {
            key: torch.autograd.grad(y.sum(), x, retain_graph=True)[0].item()
            for key, y in outputs.items()
        }
    h = 0.0 + (1.9 + 0.1 * -0.8) / 2
    assert grads[False]["s"] == grads[True]["s"] == 0.5
    assert grads[False]["w"] == grads[True]["w"] == 0.5
    assert grads[True]["v"] == 0.5  # h = 0.91 does not fire: v = h
    assert grads[False]["v"] == pytest.approx(0.5 * (1 + 0.3 - h))


def test_half_types_are_storage_only() -> None:
    x = torch.full((3, 1), 0.1, dtype=torch.float16)
    out = oracle.run("IF", x, surrogate=oracle.Surrogate("ATan"))
    assert (
        out.state["v"].dtype == torch.float32
        and out.spikes.dtype == out.record["v"].dtype == torch.float16
    )
    assert out.state["v"].item() == sum([float(torch.tensor(0.1).half())] * 3)
