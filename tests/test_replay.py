"""benchmarks/replay.py: its calls cover the library, and it finds what differs in two trees."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import neuronjit as nj
from neuronjit.kernels import targets
from neuronjit.kernels.spec import DTYPES

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import replay  # noqa: E402 (found through the path set above)
from replay import Case, Pair  # noqa: E402

DIRECTIONS = ("forward", "backward")
LIF = Case("lif", "forward", "float32", 1000, 4)
SIGMOID = Case("if", "backward", "float16", 1000, 4, "Sigmoid", arriving=("s",))
SLOPE = "R(1) / (R(1) + exp_(-a))"  # sigmoid_, which every rendered text has and few kernels use

# --- the calls ------------------------------------------------------------------------------------


def test_every_built_in_model_is_called() -> None:
    """Backward at least, whose kernels do what forward does: a new model is no new line here."""
    found = replay.cases()
    assert found == replay.cases() and found[: len(replay.grid())] == replay.grid()
    assert len(set(map(str, found))) == len(found), "each is named apart"
    built_in = set(nj.neurons.built_in())
    assert built_in <= {c.model for c in found if c.direction == "backward"}


def test_the_calls_cover_all_that_can_be_asked_for() -> None:
    found = replay.grid()
    assert 180 <= len(found) <= 220
    models = set().union(*replay.MODELS.values())
    assert set(itertools.product(models, DIRECTIONS, DTYPES)) <= {
        (c.model, c.direction, c.dtype) for c in found
    }
    surrogates = {s.name for s in vars(nj.surrogates).values() if isinstance(s, nj.Surrogate)}
    assert surrogates == {c.surrogate for c in found if c.direction == "backward" and c.spiking}
    for direction in DIRECTIONS:
        of = [c for c in found if c.direction == direction]
        assert {(c.reset, c.spiking) for c in of} == {
            *itertools.product(("hard", "soft"), (True, False))
        }
        assert {bool(c.per_neuron) for c in of} == {True, False}
        sequences = {c.record if direction == "forward" else c.arriving for c in of}
        assert set().union(*sequences) >= {"v", "w", "i", "a", "h"} and () in sequences
        assert not any(c.detach_reset or c.learned for c in of if direction == "forward")
    backward = [c for c in found if c.direction == "backward"]
    assert {c.detach_reset for c in backward} == {True, False}
    for name in models:
        params = model(name).params if name in replay.EQUATIONS else nj.neurons.by_name(name).params
        of = [c for c in backward if c.model == name]
        assert tuple(params) == replay.PARAMS[name], "in the order in which calls name them"
        assert set(params) == set().union(*(c.learned + c.per_neuron for c in of)), name


def model(name: str) -> nj.NeuronModel:
    return nj.NeuronModel(name, **replay.EQUATIONS[name])


LIKE = {  # a short model with these states: shapes depend on how many there are
    states: nj.NeuronModel("like", "h = v + x", state=dict.fromkeys(states, 0.0))
    for states in replay.MODELS
}


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_the_calls_have_every_shape(target: str) -> None:
    """Of kernels with one sequence or none, as `targets` finds them by asking for all sizes."""
    seen: dict[tuple[str, int, tuple[str, ...]], set[object]] = {}
    for case in replay.grid():
        (states,) = (names for names, models in replay.MODELS.items() if case.model in models)
        kind = case.direction, DTYPES[case.dtype].tensor.itemsize, states
        sequences = len(case.record or case.arriving)
        like = LIKE[states]
        shape = targets.by_name(target).shape(*kind[:2], like, sequences, case.N, case.T, True)
        seen.setdefault(kind, set()).add(shape)
    assert len(seen) == 2 * 3 * 3
    for (direction, size, states), shapes in seen.items():
        assert set(targets.shapes(target, direction, size, LIKE[states], 1)) <= shapes, states


def test_fewer_calls_cover_all_models_too() -> None:
    found = replay.thinned(replay.grid(), replay.QUICK)
    assert len(found) == len(set(found)) == replay.QUICK
    models = set().union(*replay.MODELS.values())
    assert {(c.model, c.direction) for c in found} == set(itertools.product(models, DIRECTIONS))
    assert {(c.dtype, c.direction) for c in found} == set(itertools.product(DTYPES, DIRECTIONS))
    sizes = set(itertools.product(replay.FOURS, DIRECTIONS))
    assert {((c.N, c.T), c.direction) for c in found} == sizes


# --- the comparison -------------------------------------------------------------------------------


_ask = cache(replay.ask)


@pytest.fixture(autouse=True)
def asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree's process imports torch: seconds, which tests of the same trees need not pay twice."""
    monkeypatch.setattr(replay, "ask", lambda tree, found: _ask(tree, tuple(found)))


def copied(folder: Path, before: str = "", after: str = "") -> Path:
    """The library in another folder; its templates with one line changed."""
    tree = folder / "tree"
    for name in ("neuronjit", "templates"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    changed = [p for p in (tree / "templates").iterdir() if before and before in p.read_text()]
    assert len(changed) == bool(before)
    for path in changed:
        path.write_text(path.read_text().replace(before, after))
    return tree


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("same"))


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree whose sigmoid does nothing: its code is smaller."""
    return copied(tmp_path_factory.mktemp("changed"), SLOPE, "a")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


def test_a_tree_is_as_itself(copy: Path, kept: Path) -> None:
    pairs, notes = replay.compare(ROOT, copy, [LIF, SIGMOID], kept)
    assert len(pairs) + 2 * len(notes) == 2 * len(replay.BUILDS)
    for pair in pairs:
        assert pair.same_text and pair.same_code and not pair.faults
        assert pair.a == pair.b and pair.a["size"] > 0
    assert replay.differing(pairs) == []


def test_a_changed_template_is_found(changed: Path, kept: Path) -> None:
    """Named are the kernels that use the line; of the others, that they have the same code."""
    pairs, _ = replay.compare(changed, ROOT, [LIF, SIGMOID], kept)
    assert not any(pair.same_text for pair in pairs) and pairs
    assert {p.case: p.same_code for p in pairs} == {str(LIF): True, str(SIGMOID): False}
    first, *_, last = replay.differing(pairs)
    assert first.case == str(SIGMOID) and str(SIGMOID) in str(first)
    assert last.case == str(LIF) and "the same machine code" in str(last)


@pytest.mark.parametrize("strict", [True, False])
def test_the_command(
    strict: bool,
    changed: Path,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """B's kernel is larger than A's: said always, refused if asked to."""

    @contextmanager
    def checked_out(revision: str) -> Iterator[Path]:
        assert revision == "v0"
        yield changed

    monkeypatch.setattr(replay, "checked_out", checked_out)
    monkeypatch.setattr(replay, "cases", lambda: [LIF, SIGMOID])
    words = ["replay.py", "--base", "v0", "--kept", str(kept), "--all"]
    monkeypatch.setattr(sys, "argv", words + ["--strict"] * strict)
    assert replay.main() == strict
    said = capsys.readouterr().out
    assert f"host   {SIGMOID}: code" in said and "CODE 2% LARGER" in said
    assert f"host   {LIF}: other text, the same machine code" in said


def test_quick_compiles_only_what_differs(copy: Path, tmp_path: Path) -> None:
    pairs, notes = replay.compare(ROOT, copy, [LIF, SIGMOID], tmp_path, quick=True)
    assert all(pair.same_code and not pair.a for pair in pairs)
    cuda = [pair.build for pair in pairs if pair.build in replay.ARCHS]
    assert cuda == [arch for arch in replay.ARCHS if not any(arch in note for note in notes)]
    assert not list(tmp_path.glob("*.json"))


def test_what_a_tree_cannot_render_is_reported() -> None:
    strange = replace(LIF, model="no_such_model")
    told = replay.ask(ROOT, [LIF, strange])["texts"]
    assert "lif_forward" in told[f"cpu {LIF}"]["text"]
    assert "unknown neuron 'no_such_model'" in told[f"cpu {strange}"]["error"]


GOOD = {"code": "a", "size": 10_000, "registers": 40, "spilled": 0}


@pytest.mark.parametrize(
    ("a", "b", "faults"),
    [
        ({}, {}, []),
        ({}, {"size": 10_200, "registers": 99}, []),
        ({}, {"size": 10_201}, ["code 2% larger"]),
        ({"size": 10_201}, {}, []),
        ({"spilled": 8}, {"spilled": 8}, []),
        ({"spilled": 8}, {"spilled": 16}, ["spills"]),
        ({}, {"spilled": 8, "size": 20_000}, ["spills", "code 2% larger"]),
    ],
)
def test_what_strict_refuses(a: dict[str, int], b: dict[str, int], faults: list[str]) -> None:
    pair = Pair("lif", "sm_90", False, GOOD | a, GOOD | b | {"code": "b"})
    assert pair.faults == faults and not pair.same_code
    assert all(fault.upper() in str(pair) for fault in faults)


def test_strict_refuses_what_no_longer_builds() -> None:
    error = {"error": "expected a ;"}
    assert Pair("lif", "sm_90", False, GOOD, error).faults == ["does not build"]
    assert Pair("lif", "sm_90", False, error, GOOD).faults == []
    assert Pair("lif", "sm_90", False, error, error).faults == []
    assert "B: expected a ;" in str(Pair("lif", "sm_90", False, GOOD, error))


def test_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge base with main; on main itself the commit before; None where there is none."""
    monkeypatch.setattr(replay, "ROOT", tmp_path)

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *who, *words]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def commit() -> str:
        git("commit", "-q", "--allow-empty", "-m", "a")
        return git("rev-parse", "HEAD")

    git("init", "-q", "-b", "main")
    first = commit()
    assert replay.default_base() is None
    second = commit()
    assert replay.default_base() == first
    git("checkout", "-q", "-b", "mine")
    commit()
    commit()
    assert replay.default_base() == second


# --- machine code ---------------------------------------------------------------------------------


def shared(folder: Path, name: str, body: str) -> tuple[int, str]:
    path = folder / "code.so"
    text = f'#include <cmath>\nextern "C" float {name}(float a) {{ return {body}; }}'
    command = ["g++", "-O2", "-shared", "-fPIC", "-o", str(path), "-x", "c++", "-"]
    subprocess.run(command, input=text, text=True, check=True)
    return replay.machine_code(path.read_bytes())


def test_names_are_not_machine_code_but_constants_and_imports_are(tmp_path: Path) -> None:
    size, code = shared(tmp_path, "f", "expf(a) * 1.5f")
    assert shared(tmp_path, "a_much_longer_name", "expf(a) * 1.5f") == (size, code)
    assert shared(tmp_path, "f", "expf(a) * 1.25f") != (size, code)
    other = shared(tmp_path, "f", "logf(a) * 1.5f")
    assert other[0] == size and other[1] != code


@pytest.mark.nvrtc
def test_names_of_cuda_kernels_are_not_machine_code(tmp_path: Path) -> None:
    compilers = replay.Compilers((), (), tmp_path)

    def built(name: str, body: str) -> dict[str, object]:
        text = f'extern "C" __global__ void {name}(double* a) {{ *a = {body}; }}'
        return compilers.build(text, "sm_90")

    assert built("f", "*a * 1.1") == built("longer", "*a * 1.1")
    assert built("f", "*a * 1.1")["code"] != built("f", "*a * 1.2")["code"]
    assert built("f", "*a * 1.1")["registers"] and not built("f", "*a * 1.1")["spilled"]
    assert "error" in built("f", "*a * b")
