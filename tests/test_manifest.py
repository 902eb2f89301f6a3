"""Manifests: what a run used, through JSON and back; and what a hostile one can bring (nothing)."""

import io
import itertools
import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from cachekit import BARE, crowd

import neuronjit as nj
from neuronjit import cli
from neuronjit.kernels import ahead, build, manifest
from neuronjit.kernels.spec import KernelSpec

ADEX = nj.NeuronModel(
    "adex",
    """
    h = v + (x - (v - v_rest) + delta_T * exp((v - theta_rh) / delta_T) - w) / tau
    w = w + (a * (h - v_rest) - w) / tau_w + b * s
    """,
    state=dict(v=0.0, w=0.1),
    params=dict(tau=2.0, v_rest=0.0, delta_T=1.0, theta_rh=0.8, a=0.1, b=0.1, tau_w=2.0),
    strict=True,
    positive=["tau", "delta_T"],
)
BOXCAR = nj.Surrogate(
    "boxcar", derivative="where(abs(u) < width, 0.5 / width, 0.0)", params=dict(width=0.5)
)
LIKE_LIF = nj.NeuronModel("lif", "h = v * 0.5 + x", state=dict(v=0.0))  # not the built-in one


def spec(model, target, direction, surrogate="atan", reset="hard", dtype="float32", **options):
    detach = options.pop("detach", False)
    return KernelSpec.of(model, target, direction, surrogate, reset, detach, dtype, **options)


SMOOTH = nj.surrogates.Sigmoid(alpha=3.0, spiking=False)
MANY = dict(learned=("tau", "b"), per_neuron=("tau",), arriving=("s", "v", "h"), prefetch=True)


@pytest.mark.parametrize(
    "spec",
    [
        spec("lif", "cpu", "forward"),
        spec("plif", "cuda", "backward", "erf", "soft", "float16", detach=True),
        spec(LIKE_LIF, "cuda", "forward", dtype="bfloat16", lanes=4, interval=8),
        spec(ADEX, "cpu", "backward", BOXCAR, dtype="float64", **MANY),
        spec("if", "cpu", "forward", SMOOTH, record=("v",)),
        spec("if", "cpu", "backward", nj.surrogates.SquarewaveFourierSeries(3)),
    ],
    ids=lambda spec: spec.symbol,
)
def test_specs_pass_through_json(spec):
    data = json.loads(json.dumps(manifest.to_json(spec)))
    again = manifest.from_json(data)
    assert again == spec
    assert (again.request, again.symbol) == (spec.request, spec.symbol)
    assert again.model.positive == spec.model.positive
    built_in = spec.model not in (ADEX, LIKE_LIF)
    assert isinstance(data["model"], str) == built_in


def test_every_field_is_checked():
    """A field of another type would pass unchecked: look after it in manifest.from_json."""
    others = {field.type for field in fields(KernelSpec)} - manifest._IN_JSON.keys()
    assert others == {"NeuronModel", "Surrogate | None"}


def fresh_model(name):
    """A model that no other test has loaded, so that the call meets the slow path."""
    return nj.NeuronModel(name, "h = v * decay + x", state=dict(v=0.0), params=dict(decay=0.5))


def test_a_run_records_what_it_used_once(tmp_path, monkeypatch):
    path = tmp_path / "kernels.jsonl"
    monkeypatch.setenv("NEURONJIT_RECORD", str(path))
    model = fresh_model("recorded")
    x = torch.rand(4, 10, requires_grad=True)
    for _ in range(2):
        nj.multistep(model, x, surrogate=BOXCAR).spikes.sum().backward()
    found = manifest.read(str(path))
    assert [(s.model, s.direction, s.surrogate) for s, _ in found] == [
        (model, "forward", None),
        (model, "backward", BOXCAR),
    ]
    build._kernels.clear()  # as in another run
    nj.multistep(model, x[:, 1:], surrogate=BOXCAR).spikes.sum().backward()
    assert len(path.read_bytes().splitlines()) == 2


def test_what_is_missing_is_recorded_too(tmp_path, monkeypatch):
    path = tmp_path / "kernels.jsonl"
    monkeypatch.setenv("NEURONJIT_RECORD", str(path))
    monkeypatch.setenv("NEURONJIT_NO_COMPILE", "1")
    with pytest.raises(nj.MissingKernelError, match=r"NEURONJIT_RECORD=.* prebuild --manifest"):
        nj.multistep(fresh_model("missing"), torch.rand(4, 10))
    assert [spec.model.name for spec, _ in manifest.read(str(path))] == ["missing"]


def test_the_command_in_the_error_builds_that_kernel(monkeypatch):
    options = dict(learned=("reciprocal_tau", "v_threshold"), per_neuron=("v_threshold",))
    options |= dict(arriving=("s", "v"), detach=True)
    wanted = spec("plif", "cpu", "backward", "erf", "soft", "float64", **options)
    work = []
    monkeypatch.setattr(ahead, "prebuild", lambda jobs, *_: (work.extend(jobs), ([], []))[1])
    cli.main(manifest.command(wanted, "x86-64-v3").split()[1:])
    assert {(other, "x86-64-v3") for other in ahead.every_shape(wanted, "cpu")} <= set(work)


def test_a_file_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("NEURONJIT_RECORD", str(tmp_path / "no" / "such" / "folder"))
    with pytest.warns(UserWarning, match="cannot record kernels"):
        out = nj.multistep(fresh_model("unrecorded"), torch.rand(4, 10))
    assert out.spikes.shape == (4, 10)


def record(number, path):
    os.environ["NEURONJIT_RECORD"] = path
    for dtype, k in itertools.product(("float32", "float64", "float16", "bfloat16"), range(8)):
        wanted = KernelSpec.of("lif", "cpu", "forward", "atan", "hard", False, dtype, interval=2**k)
        manifest.record(wanted, f"x86-64-v{2 + number % 3}")


def test_processes_append_whole_lines(tmp_path):
    path = tmp_path / "kernels.jsonl"
    path.write_text("{")  # the end of a run that was cut short
    crowd(4, record, str(path))
    with pytest.raises(nj.SpecError, match="line 1: "):
        manifest.read(str(path))
    path.write_bytes(path.read_bytes()[2:])
    assert len(set(manifest.read(str(path)))) == 3 * 32


LINE = json.dumps(manifest.to_json(spec(ADEX, "cpu", "backward", BOXCAR)) | {"arch": "x86-64-v3"})
INJECTED = '1;}__global__ void evil(){system("x");}'
HOSTILE = {
    "": [
        {"interval": INJECTED}, {"interval": -1}, {"lanes": 10**9}, {"loads": True}, {"loads": 1.0},
        {"prefetch": INJECTED}, {"arriving": [INJECTED]}, {"arriving": ["s", "s"]},
        {"arriving": "s"}, {"record": ["v"]}, {"record": "v"},
        {"learned": [INJECTED]}, {"per_neuron": [["tau"]]},
        {"dtype": INJECTED}, {"target": "../../x"}, {"direction": None}, {"reset": "own"},
        {"reset": INJECTED}, {"spiking": "no"}, {"spiking": False}, {"surrogate": None},
        {"surrogate": "no_such"}, {"surrogate": 7}, {"model": "no_such"}, {"model": None},
        {"model": {"name": "x"}}, {"arch": "native; rm -rf /"}, {"arch": None}, {"extra": 1},
    ],
    "model": [
        {"name": INJECTED}, {"name": 1}, {"equations": INJECTED}, {"equations": ["h = v + x"]},
        {"equations": "h = __import__('os').system('x')"}, {"equations": "import os\nh = v + x"},
        {"state": {"v": "0"}}, {"state": {"v": 0.0, "w; int y": 0.0}}, {"state": ["v"]},
        {"params": []}, {"params": {"tau": 1e999}}, {"positive": [1]}, {"strict": "yes"},
        {"more": 1},
    ],
    "surrogate": [
        {"derivative": INJECTED}, {"name": "a b"}, {"primitive": 7}, {"params": {"u": 1}},
        {"spiking": 1}, {"more": 1},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "change"),
    [(field, change) for field, changes in HOSTILE.items() for change in changes],
    ids=lambda value: ascii(value)[:40],
)
def test_hostile_lines_are_refused_by_name(tmp_path, field, change):
    path, hostile = tmp_path / "kernels.jsonl", json.loads(LINE)
    (hostile[field] if field else hostile).update(change)
    path.write_text(f"{LINE}\n\n{json.dumps(hostile)}\n")
    with pytest.raises(nj.SpecError, match="line 3: "):
        manifest.read(str(path))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "\0", "\udcff", '{"a": 1', "1e999", "[]", "null", "{}", '"lif"']
)
def test_what_is_no_json_object_is_refused(tmp_path, text):
    path = tmp_path / "kernels.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(nj.SpecError, match="line 1: "):
        manifest.read(str(path))


def test_a_manifest_is_not_read_without_end(tmp_path, monkeypatch):
    path = tmp_path / "kernels.jsonl"
    path.write_text(LINE)
    monkeypatch.setattr(manifest, "MAX_BYTES", 100)
    with pytest.raises(nj.SpecError, match="no manifest"):
        manifest.read(str(path))


RECORDER = f"""{BARE}
import resource
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from neuronjit.kernels import manifest
from neuronjit.kernels.spec import KernelSpec
for k in (1, 2):
    spec = KernelSpec.of("lif", "cpu", "forward", "atan", "hard", False, "float32", interval=k)
    manifest.record(spec, "x86-64-v3")
print("went on")
"""


def _pipe(path):
    os.mkfifo(path)
    return path


def _large(path):
    with open(path, "wb") as file:
        file.truncate(manifest.MAX_BYTES + 1)
    return path


ENDLESS = {
    "/dev/full": lambda path: "/dev/full",
    "/dev/zero": lambda path: "/dev/zero",
    "a link to it": lambda path: path.symlink_to("/dev/full") or path,
    "a pipe": _pipe,
    "a directory": lambda path: path.mkdir() or path,
    "a large file": _large,
}


QUICK = ("/dev/zero", "a pipe")  # each is a process of its own, which imports torch


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ENDLESS]
)
def test_what_is_no_small_file_is_no_record(tmp_path, name):
    """One warning, at once; and nothing is read from it or written to it."""
    path = ENDLESS[name](tmp_path / "record")
    environment = {**os.environ, "NEURONJIT_RECORD": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", RECORDER], env=environment, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "went on\n", done.stderr
    assert done.stderr.count("cannot record kernels") == 1
    if name == "a large file":
        assert path.stat().st_size == manifest.MAX_BYTES + 1


def test_a_record_is_read_on_and_not_again(tmp_path, monkeypatch):
    path = tmp_path / "kernels.jsonl"
    monkeypatch.setenv("NEURONJIT_RECORD", str(path))
    sizes, read = [], []

    class Counted(io.FileIO):
        def read(self, size=-1):
            data = super().read(size)
            read.append(len(data))
            return data

    def counted(name, mode, buffering, opener):
        return Counted(name, mode, opener=opener)

    monkeypatch.setattr(manifest, "open", counted, raising=False)
    for interval in [2**i for i in range(8)]:
        for _ in range(2):
            manifest.record(spec("lif", "cpu", "forward", interval=interval), "x86-64-v3")
        with open(path, "ab") as other:  # another process
            line = json.dumps(
                manifest.to_json(spec("if", "cpu", "forward", interval=interval))
                | {"arch": "x86-64-v3"}
            )
            other.write(line.encode() + b"\n")
        manifest.record(spec("if", "cpu", "forward", interval=interval), "x86-64-v3")
        sizes.append(path.stat().st_size)
    monkeypatch.delattr(manifest, "open")
    assert len(manifest.read(str(path))) == len(path.read_bytes().splitlines()) == 16
    assert sum(read) <= sizes[-1]  # each byte at most once


@pytest.mark.parametrize("how", ["removed", "emptied", "replaced"])
def test_a_record_that_began_anew_is_written_anew(tmp_path, monkeypatch, how):
    path = tmp_path / "kernels.jsonl"
    monkeypatch.setenv("NEURONJIT_RECORD", str(path))
    wanted = spec("lif", "cpu", "forward")
    manifest.record(wanted, "x86-64-v3")
    if how == "removed":
        path.unlink()
    elif how == "emptied":
        os.truncate(path, 0)
    else:
        other = tmp_path / "other"
        other.write_text("\n" * 5000)
        os.replace(other, path)
    manifest.record(wanted, "x86-64-v3")
    assert manifest.read(str(path)) == [(wanted, "x86-64-v3")]
