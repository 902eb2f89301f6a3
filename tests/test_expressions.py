"""The language of the equations: what every function, operator and rule means, on every target."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import DEVICES, assert_near, assert_same_bits, quotients, slow
from torch import Tensor

import neuronjit as nj

Torch = Callable[[Tensor], Tensor]
# where the equations are evaluated: the kernels, and eager PyTorch
each_place = pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "cpu"), ("cpu", "eager"), pytest.param("cuda", "cuda", marks=pytest.mark.cuda)],
    ids=lambda value: value,
)
each_arithmetic = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
assert len(DEVICES) == 2


def evaluate(
    expressions: list[str], x: Tensor, device: str, backend: str, **params: float | Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Values and derivatives at x of many expressions: one state each, in one kernel.

    Each expression has a row of x of its own, so that an infinite slope stays in its row.
    """
    names = [f"y{i}" for i in range(len(expressions))]
    lines = [f"{n} = {e}" for n, e in zip(names, expressions, strict=True)]
    model = nj.NeuronModel(
        "language",
        "\n".join([*lines, "h = v + x"]),
        state={"v": 0.0, **dict.fromkeys(names, 0.0)},
        params=dict.fromkeys(params, 1.0),
    )
    rows = x.expand(1, len(names), -1).to(device).contiguous().requires_grad_()
    params = {k: p.to(device) if isinstance(p, Tensor) else p for k, p in params.items()}
    out = nj.multistep(model, rows, record=names, backend=backend, **params)
    values = [out.record[name][0, i].detach().cpu() for i, name in enumerate(names)]
    outputs, weights = [], []
    for i, name in enumerate(names):
        weight = torch.zeros_like(rows)
        weight[0, i] = 1
        if out.record[name].requires_grad:
            outputs.append(out.record[name])
            weights.append(weight)
    (slopes,) = torch.autograd.grad(outputs, rows, weights, materialize_grads=True)
    return values, list(slopes[0].cpu())


def compare(
    table: dict[str, Torch],
    x: Tensor,
    device: str,
    backend: str,
    tolerance: float,
    tiny: float = 0.0,
) -> None:
    """Values and slopes of each expression against torch in float64."""
    values, slopes = evaluate(list(table), x, device, backend)
    for (text, function), value, slope in zip(table.items(), values, slopes, strict=True):
        wide = x.double().requires_grad_()
        want = function(wide)
        (want_slope,) = torch.autograd.grad(want.sum(), wide)
        for got, exact, what in ((value, want.detach(), "value"), (slope, want_slope, "slope")):
            exact = exact.to(x.dtype)
            bad = ~torch.isclose(got, exact, rtol=tolerance, atol=tiny, equal_nan=True)
            assert not bad.any(), (
                f"{what} of {text} at {x[bad][:3].tolist()}: {got[bad][:3].tolist()}, "
                f"expected {exact[bad][:3].tolist()}"
            )


def straight(function: Torch, x: Tensor) -> Tensor:
    return x + (function(x) - x).detach()


ANYWHERE: dict[str, Torch] = {
    "exp(x)": torch.exp, "tanh(x)": torch.tanh, "sigmoid(x)": torch.sigmoid, "sin(x)": torch.sin,
    "cos(x)": torch.cos, "atan(x)": torch.atan, "erf(x)": torch.erf, "abs(x)": torch.abs,
    "erfc(x)": torch.erfc,
    "sign(x)": torch.sign, "x**2": torch.square, "x**3": lambda x: x**3,
    "minimum(x, 0.5)": lambda x: torch.minimum(x, x.new_tensor(0.5)),
    "maximum(0.5, x)": lambda x: torch.maximum(x.new_tensor(0.5), x),
    "2**x": lambda x: torch.pow(2.0, x), "pi * x": lambda x: math.pi * x,
    "relu(x)": torch.relu, "relu(x * x - 1 + 0 * x)": lambda x: torch.relu(x * x - 1),
    "clamp(x, -1, 0.5)": lambda x: torch.clamp(x, -1, 0.5),
    "clamp(2 * x, 0, 4)": lambda x: torch.clamp(2 * x, 0, 4),
    "round(x)": lambda x: straight(torch.round, x), "floor(x)": lambda x: straight(torch.floor, x),
    "round(clamp(x, 0, 4))": lambda x: straight(torch.round, torch.clamp(x, 0, 4)),
    "where(x > -1 and x < 2 or x > 4, x, 0)": lambda x: torch.where(
        ((x > -1) & (x < 2)) | (x > 4), x, 0.0
    ),
    "where(not x > 1, x * x, -x)": lambda x: torch.where(~(x > 1), x * x, -x),
    "where(not (x > 1 and x < 3), x, 1)": lambda x: torch.where(~((x > 1) & (x < 3)), x, 1.0),
}  # fmt: skip
ABOVE_ZERO: dict[str, Torch] = {
    "log(x)": torch.log, "sqrt(x)": torch.sqrt, "x**0.5": torch.sqrt, "x**-1.5": lambda x: x**-1.5,
    "1 / x": torch.reciprocal, "x**-1": torch.reciprocal,
    "x**4": lambda x: x**4,
}  # fmt: skip


@each_place
@each_arithmetic
def test_functions_and_their_derivatives(dtype: torch.dtype, device: str, backend: str) -> None:
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    x = torch.cat([torch.linspace(-6, 6, 301), torch.tensor([0.0, 0.5, -0.5, 1e-3, -1e-3, 1e-8])])
    compare(ANYWHERE, x.to(dtype), device, backend, tolerance, tiny=tolerance / 4)
    x = torch.cat([torch.linspace(0.01, 8, 301), torch.tensor([1e-3, 1e-8, 1.0, 1e4])])
    compare(ABOVE_ZERO, x.to(dtype), device, backend, tolerance, tiny=tolerance / 4)
    compare({"x**x": lambda x: x**x}, x[:301].to(dtype), device, backend, 4 * tolerance)


@each_place
@each_arithmetic
def test_functions_at_the_ends_of_the_range(dtype: torch.dtype, device: str, backend: str) -> None:
    """Overflow, underflow, infinities and NaN, as torch has them."""
    table = {
        f"{f}(x)": ANYWHERE[f"{f}(x)"]
        for f in ("exp", "tanh", "sigmoid", "atan", "erf", "erfc", "abs")
    }
    table |= {
        "minimum(x, 0.5)": ANYWHERE["minimum(x, 0.5)"],
        "maximum(0.5, x)": ANYWHERE["maximum(0.5, x)"],
    }
    ends = [
        -1e30,
        -1000.0,
        -103.5,
        -95.0,
        -88.0,
        -87.0,
        -20.0,
        20.0,
        80.0,
        88.5,
        88.8,
        95.0,
        800.0,
        1e30,
    ]
    x = torch.tensor([*ends, math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40]).to(dtype)
    values, _ = evaluate(list(table), x, device, backend)
    for (text, function), value in zip(table.items(), values, strict=True):
        want = function(x)
        # the kernels' sigmoid, 1 / (1 + exp(-x)), is 0 where torch's is a subnormal number
        close = torch.isclose(value, want, rtol=4e-6, atol=1.2e-38, equal_nan=True)
        assert close.all(), (
            f"{text} at {x[~close].tolist()}: {value[~close].tolist()}, not {want[~close].tolist()}"
        )


@each_place
def test_exp_is_accurate_everywhere(device: str, backend: str) -> None:
    x = torch.linspace(-87.3, 88.7, 200_001)
    (value,), _ = evaluate(["exp(x)"], x, device, backend)
    error = (value.double() - x.double().exp()).abs() / x.double().exp()
    assert error.max() < 2.5e-7, f"{error.max():.2e} at {x[error.argmax()]}"


@each_place
def test_powers_of_zero_and_of_negative_numbers(device: str, backend: str) -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 3.0])
    for exponent in (0.0, 1.0, 2.0, 3.0, -1.0):
        (value,), (slope,) = evaluate(["x**p"], x, device, backend, p=exponent)
        leaf = x.clone().requires_grad_()
        want = leaf ** torch.tensor(exponent)
        (want_slope,) = torch.autograd.grad(want.sum(), leaf)
        torch.testing.assert_close(value, want.detach(), equal_nan=True)
        torch.testing.assert_close(
            slope, want_slope, equal_nan=True, msg=lambda m, p=exponent: f"p={p}: {m}"
        )


@each_place
def test_comparisons(device: str, backend: str) -> None:
    """All six, on both sides and on the tie; a NaN is unequal to everything."""
    x = torch.tensor([-1.0, 0.25, 0.5, 0.75, -0.0, math.nan, math.inf])
    operators = {
        "<": x < 0.5,
        "<=": x <= 0.5,
        ">": x > 0.5,
        ">=": x >= 0.5,
        "==": x == 0.5,
        "!=": x != 0.5,
    }
    texts = [f"where(x {operator} 0.5, 3 * x, -x)" for operator in operators]
    values, _ = evaluate(texts, x, device, backend)
    _, slopes = evaluate(texts, x[:5], device, backend)
    for (operator, chosen), value, slope in zip(operators.items(), values, slopes, strict=True):
        assert_same_bits(value, torch.where(chosen, 3 * x, -x), operator)
        assert_same_bits(slope, torch.where(chosen, 3.0, -1.0)[:5], f"slope of {operator}")


@each_place
def test_ties_share_the_slope(device: str, backend: str) -> None:
    """As in torch: one half each at a tie of minimum and maximum, none at the corner of abs."""
    texts = ["minimum(x, 0.5)", "maximum(x, 0.5)", "minimum(x, x)", "abs(x - 0.5)", "sign(x - 0.5)"]
    _, slopes = evaluate(texts, torch.tensor([0.5]), device, backend)
    assert [slope.item() for slope in slopes] == [0.5, 0.5, 1.0, 0.0, 0.0]


def low(a: Any, b: Any) -> Tensor:
    return torch.minimum(*torch.broadcast_tensors(*map(torch.as_tensor, (a, b))))


def high(a: Any, b: Any) -> Tensor:
    return torch.maximum(*torch.broadcast_tensors(*map(torch.as_tensor, (a, b))))


def opened(x: Tensor, kept: Tensor, branch: Torch, otherwise: Any = 0.0) -> Tensor:
    """`branch` where it is kept. Elsewhere torch would give 0 times its slope, NaN at its pole."""
    return torch.where(kept, branch(torch.where(kept, x, x.detach())), otherwise)


# choices within operations and operations within choices, with slopes that are infinite at a kink
CHOICES: dict[str, Torch] = {
    "sqrt(maximum(x, 0))": lambda x: high(x, 0.0).sqrt(),
    "sqrt(maximum(0, x - 1))": lambda x: high(0.0, x - 1).sqrt(),
    "maximum(x, 0)**0.5": lambda x: high(x, 0.0) ** 0.5,
    "maximum(x, 0)**p": lambda x: high(x, 0.0) ** torch.tensor(0.5, dtype=x.dtype),
    "sqrt(where(x > 0, x, 0))": lambda x: torch.where(x > 0, x, 0.0).sqrt(),
    "sqrt(where(x >= 0, x, 0))": lambda x: torch.where(x >= 0, x, 0.0).sqrt(),
    "where(x > 0, sqrt(x), 0)": lambda x: opened(x, x > 0, torch.sqrt),
    "where(x != 0, 1 / x, x)": lambda x: opened(x, x != 0, torch.reciprocal, x),
    "log(minimum(x, 1))": lambda x: low(x, 1.0).log(),
    "1 / maximum(x, 0)": lambda x: 1 / high(x, 0.0),
    "-sqrt(minimum(-minimum(x, 0), 2))": lambda x: -low(-low(x, 0.0), 2.0).sqrt(),
    "sqrt(maximum(x, 0) + maximum(x - 1, 0))": lambda x: (high(x, 0.0) + high(x - 1, 0.0)).sqrt(),
    "sqrt(maximum(x, 0) * maximum(x - 1, 0))": lambda x: (high(x, 0.0) * high(x - 1, 0.0)).sqrt(),
    "sqrt(minimum(maximum(x, 0), 1))": lambda x: low(high(x, 0.0), 1.0).sqrt(),
    "sqrt(minimum(maximum(minimum(x, 2), 0), 1))": lambda x: low(
        high(low(x, 2.0), 0.0), 1.0
    ).sqrt(),
    "maximum(sqrt(maximum(x, 0)), 0.5)": lambda x: opened(
        x, ~(x < 0.25), lambda y: high(high(y, 0.0).sqrt(), 0.5), 0.5
    ),
    "maximum(sqrt(x), 0.5)": lambda x: opened(
        x, ~(x.sqrt() < 0.5), lambda y: high(y.sqrt(), 0.5), 0.5
    ),
    "where(x > 1, sqrt(maximum(x - 1, 0)), where(x < 0, sqrt(-x), 0))": lambda x: torch.where(
        x > 1,
        opened(x, x > 1, lambda y: high(y - 1, 0.0).sqrt()),
        opened(x, x < 0, lambda y: (-y).sqrt()),
    ),
    "sqrt(where(x > 1, where(x < 2, x - 1, 1), 0))": lambda x: torch.where(
        x > 1, torch.where(x < 2, x - 1, 1.0), 0.0
    ).sqrt(),
    "exp(where(x < 1, x, 0)) * x": lambda x: torch.where(x < 1, x, 0.0).exp() * x,
    "where(x > 0, maximum(sqrt(x), 0.5), 0)": lambda x: opened(
        x, x > 0, lambda y: opened(y, ~(y < 0.25), lambda z: high(z.sqrt(), 0.5), 0.5)
    ),
    "abs(maximum(x, 0))": lambda x: high(x, 0.0).abs(),
    "where(minimum(x, 1) < maximum(x, 0), x, sqrt(abs(x)))": lambda x: torch.where(
        low(x, 1.0) < high(x, 0.0),
        x,
        opened(x, ~(low(x, 1.0) < high(x, 0.0)), lambda y: y.abs().sqrt()),
    ),
    "maximum(x, 2 * x) + minimum(x, x * x)": lambda x: high(x, 2 * x) + low(x, x * x),
    "sign(sqrt(maximum(x, 0)))": lambda x: (
        high(x, 0.0).detach().sqrt().sign() + torch.where(x > 9, x, 0.0)
    ),
}
KINKS = [0.0, -0.0, 1e-30, -1e-30, 1e-3, 0.25, 0.5, 0.999, 1.0, 1.001, 1.5, 2.0, 3.0, -1.0, -2.5]
ENDS = [math.inf, -math.inf, math.nan]
ARRIVING = [1.0, -0.5, 0.0, math.inf, -math.inf, math.nan]


def check_slopes(
    table: dict[str, Torch], points: list[float], dtype: torch.dtype, device: str, backend: str
) -> None:
    """Slopes at all points, met by all sorts of gradients, against torch's.

    Each expression has a row of its own, and reads a harmless number in all others.
    """
    texts = [re.sub(r"\bx\b", f"x{i}", text) for i, text in enumerate(table)]
    lines = [f"x{i} = where(row == {i}, x, 0.7)\ny{i} = {text}" for i, text in enumerate(texts)]
    names = [f"y{i}" for i in range(len(texts))]
    model = nj.NeuronModel(
        "choices",
        "\n".join([*lines, "h = v + x"]),
        state=dict.fromkeys(["v", *names], 0.0),
        params={"row": 0.0, "p": 0.5},
    )
    x = torch.tensor(points, dtype=dtype).repeat_interleave(len(ARRIVING))
    arriving = torch.tensor(ARRIVING, dtype=dtype).repeat(len(points))
    rows = x.expand(1, len(texts), -1).to(device).contiguous().requires_grad_()
    numbers = torch.arange(len(texts), device=device).to(dtype)[:, None]
    half = torch.tensor(0.5, dtype=dtype, device=device)
    out = nj.multistep(model, rows, record=names, backend=backend, row=numbers, p=half)
    weights = torch.zeros(len(texts), *rows.shape, dtype=dtype)
    for i in range(len(texts)):
        weights[i, 0, i] = arriving
    outputs = [out.record[name] for name in names]
    (slopes,) = torch.autograd.grad(outputs, rows, list(weights.to(device)))
    for (text, function), slope in zip(table.items(), slopes[0].cpu(), strict=True):
        leaf = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(function(leaf), leaf, arriving)
        bad = ~torch.isclose(slope, want, rtol=2e-6, atol=0.0, equal_nan=True)
        shown = [t[bad][:5].tolist() for t in (x, arriving, slope, want)]
        assert not bad.any(), f"{text}: at {shown[0]}, where {shown[1]} arrives: {shown[2:]}"


@each_place
@each_arithmetic
def test_choices_select_slopes(dtype: torch.dtype, device: str, backend: str) -> None:
    """Beside and on every kink: a closed branch gives 0, whatever meets it, as in torch."""
    for some in (slice(0, 9), slice(9, 17), slice(17, None)):  # compilers are slow with many states
        check_slopes(dict([*CHOICES.items()][some]), KINKS, dtype, device, backend)
    plain = ("sqrt(x", "1 / x", "sign", "2 * x")  # written by hand above, for finite x
    table = {k: f for k, f in CHOICES.items() if not any(word in k for word in plain)}
    check_slopes(table, ENDS, dtype, device, backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cpu", torch.float32), ("eager", torch.float32),
        slow("cpu", torch.float64), slow("eager", torch.float64),
    ],
)  # fmt: skip
def test_quotients_are_those_of_plain_divisions(dtype: torch.dtype, backend: str) -> None:
    """By infinite, huge, subnormal and zero divisors too: forward bit for bit, and backward."""
    for what, value, want, slope, want_slope in quotients(dtype, backend):
        assert_same_bits(value, want, what)
        tolerance, tiny = 4 * torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        near = torch.isclose(slope, want_slope, rtol=tolerance, atol=tiny, equal_nan=True)
        assert near.all(), (what, slope[~near], want_slope[~near])


@each_place
def test_the_written_order_is_kept(device: str, backend: str) -> None:
    """Float32 bits show any reordering, simplification or contraction."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2001, generator=generator) * 10
    c = {n: torch.tensor(n) for n in (0.1, 0.3, 3.0, 7.0, 1e8, 1.7)}
    table: dict[str, Tensor] = {
        "x + 0.1 + 0.3": (x + c[0.1]) + c[0.3],
        "x + (0.1 + 0.3)": x + (c[0.1] + c[0.3]),
        "0.1 + (0.3 + x)": c[0.1] + (c[0.3] + x),
        "x - 0.1 - 0.3": (x - c[0.1]) - c[0.3],
        "x - (0.1 - 0.3)": x - (c[0.1] - c[0.3]),
        "x - (0.1 + x) - 0.3": (x - (c[0.1] + x)) - c[0.3],
        "(x + 1e8) - 1e8": (x + c[1e8]) - c[1e8],
        "x / 3 / 7": (x / c[3.0]) / c[7.0],
        "x / (3 / 7)": x / (c[3.0] / c[7.0]),
        "x / (3 * 7)": x / (c[3.0] * c[7.0]),
        "x / 3 * 7": (x / c[3.0]) * c[7.0],
        "x * (7 / 3)": x * (c[7.0] / c[3.0]),
        "x * 7 + 0.1": (x * c[7.0]) + c[0.1],
        "x * x - x * 1.7": (x * x) - (x * c[1.7]),
        "-x**2": -(x * x),
        "(-x)**2": (-x) * (-x),
        "-x * -0.3": (-x) * (-c[0.3]),
        "x - -0.3": x - (-c[0.3]),
        "- - x": x,
        "+x": x,
        "-(x + 0.1) * 3": -(x + c[0.1]) * c[3.0],
        "x**3": x * x * x,
        "where(x < 0.1, x, 0.3) * 3": torch.where(x < c[0.1], x, c[0.3]) * c[3.0],
        "3 * where(x + 0.1 >= 0.3 * x, x - 1.7, x) - x": c[3.0]
        * torch.where(x + c[0.1] >= c[0.3] * x, x - c[1.7], x)
        - x,
    }
    values, _ = evaluate(list(table), x, device, backend)
    for (text, want), value in zip(table.items(), values, strict=True):
        assert_same_bits(value, want, text)


@each_place
def test_numbers_are_rounded_once(device: str, backend: str) -> None:
    """Every number reaches the kernel as the float32 (float64) nearest to what was written."""
    written = [
        "0.1", "1e-8", "16777217", "3.4028234e38", "1e-45", "123456789.123", "1e30",
        "0.30000001192", "100000000000000000000", "2.5e-310", "1000000", "999999.9", "0x10",
        "1_000.5",
    ]  # fmt: skip
    for dtype in (torch.float32, torch.float64):
        values, _ = evaluate(
            [f"x * {n}" for n in written], torch.ones(1, dtype=dtype), device, backend
        )
        for text, value in zip(written, values, strict=True):
            number = float(int(text, 0)) if text.startswith("0x") else float(text)
            assert_same_bits(value, torch.tensor([number], dtype=dtype), text)


@each_place
def test_gradients_of_operators_reach_every_operand(device: str, backend: str) -> None:
    model = nj.NeuronModel(
        "operands",
        """
        y = a * x - b / c + (a + c)**b + maximum(a, b) * minimum(b, c)
        h = y - where(a < b, c, x) + abs(c - a)
        """,
        state=dict(v=0.0), params=dict(a=1.1, b=1.2, c=1.3),
    )  # fmt: skip
    x = torch.rand(1, 7, dtype=torch.float64, device=device, requires_grad=True)
    leaves = {
        n: torch.rand(7, dtype=torch.float64, device=device).add(0.5).requires_grad_()
        for n in "abc"
    }
    out = nj.multistep(model, x, record="h", backend=backend, **leaves)
    got = torch.autograd.grad(out.record["h"].sum(), [x, *leaves.values()])
    a, b, c = leaves.values()
    h = a * x - b / c + (a + c) ** b + torch.maximum(a, b) * torch.minimum(b, c)
    h = h - torch.where(a < b, c, x) + (c - a).abs()
    for mine, want, name in zip(
        got, torch.autograd.grad(h.sum(), [x, a, b, c]), "xabc", strict=True
    ):
        assert_near(mine, want.cpu(), 1e-12, name)


# --- detach, theta, s and the assignment of v ----------------------------------------------------


@each_place
def test_detach(device: str, backend: str) -> None:
    texts = ["x * detach(x)", "detach(x * x)", "detach(where(x > 0, 1, 0)) * x", "x + detach(-x)"]
    x = torch.tensor([0.5, -2.0])
    values, slopes = evaluate(texts, x, device, backend)
    want = [x * x, x * x, (x > 0) * x, x - x]
    want_slopes = [x, 0 * x, (x > 0).float(), torch.ones(2)]
    for text, *pairs in zip(texts, values, want, slopes, want_slopes, strict=True):
        assert torch.equal(pairs[0], pairs[1]) and torch.equal(pairs[2], pairs[3]), text


def run(text: str, x: list[float], device: str, backend: str, **options: Any) -> nj.Output:
    params = options.pop("params", {})
    state = options.pop("state", {"v": 0.0})
    model = nj.NeuronModel("rules", text, state=state, params=params)
    sequence = torch.tensor(x, device=device)[:, None]
    record = options.pop("record", (*state, "h"))
    return nj.multistep(model, sequence, record=record, backend=backend, **options)


def column(out: nj.Output, name: str) -> list[float]:
    sequence = out.spikes if name == "s" else out.record[name]
    return sequence.detach().flatten().tolist()


@each_place
def test_theta_is_the_threshold_and_soft_reset_subtracts_it(device: str, backend: str) -> None:
    text = "h = v + x\ntheta = v_threshold + b * a\na = a + s"
    out = run(
        text, [1.0, 1.0, 1.0, 1.0], device, backend,
        state={"v": 0.0, "a": 0.0}, params={"b": 0.5}, reset="soft",
    )  # fmt: skip
    # theta 1: fires, v 0, a 1. theta 1.5: h 1. theta 1.5: h 2, fires, v 0.5, a 2. theta 2: h 1.5
    assert column(out, "s") == [1, 0, 1, 0]
    assert column(out, "v") == [0, 1, 0.5, 1.5] and column(out, "a") == [1, 1, 2, 2]


@each_place
def test_theta_may_be_read_without_being_assigned(device: str, backend: str) -> None:
    out = run("h = v + x * theta", [1.0, 0.5], device, backend, v_threshold=0.75)
    assert column(out, "h") == [0.75, 0.375] and column(out, "s") == [1, 0]


@each_place
def test_reading_s_fires(device: str, backend: str) -> None:
    """Statements before it see the old v, those from it on the spike and the v that was reset."""
    text = "h = v + x\nbefore = v\nn = n + s\nafter = v + h"
    state = {"v": 0.0, "n": 0.0, "before": 0.0, "after": 0.0}
    out = run(text, [0.75, 0.5, 0.5], device, backend, state=state)
    assert column(out, "s") == [0, 1, 0] and column(out, "n") == [0, 1, 1]
    assert column(out, "before") == [0, 0.75, 0] and column(out, "after") == [1.5, 1.25, 1.0]
    assert column(out, "v") == [0.75, 0.0, 0.5]


@each_place
@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_a_model_may_assign_v(reset: str, device: str, backend: str) -> None:
    """Then the reset mode changes nothing."""
    out = run("h = v + x\nv = h - s * (theta - 0.25)", [1.5, 0.5], device, backend, reset=reset)
    assert column(out, "s") == [1, 1] and column(out, "v") == [0.75, 0.5]


@each_place
def test_a_name_may_be_assigned_again(device: str, backend: str) -> None:
    text = "y = x + 1\ny = y * y\nw = w + y\nw = w * 2\nh = v + y\nh = h + w"
    out = run(text, [1.0], device, backend, state={"v": 0.0, "w": 0.25})
    assert column(out, "w") == [8.5] and column(out, "h") == [12.5]


@each_place
def test_a_state_that_never_changes(device: str, backend: str) -> None:
    out = run("h = v + x * k", [1.0, 1.0], device, backend, state={"v": 0.0, "k": 0.25})
    assert column(out, "k") == [0.25, 0.25] and column(out, "h") == [0.25, 0.5]


@each_place
def test_a_parameter_that_nothing_reads(device: str, backend: str) -> None:
    model = nj.NeuronModel("idle", "h = v + x", state=dict(v=0.0), params=dict(unused=1.0))
    x = torch.rand(3, 4, device=device, requires_grad=True)
    unused = torch.ones(4, device=device, requires_grad=True)
    out = nj.multistep(model, x, backend=backend, unused=unused)
    grads = torch.autograd.grad(out.spikes.sum(), [x, unused], materialize_grads=True)
    assert grads[1].eq(0).all()


@each_place
def test_a_model_that_ignores_its_input(device: str, backend: str) -> None:
    model = nj.NeuronModel("pacemaker", "h = v + rate", state=dict(v=0.0), params=dict(rate=0.5))
    x = torch.zeros(4, 3, device=device, requires_grad=True)
    rate = torch.tensor(0.5, device=device, requires_grad=True)
    out = nj.multistep(model, x, backend=backend, rate=rate)
    assert out.spikes[:, 0].tolist() == [0, 1, 0, 1]
    grads = torch.autograd.grad(out.spikes.sum(), [x, rate], materialize_grads=True)
    assert grads[0].eq(0).all() and grads[1] > 0


def test_indentation_comments_and_blank_lines_are_free() -> None:
    plain = nj.NeuronModel("m", "y = x\nh = v + y", state=dict(v=0.0))
    free = nj.NeuronModel(
        "m",
        """

            y = x  # the input
            # now charge
            h = (v
                 + y)
        """,
        state=dict(v=0.0),
    )
    x = torch.rand(3, 4)
    assert torch.equal(nj.multistep(plain, x).spikes, nj.multistep(free, x).spikes)


# --- long and deep expressions -------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_chain_of_operators_may_be_long(backend: str) -> None:
    """As long as the text may be, in the written order, with every gradient."""
    x = (torch.rand(2, 3, generator=torch.Generator().manual_seed(1)) + 0.5).requires_grad_()
    signs = ["+", "-", "+", "*", "/"]
    chain = "v" + "".join(f" {signs[i % 3]} x" for i in range(990))
    product = "x" + "".join(f" {signs[3 + i % 2]} a" for i in range(300))
    inside = "tanh(" + "x" + " + 0.01" * 300 + ")"
    for text, loop in ((chain, signs[:3] * 330), (product, signs[3:] * 150), (inside, ["+"] * 300)):
        model = nj.NeuronModel(
            "chain", f"h = {text}", state={"v": 0.0}, params={"a": 1.1, "v_threshold": 1e9}
        )
        out = nj.multistep(model, x, record="h", backend=backend)
        a, c = torch.tensor(1.1), torch.tensor(0.01)
        v, rows = torch.zeros(3), []
        for now in x:
            h = v if text is chain else now
            operand = now if text is chain else a if text is product else c
            for sign in loop:
                functions = {"+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div}
                h = functions[sign](h, operand)
            v = torch.tanh(h) if text is inside else h
            rows.append(v)
        want = torch.stack(rows)
        if text is inside:
            assert_near(out.record["h"], want, 1e-6, text[:20])
        else:
            assert_same_bits(out.record["h"], want.detach(), text[:20])
        slopes = [torch.autograd.grad(h.sum(), x)[0] for h in (out.record["h"], want)]
        assert_near(*slopes, 1e-4, f"slope of {text[:20]}")


def test_a_long_reset_of_ones_own_may_be_detached() -> None:
    """`detach_reset` cuts s in all parts of a long assignment to v."""
    text = "h = v + x\nv = h - s" + " + 0.001 * s - 0.001 * h" * 40
    model = nj.NeuronModel("own", text, state={"v": 0.0})
    x = torch.rand(5, 4, dtype=torch.float64).add(0.4).requires_grad_()
    out = nj.multistep(model, x, detach_reset=True, record="v")
    v, rows = torch.zeros(4, dtype=torch.float64), []
    for now in x:
        h = v + now
        s = (h >= 1).double().detach()
        v = h - s
        for _ in range(40):
            v = v + 0.001 * s - 0.001 * h
        rows.append(v)
    want = torch.stack(rows)
    assert_near(out.record["v"], want, 1e-12, "v")
    slopes = [torch.autograd.grad(v.sum(), x)[0] for v in (out.record["v"], want)]
    assert_near(*slopes, 1e-12, "slope")


DEEPEST = {
    "sums": "x" + " + x" * 999,
    "functions": "tanh(" * 98 + "x" + ")" * 98,
    "powers": "x" + "**0.9" * 95,
    "right": "x - (" * 98 + "x" + ")" * 98,
    "choices": "maximum(0.1, " * 90 + "x" + ")" * 90,
    "alternating": "tanh(0.1 + 0.1 * sqrt(" * 24 + "x" + "))" * 24,
    "wheres": "where(x > 0.1, 0.5 * " * 45 + "x" + ", sqrt(x))" * 45,
    "chains in chains": "tanh(" * 19 + "x" + (" + 0.01" * 48 + ")") * 19,
}


@pytest.mark.parametrize("shape", DEEPEST)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_the_largest_blocks_that_are_accepted_work(shape: str, backend: str) -> None:
    """No recursion of Python's overflows, in a process that stands deep in its stack already."""
    x = torch.full((1, 3), 0.5, dtype=torch.float64).requires_grad_()

    def deeper(levels: int) -> tuple[Tensor, ...]:
        if levels:
            return deeper(levels - 1)
        model = nj.NeuronModel("deep", f"h = {DEEPEST[shape]}", state={"v": 0.0})
        out = nj.multistep(model, x, record="h", backend=backend)
        return out.record["h"], *torch.autograd.grad(out.record["h"].sum(), x)

    value, slope = deeper(200)
    step = 1e-6
    text = DEEPEST[shape]
    places = {"tanh": math.tanh, "sqrt": math.sqrt, "maximum": max}
    if shape != "wheres" and shape != "sums":

        def f(x: float) -> float:
            return float(eval(text, {}, {**places, "x": x}))  # noqa: S307 our own text

        near = torch.full_like(value, f(0.5))
        torch.testing.assert_close(value.detach(), near)
        rise = (f(0.5 + step) - f(0.5 - step)) / (2 * step)
        torch.testing.assert_close(slope, torch.full_like(slope, rise), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "text",
    ["x" + " + x" * 1001, "tanh(" * 101 + "x" + ")" * 101, "x" + "**x" * 101, "-" * 101 + "x"],
    ids=["sums", "functions", "powers", "signs"],
)
def test_larger_ones_are_refused(text: str) -> None:
    with pytest.raises(nj.EquationError, match="too large"):
        nj.NeuronModel("deep", f"h = {text}", state={"v": 0.0})
    with pytest.raises(nj.EquationError, match="too large"):
        nj.Surrogate("deep", text.replace("x", "u"))


# --- names that mean something in the generated code ---------------------------------------------


def words(text: str) -> list[str]:
    return text.split()


# what our templates append to the names of states, and where that leads
STATES = words("v_d v_in v_now v_ahead v_seq v_last v_ptr v_value v_grad v_1 s_1 d_v after_v z_v")
# our templates' and headers' own words
OURS = words(
    "K LANES LOADS N T Seq Row Args INLINE UNROLL FOR_LANES ENTRY OMP_FOR real storage half_t "
    "bfloat16_t m_exp m_pow2 to_real from_real load_row step slope sg_alpha p_tau dx spike charged "
    "sums first valid lane x_now x_grad s_d s_now h_d h_now v_inner v_count tau_d tau_grad alpha "
    "alpha_sg u checkpoints partials xd"
)
# words of C, C++ and CUDA
THEIRS = words(
    "std errno NAN INFINITY NULL EOF M_PI main printf linux unix assert float32 uint16_t int32_t "
    "size_t isnan fmaf expf j0 y0 y1 gamma index threadIdx blockIdx warpSize float4 dim3 extern "
    "asm typeof restrict noinline and xor bool char half min max round signbit time clock nan inf"
)


def accepted(words: list[str]) -> list[str]:
    """The words that the language takes as a name."""
    names = []
    for name in words:
        try:
            nj.NeuronModel("m", f"h = v + x * {name}", state=dict(v=0.0), params={name: 0.5})
        except nj.EquationError:
            continue
        names.append(name)
    return names


@each_place
@pytest.mark.parametrize("role", ["state", "parameter", "temporary"])
def test_an_accepted_name_works(role: str, device: str, backend: str) -> None:
    """Whatever a name means to a compiler or to our templates: rejected at the door, or harmless.

    All together in one model, and beside each other, with every gradient asked for.
    """
    names = accepted({"state": STATES, "temporary": THEIRS, "parameter": OURS + THEIRS}[role])
    assert len(names) > 10, "so many cannot all be forbidden"
    rows = [f"({' + '.join(names[i : i + 12])})" for i in range(0, len(names), 12)]
    total = " + ".join(rows)  # in rows: 100 levels are the limit
    x = torch.rand(4, 3, dtype=torch.float64, device=device, requires_grad=True)
    if role == "state":
        text = f"h = v + x * ({total})\n" + "\n".join(f"{n} = {n} * 0.5 + s * 0.125" for n in names)
        model = nj.NeuronModel("m", text, state={"v": 0.0, **dict.fromkeys(names, 0.01)})
        params = {}
    elif role == "parameter":
        model = nj.NeuronModel(
            "m", f"h = v + x * ({total})", state=dict(v=0.0), params=dict.fromkeys(names, 0.01)
        )
        params = {
            n: torch.full(
                (3,) if i % 2 else (), 0.01, dtype=torch.float64, device=device, requires_grad=True
            )
            for i, n in enumerate(names)
        }
    else:
        text = "\n".join(f"{n} = x * 0.01" for n in names) + f"\nh = v + x * ({total})"
        model, params = nj.NeuronModel("m", text, state=dict(v=0.0)), {}
    record = tuple(model.state)[:3]
    out = nj.multistep(model, x, record=record, backend=backend, **params)
    want = nj.multistep(model, x, record=record, backend="eager", **params)
    for name in record:
        torch.testing.assert_close(out.record[name], want.record[name], msg=name)
    leaves = [x, *params.values()]
    grads = [
        torch.autograd.grad(sum(r.sum() for r in o.record.values()), leaves) for o in (out, want)
    ]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other)
