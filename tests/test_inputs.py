"""Models with several inputs, against plain PyTorch: what they broadcast, how they are kept."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
import torch
from support import each_device
from torch import Tensor

import neuronjit as nj
from neuronjit.kernels import manifest
from neuronjit.kernels.spec import KernelSpec
from neuronjit.kernels.targets import cuda

# a threshold that moves, a residual, and a branch with a state of its own (as DH-LIF's)
MODEL = nj.NeuronModel(
    "three_inputs",
    "d = 0.5 * d + tanh(branch)\nh = 0.75 * v + x + d\ntheta = v_threshold + lift\ny = s + branch",
    state={"v": 0.0, "d": 0.0},
    inputs=("x", "branch", "lift"),
)


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


def written_out(x: Tensor, branch: Tensor, lift: Tensor, spiking: bool = True) -> Tensor:
    """What the model says, in the dtype of x."""
    v = d = torch.zeros_like(x[0])
    steps = []
    for now, side, up in zip(x, branch.expand(x.shape), lift.expand(x.shape), strict=True):
        d = 0.5 * d + torch.tanh(side)
        h = 0.75 * v + now + d
        u = h - (1.0 + up)
        s = Heaviside.apply(u) if spiking else torch.atan(math.pi * u) / math.pi + 0.5
        v = h * (1 - s)
        steps.append(s + side)
    return torch.stack(steps)


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def gradients(out: Tensor, given: list[Tensor], weight: Tensor) -> list[Tensor]:
    return [g.cpu() for g in torch.autograd.grad(out, given, weight.to(out))]


SHAPES = {
    "whole": ((21, 3, 4), (21, 3, 4)),
    "per step": ((21, 3, 4), (21, 1, 1)),
    "both per step": ((21, 1, 1), (21, 1, 1)),
    "per neuron": ((3, 4), (4,)),
    "over the batch": ((21, 1, 4), (1, 3, 1)),
    "one number": ((), (1, 1)),
}


@each_device
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_broadcast(shapes: str, backend: str | None, device: str) -> None:
    for spiking, dtype in ((True, torch.float32), (True, torch.float64), (False, torch.float64)):
        tolerance = 2e-5 if dtype == torch.float32 else 1e-11
        theirs = [numbers((21, 3, 4), 1, dtype) * 0.75]
        theirs += [numbers(size, 2 + i, dtype) * 0.5 for i, size in enumerate(SHAPES[shapes])]
        ours = [t.to(device).requires_grad_() for t in theirs]
        want = written_out(*(t.requires_grad_() for t in theirs), spiking=spiking)
        weight = numbers((21, 3, 4), 9, dtype)
        wanted = gradients(want, theirs, weight)
        surrogate = nj.surrogates.ATan(spiking=spiking)
        for _ in range(2):  # the second call finds a plan
            x, branch, lift = ours
            out = nj.multistep(
                MODEL, x, surrogate=surrogate, backend=backend, lift=lift, branch=branch
            ).spikes
            torch.testing.assert_close(out.cpu(), want, rtol=tolerance, atol=tolerance)
            for got, expected in zip(gradients(out, ours, weight), wanted, strict=True):
                assert got.shape == expected.shape and got.dtype == expected.dtype
                torch.testing.assert_close(got, expected, rtol=tolerance, atol=10 * tolerance)


@each_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_in_half_the_bits(dtype: torch.dtype, device: str) -> None:
    """As x is; but what all neurons share keeps the digits of the arithmetic."""
    x, branch = (numbers((21, 64), seed, dtype, device) for seed in (1, 2))
    lift = numbers((21, 1), 3, torch.float32, device) * 0.5
    own = nj.NeuronModel(
        "lifted", "h = 0.75 * v + x + branch\ntheta = v_threshold + lift", state={"v": 0.0},
        inputs=("x", "branch", "lift"),
    )  # fmt: skip
    for of_branch in (branch, branch.float()):
        got = nj.multistep(own, x, branch=of_branch, lift=lift).spikes
        v = torch.zeros(64, device=device)
        for t in range(21):
            h = 0.75 * v + x[t].float() + branch[t].float()
            s = (h >= 1.0 + lift[t]).float()
            assert torch.equal(got[t].float(), s)
            v = h * (1 - s)


@each_device
@pytest.mark.parametrize("steps", [3, 4, 5])
def test_many_neurons(steps: int, device: str) -> None:
    """So many that threads of a GPU have several each: in half precision four, for four steps."""
    model = nj.NeuronModel(
        "beside", "h = 0.75 * v + x + side\ny = s + side", state={"v": 0.0}, inputs=("x", "side")
    )
    for dtype, n in ((torch.float16, 2**19), (torch.float32, 2**18)):
        given = [numbers((steps, n), seed, dtype) * 0.5 for seed in (1, 2)]
        weight = numbers((steps, n), 3, dtype)
        theirs = [t.float().requires_grad_() for t in given]
        v, rows = torch.zeros(n), []
        for now, side in zip(*theirs, strict=True):
            h = 0.75 * v + now + side
            s = Heaviside.apply(h - 1.0)
            v = h * (1 - s)
            rows.append(s + side)
        expected = gradients(torch.stack(rows), theirs, weight)
        ours = [t.to(device).requires_grad_() for t in given]
        out = nj.multistep(model, ours[0], side=ours[1]).spikes
        assert torch.equal(out.cpu(), torch.stack(rows).to(dtype))
        rounding = max(torch.finfo(dtype).eps, 1e-6)
        for got, wanted in zip(gradients(out, ours, weight), expected, strict=True):
            torch.testing.assert_close(got.float(), wanted, rtol=rounding, atol=4 * rounding)


@each_device
@pytest.mark.parametrize("wanted", range(1, 8))
def test_some_want_no_gradient(wanted: int, device: str) -> None:
    sizes = ((9, 13), (9, 13), (9, 1))
    found = []
    for run in (written_out, None):
        place = "cpu" if run else device
        given = [numbers(s, i, torch.float64, place) for i, s in enumerate(sizes)]
        leaves = [t.requires_grad_() for i, t in enumerate(given) if wanted >> i & 1]
        x, branch, lift = given
        out = run(*given) if run else nj.multistep(MODEL, x, branch=branch, lift=lift).spikes
        found.append(gradients(out, leaves, numbers((9, 13), 7, torch.float64)))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@each_device
def test_layouts_of_the_second_call(device: str) -> None:
    """Kept plans know each layout: channels last, views, a broadcast in another place."""
    x = numbers((5, 2, 3, 4, 4), 1, torch.float64, device)
    side = numbers((5, 2, 3, 4, 4), 2, torch.float64, device)

    def channels_last(t: Tensor) -> Tensor:
        return t.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)

    lift = numbers((5, 1, 1, 1, 1), 3, torch.float64, device)
    channel = numbers((3, 1, 1), 4, torch.float64, device)
    every = [
        (x, side, lift), (channels_last(x), side, lift), (x, channels_last(side), lift),
        (x, side.transpose(3, 4), channel), (x.transpose(1, 2), channel.unsqueeze(1), lift),
        (x, channel, channel), (x, side[:1], lift[:1]), (x, torch._neg_view(side), lift),
    ]  # fmt: skip
    for _ in range(2):
        for given in every:
            want = written_out(*given)
            leaves = [t.detach().requires_grad_() for t in given]
            again = [t.detach().requires_grad_() for t in given]
            out = nj.multistep(MODEL, leaves[0], branch=leaves[1], lift=leaves[2]).spikes
            torch.testing.assert_close(out, want)
            weight = numbers(tuple(x.shape), 8, torch.float64).reshape(out.shape)
            torch.testing.assert_close(
                gradients(out, leaves, weight), gradients(written_out(*again), again, weight)
            )


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_no_steps_and_no_neurons(steps: int, n: int) -> None:
    given = [torch.ones(steps, n, requires_grad=True) for _ in range(2)]
    lift = torch.zeros(steps, 1, requires_grad=True)
    out = nj.multistep(MODEL, given[0], branch=given[1], lift=lift).spikes
    assert out.shape == (steps, n)
    leaves = [*given, lift]
    grads = torch.autograd.grad(out.sum(), leaves, materialize_grads=True)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]


def test_gradcheck() -> None:
    given = [
        (numbers(size, i, torch.float64) * 0.5).requires_grad_()
        for i, size in enumerate(((6, 3), (6, 3), (6, 1)))
    ]
    smooth = nj.surrogates.ATan(spiking=False)

    def run(x: Tensor, branch: Tensor, lift: Tensor) -> Tensor:
        return nj.multistep(MODEL, x, surrogate=smooth, branch=branch, lift=lift).spikes

    assert torch.autograd.gradcheck(run, given)


def test_layers() -> None:
    x, branch = (numbers((6, 2, 5), seed, torch.float32) for seed in (1, 2))
    lift = numbers((6, 1, 1), 3, torch.float32) * 0.5
    whole = nj.nn.Neuron(MODEL)
    out = whole(x, branch, lift)
    assert torch.equal(out, nj.multistep(MODEL, x, branch=branch, lift=lift).spikes)
    one = nj.nn.Neuron(MODEL, step_mode="s")
    steps = [one(*step) for step in zip(x, branch, lift, strict=True)]
    assert torch.equal(torch.stack(steps), out)
    assert torch.equal(one.functional_forward(x[0], None, branch[0], lift[0])[0], out[0])
    whole.reset()
    pieces = [whole(x[a:b], branch[a:b], lift[a:b]) for a, b in ((0, 2), (2, 6))]
    assert torch.equal(torch.cat(pieces), out)
    with pytest.raises(nj.SpecError, match=r"has the inputs x, branch, lift; got 2 of them"):
        whole(x, branch)


@each_device
def test_in_a_graph(device: str) -> None:
    backend = "aot_eager" if device == "cpu" else "inductor"

    def loss(x: Tensor, branch: Tensor, lift: Tensor) -> Tensor:
        return nj.multistep(MODEL, x * 1.5, branch=branch, lift=lift).spikes.square().sum()

    sizes = ((6, 4, 5), (6, 4, 5), (6, 1, 1)), ((6, 4, 5), (4, 5), (5,))
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for shapes in sizes:
        grads = []
        for run in (loss, compiled):
            given = [
                numbers(s, i, torch.float32, device).requires_grad_() for i, s in enumerate(shapes)
            ]
            value = run(*given)
            grads += [[value.detach(), *torch.autograd.grad(value, given)]]
        torch.testing.assert_close(*grads)


def test_a_saved_graph_has_its_inputs() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor, branch: Tensor, lift: Tensor) -> Tensor:
            return nj.multistep(MODEL, x, branch=branch, lift=lift).spikes

    given = tuple(numbers(s, i, torch.float32) for i, s in enumerate(((6, 5), (6, 5), (6, 1))))
    assert torch.equal(torch.export.export(Net(), given).module()(*given), Net()(*given))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rendered_and_recorded(direction: str) -> None:
    for shared in ((), ("lift",), ("branch", "lift")):
        spec = KernelSpec.of(
            MODEL, "cpu", direction, "atan", "hard", False, "float16", arriving=("s", "v"),
            record=("d",), per_step=shared,
        )  # fmt: skip
        again = manifest.from_json(json.loads(json.dumps(manifest.to_json(spec))))
        assert again == spec and again.request == spec.request
    other = KernelSpec.of(MODEL, "cpu", direction, "atan", "hard", False, "float16")
    assert other.request != spec.request and other.symbol != spec.symbol
    with pytest.raises(nj.SpecError, match=r"per_step: .* Known: branch, lift"):
        nj.render(MODEL, per_step="x")


@pytest.mark.nvrtc
@pytest.mark.parametrize("steps", [4, 100])
def test_nvrtc_compiles_them(steps: int) -> None:
    for direction in ("forward", "backward"):
        text = nj.render(MODEL, direction=direction, steps=steps, neurons=4096, per_step="lift")
        symbol = text.rpartition("(const Kernel::Args")[0].rpartition("\n")[2]
        assert cuda.compile(text, symbol, "sm_90")


def test_pickled_and_compared() -> None:
    assert pickle.loads(pickle.dumps(MODEL)) == MODEL  # noqa: S301 our own
    fewer = nj.NeuronModel("m", "h = v + x", state={"v": 0.0})
    more = nj.NeuronModel("m", "h = v + x", state={"v": 0.0}, inputs=("x", "z"))
    assert fewer != more and fewer.token != more.token


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (dict(branch=torch.ones(4, 3)), "the input 'lift' of model .* is missing"),
    "a number": (
        dict(branch=torch.ones(4, 3), lift=0.5), r"lift is an input: a tensor .*\[4, 3\], got float"
    ),
    "nothing": (dict(branch=None, lift=torch.ones(1)), "branch is an input: .* got NoneType"),
    "another shape": (
        dict(branch=torch.ones(4, 2), lift=torch.ones(1)),
        r"branch has shape \(4, 2\), which does not broadcast to \(4, 3\)",
    ),
    "another length": (
        dict(branch=torch.ones(4, 3), lift=torch.ones(5, 1)), r"lift has shape \(5, 1\)"
    ),
    "integers": (
        dict(branch=torch.ones(4, 3, dtype=torch.int64), lift=torch.ones(1)),
        "branch must be floating point",
    ),
    "an unknown one": (
        dict(branch=torch.ones(4, 3), lift=torch.ones(1), brunch=torch.ones(1)),
        "unknown parameter 'brunch' .* Known: branch, lift, v_reset, v_threshold",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("warm", [False, True])
def test_mistakes_in_a_call(mistake: str, warm: bool) -> None:
    given, message = MISTAKES[mistake]
    if warm:
        nj.multistep(MODEL, torch.ones(4, 3), branch=torch.ones(4, 3), lift=torch.ones(1))
    with pytest.raises(nj.NeuronJitError, match=message):
        nj.multistep(MODEL, torch.ones(4, 3), **given)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "x is the first": (dict(inputs=("skip", "x")), "the first of inputs is 'x'"),
    "no input": (dict(inputs=()), "the first of inputs is 'x'"),
    "a state": (dict(inputs=("x", "v")), r"\['v'\] can only be one of"),
    "twice": (dict(inputs=("x", "a", "a")), r"\['a'\] can only be one of"),
    "a parameter": (dict(inputs=("x", "a"), params={"a": 1.0}), r"\['a'\] can only be one of"),
    "reserved": (dict(inputs=("x", "theta")), "'theta' is the threshold"),
    "no name": (dict(inputs=("x", "a b")), "input 'a b' is not a name"),
    "assigned": (
        dict(inputs=("x", "a"), equations="a = x\nh = v + a"), "'a' is an input; it cannot be"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_in_a_model(mistake: str) -> None:
    given, message = WRONG[mistake]
    with pytest.raises(nj.EquationError, match=message):
        nj.NeuronModel("wrong", **{"equations": "h = v + x", "state": {"v": 0.0}, **given})


def test_explained() -> None:
    text = str(nj.explain(MODEL))
    assert "grad(branch) = " in text and "grad(lift) = " in text
    assert "inputs=['x', 'branch', 'lift']" in repr(MODEL)
    assert "inputs" not in repr(nj.neurons.LIF)
