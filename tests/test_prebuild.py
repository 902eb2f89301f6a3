"""Kernels built ahead of time: those that calls look up, for any GPU, in containers, for ranks."""

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import slow

import neuronjit as nj
from neuronjit import cli
from neuronjit.cache import admin, store
from neuronjit.kernels import ahead, build
from neuronjit.kernels.targets import cpu, cuda
from neuronjit.kernels.targets.base import Grid

ROOT = Path(nj.__file__).parent.parent

# A training step of two layers, one of them with equations of its own; prints all that it gave.
STEP = """
import hashlib, json, os, sys
import torch
torch_alone = set(sys.modules)
import neuronjit as nj

def train(seed=0):
    own = nj.NeuronModel("own", "h = v + (x - v) * exp(-k)", state=dict(v=0.0), params=dict(k=0.5))
    box = nj.Surrogate("box", derivative="where(abs(u) < w, 0.5 / w, 0.0)", params=dict(w=0.5))
    x = torch.rand(9, 33, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    tau = torch.tensor(2.0, requires_grad=True)
    hidden = nj.multistep(nj.neurons.LIF, 2 * x, tau=tau)
    out = nj.multistep(own, 3 * hidden.spikes + x, surrogate=box, record=("v",))
    (out.spikes.sum() + out.record["v"].square().sum()).backward()
    parts = [hidden.spikes, out.spikes, out.record["v"], x.grad, tau.grad]
    assert out.spikes.sum() > 0 and tau.grad != 0
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in parts)).hexdigest()

def report():
    result = train()
    new = sorted({name.split(".")[0] for name in set(sys.modules) - torch_alone})
    print(json.dumps(dict(result=result, new=new, **nj.stats())), flush=True)
"""
RUN_STEP = STEP + "\nreport()\n"


def run(code, *, folder, **environment):
    """What a new process prints last, as JSON."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NEURONJIT", "XDG", "CXX"))}
    environment = {**kept, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_container_without_a_compiler(tmp_path, monkeypatch, capsys):
    """A run is recorded; what it used is built, exported, imported elsewhere, and all it takes."""
    manifest, bundle = tmp_path / "kernels.jsonl", tmp_path / "kernels.njc"
    mine, built, site = tmp_path / "mine", tmp_path / "built", tmp_path / "site"
    recorded = run(
        RUN_STEP, folder=tmp_path, NEURONJIT_CACHE_DIR=str(mine), NEURONJIT_RECORD=str(manifest)
    )
    assert recorded["compiled"] == 4
    monkeypatch.setenv("NEURONJIT_CACHE_DIR", str(built))
    assert cli.main(["prebuild", "--manifest", str(manifest), "--target", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compiled"] == 4
    assert cli.main(["export", str(bundle), "--json"]) == 0
    digest = json.loads(capsys.readouterr().out)["sha256"]
    assert cli.main(["import", str(bundle), "--sha256", digest, "--to", str(site)]) == 0
    shutil.rmtree(mine)
    shutil.rmtree(built)
    for path in [*site.iterdir(), site]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "bin").mkdir()
    container = dict(
        NEURONJIT_CACHE_PATH=str(site), NEURONJIT_CACHE_DIR=str(tmp_path / "none"),
        NEURONJIT_NO_COMPILE="1", PATH=str(tmp_path / "bin"),
    )  # fmt: skip
    before = {path.name: path.read_bytes() for path in site.iterdir()}
    found = run(RUN_STEP, folder=tmp_path, **container)
    assert (found["result"], found["compiled"], found["loaded"]) == (recorded["result"], 0, 4)
    assert not {"jinja2", "sympy", "cupy"} & set(found["new"])  # a warm start renders nothing
    assert {path.name: path.read_bytes() for path in site.iterdir()} == before
    assert not (tmp_path / "none").exists()
    with pytest.raises(AssertionError, match=r"(?s)MissingKernelError.*prebuild --neuron lif"):
        run(RUN_STEP, folder=tmp_path, **{**container, "NEURONJIT_CACHE_PATH": ""})


def test_a_warm_start_imports_no_renderer(tmp_path):
    """Neither jinja2 nor sympy (unless torch does), with a compiler at hand as without."""
    cache = dict(NEURONJIT_CACHE_DIR=str(tmp_path / "cache"))
    cold, warm = (run(RUN_STEP, folder=tmp_path, **cache) for _ in range(2))
    assert (cold["compiled"], warm["compiled"], warm["loaded"]) == (4, 0, 4)
    assert cold["result"] == warm["result"]
    assert "jinja2" in cold["new"]
    assert set(warm["new"]) - set(sys.stdlib_module_names) == {"neuronjit"}


RANK = """
import torch.distributed as dist
dist.init_process_group("gloo")
results = [None] * dist.get_world_size()
dist.all_gather_object(results, (train(), nj.stats()))
if dist.get_rank() == 0:
    print(json.dumps(results), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_compile_each_kernel_once(tmp_path):
    """torchrun starts four processes on a cold cache; the compiler is one that counts."""
    script, compiler, log = tmp_path / "rank.py", tmp_path / "c++", tmp_path / "log"
    script.write_text(STEP + RANK)
    real = cpu.compiler()[0]
    counts = f'case "$*" in *--version*) ;; *) echo compiled >>"{log}";; esac'
    compiler.write_text(f'#!/bin/sh\n{counts}\nexec "{real}" "$@"\n')
    compiler.chmod(0o755)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "NEURONJIT_CACHE_DIR": str(tmp_path / "cache"),
        "CXX": str(compiler), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=4", script],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("[[")]
    results = json.loads(lines[-1])
    alone = run(RUN_STEP, folder=tmp_path, NEURONJIT_CACHE_DIR=str(tmp_path / "alone"))
    assert {result for result, _ in results} == {alone["result"]}
    assert len(log.read_text().splitlines()) == 4
    assert sum(stats["compiled"] for _, stats in results) == 4
    assert sum(stats["loaded"] for _, stats in results) == 12


class Launched:
    """Stands in for a kernel: looked up, never run."""

    def grid(self, n, channels):
        return Grid(1, 1)

    def launch(self, packed, grid, n, steps):
        pass


SIZES = [
    (1, 1), (3, 7), (4, 4096), (5, 4098), (8, 2**17), (9, 2**18 + 2), (16, 2**19), (17, 3 * 2**19),
    (1000, 2**14), (64, 2**20 + 1), (33, 2**21), (4, 2**24), (100, 2**24 + 4),
]  # fmt: skip


EVERY = [
    *itertools.product(
        ("cpu", "cuda"), ("lif", "plif", "izhikevich"), ("float32", "float16", "float64")
    )
]
QUICK = [
    ("cpu", "lif", "float32"), ("cpu", "izhikevich", "float64"),
    ("cuda", "lif", "float16"), ("cuda", "plif", "float32"), ("cuda", "izhikevich", "float32"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "name", "dtype"), [row if row in QUICK else slow(*row) for row in EVERY]
)
def test_choices_cover_what_calls_look_up(monkeypatch, target, name, dtype):
    """Training on tensors without memory, of many sizes, aligned and not: what it asks for."""
    asked = set()

    def look_up(spec, device=0):
        asked.add(spec)
        return Launched()

    monkeypatch.setenv("NEURONJIT_FRONT_END", "python")  # in C++ it would run
    monkeypatch.setattr(build, "load_kernel", look_up)
    plan = importlib.import_module("neuronjit.run.plan")
    monkeypatch.setattr(plan, "choose_target", lambda *_: target)
    plans: dict = {}
    for module in (plan, importlib.import_module("neuronjit.run.autograd")):
        monkeypatch.setattr(module, "plans", plans)
    model, erf = nj.neurons.by_name(name), nj.surrogates.by_name("erf")
    params = {}
    if name == "plif":
        params["reciprocal_tau"] = torch.empty(1, device="meta", requires_grad=True)
    for (steps, n), pointer in itertools.product(SIZES, (256, 260)):
        monkeypatch.setattr(torch.Tensor, "data_ptr", lambda _, pointer=pointer: pointer)
        for record in ((), ("v", "h")):
            for wanted in (True, False) if params else (True,):
                x = torch.empty(steps, n, dtype=getattr(torch, dtype), device="meta")
                x.requires_grad_(wanted)
                out = nj.multistep(model, x, surrogate=erf, record=record, **params)
                losses = [out.spikes.sum(), out.spikes.sum() + out.state["v"].sum()]
                if record:
                    losses.append(out.spikes.sum() + out.record["v"].sum() + out.record["h"].sum())
                for loss in losses:
                    loss.backward(retain_graph=True)
    monkeypatch.undo()
    options = dict(surrogates=["erf"], dtypes=[dtype])
    chosen = ahead.choices([name], target, record=("v", "h"), **options)
    assert {spec.to_inputs for spec in asked} == ({True, False} if params else {True})
    assert asked <= set(chosen)
    assert len(chosen) == len(set(chosen))
    plain = {spec for spec in asked if "v" not in spec.sequences}
    assert plain <= set(ahead.choices([name], target, **options))


@pytest.mark.nvrtc
def test_prebuild_for_gpus_that_are_not_here(tmp_path, monkeypatch, capsys):
    """Two generations in one go."""
    monkeypatch.setenv("NEURONJIT_CACHE_DIR", str(tmp_path / "cache"))
    words = (
        "prebuild --neuron if --surrogate atan --dtype float16 --arch sm_75 sm_90 --jobs 2 --json"
    )
    monkeypatch.setattr(ahead, "every_shape", lambda spec, target: [spec])
    assert cli.main(words.split()) == 0
    assert json.loads(capsys.readouterr().out)["compiled"] == 4
    found = list(admin.entries())
    assert sorted((e.meta["direction"], e.meta["arch"]) for e in found) == [
        ("backward", "sm_75"), ("backward", "sm_90"), ("forward", "sm_75"), ("forward", "sm_90"),
    ]  # fmt: skip
    entries = [store.load(e.key) for e in found]
    assert {entry.binary[:4] for entry in entries} == {b"\x7fELF"}
    assert len({entry.binary for entry in entries}) == 4


def test_a_manifest_serves_another_target(tmp_path):
    spec = ahead.choices(["lif"], "cpu", surrogates=["atan"])[0]
    recorded = [(spec, "x86-64-v3")]

    def jobs(*only, archs=()):
        return ahead.jobs(recorded, lambda target: [], only, archs)

    assert jobs() == jobs("cpu") == recorded
    assert jobs(archs=["x86-64-v2"]) == [(spec, "x86-64-v2")]
    moved = jobs("cuda", archs=["sm_80", "sm_90"])
    assert {arch for _, arch in moved} == {"sm_80", "sm_90"}
    assert {s for s, _ in moved} == set(ahead.every_shape(spec, "cuda"))
    assert set(jobs(archs=["x86-64-v3", "sm_80"])) > set(recorded)


def test_no_gpu_and_no_arch_asks_for_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(nj.SpecError, match="--arch"):
        ahead.jobs([], lambda target: ahead.choices(["lif"], target), ["cuda"])


def test_a_newer_machine_takes_kernels_of_an_older_one(tmp_path, monkeypatch):
    """Where nothing can be compiled, x86-64-v2 serves x86-64-v3, and sm_80 serves sm_86."""
    assert cpu.serving("x86-64-v3") == ["x86-64-v3", "x86-64-v2", "x86-64"]
    assert cuda.serving("sm_86")[:2] == ["sm_86", "sm_85"]
    assert cuda.serving("sm_86")[-1] == "sm_80"
    assert cuda.serving("sm_90a") == ["sm_90a"]
    monkeypatch.setenv("NEURONJIT_CACHE_DIR", str(tmp_path / "cache"))
    spec = ahead.choices(["if"], "cpu", dtypes=["float64"])[0]
    older = build.entry(spec, cpu.serving(cpu.arch())[-1])
    monkeypatch.setenv("CXX", "not-there")
    assert build.entry(spec, cpu.arch()) == older
    monkeypatch.setenv("NEURONJIT_CACHE_DIR", str(tmp_path / "none"))
    with pytest.raises(nj.BackendError, match=r"(?s)not-there.*No cache holds"):
        build.entry(spec, cpu.arch())
    monkeypatch.setenv("NEURONJIT_NO_COMPILE", "1")
    with pytest.raises(nj.MissingKernelError, match="prebuild --neuron if"):
        build.entry(spec, cpu.arch())


def test_a_kernel_whose_library_is_missing_says_so(tmp_path):
    """Carried to a slim image, say, that has no libgomp."""
    (tmp_path / "f.cpp").write_text('extern "C" void f(const char*, int) {}\n')
    make = [*cpu.compiler(), "-shared", "-fPIC", "f.cpp", "-o"]
    subprocess.run([*make, "libgone.so"], cwd=tmp_path, check=True)
    linked = ["f.so", "-Wl,--no-as-needed", "-L.", "-lgone"]
    subprocess.run([*make, *linked], cwd=tmp_path, check=True)
    (tmp_path / "libgone.so").unlink()
    with pytest.raises(nj.BackendError, match=r"libgone\.so"):
        cpu.load((tmp_path / "f.so").read_bytes(), "f", 64)
