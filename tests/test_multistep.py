"""Every model x reset x detach x surrogate x dtype, forward and backward, against the oracle."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from support import (
    DTYPES,
    check,
    each_device,
    each_reset,
    inputs,
    library_model,
    slow,
    starts,
)

import neuronjit as nj

OTHER_SURROGATES = [name for name in oracle.SURROGATES if name not in oracle.SEED_SURROGATES]
# parameters away from their defaults, where a default would hide a term (a = b = 0, v_reset = 0)
TELLING = {
    "IF": {"v_reset": 0.2},
    "LIF": {"tau": 1.7, "v_reset": 0.2},
    "LIF_NO_DECAY": {"tau": 1.7, "v_reset": 0.2},
    "PLIF": {"reciprocal_tau": 0.4, "v_reset": 0.2},
    "PLIF_NO_DECAY": {"reciprocal_tau": 0.4, "v_reset": 0.2},
    "QIF": {"v_rest": 0.1, "a0": 0.9},
    "EIF": {"v_rest": 0.05, "delta_T": 0.7},
    "IZHIKEVICH": {"a": 0.3, "b": 0.2, "v_reset": 0.15, "tau_w": 1.9},
    "alif": {"v_reset": 0.2},
    "refractory": {"v_reset": 0.1},
    "klif": {"v_reset": 0.1},
}


def telling(model: str, reset: str) -> dict[str, float]:
    params = dict(TELLING.get(model, {}))
    if reset == "soft":
        params.pop("v_reset", None)  # the equations then read 0
    return params


def one_cell(
    model: str,
    reset: str,
    detach: bool,
    surrogate: oracle.Surrogate,
    dtype: torch.dtype,
    device: str,
    backend: str | None = None,
) -> None:
    x = inputs((7, 41), dtype).requires_grad_()
    state = {name: value.requires_grad_() for name, value in starts(model, (41,)).items()}
    check(
        model, x, state, surrogate=surrogate, reset=reset, detach_reset=detach, device=device,
        backend=backend, **telling(model, reset),
    )  # fmt: skip


NUMBERS = {
    "Sigmoid": {"alpha": 1.5},
    "ATan": {"alpha": 5.0},
    "PiecewiseLeakyReLU": {"w": 0.3, "c": 0.1},
    "S2NN": {"alpha": 2.0, "beta": 0.7},
    "QPseudoSpike": {"alpha": 3.5},
    "LeakyKReLU": {"leak": 0.2, "k": 1.3},
    "FakeNumericalGradient": {"alpha": 2.0},
    "LogTailedReLU": {"alpha": 0.1},
    "PiecewiseQuadratic": {"alpha": 1.6},
    "PiecewiseExp": {"alpha": 2.5},
    "SoftSign": {"alpha": 3.0},
    "SuperSpike": {"alpha": 2.0},
    "FastSigmoid": {"k": 4.0},
    "Erf": {"alpha": 1.1},
    "NonzeroSignLogAbs": {"alpha": 2.2},
    "Rect": {"alpha": 0.8},
    "StraightThrough": {},
    "SquarewaveFourierSeries": {"n": 4, "T": 3.0},
    "SpikeRateEscape": {"beta": 2.0, "k": 3.0},
    "Gaussian": {"sigma": 0.4},
    "Tanh": {"k": 2.0},
}


def covering_rows() -> list[tuple[str, str, bool, str, torch.dtype]]:
    """Few rows in which every pair of options meets, but for models and surrogates.

    Those two know nothing of each other, and a new kernel costs a third of a second of compiler:
    each surrogate meets two models. Every combination runs behind the marker `slow`, and in eager
    PyTorch below.
    """
    models = list(oracle.SEED)
    names = [*oracle.SEED_SURROGATES, *OTHER_SURROGATES]
    pairs = [(models[(i + j) % 8], name) for i, name in enumerate(names) for j in (0, 3)]
    options = list(itertools.product(("hard", "soft"), (False, True), DTYPES))
    seen: set[tuple[object, object]] = set()
    rows = []
    for model, surrogate in pairs:

        def fresh(option: tuple[str, bool, torch.dtype]) -> set[tuple[object, object]]:
            return set(itertools.combinations((model, surrogate, *option), 2)) - seen  # noqa: B023

        best = max(options, key=lambda option: len(fresh(option)))
        seen |= fresh(best)
        rows.append((model, best[0], best[1], surrogate, best[2]))
        options = [*options[1:], options[0]]  # ties take turns
    return rows


def row_id(value: object) -> str:
    if isinstance(value, bool):
        return "detach" if value else "attach"
    return str(value).removeprefix("torch.")


@each_device
@pytest.mark.parametrize(
    ("model", "reset", "detach", "surrogate", "dtype"), covering_rows(), ids=row_id
)
def test_covering_grid(
    model: str, reset: str, detach: bool, surrogate: str, dtype: torch.dtype, device: str
) -> None:
    one_cell(model, reset, detach, oracle.Surrogate(surrogate), dtype, device)
    if surrogate != "SquarewaveFourierSeries" or device == "cuda":  # n shapes its kernel
        one_cell(
            model, reset, detach, oracle.Surrogate(surrogate, **NUMBERS[surrogate]), dtype, device
        )


KINDS = [
    [(reset, detach, dtype) for detach, dtype in zip((False, True) * 2, dtypes, strict=True)]
    for dtypes in (DTYPES, DTYPES[1:] + DTYPES[:1])
    for reset in ("hard", "soft")
]


@pytest.mark.slow
@each_device
@pytest.mark.parametrize("model", oracle.SEED)
@pytest.mark.parametrize("surrogate", oracle.SURROGATES)
def test_whole_grid(model: str, surrogate: str, device: str) -> None:
    """Every model with every surrogate in every dtype; the four sets of kinds take turns."""
    turn = list(oracle.SEED).index(model) + list(oracle.SURROGATES).index(surrogate)
    for reset, detach, dtype in KINDS[turn % len(KINDS)]:
        one_cell(model, reset, detach, oracle.Surrogate(surrogate), dtype, device)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (model, dtype) if dtype == torch.float32 or model == "LIF" else slow(model, dtype)
        for model in oracle.SEED
        for dtype in DTYPES
    ],
    ids=row_id,
)
def test_whole_grid_in_eager_pytorch(model: str, dtype: torch.dtype) -> None:
    """The eager reference evaluates the texts that kernels are printed from, without compiling."""
    for reset, detach, surrogate in itertools.product(
        ("hard", "soft"), (False, True), oracle.SURROGATES
    ):
        if detach and surrogate != "ATan":
            continue  # nothing of the surrogate depends on it
        one_cell(model, reset, detach, oracle.Surrogate(surrogate), dtype, "cpu", backend="eager")


KINKED = [
    "PiecewiseLeakyReLU", "S2NN", "LeakyKReLU", "FakeNumericalGradient", "LogTailedReLU",
    "PiecewiseQuadratic", "Rect", "SpikeRateEscape",
]  # fmt: skip


def at_kinks(name: str, device: str, backend: str | None = None) -> None:
    """The slope exactly on every edge of a surrogate, on the numbers beside it, and far away."""
    surrogate = oracle.Surrogate(name)
    kinks = sorted({0.0, *surrogate.kinks()})
    # h - theta for h = 1 + u is u itself where it is a small multiple of the spacing near 1
    u = torch.tensor([k + d * 2.0**-20 for k in kinks for d in (-1, 0, 1)] + [-7.0, 7.0])
    x = (1 + u)[None].requires_grad_()
    check("IF", x, surrogate=surrogate, device=device, backend=backend, record=(), arriving=["s"])


@pytest.mark.parametrize("name", oracle.SURROGATES)
def test_kinks_in_eager_pytorch(name: str) -> None:
    at_kinks(name, "cpu", "eager")


@each_device
@pytest.mark.parametrize("name", KINKED)
def test_kinks(name: str, device: str) -> None:
    at_kinks(name, device)


@each_device
@pytest.mark.parametrize(
    ("model", "reset", "detach"),
    [
        (m, *way) if j == i % 2 else slow(m, *way)
        for i, m in enumerate(oracle.USER)
        for j, way in enumerate((("hard", False), ("soft", True)))
    ],
    ids=row_id,
)
def test_models_from_equations(model: str, reset: str, detach: bool, device: str) -> None:
    scale = 12.0 if model == "classic_izhikevich" else 1.0
    steps = 20 if model == "classic_izhikevich" else 5  # it needs some steps to reach 30 mV
    x = inputs((steps, 33), scale=scale).requires_grad_()
    state = {name: value.requires_grad_() for name, value in starts(model, (33,)).items()}
    out = check(
        model, x, state, reset=reset, detach_reset=detach, device=device, **telling(model, reset)
    )
    assert 0 < out.spikes.mean() < 1


@each_device
@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("alif", torch.float16), ("adex", torch.bfloat16), ("clif", torch.float64),
        ("leaky", torch.bfloat16), ("refractory", torch.float64), ("klif", torch.float16),
        ("rotating", torch.float64),
    ],
    ids=row_id,
)  # fmt: skip
def test_models_from_equations_in_other_dtypes(model: str, dtype: torch.dtype, device: str) -> None:
    state = {name: value.requires_grad_() for name, value in starts(model, (33,)).items()}
    check(model, inputs((5, 33), dtype).requires_grad_(), state, device=device)


@each_device
@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (model, dtype) if dtype == torch.float32 or model == "LIF" else slow(model, dtype)
        for model in ("IF", "LIF", "QIF", "leaky")
        for dtype in DTYPES
    ],
    ids=row_id,
)
def test_equality_fires(model: str, dtype: torch.dtype, device: str) -> None:
    """Exactly on the threshold: h >= theta fires, unless the model asks for a strict comparison."""
    x = {"IF": 0.5, "LIF": 1.5, "QIF": 2.0, "leaky": 1.0}[model]
    start = {"IF": 0.5, "LIF": 0.5, "QIF": 0.0, "leaky": 0.0}[model]
    out = check(
        model, torch.full((7, 41), x, dtype=dtype), {"v": torch.full((41,), start)}, device=device
    )
    assert out.record["h"][0].eq(1).all()
    assert out.spikes[0].eq(0 if model == "leaky" else 1).all()


@each_device
@pytest.mark.parametrize(
    "tau", [1.0000001, 1.1, 1.5, 2.0, 3.0, 7.3, 10.0, 20.0, 1e3, 1.6777217e7, 0.3]
)
def test_division_is_correctly_rounded(tau: float, device: str) -> None:
    """However a kernel divides by a number that stays, it must give the quotient's very bits."""
    generator = torch.Generator().manual_seed(int(tau * 10))
    x = torch.randn(1, 200_003, generator=generator) * torch.exp(
        torch.randn(200_003, generator=generator) * 8
    )
    for dtype in (torch.float32, torch.float64):
        check("LIF", x.to(dtype), tau=tau, device=device)


@each_device
def test_division_at_the_ends_of_the_range(device: str) -> None:
    """Overflow, underflow and subnormal numbers give the oracle's spikes, at any threshold."""
    ends = torch.tensor(
        [1e-45, 3e-42, 1.1754944e-38, 2.5e-38, 1e-30, 1.0, 1e30, 1.7e38, 3.4028235e38]
    )
    x = torch.cat([ends, -ends]).expand(2, -1)
    for tau in (0.3, 0.5, 2.0, 3.0, 1e30, 1e-30, 2.0**-126, 2.0**127):
        for threshold in (1.0, 1e-44, 1e38):
            out = nj.multistep(
                nj.neurons.LIF, x.to(device), tau=tau, v_threshold=threshold, record=("h",)
            )
            want = oracle.run(
                "LIF", x, surrogate=oracle.Surrogate("ATan"), tau=tau, v_threshold=threshold
            )
            wrong = out.spikes.cpu() != want.spikes
            assert not wrong.any(), (
                f"tau={tau}, threshold={threshold}: spikes differ at x={x[wrong].tolist()}"
            )


@each_device
@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        *itertools.product(["IF", "LIF", "QIF", "IZHIKEVICH"], DTYPES[:1]),
        *itertools.product(["PLIF"], DTYPES[1:]),
    ],
    ids=row_id,
)
@each_reset
def test_nan_and_infinity(model: str, reset: str, dtype: torch.dtype, device: str) -> None:
    """As the equations say, bit for bit; and a NaN stays with its neuron."""
    x = inputs((7, 16), dtype)
    x[2, 3], x[2, 5], x[2, 7], x[0, 9] = float("nan"), float("inf"), -float("inf"), float("nan")
    out = check(model, x.requires_grad_(), reset=reset, device=device)
    assert not out.spikes.isnan().any(), "a NaN does not reach the threshold: it does not fire"
    others = [i for i in range(16) if i not in (3, 5, 7, 9)]
    assert out.record["v"][:, others].isfinite().all()


@each_device
@each_reset
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_infinite_input_at_the_end_spoils_no_earlier_gradient(
    bad: float, reset: str, device: str
) -> None:
    """Nothing follows the last step: v after it gets no gradient, and 0 * inf must not make one.

    An overflowed activation of half-precision training would otherwise poison its whole history.
    """
    x = inputs((7, 16))
    x[-1, 3:6] = bad
    check("LIF", x.requires_grad_(), reset=reset, device=device, record=(), arriving=["s"])


@each_device
def test_numbers_compile_nothing(device: str) -> None:
    """tau, thresholds, surrogate parameters and T are arguments of a kernel, not part of it."""
    x = inputs((5, 32)).to(device).requires_grad_()

    def call(x: torch.Tensor, tau: float, threshold: float, alpha: float) -> None:
        out = nj.multistep(
            nj.neurons.LIF,
            x,
            surrogate=nj.surrogates.ATan(alpha=alpha),
            tau=tau,
            v_threshold=threshold,
        )
        out.spikes.sum().backward()

    call(x, 2.0, 1.0, 2.0)
    before = nj.stats()["compiled"]
    for tau, threshold, alpha in ((2.5, 1.0, 2.0), (2.0, 0.7, 2.0), (2.0, 1.0, 3.3)):
        call(x, tau, threshold, alpha)
    call(inputs((6, 32)).to(device).requires_grad_(), 2.0, 1.0, 2.0)
    assert nj.stats()["compiled"] == before


def test_model_and_surrogate_by_name() -> None:
    x = inputs((5, 8))
    named = nj.multistep("lif", x, surrogate="sigmoid")
    assert torch.equal(
        named.spikes, nj.multistep(nj.neurons.LIF, x, surrogate=nj.surrogates.Sigmoid()).spikes
    )


def test_two_models_of_one_name_stay_apart() -> None:
    """The name of a model is a label: kernels are told apart by the equations."""
    x = inputs((5, 8))
    plus, minus = (nj.NeuronModel("twin", f"h = v {sign} x", state=dict(v=0.0)) for sign in "+-")
    assert torch.equal(nj.multistep(plus, x).spikes, nj.multistep(library_model("IF"), x).spikes)
    assert torch.equal(nj.multistep(minus, -x).spikes, nj.multistep(plus, x).spikes)
