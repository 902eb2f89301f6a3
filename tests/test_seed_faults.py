"""The faults of the seed's kernels: one test each that would have caught it."""

from __future__ import annotations

import re
from pathlib import Path

import oracle
import pytest
import torch
from seedkit import NEURONS, NUMBERS, call, compare
from support import each_device, inputs

import neuronjit as nj


@each_device
@pytest.mark.parametrize("neuron", ["qif", "eif", "izhikevich"])
def test_grad_of_v_init_too_small_by_tau(neuron: str, device: str) -> None:
    """One silent step, dv/dv_init by hand: 1 + (a0 (2 v - v_rest - v_c)) / tau and its likes."""
    v = torch.tensor([0.3], device=device, requires_grad=True)
    x = torch.zeros(1, 1, device=device)
    state = {"v": v, "w": torch.zeros(1, device=device)} if neuron == "izhikevich" else {"v": v}
    atan = nj.surrogates.ATan()
    out = call(neuron, x, state, "soft", True, atan, v_threshold=50.0)
    (grad,) = torch.autograd.grad(out["v"][-1].sum(), v)
    p = NUMBERS[neuron]
    if neuron == "eif":
        slope = (
            1
            + (-1 + torch.exp(torch.tensor((0.3 - p["theta_rh"]) / p["delta_T"])).item()) / p["tau"]
        )
    else:
        slope = 1 + p["a0"] * (2 * 0.3 - p["v_rest"] - p["v_c"]) / p["tau"]
    # the spike's surrogate is 50 away, and cut from the reset
    assert grad.item() == pytest.approx(slope, rel=1e-5)


@each_device
def test_gradients_arriving_at_w_seq_ignored(device: str) -> None:
    compare("izhikevich", device, arriving=("w",))


@each_device
def test_v_reset_missing_from_the_detached_hard_reset_of_izhikevich(device: str) -> None:
    x = torch.full((2, 3), 5.0, device=device)
    state = {"v": torch.zeros(3, device=device), "w": torch.zeros(3, device=device)}
    out = call("izhikevich", x, state, "hard", True, nj.surrogates.Sigmoid(), v_reset=0.25)
    assert out["s"].eq(1).all() and out["v"].eq(0.25).all()


@each_device
def test_piecewise_leaky_relu_twice_too_large_and_its_edges(device: str) -> None:
    """1 / (2 w) strictly inside the width, c on the edge and outside."""
    x = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 2.5]], device=device, requires_grad=True)
    zeros = torch.zeros(6, device=device)
    for w, expected in (
        (1.0, [0.01, 0.5, 0.5, 0.5, 0.01, 0.01]),
        (0.5, [0.01, 0.01, 1.0, 0.01, 0.01, 0.01]),
    ):
        surrogate = nj.surrogates.PiecewiseLeakyReLU(w=w, c=0.01)
        s, _ = nj.multistep_if_ptt(x, zeros, 1.0, 0.0, True, surrogate)
        (grad,) = torch.autograd.grad(s.sum(), x)
        torch.testing.assert_close(grad.cpu(), torch.tensor([expected]))


@each_device
@pytest.mark.parametrize("neuron", NEURONS)
def test_log_tailed_relu_does_not_compile(neuron: str, device: str) -> None:
    compare(neuron, device, surrogate=oracle.Surrogate("LogTailedReLU", alpha=0.2))


@each_device
@pytest.mark.parametrize("decay_input", [False, True])
def test_plif_where_only_reciprocal_tau_requires_grad(decay_input: bool, device: str) -> None:
    compare("plif", device, requires=("reciprocal_tau",), decay_input=decay_input)


def test_save_cuda_codes_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no arguments: every kernel of the seed, contents first, each symbol once."""
    monkeypatch.chdir(tmp_path)
    symbols = nj.save_cuda_codes()
    text = Path("neuron_kernel_sample.cu").read_text()
    assert len(symbols) > 100 and len(symbols) == len(set(symbols))
    assert all(re.search(rf"\b{symbol}\b", text) for symbol in symbols)
    contents = text[: text.index("#")]
    for name in ("if", "lif", "plif", "qif", "izhikevich", "eif", *oracle.SEED_SURROGATES):
        assert name in contents, f"{name} is missing from the list of contents"


@each_device
def test_half_precision_spikes_on_nan(device: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.full((3, 4), float("nan"), dtype=dtype, device=device)
        s, v = nj.multistep_if_ptt(
            x, torch.zeros(4, device=device), 1.0, 0.0, False, nj.surrogates.Sigmoid()
        )
        assert s.eq(0).all() and v.isnan().all()


@pytest.mark.cuda
def test_a_device_synchronisation_in_every_forward() -> None:
    """Warm calls enqueue work and read nothing back, forward or backward."""
    sigmoid = nj.surrogates.Sigmoid()
    x = inputs((7, 64)).cuda().requires_grad_()
    v = torch.zeros(64, device="cuda", requires_grad=True)
    rt = torch.tensor(0.4, device="cuda", requires_grad=True)

    def work() -> None:
        s, vv, _ = nj.multistep_plif_ptt(x, v, rt, True, 1.0, 0.0, False, sigmoid)
        torch.autograd.grad([s, vv], [x, v, rt], [torch.ones_like(s), torch.ones_like(vv)])

    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_the_stream_of_cupy_instead_of_torch() -> None:
    """Work queued on a side stream behind a long wait: the kernels wait for it too."""
    zeros = torch.zeros(4096, device="cuda")
    sigmoid = nj.surrogates.Sigmoid()
    warm = torch.zeros(7, 4096, device="cuda", requires_grad=True)
    nj.multistep_if_ptt(warm, zeros, 1.0, 0.0, False, sigmoid)[0].sum().backward()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x = torch.zeros(7, 4096, device="cuda", requires_grad=True)
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            x += 2.0
        s, _ = nj.multistep_if_ptt(x, zeros, 1.0, 0.0, False, sigmoid)
        fired = s.mean()
    side.synchronize()
    assert fired.item() == 1.0


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.memory
def test_counts_of_32_bits() -> None:
    x = torch.zeros(2, 2**30 + 8, dtype=torch.float16, device="cuda")
    x[1, -3:] = 2.0
    v = torch.zeros(x.shape[1], dtype=torch.float16, device="cuda")
    s, _ = nj.multistep_if_ptt(x, v, 1.0, 0.0, False, nj.surrogates.Sigmoid())
    assert s[1, -3:].eq(1).all() and int(s.count_nonzero()) == 3


@each_device
def test_double_backward_silently_without_a_graph(device: str) -> None:
    x = inputs((4, 5)).to(device).requires_grad_()
    s, _ = nj.multistep_if_ptt(
        x, torch.zeros(5, device=device), 1.0, 0.0, False, nj.surrogates.Sigmoid()
    )
    (grad,) = torch.autograd.grad(s.sum(), x, create_graph=True)
    with pytest.raises(nj.DifferentiationError):
        grad.sum().backward()
