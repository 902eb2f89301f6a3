"""Shared pieces of the benchmarks: command line, clocks, the check of answers, rows and notes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peers import DTYPES, OURS, PEERS, Call, Work
from tables import Goal, goal_table, page, plot

Row = dict[str, Any]
SECTIONS = "kernels,chain,memory,calls,onm,scaling,first-call"


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="folder for the files")
    parser.add_argument("--only", default=SECTIONS, help="sections to run")
    parser.add_argument("--peers", default=",".join(PEERS), help="who takes part")
    parser.add_argument("--quick", action="store_true", help="few small works: does it run?")
    parser.add_argument("--peer-seconds", type=float, default=90, help="limit of a peer on a work")
    parser.add_argument("--compile-max-t", type=int, default=64, help="largest T to torch.compile")
    parser.add_argument("--seconds", type=float, default=1e9, help="skip what is left after these")
    return parser


class Run:
    """One benchmark run: its arguments, and the rows and notes it has gathered."""

    def __init__(self, device: str, args: argparse.Namespace, **tags: Any) -> None:
        self.device, self.args, self.tags = device, args, tags
        self.peers = args.peers.split(",")
        self.machine: Row = {}
        self.measured = ""  # when, and of which version
        self.turn = 0  # rows of one turn were measured side by side: only those are compared
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.started = time.perf_counter()

    def add(self, section: str, peer: str, work: Work, mode: str, **values: Any) -> None:
        row = {"section": section, "turn": self.turn, "peer": peer, **self.tags, **vars(work)}
        self.rows.append({**row, "mode": mode, **values})

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            print("  note:", text, flush=True)

    @contextlib.contextmanager
    def attempt(self, what: str, limit: float | None = None) -> Iterator[None]:
        """What fails, or takes longer than a peer may, becomes a note: the run goes on.

        The limit can only stop Python code; Inductor's compilation is.
        """
        seconds = self.args.peer_seconds if limit is None else limit

        def stop(*_: Any) -> None:
            raise TimeoutError(f"took more than {seconds:.0f} s (--peer-seconds)")

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        except Exception as error:
            words = " ".join(str(error).split())[:300]
            self.note(f"{what} failed: {type(error).__name__}: {words}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def in_time(self, section: str, grid: list[tuple[Work, list[str]]]) -> Iterator[tuple]:
        for work, names in grid:
            if time.perf_counter() - self.started > self.args.seconds:
                self.note(f"{section}, {work}: skipped, the run's time is over (--seconds)")
                continue
            self.turn += 1
            yield work, names

    def build(self, names: Iterable[str], work: Work, always: bool = False) -> dict[str, Call]:
        """The peers that can do `work`; a note for each that cannot."""
        calls = {}
        for name in names:
            if name not in self.peers and not always:
                continue
            try:
                calls[name] = PEERS[name](work, self.device, self.args.compile_max_t)
            except Exception as reason:  # Skip, not installed, or broken here
                self.note(f"{name} is not in {work.neuron} {work.dtype}: {reason}")
        return calls

    def data(self, work: Work, *shape: int, sets: int = 1) -> list[torch.Tensor]:
        """Random inputs that require grad; a quarter of LIF's steps fire."""
        make = [torch.randn(shape or (work.T, work.N), device=self.device) for _ in range(sets)]
        return [x.add_(1.0).to(DTYPES[work.dtype]).requires_grad_() for x in make]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(seconds: list[float]) -> Row:
    us = [1e6 * s for s in seconds]
    return {"us": statistics.median(us), "us_min": min(us), "us_max": max(us)}


def wall(
    run: Run, what: str, calls: dict[str, Callable], rounds: int = 9, block: float = 0.02
) -> dict[str, Row]:
    """Wall clock of each call with its device work: they take turns, in rounds of `block` s."""
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        with run.attempt(f"{name}, {what}"):
            call()
            call()
            synchronize()
            begin = time.perf_counter()
            call()
            synchronize()
            repeats[name] = max(1, min(200, round(block / (time.perf_counter() - begin))))
    times: dict[str, list[float]] = {name: [] for name in repeats}
    for turn in range(3 if run.args.quick else rounds):
        for name, count in repeats.items():
            if turn >= 3 and sum(times[name]) * count > 2.0:  # a slow one: three rounds will do
                continue
            begin = time.perf_counter()
            for _ in range(count):
                calls[name]()
            synchronize()
            times[name].append((time.perf_counter() - begin) / count)
    return {name: summary(seconds) for name, seconds in times.items()}


def graph(prepare: Callable[[], list[Callable]], rounds: int = 9) -> Row:
    """Device time of a call: those of `prepare` are captured in one CUDA graph, and replayed.

    `prepare` runs on the capturing stream: autograd runs a backward where its forward ran.
    Each call has tensors of its own, and results live on, so that L2 does not serve the next.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = prepare()
        for call in calls * 2:
            call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        kept = [call() for call in calls]
    captured.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds: list[float] = []
    repeats = 1
    for turn in range(rounds + 1):
        begin.record()
        for _ in range(repeats):
            captured.replay()
        end.record()
        end.synchronize()
        elapsed = begin.elapsed_time(end) / 1e3 / repeats
        if turn == 0:  # only sizes the rounds
            repeats = max(1, min(50, round(0.01 / elapsed)))
        else:
            seconds.append(elapsed / len(kept))
    return summary(seconds)


def train(call: Call, x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Forward and backward: (spikes, gradient of x, gradients of the parameters)."""
    spikes = call.forward(x)
    return (spikes.detach(), *torch.autograd.grad(spikes, [x, *call.params], g))


def compare(result: tuple, reference: tuple, call: Call, dtype: str) -> Row:
    """Distance from the eager loop: share of other spikes, relative error of the gradients.

    The same operations in another order move h by an ulp, and one spike in some 10^6 with it.
    """
    differ = (result[0] != reference[0]).float().mean().item()
    pairs = [(a.float(), b.float()) for a, b in zip(result[1:], reference[1:], strict=True)]
    error = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
    close = error <= (5e-3 if dtype == "fp32" else 2e-2)  # false for NaN
    equal = differ <= 1e-4 and (close or not call.exact)
    return {"spikes_differ": differ, "grad_error": error, "equal": equal}


def find(run: Run, section: str, **want: Any) -> list[Row]:
    """Rows of a section: each value is, or is among, the wanted ones; a callable judges it."""

    def fits(value: Any, wanted: Any) -> bool:
        if callable(wanted):
            return wanted(value)
        return value in wanted if isinstance(wanted, tuple) else value == wanted

    rows = (row for row in run.rows if row["section"] == section)
    return [row for row in rows if all(fits(row.get(key), v) for key, v in want.items())]


def speedups(run: Run, section: str, peer: str, **want: Any) -> list[float]:
    """Times faster than a peer, on each work where both gave the eager loop's answer."""

    def key(row: Row) -> tuple:
        return row["turn"], row["mode"], row.get("threads")

    rows = [row for row in find(run, section, **want) if row.get("equal", True)]
    ours = {key(row): row["us"] for row in rows if row["peer"] == OURS}
    return [r["us"] / ours[key(r)] for r in rows if r["peer"] == peer and key(r) in ours]


def environment(run: Run) -> Row:
    packages = {name: _version(name) for name in ("torch", "triton", "cupy", *run.peers)}
    device = torch.cuda.get_device_name() if run.device == "cuda" else _processor()
    found = {name: version for name, version in packages.items() if version}
    return {"device": device, "python": platform.python_version(), **found}


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return getattr(sys.modules.get(name), "__version__", None)


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return platform.machine()


def save(run: Run, name: str) -> Row:
    run.args.out.mkdir(parents=True, exist_ok=True)
    machine = run.machine or environment(run)
    machine = machine | {"seconds": round(time.perf_counter() - run.started)}
    record = {"machine": machine, "notes": run.notes, "rows": run.rows}
    (run.args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return machine


def report(run: Run, name: str, goals: list[Goal]) -> None:
    """Write NAME.json, NAME.md and NAME.png, and print the table of goals."""
    machine, base = save(run, name), run.args.out / name
    base.with_suffix(".md").write_text(page(machine, goals, run.rows, run.notes))
    with run.attempt("the plot"):  # matplotlib may not be there
        plot(run.rows, base.with_suffix(".png"), machine["device"])
    print(f"\n{goal_table(goals)}\n\n{base}.md, .json, .png")
