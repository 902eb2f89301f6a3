"""The table of unusual inputs: rows x models x dtypes x devices, with the count of right cells.

What each row must do stands beside it: an error of ours that says what is wrong, or the numbers of
an ordinary call. A good call follows every cell: the process and the CUDA context live on.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import DTYPES, each_device, inputs, library_model, slow
from torch import Tensor

import neuronjit as nj

MODELS = ("IF", "LIF", "PLIF", "IZHIKEVICH")
Cell = Callable[[nj.NeuronModel, Tensor], None]  # x is [6, 8]; asserts or raises where wrong


def run(model: nj.NeuronModel, x: Any, *args: Any, **options: Any) -> nj.Output:
    return nj.multistep(model, x, *args, **options)


def refused(
    error: type[Exception], words: str, do: Callable[[nj.NeuronModel, Tensor], Any]
) -> Cell:
    """The call raises our error, in these words, twice (a second call is a warm one)."""

    def cell(model: nj.NeuronModel, x: Tensor) -> None:
        for _ in range(2):
            with pytest.raises(error, match=f"(?s){words}") as caught:
                do(model, x)
            assert isinstance(caught.value, nj.NeuronJitError) and len(str(caught.value)) < 500

    return cell


def equal(make: Callable[[Tensor], Tensor]) -> Cell:
    """x in another layout: the bits and gradients of the contiguous run, x itself untouched."""

    def cell(model: nj.NeuronModel, x: Tensor) -> None:
        view = make(x)
        before = view.clone()
        dense = view.detach().clone(memory_format=torch.contiguous_format)
        grads = []
        for given in (view.detach().requires_grad_(), dense.requires_grad_()):
            out = run(model, given, record=("v",))
            (grad,) = torch.autograd.grad(out.spikes.sum() + out.record["v"].sum(), given)
            grads.append((out.spikes, out.state["v"], out.record["v"], grad))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(view, before)

    return cell


def like_eager(**values: Any) -> Cell:
    """NaN and infinity in x: as the eager reference, forward and backward."""

    def cell(model: nj.NeuronModel, x: Tensor) -> None:
        x = x.clone()
        x[2, 1], x[3, 2], x[4, 3] = math.nan, math.inf, -math.inf
        results = []
        for backend in (None, "eager"):
            given = x.clone().requires_grad_()
            out = run(model, given, backend=backend)
            (grad,) = torch.autograd.grad(out.spikes.sum(), given)
            results.append((out.spikes, out.state["v"], grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-5, equal_nan=True)
        assert torch.equal(results[0][0].nan_to_num(7), results[1][0].nan_to_num(7))

    return cell


def empty(steps: int, n: int) -> Cell:
    def cell(model: nj.NeuronModel, x: Tensor) -> None:
        v = torch.full((n,), 0.25, device=x.device, requires_grad=True)
        given = x.new_zeros((steps, n)).requires_grad_()
        out = run(model, given, {"v": v}, record=("h",))
        assert out.spikes.shape == out.record["h"].shape == (steps, n)
        assert out.spikes.dtype == x.dtype
        if not steps:
            assert torch.equal(out.state["v"], v.to(out.state["v"].dtype))
        grads = torch.autograd.grad(
            out.spikes.sum() + out.state["v"].sum(), [given, v], allow_unused=True
        )
        assert grads[1] is not None and grads[1].shape == v.shape
        assert grads[0] is None or not grads[0].any()

    return cell


def misaligned(model: nj.NeuronModel, x: Tensor) -> None:
    equal(lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape))(model, x)
    equal(lambda x: x[1:])(model, x)


def mixed_states(model: nj.NeuronModel, x: Tensor) -> None:
    """A float32 state for half x is kept in float32; the output has x's dtype."""
    for dtype in DTYPES:
        out = run(model, x, {"v": torch.full((8,), 0.25, dtype=dtype, device=x.device)})
        same = run(model, x, {"v": 0.25})
        assert out.spikes.dtype == x.dtype and torch.equal(out.spikes, same.spikes)
        want = torch.float64 if x.dtype == torch.float64 else torch.float32
        assert out.state["v"].dtype == want and torch.equal(out.state["v"], same.state["v"])


def fills(model: nj.NeuronModel, x: Tensor) -> None:
    want = run(model, x, {"v": torch.full((8,), 0.25, device=x.device)}).spikes
    for value in (0.25, torch.tensor(0.25, device=x.device)):
        assert torch.equal(run(model, x, {"v": value}).spikes, want)
    grown = torch.tensor(0.25, device=x.device).expand(8)
    assert torch.equal(run(model, x, {"v": grown}).spikes, want) and grown.eq(0.25).all()


def one_dimensional(model: nj.NeuronModel, x: Tensor) -> None:
    want = run(model, x[:, :1]).spikes[:, 0]
    assert torch.equal(run(model, x[:, 0]).spikes, want)


def reset_above(model: nj.NeuronModel, x: Tensor) -> None:
    with pytest.warns(UserWarning, match="fires again"):
        run(model, x, v_reset=1.25 + torch.rand(()).item())


def state_gradient(model: nj.NeuronModel, x: Tensor) -> None:
    grads = []
    for backend in (None, "eager"):
        v = torch.full((8,), 0.25, device=x.device, requires_grad=True)
        out = run(model, x, {"v": v}, backend=backend)
        grads.append(torch.autograd.grad(out.spikes.sum() + out.state["v"].sum(), v)[0])
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-4)
    with torch.no_grad():
        assert not run(model, x, {"v": v}).spikes.requires_grad
    with torch.inference_mode():
        assert run(model, x, {"v": v}).spikes.is_inference()


def fake(model: nj.NeuronModel, x: Tensor) -> None:
    from torch._subclasses import FakeTensorMode

    before = nj.stats()
    with FakeTensorMode() as mode:
        out = run(model, mode.from_tensor(x))
    assert (out.spikes.shape, out.spikes.dtype, out.spikes.device) == (x.shape, x.dtype, x.device)
    meta = run(model, x.to("meta"))
    assert (meta.spikes.shape, meta.spikes.dtype) == (x.shape, x.dtype)
    assert nj.stats() == before


def autocast(model: nj.NeuronModel, x: Tensor) -> None:
    want = run(model, x)
    for dtype in (torch.float16, torch.bfloat16):
        given = x.clone().requires_grad_()
        with torch.autocast(x.device.type, dtype):
            out = run(model, given)
        assert out.spikes.dtype == x.dtype and out.state["v"].dtype == want.state["v"].dtype
        assert torch.equal(out.spikes, want.spikes)
        for inside in (True, False):
            with torch.autocast(x.device.type, dtype, enabled=inside):
                (grad,) = torch.autograd.grad(out.spikes.sum(), given, retain_graph=True)
            assert grad.dtype == x.dtype and grad.isfinite().all()


def in_place(what: str) -> Cell:
    def cell(model: nj.NeuronModel, x: Tensor) -> None:
        base = x.clone().requires_grad_()
        given = base * 1
        spikes = run(model, given).spikes
        loss = spikes.square().sum()  # saves the spikes
        (given if what == "x" else spikes).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    return cell


def second(model: nj.NeuronModel, x: Tensor) -> Any:
    given = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(run(model, given).spikes.sum(), given, create_graph=True)
    return grad.sum().backward()


def modules(model: nj.NeuronModel, x: Tensor) -> None:
    layer = nj.nn.Neuron(model, learnable="v_threshold").to(x.device)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 our own
        other.reset()
        assert torch.equal(other(x), want)


def conjugated(model: nj.NeuronModel, x: Tensor) -> None:
    """The imaginary part of a conjugate is a negative view of real numbers."""
    if x.dtype in (torch.float32, torch.float64):
        equal(lambda x: torch.complex(x, -x).conj().imag)(model, x)
        with pytest.raises(nj.InputTypeError, match="complex"):
            run(model, torch.complex(x, x).conj())


class Own(torch.Tensor):
    """A subclass that means something else by its numbers, for all we know."""


def rate(model: nj.NeuronModel) -> str:
    return next(n for n in ("tau", "reciprocal_tau", "v_threshold") if n in model.params)


def zeros(x: Tensor, *shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **{"device": x.device, **options})


def elsewhere(x: Tensor) -> str:
    return "cpu" if x.is_cuda else "meta"


INPUT, SPEC = nj.InputTypeError, nj.SpecError
TABLE: dict[str, Cell] = {
    "T = 0": empty(0, 8),
    "N = 0": empty(6, 0),
    "v_init of another shape": refused(
        SPEC, r"v_init.*\(3,\).*\(8,\)", lambda m, x: run(m, x, {"v": zeros(x, 3)})
    ),
    "v_init of one element": refused(SPEC, "expand", lambda m, x: run(m, x, {"v": zeros(x, 1)})),
    "v_init a number or 0-dim": fills,
    "x expanded": equal(lambda x: x[:, :1].expand(-1, 8)),
    "x expanded in time": equal(lambda x: x[:1].expand(6, -1)),
    "x transposed": equal(lambda x: x.t().contiguous().t()),
    "x strided": equal(lambda x: torch.cat((x, x), 1)[:, ::2]),
    "x misaligned": misaligned,
    "x a negative view": conjugated,
    "v_init of any floating dtype": mixed_states,
    "v_init int64": refused(INPUT, "int64", lambda m, x: run(m, x, {"v": zeros(x, 8).long()})),
    "x int64": refused(INPUT, r"int64.*\.float\(\)", lambda m, x: run(m, x.long())),
    "x bool": refused(INPUT, r"torch\.bool.*\.float\(\)", lambda m, x: run(m, x > 0)),
    "x complex": refused(INPUT, "complex", lambda m, x: run(m, x.float() + 1j)),
    "x sparse": refused(INPUT, "sparse", lambda m, x: run(m, x.float().to_sparse())),
    "x quantized": refused(
        INPUT, "qint8",
        lambda m, x: run(m, torch.quantize_per_tensor(x.cpu().float(), 0.1, 0, torch.qint8)),
    ),
    "x nested": refused(
        INPUT, "nested|jagged",
        lambda m, x: run(m, torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)),
    ),
    "x a subclass": refused(INPUT, "plain.*Own", lambda m, x: run(m, x.as_subclass(Own))),
    "v_init a subclass": refused(
        INPUT, "plain.*Own", lambda m, x: run(m, x, {"v": zeros(x, 8).as_subclass(Own)})
    ),
    "x 0-dim": refused(SPEC, "time dimension", lambda m, x: run(m, x[0, 0])),
    "x [T]": one_dimensional,
    "x NaN and infinite": like_eager(),
    **{
        f"rate {value}": refused(
            SPEC, f"must be finite.*{value}", lambda m, x, v=value: run(m, x, **{rate(m): v})
        )
        for value in (math.nan, math.inf)
    },
    **{
        f"tau {value}": refused(
            SPEC, f"finite and > [01], got {value}",
            lambda m, x, v=value: (
                run(m, x, tau=v) if "tau" in m.params
                else nj.nn.PLIF(v) if "reciprocal_tau" in m.params
                else nj.nn.LIF(v)
            ),
        )
        for value in (0.0, -2.0)
    },
    "threshold nan": refused(
        SPEC, "v_threshold must be finite", lambda m, x: run(m, x, v_threshold=math.nan)
    ),
    "reset above the threshold": reset_above,
    "alpha nan": refused(
        SPEC, "alpha must be finite",
        lambda m, x: run(m, x, surrogate=nj.surrogates.ATan(alpha=math.nan)),
    ),
    "v_init on another device": refused(
        SPEC, "x_seq is on.*v_init is on",
        lambda m, x: run(m, x, {"v": zeros(x, 8, device=elsewhere(x))}),
    ),
    "parameter on another device": refused(
        SPEC, "x_seq is on.*v_threshold is on",
        lambda m, x: run(m, x, v_threshold=zeros(x, 1, device=elsewhere(x))),
    ),
    "meta and FakeTensor": fake,
    "v_init requires grad": state_gradient,
    "autocast": autocast,
    "x changed before backward": in_place("x"),
    "spikes changed before backward": in_place("spikes"),
    "double backward": refused(nj.DifferentiationError, "eager", second),
    "vmap": refused(
        nj.DifferentiationError, "eager",
        lambda m, x: torch.func.vmap(lambda x: run(m, x).spikes)(torch.stack((x, x))),
    ),
    "grad of torch.func": refused(
        nj.DifferentiationError, "eager",
        lambda m, x: torch.func.grad(lambda x: run(m, x).spikes.sum())(x),
    ),
    "jvp": refused(
        nj.DifferentiationError, "eager",
        lambda m, x: torch.func.jvp(lambda x: run(m, x).spikes, (x,), (x,)),
    ),
    "deepcopy and pickle": modules,
    "another backend": refused(
        nj.BackendError, "x_seq is on",
        lambda m, x: run(m, x, backend="cpu" if x.is_cuda else "cuda"),
    ),
}  # fmt: skip
# what is done: (what is asked, error, what its message must say)
REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], type[Exception], str]] = {
    # x
    "x is a list": (lambda m, x: run(m, x.tolist()), INPUT, r"Tensor.*list"),
    "x is None": (lambda m, x: run(m, None), INPUT, r"Tensor.*NoneType"),
    "x is numpy": (lambda m, x: run(m, x.cpu().float().numpy()), INPUT, "ndarray"),
    "x is uint8": (lambda m, x: run(m, x.byte()), INPUT, "uint8"),
    "x is conjugated": (lambda m, x: run(m, (x.float() + 1j).conj()), INPUT, "complex"),
    "x is sparse CSR": (
        lambda m, x: run(m, x.float().to_sparse_csr()), INPUT, "sparse",
    ),
    "x is 8-bit float": (
        lambda m, x: run(m, x.to(torch.float8_e4m3fn)), INPUT, "float8",
    ),
    # states
    "v of another size": (
        lambda m, x: run(m, x, {"v": zeros(x, 4, 8)}), SPEC, r"v.*\(4, 8\).*\(8,\)",
    ),
    "v is complex": (
        lambda m, x: run(m, x, {"v": zeros(x, 8) + 1j}), INPUT, "v.*complex",
    ),
    "v is sparse": (
        lambda m, x: run(m, x, {"v": zeros(x, 8).to_sparse()}), INPUT, "v.*sparse",
    ),
    "v is text": (lambda m, x: run(m, x, {"v": "0"}), INPUT, "v.*str"),
    "v is a list": (lambda m, x: run(m, x, {"v": [0.0] * 8}), INPUT, "v.*list"),
    "v is nan": (lambda m, x: run(m, x, {"v": math.nan}), SPEC, "v.*finite.*nan"),
    "unknown state": (lambda m, x: run(m, x, {"u": 0.0}), SPEC, r"'u'.*Known: v"),
    "state is a tensor": (lambda m, x: run(m, x, zeros(x, 8)), INPUT, "state.*Tensor"),
    "state is a number": (lambda m, x: run(m, x, 0.5), INPUT, "state.*float"),
    "state is a list": (lambda m, x: run(m, x, [0.5]), INPUT, "state.*list"),
    # parameters
    "huge": (
        lambda m, x: run(m, x, **{rate(m): 10**309 if x.dtype == torch.float64 else 1e39}),
        SPEC, "finite and fit",
    ),
    "huge integer": (lambda m, x: run(m, x, **{rate(m): 10**400}), SPEC, "finite"),
    "threshold is text": (
        lambda m, x: run(m, x, v_threshold="1"), INPUT, "v_threshold.*str",
    ),
    "threshold is bool": (lambda m, x: run(m, x, v_threshold=True), INPUT, "bool"),
    "threshold is complex": (lambda m, x: run(m, x, v_threshold=1j), INPUT, "complex"),
    "threshold is None": (lambda m, x: run(m, x, v_threshold=None), INPUT, "NoneType"),
    "threshold of another shape": (
        lambda m, x: run(m, x, v_threshold=zeros(x, 3)), SPEC,
        r"v_threshold.*\(3,\).*\(8,\)",
    ),
    "threshold for each step": (
        lambda m, x: run(m, x, v_threshold=zeros(x, 4, 8)), SPEC,
        r"v_threshold.*\(4, 8\).*\(8,\)",
    ),
    "threshold is int tensor": (
        lambda m, x: run(m, x, v_threshold=zeros(x, 1).long()), INPUT,
        "v_threshold.*int64",
    ),
    "threshold of no element": (
        lambda m, x: run(m, x, v_threshold=zeros(x, 0)), SPEC, r"v_threshold.*\(0,\)",
    ),
    "unknown parameter": (lambda m, x: run(m, x, taw=2.0), SPEC, r"'taw'.*v_threshold"),
    # choices
    "unknown model": (
        lambda m, x: run("lyf", x), SPEC, r"'lyf'.*Known: .*\bif\b.*\blif\b",
    ),
    "model is a class": (lambda m, x: run(nj.NeuronModel, x), INPUT, "model"),
    "model is None": (lambda m, x: run(None, x), INPUT, "model.*NoneType"),
    "unknown surrogate": (
        lambda m, x: run(m, x, surrogate="atn"), SPEC, r"'atn'.*Known: ATan.*Sigmoid",
    ),
    "surrogate is a function": (
        lambda m, x: run(m, x, surrogate=torch.sigmoid), INPUT, "surrogate",
    ),
    "surrogate is None": (lambda m, x: run(m, x, surrogate=None), INPUT, "surrogate"),
    "unknown reset": (lambda m, x: run(m, x, reset="sotf"), SPEC, "'sotf'.*hard.*soft"),
    "reset is None": (lambda m, x: run(m, x, reset=None), SPEC, "None.*hard.*soft"),
    "unknown record": (lambda m, x: run(m, x, record=("v", "z")), SPEC, r"'z'.*h.*v"),
    "record is a number": (lambda m, x: run(m, x, record=3), INPUT, "record.*int"),
    "record of numbers": (lambda m, x: run(m, x, record=[3]), SPEC, "3"),
    "unknown backend": (
        lambda m, x: run(m, x, backend="gpu"), SPEC, "'gpu'.*auto.*cpu.*cuda.*eager",
    ),
}  # fmt: skip
TABLE |= {name: refused(error, words, do) for name, (do, error, words) in REFUSED.items()}
counted = {"right": 0, "cells": 0}


CELLS = [*itertools.product(MODELS, DTYPES)]
QUICK = [cell for cell in CELLS if cell[0] == "LIF" or cell[1] == torch.float32]


@pytest.mark.filterwarnings("ignore")
@each_device
@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize(
    "cells", [QUICK, slow([cell for cell in CELLS if cell not in QUICK])], ids=["", "others"]
)
def test_table(cells: list[tuple[str, torch.dtype]], row: str, device: str) -> None:
    """LIF in every dtype and every model in float32; the others are slow."""
    wrong = []
    for name, dtype in cells:
        model, x = library_model(name), inputs((6, 8), dtype).to(device)
        want = run(model, x).spikes
        counted["cells"] += 1
        try:
            TABLE[row](model, x)
            assert torch.equal(run(model, x).spikes, want)
        except (Exception, pytest.fail.Exception) as error:
            said = f"{type(error).__name__}: {error}"
            wrong.append(f"{name} {dtype}: {said:.300}")
        else:
            counted["right"] += 1
    assert not wrong, f"{len(wrong)} of {len(cells)} cells:\n" + "\n".join(wrong)


def test_count(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled(), warnings.catch_warnings():
        print(f"\ninput table: {counted['right']} of {counted['cells']} cells right", end=" ")
    assert counted["right"] == counted["cells"]


# --- more than 2^31 -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.memory
@pytest.mark.parametrize("numel", [2**31 - 1, 2**31, 2**31 + 8])
def test_wide_indices_forward_and_backward(numel: int) -> None:
    """The last neurons are as right as the first ones; half precision, one step."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 22 * numel:
        pytest.skip("needs about 48 GB of free GPU memory")
    x = torch.full((1, numel), 0.5, dtype=torch.float16, device="cuda")
    x[0, -5:] = 1.75  # farther from the threshold than 0.5: another slope
    x.requires_grad_()
    spikes = nj.multistep(nj.neurons.IF, x, final_state=False).spikes
    assert spikes[0, -8:].tolist() == [0, 0, 0, 1, 1, 1, 1, 1] and not spikes[0, :8].any()
    (grad,) = torch.autograd.grad(spikes, x, torch.ones_like(spikes))
    assert torch.equal(grad[0, -5:], grad[0, -1:].expand(5)) and not torch.equal(
        grad[0, -6], grad[0, -5]
    )
