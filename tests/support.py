"""What the numerical tests share: inputs, a call on the library and on the oracle, comparisons."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

import neuronjit as nj

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# relative error of a gradient; the half types round a float32 number, which may fall one place off
GRADIENT_TOLERANCE = {
    torch.float32: 2e-5,
    torch.float64: 1e-10,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
# relative error of a potential in a model with transcendental functions
VALUE_TOLERANCE = {
    torch.float32: 2e-5,
    torch.float64: 1e-12,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
# a potential this near to the threshold, or to a kink of the surrogate, may fall on either side
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-10, torch.float16: 1e-4, torch.bfloat16: 1e-4}


def slow(*values: Any, **options: Any) -> Any:
    """A row of a parametrisation that runs in the slow suite only."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_reset = pytest.mark.parametrize("reset", ["hard", "soft"])


@cache
def library_model(name: str) -> nj.NeuronModel:
    """The library's model of this name: a built-in one, or made from its equations."""
    model = oracle.MODELS[name]
    if model.text is None:
        return getattr(nj.neurons, name)
    return nj.NeuronModel(
        name, model.text, state=dict(model.state), params=dict(model.params), strict=model.strict
    )


def library_surrogate(surrogate: oracle.Surrogate) -> Any:
    factory = getattr(nj.surrogates, surrogate.name)
    return factory(**surrogate.params, spiking=surrogate.spiking)


class Counted:
    """How many graphs torch.compile made since."""

    def __enter__(self) -> Counted:
        from torch._dynamo.utils import counters

        counters.clear()
        self._counters = counters
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def graphs(self) -> int:
        return self._counters["stats"]["unique_graphs"]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> Tensor:
    """x [T, N, *] that fires about every third step; a tenth on a coarse grid, where ties are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2.2 - 0.5
    on_grid = torch.rand(shape, generator=generator) < 0.1
    return (torch.where(on_grid, (x * 4).round() / 4, x) * scale).to(dtype)


def starts(
    model: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 1
) -> dict[str, Tensor]:
    """Initial states around the model's own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.rand(shape, generator=generator, dtype=torch.float64) * 0.9 - 0.3 + value).to(
            dtype
        )
        for name, value in oracle.MODELS[model].state.items()
    }


def leaf(value: Any, device: str) -> Any:
    """A copy on `device` that collects its own gradient; numbers stay numbers."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().to(device).requires_grad_(value.requires_grad)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal bit for bit, signs of zeros included; any NaN equals any NaN."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.dtype.itemsize]
    a, b = actual.detach().cpu().contiguous(), expected.detach().contiguous()
    same = (a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())
    if not same.all():
        index = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} differ, "
            f"first at {index}: {a[index].item()!r}, expected {b[index].item()!r}"
        )


def assert_near(
    actual: Tensor | None, expected: Tensor | None, tolerance: float, what: str, floor: float = 0.1
) -> None:
    """Relative error within `tolerance`, or absolute within it, times `floor` of the largest."""
    if expected is None or actual is None:
        present = actual if expected is None else expected
        assert present is None or not present.any(), (
            f"{what}: {'unexpected' if expected is None else 'missing'}"
        )
        return
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    a, b = actual.detach().cpu().double(), expected.detach().double()
    finite = b[b.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    torch.testing.assert_close(
        a,
        b,
        rtol=tolerance,
        atol=tolerance * floor * largest,
        equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )


def divisions(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numerators [T, N] and divisors [N]: from the ends of the range to ordinary numbers."""
    info = torch.finfo(dtype)
    ends = [math.inf, math.nan, 0.0, info.max, info.tiny, info.tiny / 2, info.tiny * info.eps]
    some = [1.0, 3.0, 1.7, 2.0, 0.1, 1e-3, 1e8, 1e-30, 1e30, 2.0**-100, 2.0**100, 2.0**125]
    some += [1 / info.tiny, info.max / 3, info.tiny * 3]
    values = torch.tensor([sign * n for n in ends + some for sign in (1, -1)], dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(100, generator=generator, dtype=torch.float64) * 4
    divisors = torch.cat([values, random.exp().to(dtype)])
    numerators = torch.cat([values, -random.exp().to(dtype), random.to(dtype)])
    return numerators[:, None].expand(-1, len(divisors)).contiguous(), divisors


# forms of a quotient: alone, and where a sum or a difference takes it in
QUOTIENTS = {
    "x / tau": lambda x, tau, b: x / tau,
    "b + x / tau": lambda x, tau, b: b + x / tau,
    "b - x / tau": lambda x, tau, b: b - x / tau,
    "x / tau - b": lambda x, tau, b: x / tau - b,
}


def quotients(
    dtype: torch.dtype, backend: str | None = None
) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """Of each form: values and gradients of x by the library, then by plain divisions.

    The divisors are a tensor for all neurons together, and one by one a tensor of one element.
    """
    x, tau = divisions(dtype)
    b = torch.tensor(0.37, dtype=dtype)
    for text, function in QUOTIENTS.items():
        params = {"tau": 2.0, "b": 1.0}
        model = nj.NeuronModel("divide", f"h = {text}", state={"v": 0.0}, params=params)
        for some in (slice(None), *(slice(i, i + 1) for i in range(0, 44, 3))):
            rows, divisor = x[:, some], tau[some]
            mine, theirs = (rows.clone().requires_grad_() for _ in range(2))
            out = nj.multistep(model, mine, record="h", backend=backend, tau=divisor, b=b)
            got, want = out.record["h"], function(theirs, divisor, b)
            arriving = rows.flip(0)
            (slope,) = torch.autograd.grad(got, mine, arriving)
            (want_slope,) = torch.autograd.grad(want, theirs, arriving)
            what = f"{text} by {divisor.tolist()[:3]}"
            yield what, got.detach(), want.detach(), slope, want_slope


def robust(result: oracle.Result, surrogate: oracle.Surrogate, dtype: torch.dtype) -> Tensor:
    """[N, *]: neurons that stay clear of the threshold and the surrogate's kinks all the time."""
    clear = torch.ones_like(result.distance, dtype=torch.bool)
    for kink in {0.0, *surrogate.kinks()}:
        clear &= (result.distance - kink).abs() > ROUNDING[dtype]
    return (
        clear.all(0) if clear.shape[0] else torch.ones(result.distance.shape[1:], dtype=torch.bool)
    )


def check(
    model: str,
    x: Tensor,
    state: Mapping[str, Any] | None = None,
    *,
    surrogate: oracle.Surrogate | None = None,
    reset: str = "hard",
    detach_reset: bool = False,
    device: str = "cpu",
    backend: str | None = None,
    record: Iterable[str] | None = None,
    arriving: Iterable[str] | None = None,
    exact: bool | None = None,
    **params: Any,
) -> Any:
    """One call of the library against the oracle: spikes, sequences, last states, every gradient.

    Gradients are taken for each tensor (x, states, parameters) that requires one, from random
    gradients of the outputs named in `arriving` ("s", "v_last", "v_seq", "h_seq", ...; else all).
    Returns the library's output.
    """
    surrogate = surrogate or oracle.Surrogate("ATan")
    names = list(oracle.MODELS[model].state)
    record = [*names, "h"] if record is None else list(record)
    exact = oracle.MODELS[model].exact if exact is None else exact
    exact = exact and surrogate.spiking
    given = {"x": x, **{f"state.{k}": v for k, v in (state or {}).items()}, **params}
    theirs = {key: leaf(value, "cpu") for key, value in given.items()}
    ours = {key: leaf(value, device) for key, value in given.items()}

    def unpack(values: dict[str, Any]) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
        initial = {key[6:]: value for key, value in values.items() if key.startswith("state.")}
        return values["x"], initial, {key: values[key] for key in params}

    x_theirs, state_theirs, params_theirs = unpack(theirs)
    want = oracle.run(
        model,
        x_theirs,
        state_theirs,
        surrogate=surrogate,
        reset=reset,
        detach_reset=detach_reset,
        **params_theirs,
    )
    x_ours, state_ours, params_ours = unpack(ours)
    got = nj.multistep(
        library_model(model), x_ours, state_ours or None,
        surrogate=library_surrogate(surrogate), reset=reset,
        detach_reset=detach_reset, record=tuple(record), backend=backend, **params_ours,
    )  # fmt: skip
    expected = {"s": want.spikes}
    expected |= {f"{n}_last": want.state[n] for n in names} | {
        f"{n}_seq": want.record[n] for n in record
    }
    actual = {"s": got.spikes}
    actual |= {f"{n}_last": got.state[n] for n in names} | {
        f"{n}_seq": got.record[n] for n in record
    }
    kept = (
        robust(want, surrogate, x.dtype) if not exact else torch.ones(x.shape[1:], dtype=torch.bool)
    )
    assert kept.double().mean() > 0.8 or kept.numel() < 10, (
        "the inputs of this test sit on the threshold"
    )
    for key, value in expected.items():
        if exact:
            assert_same_bits(actual[key], value, key)
        else:
            mask = kept.expand(value.shape)
            values = actual[key].detach().cpu() * mask, value * mask
            tolerance = 0.0 if key == "s" and surrogate.spiking else VALUE_TOLERANCE[x.dtype]
            assert_near(*values, tolerance, key)

    wanted = [
        key for key, value in given.items() if isinstance(value, Tensor) and value.requires_grad
    ]
    if wanted:
        generator = torch.Generator().manual_seed(7)
        weights = {
            key: torch.randn(value.shape, generator=generator).to(value.dtype) * kept
            for key, value in expected.items()
        }
        arriving = list(expected) if arriving is None else list(arriving)
        grads = []
        for outputs, leaves, where in ((actual, ours, device), (expected, theirs, "cpu")):
            used = [key for key in arriving if outputs[key].requires_grad]
            grads.append(
                torch.autograd.grad(
                    [outputs[key] for key in used], [leaves[key] for key in wanted],
                    [weights[key].to(where) for key in used], allow_unused=True, retain_graph=True,
                )
            )  # fmt: skip
        for key, mine, reference in zip(wanted, *grads, strict=True):
            # a parameter's gradient is a sum in another order, so rounding is relative to its terms
            floor = 0.1 if key == "x" or key.startswith("state.") else 1.0
            assert_near(mine, reference, GRADIENT_TOLERANCE[x.dtype], f"gradient of {key}", floor)
    return got


# --- max pooling ----------------------------------------------------------------------------------

POOLED = [
    (2, 3, 8, 8), (1, 16, 6, 4), (3, 5, 7, 9), (2, 8, 5, 16), (1, 1, 2, 2), (2, 4, 3, 1),
    (4, 2, 16, 32), (1, 24, 4, 6), (2, 7, 9, 10),
]  # fmt: skip


def poolings(dtype: torch.dtype, device: str) -> Iterator[tuple[Tensor, int, bool]]:
    """Inputs with ties and without, with NaN and infinities, aligned or not, in both layouts."""
    generator = torch.Generator().manual_seed(0)
    for shape, size, ceil_mode in itertools.product(POOLED, (2, 3), (False, True)):
        if size == 2 and not ceil_mode and min(shape[2:]) < 2:
            continue  # nothing comes out, which torch refuses
        count = math.prod(shape)
        numbers = torch.randn(count + 1, generator=generator)
        if shape[1] % 2:
            numbers = (numbers > 0).float()
        elif shape[0] == 2:
            numbers[::7], numbers[1::11], numbers[2::5] = math.nan, math.inf, -math.inf
        numbers = numbers.to(device, dtype)
        for flat in (numbers[:-1], numbers[1:]):
            x = flat.view(shape)
            n, c, h, w = shape
            yield x, size, ceil_mode
            yield flat.view(n, h, w, c).permute(0, 3, 1, 2), size, ceil_mode


def compare_pooling(
    x: Tensor, size: int, ceil_mode: bool, y: Tensor, back: Callable[[Tensor], Tensor]
) -> None:
    """A max pooling and its gradient against torch's, on the CPU in float64."""
    leaf = x.detach().cpu().double().requires_grad_()
    want = torch.nn.functional.max_pool2d(leaf, size, 2, size - 2, ceil_mode=ceil_mode)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.cpu().double(), want, rtol=0, atol=0, equal_nan=True)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    want.backward(grad.double())
    for given in (grad, grad.transpose(2, 3).contiguous().transpose(2, 3)):
        got = back(given.to(x.device))
        assert got.shape == x.shape and got.dtype == x.dtype
        torch.testing.assert_close(got.cpu(), leaf.grad.to(x.dtype))
