"""Bad inputs: one sentence at the caller's line, never a crash, never a silently wrong result."""

from __future__ import annotations

import math
import stat
import warnings
from pathlib import Path

import pytest
import torch
from support import each_device, inputs, library_model

import neuronjit as nj
from neuronjit import settings


def test_error_classes_are_also_the_builtin_ones() -> None:
    assert issubclass(nj.SpecError, ValueError) and issubclass(nj.InputTypeError, TypeError)
    assert issubclass(nj.EquationError, nj.SpecError)
    for name in ("CompileError", "BackendError", "MissingKernelError"):
        assert issubclass(getattr(nj, name), RuntimeError)


@pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf, -0.0])
@pytest.mark.parametrize(
    ("model", "name"),
    [("LIF", "tau"), ("LIF_NO_DECAY", "tau"), ("QIF", "tau"), ("QIF", "a0"), ("EIF", "delta_T"),
     ("EIF", "tau"), ("IZHIKEVICH", "tau_w"), ("IZHIKEVICH", "a0")],
)  # fmt: skip
def test_parameters_that_must_be_positive(model: str, name: str, value: float) -> None:
    with pytest.raises(nj.SpecError, match=rf"{name} must be finite.*got {value}"):
        nj.multistep(library_model(model), inputs((4, 8)), **{name: value})


@pytest.mark.parametrize("value", [0.5, 1, 1.0, 1e-3, 1e6])
def test_any_positive_tau_is_allowed(value: float) -> None:
    """Layers ask for tau > 1 (a convention); the functions only for what divides."""
    out = nj.multistep(nj.neurons.LIF, inputs((4, 8)), tau=value)
    assert torch.equal(
        out.spikes, nj.multistep(nj.neurons.LIF, inputs((4, 8)), tau=value, backend="eager").spikes
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_surrogate_parameters_are_finite(value: float) -> None:
    with pytest.raises(nj.SpecError, match=r"alpha.*finite"):
        nj.surrogates.ATan(alpha=value)


def test_surrogate_parameters_are_known_numbers() -> None:
    with pytest.raises(nj.SpecError, match=r"'beta'.*Known: alpha"):
        nj.surrogates.ATan(beta=1.0)
    with pytest.raises(nj.InputTypeError, match="alpha"):
        nj.surrogates.ATan(alpha="two")
    with pytest.raises(nj.SpecError, match=r"\bn\b"):
        nj.surrogates.SquarewaveFourierSeries(n=0)


def test_reset_at_or_above_the_threshold_warns() -> None:
    for v_reset in (1.0, 2.0):
        with pytest.warns(UserWarning, match=r"v_reset.*v_threshold"):
            nj.multistep(nj.neurons.IF, inputs((4, 9 + int(v_reset))), v_reset=v_reset)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nj.multistep(nj.neurons.IF, inputs((4, 8)), v_reset=2.0, reset="soft")
        nj.multistep(nj.neurons.IF, inputs((4, 8)), v_reset=0.5)


@pytest.mark.cuda
@pytest.mark.parametrize("row", ["state", "parameter"])
def test_tensors_on_two_devices(row: str) -> None:
    x = inputs((4, 8)).cuda()
    state = {"v": torch.zeros(8)} if row == "state" else None
    params = {"tau": torch.tensor(2.0)} if row == "parameter" else {}
    with pytest.raises(nj.SpecError, match=r"cuda:0.*cpu"):
        nj.multistep(nj.neurons.LIF, x, state, **params)


@each_device
def test_unusual_but_right(device: str) -> None:
    """Parameters, subclasses and views that are as good as tensors."""
    x = inputs((4, 8)).to(device)
    want = nj.multistep(nj.neurons.LIF, x).spikes
    assert torch.equal(nj.multistep(nj.neurons.LIF, torch.nn.Parameter(x)).spikes, want)
    assert torch.equal(nj.multistep("LIF", x).spikes, want)
    integers = nj.multistep(nj.neurons.LIF, x, {"v": 0}, tau=2, v_threshold=1)
    assert torch.equal(integers.spikes, want)
    import numpy as np

    assert torch.equal(nj.multistep(nj.neurons.LIF, x, tau=np.float64(2)).spikes, want)
    assert torch.equal(nj.multistep(nj.neurons.LIF, x, record="v").spikes, want)
    assert torch.equal(nj.multistep(nj.neurons.LIF, x, record=["v", "v"]).spikes, want)


# --- compilers that are missing or fail ----------------------------------------------------------

GOOD = [0.0, 1.0, 0.0]


def compiled_call(backend: str | None = "cpu") -> list[float]:
    """A call that must compile: a model that no other call has had."""
    compiled_call.count += 1  # type: ignore[attr-defined]
    return call_of(compiled_call.count, backend)  # type: ignore[attr-defined]


compiled_call.count = 0  # type: ignore[attr-defined]


def call_of(number: int, backend: str | None = "cpu") -> list[float]:
    model = nj.NeuronModel(f"fresh{abs(number)}", f"h = v + x + 0 * {number}", state={"v": 0.0})
    return nj.multistep(model, torch.full((3, 4), 0.75), backend=backend).spikes[:, 0].tolist()


def compiler(tmp_path: Path, script: str) -> str:
    path = tmp_path / "a compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return f"'{path}'"


@pytest.mark.parametrize(
    "variables",
    [{"PATH": "/nonexistent"}, {"CXX": "/nonexistent/g++"}, {"CXX": "no-such-compiler"}],
)
def test_no_compiler(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced: an error with what was looked for and how to get it. Else eager, with one warning.

    What CXX names is used or missed: no other compiler takes its place in silence.
    """
    monkeypatch.delenv("CXX", raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(nj.BackendError, match=variables.get("CXX", r"g\+\+")) as caught:
        compiled_call()
    assert "install" in str(caught.value).lower() and "CXX" in str(caught.value)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):  # three models: what is missing is the same
            assert compiled_call(None) == GOOD
    messages = [str(w.message) for w in warned]
    assert len(messages) == 1 and "eager" in messages[0]
    assert variables.get("CXX", "g++") in messages[0]


@pytest.mark.parametrize(
    "cxx", ["g++; touch X", "g++ && touch X", "$(touch X)", "`touch X`", "g++ | tee X", "g++ 'open"]
)
def test_cxx_reaches_no_shell(tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises((nj.BackendError, nj.CompileError)):
        compiled_call()
    assert list(tmp_path.iterdir()) == []


def test_cxx_with_flags_and_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cxx = compiler(tmp_path, 'exec g++ "$@"')
    monkeypatch.setenv("CXX", f"{cxx} -DUNUSED=1")
    assert compiled_call() == GOOD


VERSION = 'case "$*" in *--version*) echo "fake g++ 13"; exit 0;; esac'


def test_failing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own words, the source's path, and nothing kept: it works once the cause is gone."""
    cxx = compiler(tmp_path, f'{VERSION}\necho "fatal: the moon is in the wrong phase" >&2; exit 1')
    monkeypatch.setenv("CXX", cxx)
    for _ in range(2):
        with pytest.raises(nj.CompileError, match="the moon is in the wrong phase") as caught:
            call_of(-1)
        words = [word.strip(";:,()'") for word in str(caught.value).split()]
        sources = [Path(w) for w in words if w.endswith(".cpp") and Path(w).exists()]
        assert sources, f"no readable source is named in: {caught.value}"
        assert "step_" in sources[0].read_text()
        sources[0].unlink()
    compiler(tmp_path, f'{VERSION}\nexec g++ "$@"')
    before = nj.stats()["compiled"]
    assert call_of(-1) == GOOD
    assert nj.stats()["compiled"] == before + 1


def test_failing_compiler_in_auto_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, forward and backward, with one warning at the user's line; the compiler rests then."""
    monkeypatch.setattr(settings, "_warned", {})
    log = tmp_path / "log"
    script = f'{VERSION}\necho x >> "{log}"; echo "fatal: the wrong phase" >&2; exit 1'
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    model = nj.NeuronModel("phase", "h = v * 0.5 + x + 0 * 3", state={"v": 0.0})
    x, grads = torch.full((3, 4), 0.75, requires_grad=True), []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for backend in ("auto", "auto", "eager"):
            out = nj.multistep(model, x, backend=backend)
            grads.append(torch.autograd.grad(out.spikes.sum() + out.state["v"].sum(), x)[0])
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[2])
    (warning,) = warned
    assert warning.filename == __file__ and "eager" in str(warning.message)
    assert log.read_text().count("x") == 1


def test_a_backward_that_cannot_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of forward is there and that of backward cannot be had: eager goes back."""
    monkeypatch.setattr(settings, "_warned", {})  # the same reason may have been given already
    model = nj.NeuronModel("halfway", "h = v * 0.5 + x + 0 * 5", state={"v": 0.0})
    x = torch.full((3, 4), 0.75, requires_grad=True)
    spikes = nj.multistep(model, x).spikes
    (want,) = torch.autograd.grad(nj.multistep(model, x, backend="eager").spikes.sum(), x)
    monkeypatch.setenv("CXX", compiler(tmp_path, f"{VERSION}\necho 'fatal: half' >&2; exit 1"))
    with pytest.warns(UserWarning, match="eager"):
        (grad,) = torch.autograd.grad(spikes.sum(), x)
    assert torch.equal(grad, want)


@pytest.mark.parametrize(
    "script",
    [
        "exit 0",  # says it worked, and wrote nothing
        'while [ "$1" != -o ]; do shift; done; : > "$2"',  # an empty file
        'while [ "$1" != -o ]; do shift; done; echo no library > "$2"',
        "kill -9 $$",
        "head -c 10000000 /dev/zero | tr '\\0' 'x' >&2; exit 1",  # megabytes of complaint
        'i=0; while [ $i -lt 5000 ]; do echo "error $i" >&2; i=$((i+1)); done; exit 1',
    ],
    ids=["nothing", "empty", "garbage", "killed", "one long line", "many lines"],
)
def test_compiler_that_lies_or_dies(
    tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, f"{VERSION}\n{script}"))
    with pytest.raises(nj.CompileError) as caught:
        compiled_call()
    message = str(caught.value)
    assert len(message) < 20_000 and message.count("\n") < 60
    monkeypatch.delenv("CXX")
    before = nj.stats()["compiled"]
    assert call_of(compiled_call.count) == GOOD  # type: ignore[attr-defined]
    assert nj.stats()["compiled"] == before + 1, "a failed build was kept"
