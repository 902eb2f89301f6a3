"""Parameters that repeat by channel, and the sums of their gradients: against plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from support import each_device
from torch import Tensor

import neuronjit as nj
from neuronjit.kernels.spec import KernelSpec
from neuronjit.kernels.targets import cuda
from neuronjit.kernels.targets.base import Channels

WAVE = 4 * 132  # blocks
MODEL = nj.NeuronModel(
    "scaled", "h = v + (gain * x - v) / tau + bias", state=dict(v=0.0),
    params=dict(tau=2.0, gain=1.0, bias=0.0),
)  # fmt: skip


def smooth(x: Tensor, tau: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """What the model says, with the arc tangent's primitive (alpha = 2) in place of the step."""
    v, steps = torch.zeros_like(x[0]), []
    for now in x:
        h = v + (gain * now - v) / tau + bias
        s = torch.atan(math.pi * (h - 1.0)) / math.pi + 0.5
        v = h * (1 - s)
        steps.append(s)
    return torch.stack(steps)


# [T, N, *], the shape of the parameters, whether channels lie last in memory
CASES = {
    "a block each": ((3, 4, 8, 16, 16), (8, 1, 1), False),
    "channels last": ((3, 4, 8, 16, 16), (8, 1, 1), True),
    "few neurons a channel": ((3, 2, 8, 3, 3), (8, 1, 1), False),
    "odd sizes": ((5, 64, 6, 7, 7), (6, 1, 1), False),
    "odd channels last": ((5, 16, 7, 5, 5), (7, 1, 1), True),
    "features": ((4, 300, 33), (33,), False),
    "more than a block of features": ((4, 40, 1000), (1000,), False),
    "rows": ((9, 4, 7, 28, 28), (28, 1), False),
    "one a sample": ((4, 6, 5, 100), (6, 1, 1), False),
    "two dimensions": ((4, 30, 8, 100), (8, 100), False),
    "all but one": ((4, 3, 5, 100), (3, 1, 100), False),
    "long": ((70, 8, 16), (16,), False),
}


@each_device
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_channels(case: str, device: str) -> None:
    shape, size, last = CASES[case]
    generator = torch.Generator().manual_seed(1)

    def numbers(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator, dtype=torch.float64)

    x = (numbers(*shape) * 2.5 - 0.5).requires_grad_()
    weight = numbers(*shape) - 0.25
    params = [numbers(*size) + offset for offset in (1.5, 0.5, -0.5)]
    mixed = [params[0], numbers() + 0.5, params[2]]  # one that all neurons share, between them
    spikes = nj.surrogates.ATan(spiking=False)
    for given in (params, mixed, params):
        leaves = [x, *(p.clone().requires_grad_() for p in given)]
        want = torch.autograd.grad(smooth(*leaves), leaves, weight)
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
            now = x.detach().to(device, dtype)
            if last:
                order = (0, 1, *range(3, now.dim()), 2)
                now = now.permute(order).contiguous().permute(0, 1, -1, *range(2, now.dim() - 1))
            ours = [now.requires_grad_()]
            ours += [p.detach().to(device, dtype).requires_grad_() for p in given]
            names = dict(zip(("tau", "gain", "bias"), ours[1:], strict=True))
            runs = []
            for _ in range(2):
                out = nj.multistep(MODEL, ours[0], surrogate=spikes, **names).spikes
                arrives = weight.to(device, dtype)
                alone = torch.autograd.grad(out, ours[1:], arrives, retain_graph=True)
                runs.append(torch.autograd.grad(out, ours, arrives))
            for first, again, expected in zip(*runs, want, strict=True):
                assert torch.equal(first, again)  # the order of the sum is always the same
                scale = expected.abs().max().item()
                error = (first.cpu().double() - expected).abs().max().item()
                assert first.shape == expected.shape and error <= tolerance * scale
            for first, expected in zip(alone, want[1:], strict=True):  # where x wants none
                error = (first.cpu().double() - expected).abs().max().item()
                assert error <= tolerance * expected.abs().max().item()


def test_each_neuron_is_walked_once() -> None:
    """The blocks of a grid, counted out in Python as the kernel walks them."""
    for lanes in (1, 2, 4):
        kernel = cuda.Kernel(0, lanes, WAVE, 0, None)
        for inner, period, outer in ((1, 8, 300), (1, 1000, 40), (1, 132, 7), (256, 8, 3),
                                     (52, 6, 64), (4, 512, 200)):  # fmt: skip
            n = inner * period * outer
            grid = kernel.grid(n, Channels(inner, period))
            columns = 1 if inner > 1 else period // lanes
            tiles = -(-columns // cuda.BLOCK)
            rows = cuda.BLOCK // -(-columns // tiles)
            assert grid.blocks == grid.slices * (period if inner > 1 else tiles)
            step = lanes if inner > 1 else 1
            turns = -(-(n // period) // (grid.slices * rows * step))
            few = 4 * (grid.blocks // grid.slices) <= WAVE  # of the blocks that walk all
            assert grid.slices == 1 or grid.blocks <= (WAVE if few else 4 * WAVE)
            assert (turns - 1) * grid.slices * rows * step < n // period  # no block is idle


@pytest.mark.nvrtc
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("lanes", [1, 4])
def test_nvrtc_compiles_them(direction: str, lanes: int) -> None:
    from neuronjit.kernels.render import render_specs

    for to_inputs in (True, False) if direction == "backward" else (True,):
        spec = KernelSpec.of(
            MODEL, "cuda", direction, "atan", "hard", False, "float16", arriving=("s",),
            per_neuron=("gain", "bias"), learned=("tau", "gain"), by_channel=True, interval=4,
            loads=4, lanes=lanes, to_inputs=to_inputs,
        )  # fmt: skip
        assert spec.to_inputs == to_inputs
        assert cuda.compile(render_specs([spec]), spec.symbol, "sm_90")


def test_by_channel_needs_channels() -> None:
    with pytest.raises(nj.SpecError, match="by_channel concerns parameters"):
        KernelSpec.of(
            MODEL, "cuda", "forward", "atan", "hard", False, "float16", by_channel=True
        )  # fmt: skip


@each_device
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 63, 64, 65, 130])
def test_where_channels_begin_and_end(channels: int, device: str) -> None:
    """In all places of a stretch of neurons that kernels handle together: as eager PyTorch."""
    generator = torch.Generator().manual_seed(channels)
    for inner in (1, 2, 3, 7, 16, 49, 63, 64, 65, 130):
        for size in ((channels, 1), (1, channels, 1), (2, channels, 1)):
            x = torch.rand(3, 2, channels, inner, generator=generator) * 2
            threshold = torch.rand(size, generator=generator) + 0.5
            decay = torch.rand(channels, 1, generator=generator)
            for own in (x, x.transpose(2, 3).contiguous().transpose(2, 3)):
                given = [t.to(device).requires_grad_() for t in (own, threshold, decay)]
                found = []
                for backend in ("auto", "eager"):
                    out = nj.multistep(
                        "plif", given[0], v_threshold=given[1], reciprocal_tau=given[2],
                        backend=backend,
                    ).spikes  # fmt: skip
                    found.append([out, *torch.autograd.grad(out.sum(), given)])
                assert torch.equal(found[0][0], found[1][0])
                torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-4, atol=1e-5)
