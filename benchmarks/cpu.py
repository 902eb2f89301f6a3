"""Benchmarks on the CPU, with one thread and with all of them: see README.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import sections
import torch
from common import Run, arguments, find, report, speedups
from peers import DTYPES, LOOPS, OURS, SJ, Work
from tables import Goal

# glibc gives freed memory of this size back at once, and the page faults of fresh memory would be
# most of what is timed; long runs keep theirs, by these settings or by another allocator
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**33)}


def grids(quick: bool) -> dict[str, list]:
    if quick:
        everyone, loops = [OURS, *LOOPS], [OURS, SJ, "eager"]
        works = [(Work("lif", "fp32", 4, 2**14), everyone), (Work("adex", "fp32", 4, 2**14), loops)]
        works += [(Work("lif", "bf16", 100, 2**8), everyone)]
        scaling = [(Work("lif", "fp32", t, n), loops) for t in (4, 16) for n in (2**10, 2**12)]
        return dict(kernels=works, calls=works, memory=works, scaling=scaling, onm=[64])
    everyone = [OURS, *LOOPS, "torch.compile"]
    loops = [OURS, SJ, "eager"]
    lif = partial(Work, "lif", "fp32")
    kernels = [(Work("lif", d, t, 2**20), [OURS]) for d in DTYPES for t in (4, 16)]
    kernels += [(lif(64, 2**18), [OURS]), (lif(1000, 16384), [OURS])]
    kernels += [(Work(n, "fp32", 4, 2**20), [OURS]) for n in ("if", "plif", "izhikevich", "adex")]
    calls = [(lif(t, n), everyone) for t in (4, 16) for n in (2**18, 2**20)]
    calls += [(lif(4, 4096), everyone), (lif(500, 5120), [OURS, *LOOPS])]
    calls += [(Work("lif", d, 4, 2**20), loops) for d in ("fp16", "bf16")]
    calls += [(Work(n, "fp32", 4, 2**20), loops) for n in ("if", "plif", "izhikevich")]
    calls += [(Work("adex", "fp32", 4, 2**20), [*loops, "torch.compile"])]
    memory = [(lif(t, 2**14), [OURS, *LOOPS]) for t in (4, 16, 64, 1000)]
    scaling = [(lif(4, 2**k), loops) for k in range(10, 23, 2)]
    scaling += [(lif(t, 2**14), loops) for t in (1, 8, 16, 64, 250, 1000)]
    return dict(kernels=kernels, calls=calls, memory=memory, scaling=scaling, onm=[512, 4096])


def goals(run: Run) -> list[Goal]:
    threads = max((row["threads"] for row in run.rows), default=0)
    work = dict(neuron="lif", dtype="fp32", T=(4, 16), N=(2**18, 2**20), threads=threads)

    def faster(peer: str) -> list[float]:
        return speedups(run, "calls", peer, mode="train", **work)

    forward = find(run, "kernels", peer=OURS, mode="forward", **(work | dict(N=2**20)))
    where = f"T=4, 16, N=2^18, 2^20, {threads} threads"
    return [
        Goal(f"training, {where}, times SpikingJelly", faster(SJ), 5),
        Goal("the same, times torch.compile", faster("torch.compile"), 2),
        Goal("the same, times eager", faster("eager"), 15),
        Goal("inference, N=2^20: share of copy's bandwidth", [r["of_copy"] for r in forward], 0.6),
        Goal("the same of clone's, which allocates too", [r["of_clone"] for r in forward], 0.6),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--threads", default=f"1,{os.cpu_count()}", help="numbers of threads to measure with"
    )
    parser.add_argument(
        "--child", action="store_true", help="measure in this process; the script calls itself so"
    )
    args = parser.parse_args()
    counts = sorted({int(count) for count in args.threads.split(",")})
    run = Run("cpu", args)
    if args.child:
        run.tags["threads"] = counts[0]
        torch.set_num_threads(counts[0])
        sections.run_all(run, grids(args.quick), "cpu", None)
        return
    for count in (
        counts
    ):  # a process each: thread pools and torch.compile's kernels keep the number they began with
        with tempfile.TemporaryDirectory() as out:
            print(f"--- {count} threads", flush=True)
            command = [sys.executable, *sys.argv, "--child", "--threads", str(count), "--out", out]
            env = os.environ | KEEP_MEMORY | {"OMP_NUM_THREADS": str(count)}
            subprocess.run(command, env=env, check=True)
            child = json.loads(Path(out, "cpu.json").read_text())
        run.machine = child["machine"]
        run.rows += child["rows"]
        run.notes += [note for note in child["notes"] if note not in run.notes]
    report(run, "cpu", goals(run))


if __name__ == "__main__":
    main()
