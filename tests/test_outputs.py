"""fire(a, b), a block's own s and y, and recording any name: against plain PyTorch by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import each_device, slow
from torch import Tensor

import neuronjit as nj
from neuronjit.kernels import manifest
from neuronjit.kernels.spec import KernelSpec
from neuronjit.kernels.targets import cuda

Values = dict[str, Tensor]
Step = Callable[[Values, Callable[[Tensor, Any], Tensor]], Values]


class Heaviside(torch.autograd.Function):
    """1 where u >= 0, with the arc tangent's slope (alpha = 2)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u >= 0).to(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grad / (1 + (math.pi * u) ** 2)


def smooth(a: Tensor, b: Any) -> Tensor:
    return torch.atan(math.pi * (a - b)) / math.pi + 0.5


def exact(a: Tensor, b: Any) -> Tensor:
    return Heaviside.apply(a - b)


def straight(function: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    return a + (function(a) - a).detach()


def ternary(z: Values, fire: Any) -> Values:
    h = 0.75 * z["v"] + z["x"]
    s = fire(h, 1.0) - fire(-h, 1.0)
    return {"out": s, "h": h, "v": h - s}


def integer(z: Values, fire: Any) -> Values:
    h = 0.75 * z["v"] + z["x"]
    s = straight(torch.round, torch.clamp(h / 0.5, 0, 4))
    return {"out": s, "h": h, "v": h - s * 0.5, "theta": torch.tensor(0.5).to(h)}


def residual(z: Values, fire: Any) -> Values:
    h = z["v"] + z["x"]
    s = fire(h, 1.0)
    current = torch.tanh(z["x"])
    return {"out": s + current, "h": h, "v": h * (1 - s), "current": current}


def graded(z: Values, fire: Any) -> Values:
    h = 0.75 * z["v"] + z["x"]
    s = fire(h, 1.0)
    return {"out": s * torch.relu(h), "h": h, "v": h * (1 - s)}


def readout(z: Values, fire: Any) -> Values:
    h = 0.75 * z["v"] + z["x"]
    return {"out": h, "h": h, "v": h}


def adaptive(z: Values, fire: Any) -> Values:
    h = 0.75 * z["v"] + z["x"]
    theta = 1.0 + 0.5 * z["a"]
    s = fire(h, theta)
    burst = s * fire(h - 0.5, theta + 0.25 * s)
    return {
        "out": s, "h": h, "v": h * (1 - s), "a": 0.5 * z["a"] + s + burst, "theta": theta,
        "burst": burst,
    }  # fmt: skip


MODELS: dict[str, tuple[str, dict[str, float], str, Step]] = {
    "ternary": (
        "h = 0.75 * v + x\ns = fire(h, theta) - fire(-h, theta)", {"v": 0.0}, "soft", ternary,
    ),
    "integer": (
        "h = 0.75 * v + x\ntheta = 0.5 * v_threshold\ns = round(clamp(h / theta, 0, 4))",
        {"v": 0.0}, "soft", integer,
    ),
    "residual": ("h = v + x\ncurrent = tanh(x)\ny = s + current", {"v": 0.0}, "hard", residual),
    "graded": ("h = 0.75 * v + x\ny = s * relu(h)", {"v": 0.0}, "hard", graded),
    "readout": ("h = 0.75 * v + x\nv = h\ny = v", {"v": 0.0}, "hard", readout),
    "adaptive": (
        "h = 0.75 * v + x\ntheta = v_threshold + 0.5 * a\n"
        "burst = s * fire(h - 0.5, theta + 0.25 * s)\na = 0.5 * a + s + burst",
        {"v": 0.0, "a": 0.0}, "hard", adaptive,
    ),
}  # fmt: skip


def model(name: str) -> nj.NeuronModel:
    text, state, _, _ = MODELS[name]
    return nj.NeuronModel(name, text, state=state)


@each_device
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize(
    ("spiking", "dtype"),
    [
        (True, torch.float32),
        (False, torch.float64),
        slow(True, torch.float64),
        slow(False, torch.float32),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_as_written_out(
    name: str, dtype: torch.dtype, spiking: bool, backend: str | None, device: str
) -> None:
    _, state, reset, step = MODELS[name]
    own = model(name)
    record = list(own.recordable)
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(21, 9, generator=generator, dtype=torch.float64) * 2.4 - 0.8).to(dtype)
    x[3], x[4, 2:] = 0.0, 1.0  # exactly at thresholds and at ends of clamp
    theirs, ours = x.clone().requires_grad_(), x.to(device).requires_grad_()
    now = {z: torch.full((9,), value, dtype=dtype) for z, value in state.items()}
    seen: dict[str, list[Tensor]] = {n: [] for n in ("out", *record)}
    for row in theirs:
        now = {**now, **step({**now, "x": row}, exact if spiking else smooth)}
        for n, many in seen.items():
            many.append(now.get(n, torch.ones((), dtype=dtype)).expand(9))
    wanted = {n: torch.stack(many) for n, many in seen.items()}
    surrogate = nj.surrogates.ATan(spiking=spiking)
    for _ in range(2):
        out = nj.multistep(
            own, ours, surrogate=surrogate, reset=reset, record=record, backend=backend
        )
        got = {"out": out.spikes, **out.record}
        assert list(out.record) == record
        tolerance = 1e-12 if dtype == torch.float64 else 3e-5
        weights = [torch.rand(21, 9, generator=generator).to(dtype) for _ in wanted]
        for n, value in wanted.items():
            torch.testing.assert_close(got[n].cpu(), value, rtol=tolerance, atol=tolerance)
        grads = []
        for values, leaf in ((got, ours), (wanted, theirs)):
            pairs = zip(values.values(), weights, strict=True)
            loss = sum((v * w.to(v.device)).sum() for v, w in pairs)
            grads += torch.autograd.grad(loss, leaf, retain_graph=True)
        torch.testing.assert_close(
            grads[0].cpu(), grads[1], rtol=10 * tolerance, atol=10 * tolerance
        )


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_single_steps(name: str) -> None:
    x = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) * 2
    reset = MODELS[name][2]
    whole = nj.nn.Neuron(model(name), reset=reset)(x)
    one = nj.nn.Neuron(model(name), reset=reset, step_mode="s")
    assert torch.equal(torch.stack([one(row) for row in x]), whole)
    if name == "ternary":
        assert set(nj.nn.Neuron(model(name), reset=reset)(-x).unique().tolist()) == {-1.0, 0.0}
    if name == "integer":
        assert set(whole.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0} and whole.max() > 1


@pytest.mark.nvrtc
@pytest.mark.parametrize("name", MODELS)
def test_nvrtc_compiles_them(name: str) -> None:
    own = model(name)
    for direction in ("forward", "backward"):
        text = nj.render(own, direction=direction, reset=MODELS[name][2], record=own.recordable)
        symbol = text.rpartition("(const Kernel::Args")[0].rpartition("\n")[2]
        assert cuda.compile(text, symbol, "sm_90")


@pytest.mark.parametrize("name", ["ternary", "adaptive", "residual"])
def test_in_a_graph(name: str) -> None:
    own = model(name)
    record = own.recordable

    def loss(x: Tensor) -> Tensor:
        out = nj.multistep(own, x, reset=MODELS[name][2], record=record)
        return (out.spikes * 2).sum() + sum(r.square().sum() for r in out.record.values())

    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(3)) * 2
    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        given = x.clone().requires_grad_()
        value = run(given)
        grads += [value.detach(), *torch.autograd.grad(value, given)]
    torch.testing.assert_close(grads[:2], grads[2:])


def test_a_manifest_holds_them() -> None:
    for direction in ("forward", "backward"):
        wanted = KernelSpec.of(
            model("adaptive"), "cpu", direction, "atan", "hard", False, "float32",
            record=("v", "burst"), arriving=("s", "theta", "burst"),
        )  # fmt: skip
        again = manifest.from_json(json.loads(json.dumps(manifest.to_json(wanted))))
        assert again == wanted and again.request == wanted.request


def test_what_fires_may_have_any_name() -> None:
    """The kernels' own names meet none of the equations', nor each other."""
    own = nj.NeuronModel(
        "names",
        "h = v + x\na = x\na = fire(h, 0.3)\nnew_a = fire(h, 0.6)\nu_s = fire(a - h, 0)\n"
        "w = 0.5 * w + a + fire(fire(h, 0.2), fire(x, 0.1)) + new_a * u_s",
        state={"v": 0.0, "w": 0.0},
    )
    for spiking in (True, False):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(4)).requires_grad_()
        grads = []
        for backend in ("cpu", "eager"):
            out = nj.multistep(
                own, x, backend=backend, surrogate=nj.surrogates.ATan(spiking=spiking)
            )
            grads += torch.autograd.grad(out.spikes.sum() + out.state["w"].sum(), x)
        torch.testing.assert_close(*grads)


MISTAKES = {
    "s = fire(x, 1)\nh = v + x": "'s' is assigned before 'h'",
    "h = v + x\nz = s\ns = fire(h, 1)": "'s' is read before it is assigned",
    "h = v + x\ns = fire(h, 1)\ns = s * 2": "'s' is assigned twice",
    "h = v + x\ns = fire(h, 1)\ntheta = 2": "after the neuron fired",
    "h = v + fire(x)": r"fire\(\) takes 2 arguments",
    "h = v + fire": "function or constant|unknown name",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes(text: str) -> None:
    with pytest.raises(nj.EquationError, match=MISTAKES[text]):
        nj.NeuronModel("wrong", text, state={"v": 0.0})


def test_a_surrogate_does_not_fire() -> None:
    with pytest.raises(nj.EquationError, match="model"):
        nj.Surrogate("wrong", "fire(u, 0)")


def test_what_comes_out_is_not_recorded() -> None:
    for name in ("s", "y"):
        with pytest.raises(nj.SpecError, match=rf"cannot record '{name}'\. Known: current, h, v"):
            nj.multistep(model("residual"), torch.ones(3, 4), record=(name,))
