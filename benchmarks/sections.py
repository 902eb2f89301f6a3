"""What is measured: each section takes the run and its part of the grid, and adds rows.

A grid is a list of (work, peers' names). README.md says what the numbers mean.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import Run, compare, graph, report, save, summary, synchronize, train, wall
from peers import DTYPES, LOOPS, OURS, SJ, Call, Work
from tables import Goal

Grid = list[tuple[Work, list[str]]]


def kernels(run: Run, grid: Grid) -> None:
    """Least bytes a second of forward and of backward alone, beside a copy of forward's size."""
    copies: dict[int, dict[str, float]] = {}
    for work, names in run.in_time("kernels", grid):
        size = DTYPES[work.dtype].itemsize * work.T * work.N
        sets = max(1, min(16, math.ceil(2**28 / size))) if run.device == "cuda" else 1
        xs = run.data(work, sets=sets)
        gs = [torch.randn_like(x) for x in xs]
        if size not in copies:
            copies[size] = {}
            for kind, row in _copies(run, size, sets).items():
                copies[size][kind] = speed = 2 * size / row["us"] / 1e3
                run.add("kernels", kind, work, "copy", **row, GBps=speed)
        for name, call in run.build(names, work).items():
            modes = [("forward", _forwards, 2), ("backward", _backwards, 3)]
            modes += [("forward, no last state", _stateless, 2)] if call.stateless else []
            for mode, make, moved in modes:
                what, prepare = f"{name}, {mode} of {work}", partial(make, call, xs, gs)
                with run.attempt(what), torch.set_grad_enabled(mode == "backward"):
                    if run.device == "cuda":
                        row = graph(prepare)
                    else:
                        row = wall(run, what, {name: prepare()[0]})[name]
                    speed = moved * size / row["us"] / 1e3
                    shares = {f"of_{kind}": speed / limit for kind, limit in copies[size].items()}
                    run.add("kernels", name, work, mode, **row, GBps=speed, **shares)


def _forwards(call: Call, xs: list, gs: list) -> list[Callable]:
    return [partial(call.forward, x) for x in xs]


def _stateless(call: Call, xs: list, gs: list) -> list[Callable]:
    return [partial(call.stateless, x) for x in xs]


def _backwards(call: Call, xs: list, gs: list) -> list[Callable]:
    ends = [(call.forward(x), [x, *call.params], g) for x, g in zip(xs, gs, strict=True)]
    return [partial(torch.autograd.grad, *end, retain_graph=True) for end in ends]


def _copies(run: Run, size: int, sets: int) -> dict[str, dict]:
    """copy_ into memory that is there; on the CPU also clone, which allocates as a call must."""
    sources = [torch.randn(size // 4, device=run.device) for _ in range(sets)]
    copies = [partial(torch.empty_like(source).copy_, source) for source in sources]
    if run.device == "cuda":
        return {"copy": graph(lambda: copies)}
    return wall(run, "copy", {"copy": copies[0], "clone": sources[0].clone})


def calls(run: Run, grid: Grid, section: str = "calls") -> None:
    """Wall clock of whole calls, in turn on the same tensors, once their answers are compared."""
    for work, names in run.in_time(section, grid):
        (x,) = run.data(work)
        g = torch.randn_like(x)
        reference = train(run.build(["eager"], work, always=True)["eager"], x, g)
        checked: dict[str, dict] = {}
        ready = run.build(names, work)
        for name, call in ready.items():
            with run.attempt(f"{name} on {work}"):
                begin = time.perf_counter()
                result = train(call, x, g)
                check = {"first_s": time.perf_counter() - begin}  # what there is of compilation
                check |= compare(result, reference, call, work.dtype)
                if not check["equal"]:
                    run.note(f"{name} on {work} gives another answer, so no ratio: {check}")
                checked[name] = check
        result = reference = None  # their memory
        for mode in ("inference", "train") if section == "calls" else ("train",):
            ways = {n: (ready[n].forward, x) for n in checked}
            if mode == "train":
                ways = {n: (train, ready[n], x, g) for n in checked}
            with torch.set_grad_enabled(mode == "train"):
                times = wall(run, f"{mode} of {work}", {n: partial(*w) for n, w in ways.items()})
            for name, row in times.items():
                run.add(section, name, work, mode, **row, **checked[name])


class Nothing(torch.autograd.Function):
    """What autograd costs a Python function that does nothing."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def chain(run: Run, layers: int = 20) -> None:
    """Host time a layer: 20 layers of 4,096 neurons and 4 steps leave a GPU nothing to do."""
    work = Work("lif", "fp32", 4, 4096)
    (x,) = run.data(work)
    g = torch.randn_like(x)
    one = {name: call.forward for name, call in run.build([OURS, SJ, SJ + " node"], work).items()}
    one |= {"sigmoid": torch.sigmoid, "empty autograd.Function": Nothing.apply}

    def inference(layer: Callable) -> torch.Tensor:
        y = x
        for _ in range(layers):
            y = layer(y)
        return y

    def training(layer: Callable) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(inference(layer), x, g)

    for mode, through in ("inference", inference), ("train", training):
        todo = {name: partial(through, layer) for name, layer in one.items()}
        with torch.set_grad_enabled(mode == "train"):
            times = wall(run, f"chain, {mode}", todo, rounds=15, block=0.05)
        for name, row in times.items():
            run.add("chain", name, work, mode, **{key: us / layers for key, us in row.items()})


def memory(run: Run, grid: Grid) -> None:
    """Bytes an element that live between forward and backward, beside x and the spikes.

    CUDA: what the allocator holds. CPU: the tensors that autograd packs, each storage once.
    """
    measure = _kept_cuda if run.device == "cuda" else _kept_cpu
    for work, names in run.in_time("memory", grid):
        for name, call in run.build(names, work).items():
            (x,) = run.data(work)
            with run.attempt(f"{name}, memory of {work}"):
                call.forward(x)
                run.add("memory", name, work, "kept", bytes=measure(call, x) / x.numel())


def _kept_cuda(call: Call, x: torch.Tensor) -> int:
    def requested() -> int:  # not `memory_allocated`, which counts what blocks are rounded up to
        synchronize()
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    before = requested()
    spikes = call.forward(x)
    return requested() - before - spikes.untyped_storage().nbytes()


def _kept_cpu(call: Call, x: torch.Tensor) -> int:
    kept = {}  # the tensors too: a freed one's address would be another's

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        spikes = call.forward(x)
    for other in (x, spikes, *call.params):
        kept.pop(other.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def onm(run: Run, sizes: list[int], names: list[str], batch: int = 10, steps: int = 500) -> None:
    """Open Neuromorphic's benchmark: a linear layer and LIF; forward and backward apart."""
    grid = [(Work("lif", "fp32", steps, n), names) for n in sizes]
    for work, names in run.in_time("onm", grid):
        linear = torch.nn.Linear(work.N, work.N, device=run.device)
        x = 2.0 * run.data(work, steps, batch, work.N)[0].detach()
        reference = None
        for name, call in run.build(names, work).items():
            seconds: dict[str, list[float]] = {"forward": [], "backward": []}
            with run.attempt(f"{name}, onm with {work.N} neurons"):
                for turn in range(5 if run.args.quick or work.N > 8192 else 10):
                    synchronize()
                    times = [time.perf_counter()]
                    spikes = call.forward(linear(x))
                    synchronize()
                    times.append(time.perf_counter())
                    spikes.sum().backward()
                    synchronize()
                    times.append(time.perf_counter())
                    if turn >= 2:
                        seconds["forward"].append(times[1] - times[0])
                        seconds["backward"].append(times[2] - times[1])
                reference = spikes.detach() if reference is None else reference
                equal = (spikes != reference).float().mean().item() <= 1e-4
                for mode, values in seconds.items():
                    run.add("onm", name, work, mode, **summary(values), equal=equal)


def first_call(run: Run, names: list[str]) -> None:
    """Fresh processes, with empty caches and then with what the first one left in them."""
    script = str(Path(__file__).with_name("first_call.py"))
    work = Work("lif", "fp32", 4, 65536)
    for _, (name, *_) in run.in_time("first-call", [(work, [n]) for n in names if n in run.peers]):
        with tempfile.TemporaryDirectory() as caches, run.attempt(f"{name}, first call"):
            places = ("NEURONJIT_CACHE", "TRITON_CACHE", "TORCHINDUCTOR_CACHE", "CUPY_CACHE")
            env = os.environ | {f"{place}_DIR": f"{caches}/{place}" for place in places}
            for mode in ("cold", "warm"):
                command = [sys.executable, script, name, run.device]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr[-300:])
                run.add("first-call", name, work, mode, **json.loads(done.stdout.splitlines()[-1]))


def run_all(
    run: Run, grid: dict[str, list], name: str, goals: Callable[[Run], list[Goal]] | None
) -> None:
    """Run the sections asked for. What fails is noted, what was measured is kept; goals last."""
    steps = {
        "kernels": lambda: kernels(run, grid["kernels"]),
        "chain": lambda: chain(run),
        "memory": lambda: memory(run, grid["memory"]),
        "calls": lambda: calls(run, grid["calls"]),
        "onm": lambda: onm(run, grid["onm"], [OURS, *LOOPS]),
        "scaling": lambda: calls(run, grid["scaling"], "scaling"),
        "first-call": lambda: first_call(run, [OURS, SJ, "torch.compile", "eager"]),
    }
    chosen = run.args.only.split(",")
    if unknown := set(chosen) - set(steps):
        raise SystemExit(f"unknown sections {sorted(unknown)}. Known: {', '.join(steps)}")
    torch.manual_seed(0)
    for section in (s for s in steps if s in chosen):
        begin = time.perf_counter()
        with run.attempt(f"section {section}", limit=0):
            steps[section]()
        print(f"{section}: {time.perf_counter() - begin:.1f} s", flush=True)
        save(run, name)  # a run that is killed keeps what it had
    if goals:
        report(run, name, goals(run))
