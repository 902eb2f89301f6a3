"""Sizes, layouts and states: any T and N, views, and a sequence run in pieces."""

from __future__ import annotations

import oracle
import pytest
import torch
from support import (
    DTYPES,
    assert_near,
    assert_same_bits,
    check,
    each_device,
    each_dtype,
    inputs,
    leaf,
    library_model,
    starts,
)
from torch import Tensor

import neuronjit as nj


def with_grad(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.requires_grad_() for name, value in state.items()}


# --- T and N -------------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("model", ["LIF", "IZHIKEVICH"])
def test_any_number_of_steps(model: str, device: str) -> None:
    """Across every remainder of the checkpoint distance, and long runs."""
    params = {"a": 0.2, "b": 0.1} if model == "IZHIKEVICH" else {}
    for steps in (*range(1, 41), 63, 64, 65, 100):
        x = inputs((steps, 5), seed=steps).requires_grad_()
        check(model, x, with_grad(starts(model, (5,))), device=device, **params)


@each_device
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 15, 31, 33, 63, 64, 65, 127, 129, 255, 1000, 1023])
def test_any_number_of_neurons(n: int, device: str) -> None:
    """Whole vectors, the rest behind them, and fewer neurons than one vector has."""
    for steps in (5, 20):
        x = inputs((steps, n), seed=n).requires_grad_()
        check("LIF", x, with_grad(starts("LIF", (n,))), device=device)


@each_device
@each_dtype
@pytest.mark.parametrize("n", [100_003, 2**19, 2**19 + 2, 2**20 + 4])
def test_many_neurons(n: int, dtype: torch.dtype, device: str) -> None:
    """Large enough for threads and for every vector width, with odd sizes among them."""
    if device == "cpu" and n > 2**19:
        pytest.skip("widths change with size on the GPU only")
    x = inputs((3, n), dtype).requires_grad_()
    tau = torch.tensor(2.5, dtype=x.dtype, requires_grad=True)
    check("LIF", x, with_grad(starts("LIF", (n,))), device=device, record=("v",), tau=tau)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("model", "dtype", "n"),
    [
        ("LIF", torch.float32, 2**18),
        ("LIF", torch.float16, 2**18),
        ("LIF", torch.bfloat16, 2**19),
        ("IZHIKEVICH", torch.float32, 2**18),
    ],
)
def test_many_neurons_and_steps(model: str, dtype: torch.dtype, n: int) -> None:
    """Several groups of steps, two and four neurons a thread: sequences besides s take one."""
    x = inputs((18, n), dtype).requires_grad_()
    check(model, x, device="cuda", record=(), arriving=("s",))


@each_device
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2, 3), (4, 2, 3, 5), (3, 2, 1, 3, 2)])
def test_any_dimensions(shape: tuple[int, ...], device: str) -> None:
    """x is [T, N, *]; [T] is one neuron."""
    x = inputs(shape).requires_grad_()
    out = check("LIF", x, with_grad(starts("LIF", shape[1:])), device=device)
    assert out.spikes.shape == shape and out.state["v"].shape == shape[1:]


@each_device
@each_dtype
@pytest.mark.parametrize("model", ["LIF", "IZHIKEVICH"])
def test_no_steps(model: str, dtype: torch.dtype, device: str) -> None:
    """T = 0: empty spikes, the state as it was given, its gradient handed through."""
    x = torch.empty(0, 7, dtype=dtype, device=device, requires_grad=True)
    v = torch.rand(7, device=device, requires_grad=True)
    before = nj.stats()
    out = nj.multistep(library_model(model), x, {"v": v}, record=("v", "h"))
    assert out.spikes.shape == out.record["v"].shape == out.record["h"].shape == (0, 7)
    assert out.spikes.dtype == dtype
    assert torch.equal(out.state["v"], v.to(oracle.arithmetic(dtype)))
    grad_x, grad_v = torch.autograd.grad(
        [out.spikes.sum(), out.state["v"].sum()], [x, v], materialize_grads=True
    )
    assert grad_x.shape == x.shape and grad_v.eq(1).all()
    assert nj.stats() == before, "there is nothing to launch"


@each_device
@pytest.mark.parametrize("shape", [(4, 0), (4, 3, 0, 2), (0, 0)])
def test_no_neurons(shape: tuple[int, ...], device: str) -> None:
    x = torch.empty(shape, device=device, requires_grad=True)
    tau = torch.tensor(2.0, device=device, requires_grad=True)
    out = nj.multistep(nj.neurons.LIF, x, record=("v",), tau=tau)
    assert out.spikes.shape == out.record["v"].shape == shape and out.state["v"].shape == shape[1:]
    total = out.spikes.sum() + out.state["v"].sum() + out.record["v"].sum()
    grads = torch.autograd.grad(total, [x, tau], materialize_grads=True)
    assert grads[0].shape == shape and grads[1] == 0


# --- initial states ------------------------------------------------------------------------------


@each_device
@pytest.mark.parametrize("given", ["none", "number", "integer", "0-dim", "tensor", "partial"])
def test_initial_state(given: str, device: str) -> None:
    state: dict[str, object] | None = {
        "none": None,
        "number": {"v": 0.3, "w": -0.1},
        "integer": {"v": 0, "w": 1},
        "0-dim": {
            "v": torch.tensor(0.3, requires_grad=True),
            "w": torch.tensor(-0.1, requires_grad=True),
        },
        "tensor": dict(with_grad(starts("IZHIKEVICH", (6,)))),
        "partial": {"w": torch.full((6,), 0.2, requires_grad=True)},
    }[given]
    check("IZHIKEVICH", inputs((5, 6)).requires_grad_(), state, device=device, a=0.2, b=0.1)


@each_device
@each_dtype
def test_initial_state_of_any_floating_dtype(dtype: torch.dtype, device: str) -> None:
    """Computed in the arithmetic dtype whatever it was given in; its gradient goes back."""
    for state_dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        state = with_grad(starts("LIF", (6,), state_dtype))
        tolerance = 2e-5 if state_dtype in (torch.float32, torch.float64) else 1.6e-2
        x = inputs((5, 6), dtype)
        want_v, got_v = leaf(state["v"], "cpu"), leaf(state["v"], device)
        want = oracle.run("LIF", x, {"v": want_v}, surrogate=oracle.Surrogate("ATan"))
        got = nj.multistep(nj.neurons.LIF, x.to(device), {"v": got_v})
        assert_same_bits(got.spikes, want.spikes, f"spikes from a {state_dtype} state")
        assert got.state["v"].dtype == oracle.arithmetic(dtype)
        got.spikes.float().sum().backward()
        want.spikes.float().sum().backward()
        assert_near(got_v.grad, want_v.grad, tolerance, f"gradient of a {state_dtype} state")


@each_device
@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        *(("LIF", dtype) for dtype in DTYPES),
        *(("IZHIKEVICH", torch.float16), ("EIF", torch.float32), ("clif", torch.bfloat16)),
    ],
    ids=str,
)
def test_two_pieces_give_the_bits_of_one_run(model: str, dtype: torch.dtype, device: str) -> None:
    """States keep the arithmetic dtype, so cutting a sequence anywhere changes nothing."""
    x = inputs((21, 9), dtype).to(device)
    record = (*oracle.MODELS[model].state, "h")
    whole = nj.multistep(library_model(model), x, record=record)
    for cut in (1, 4, 16, 20):
        first = nj.multistep(library_model(model), x[:cut], record=record)
        second = nj.multistep(library_model(model), x[cut:], first.state, record=record)
        assert torch.equal(torch.cat([first.spikes, second.spikes]), whole.spikes)
        for name in record:
            assert torch.equal(
                torch.cat([first.record[name], second.record[name]]), whole.record[name]
            )
        for name, last in whole.state.items():
            assert torch.equal(second.state[name], last)


@each_device
def test_gradients_flow_from_piece_to_piece(device: str) -> None:
    """Backward through out.state equals backward through one long run."""
    grads = []
    for pieces in ((20,), (7, 13), (1, 16, 3)):
        x = inputs((20, 9)).to(device).requires_grad_()
        state, spikes = None, []
        for part in x.split(pieces):
            out = nj.multistep(nj.neurons.LIF, part, state)
            state = out.state
            spikes.append(out.spikes)
        weights = torch.linspace(-1, 1, 20, device=device)[:, None]
        grads.append(torch.autograd.grad((torch.cat(spikes) * weights).sum(), x)[0].cpu())
    assert_near(grads[1], grads[0], 2e-5, "two pieces")
    assert_near(grads[2], grads[0], 2e-5, "three pieces")


# --- layouts -------------------------------------------------------------------------------------


def views() -> dict[str, Tensor]:
    """Tensors [5, 4, 6, 2] in every kind of memory layout."""
    base = inputs((5, 4, 6, 2))
    wide = torch.zeros(5, 4, 6, 4)
    wide[..., ::2] = base
    padded = torch.zeros(base.numel() + 1)
    padded[1:] = base.flatten()
    time_last = base.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    longer = torch.cat([base, base])
    return {
        "contiguous": base,
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(1, 3).contiguous().transpose(1, 3),
        "time_last": time_last,
        "every_other": wide[..., ::2],
        "every_other_step": torch.stack([base, base], 1).flatten(0, 1)[::2],
        "misaligned": padded[1:].view(5, 4, 6, 2),
        "later_steps": longer[5:],
        "reversed_and_back": base.flip(0).flip(0),
        "expanded": base[:, :, :1].expand(5, 4, 6, 2),
        "expanded_steps": base[:1].expand(5, 4, 6, 2),
        "negative_view": torch._neg_view(-base),
        "negative_strided_view": torch._neg_view(-wide)[..., ::2],
    }


@each_device
@pytest.mark.parametrize("kind", views())
def test_layouts(kind: str, device: str) -> None:
    """Views give the bits of a contiguous copy, spikes and gradients, and are never written to."""
    x = views()[kind]
    if device == "cuda":  # a copy to the device keeps only dense layouts; make the view there
        base = torch.zeros(x.untyped_storage().nbytes() // 4)
        base.copy_(torch.empty(0).set_(x.untyped_storage()))
        x = base.to(device).as_strided(x.shape, x.stride(), x.storage_offset())
        x = torch._neg_view(x) if kind.startswith("negative") else x
    before = x.clone()
    results = []
    for given in (x, x.clone(memory_format=torch.contiguous_format)):
        given = given.detach().requires_grad_()
        out = nj.multistep(nj.neurons.LIF, given, record=("v", "h"))
        weights = torch.linspace(-1, 1, x.numel(), device=device).view(x.shape)
        loss = (out.spikes * weights).sum() + (out.record["h"] * weights.flip(0)).sum()
        (grad,) = torch.autograd.grad(loss + out.state["v"].sum(), given)
        results.append([out.spikes, out.record["v"], out.record["h"], out.state["v"], grad])
    for view, copy, what in zip(*results, ("s", "v_seq", "h_seq", "v", "grad"), strict=True):
        assert view.shape == copy.shape and torch.equal(view, copy), what
    assert torch.equal(x, before), "the input was written to"


@each_device
@pytest.mark.parametrize("kind", ["expanded", "strided", "transposed", "negative_view"])
def test_layouts_of_states_and_parameters(kind: str, device: str) -> None:
    dense = torch.linspace(0.1, 0.8, 24, device=device).view(4, 6)
    view = {
        "expanded": dense[:, :1].expand(4, 6),
        "strided": torch.stack([dense, dense], -1)[..., 0],
        "transposed": dense.t().contiguous().t(),
        "negative_view": torch._neg_view(-dense),
    }[kind]
    x = inputs((5, 4, 6)).to(device)
    results = []
    for given in (view, view.clone(memory_format=torch.contiguous_format)):
        v, threshold = given.detach().requires_grad_(), given.detach().requires_grad_()
        out = nj.multistep(nj.neurons.LIF, x, {"v": v}, v_threshold=threshold)
        results.append((*torch.autograd.grad(out.spikes.sum(), [v, threshold]), out.spikes))
    for a, b, what in zip(*results, ("grad of v", "grad of v_threshold", "spikes"), strict=True):
        assert torch.equal(a, b), what
    assert not torch.equal(results[0][2], torch.zeros_like(results[0][2]))


@each_device
def test_one_element_parameter_as_a_negative_view(device: str) -> None:
    x = inputs((5, 6)).to(device)
    tau = torch._neg_view(torch.tensor([-3.0], device=device))
    negative = nj.multistep(nj.neurons.LIF, x, record=("h",), tau=tau)
    plain = nj.multistep(nj.neurons.LIF, x, record=("h",), tau=3.0)
    assert torch.equal(negative.record["h"], plain.record["h"])


@each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_misaligned_and_wide(dtype: torch.dtype, device: str) -> None:
    """Sizes at which the GPU would use vector loads, on memory that does not allow them."""
    n = 2**20
    flat = inputs((3 * n + 1,), dtype).to(device)
    shifted = flat[1:].view(3, n)
    out = nj.multistep(nj.neurons.LIF, shifted)
    assert torch.equal(out.spikes, nj.multistep(nj.neurons.LIF, shifted.clone()).spikes)


@each_device
def test_incoming_gradients_in_any_layout(device: str) -> None:
    x = inputs((5, 4, 6)).to(device).requires_grad_()
    out = nj.multistep(nj.neurons.LIF, x)
    weights = torch.linspace(-1, 1, 120, device=device).view(5, 4, 6)
    (want,) = torch.autograd.grad(out.spikes, x, weights, retain_graph=True)
    strided = torch.stack([weights, weights], -1)[..., 0]
    time_last = weights.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    negative = torch._neg_view(-weights)
    for grad in (strided, time_last, negative):
        assert torch.equal(torch.autograd.grad(out.spikes, x, grad, retain_graph=True)[0], want)
    (summed,) = torch.autograd.grad(out.spikes.sum(), x, retain_graph=True)  # expanded from one 1
    (ones,) = torch.autograd.grad(out.spikes, x, torch.ones_like(out.spikes))
    assert torch.equal(summed, ones)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.memory
@pytest.mark.parametrize(("steps", "n"), [(1, 2**31 - 1), (1, 2**31 + 8), (2, 2**30 + 8)])
def test_more_than_two_to_the_31_elements(steps: int, n: int) -> None:
    """Counts and offsets are 64-bit: nothing wraps."""
    x = torch.zeros(steps, n, dtype=torch.float16, device="cuda")
    places = torch.tensor([0, 1, 2**29, n // 2, n - 9, n - 2, n - 1], device="cuda")
    x[-1, places] = 2.0
    spikes = nj.multistep(nj.neurons.IF, x).spikes
    assert spikes[-1, places].eq(1).all()
    assert int(spikes.count_nonzero()) == places.numel()
