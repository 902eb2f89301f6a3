"""Benchmarks on a CUDA device: see README.md."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import sections
import torch
from common import Run, arguments, find, speedups
from peers import DTYPES, LOOPS, OURS, SJ, Work
from tables import Goal


def grids(quick: bool) -> dict[str, list]:
    lif = partial(Work, "lif", "fp32")
    everyone, loops = [OURS, *LOOPS], [OURS, SJ, "eager"]
    if quick:
        works = [(lif(4, 2**16), everyone), (lif(64, 2**10), everyone)]
        works += [(Work("adex", "fp32", 4, 2**16), loops)]
        scaling = [(lif(t, n), loops) for t in (4, 16) for n in (2**12, 2**16)]
        return dict(kernels=works, calls=works, memory=works, scaling=scaling, onm=[512])
    kernels = [(Work("lif", d, t, 2**26 // t), [OURS]) for d in DTYPES for t in (4, 8, 16, 64)]
    kernels += [(lif(t, 2**24 // t), [OURS]) for t in (4, 16, 64)]
    kernels += [(Work("lif", d, 4, 2**24), [SJ]) for d in ("fp32", "fp16")]
    kernels += [(lif(t, n), [OURS, SJ]) for t, n in ((4, 4096), (500, 5120), (1000, 16384))]
    kernels += [(Work("plif", "fp32", t, 2**26 // t), [OURS]) for t in (4, 16)]
    kernels += [(Work(n, "fp32", 4, 2**24), [OURS]) for n in ("if", "my lif", "adex")]
    fused = [(n, d) for n in ("izhikevich", "ilif") for d in ("fp32", "fp16")]
    kernels += [(Work(n, d, 4, 2**24), [OURS, SJ]) for n, d in fused]
    calls = [(lif(t, 2**26 // t), everyone) for t in (4, 8, 16)]
    calls += [(Work("lif", d, t, 2**26 // t), loops) for d in ("fp16", "bf16") for t in (4, 16)]
    calls += [(lif(t, n), everyone) for t, n in ((4, 4096), (500, 5120), (1000, 16384))]
    calls += [(Work("lif", "fp16", 1000, 16384), [OURS, SJ])]
    others = [("if", 4), ("plif", 4), ("plif", 16), ("izhikevich", 4), ("izhikevich", 16)]
    others += [("ilif", 4), ("ilif", 16)]
    calls += [(Work(n, "fp32", t, 2**24 // t), loops) for n, t in others]
    calls += [(Work("adex", "fp32", 4, 2**22), [*loops, "torch.compile"])]
    # the slowest to start, so that they are what a short run leaves out
    calls += [(lif(t, 2**26 // t), [OURS, "torch.compile"]) for t in (4, 16, 64)]
    memory = [(lif(t, 2**16), everyone) for t in (4, 16, 64)]
    memory += [(Work("lif", d, 1000, 2**12), [OURS, SJ]) for d in ("fp32", "fp16")]
    memory += [(Work("izhikevich", "fp32", 64, 2**16), loops)]
    scaling = [(lif(4, 2**k), loops) for k in range(10, 25, 2)]
    scaling += [(lif(t, 2**14), loops) for t in (1, 8, 16, 64, 250, 1000)]
    onm = [512, 4096, 16384]
    return dict(kernels=kernels, calls=calls, memory=memory, scaling=scaling, onm=onm)


def goals(run: Run) -> list[Goal]:
    def share(mode: str, *dtypes: str, **work: Any) -> list[float]:
        rows = find(run, "kernels", peer=OURS, mode=mode, dtype=dtypes, **work)
        return [row["of_copy"] for row in rows]

    def faster(peer: str, dtype: str = "fp32", **work: Any) -> list[float]:
        return speedups(run, "calls", peer, mode="train", neuron="lif", dtype=dtype, **work)

    def layer(mode: str) -> list[float]:  # against the faster of SpikingJelly's two interfaces
        found = [speedups(run, "chain", peer, mode=mode) for peer in (SJ, SJ + " node")]
        return [min(ratios) for ratios in zip(*(f for f in found if f), strict=True)]

    def times_lif(neuron: str) -> list[float]:
        rows = find(run, "kernels", peer=OURS, mode="backward", dtype="fp32")
        lif = {(row["T"], row["N"]): row["us"] for row in rows if row["neuron"] == "lif"}
        work = ((row, (row["T"], row["N"])) for row in rows if row["neuron"] == neuron)
        return [row["us"] / lif[key] for row, key in work if key in lif]

    def of_lif(name: str, mode: str) -> list[float]:  # the time of a user's copy
        def us(neuron: str) -> float:
            work = dict(neuron=neuron, mode=mode, dtype="fp32", T=4, N=2**24)
            return next((row["us"] for row in find(run, "kernels", peer=OURS, **work)), 0.0)

        return [us(name) / us("lif")] if us(name) and us("lif") else []

    kept = find(run, "memory", peer=OURS, neuron="lif")
    big = dict(T=(4, 8, 16, 64), N=lambda n: n >= 2**18)  # in this grid: N * T >= 2^24
    large = dict(T=(4, 8, 16), N=lambda n: n >= 2**22)  # and this: N * T = 2^26
    long = dict(T=1000, N=16384)
    table = [
        ("forward kernels, fp32: share of the copy", share("forward", "fp32", **big), 1.10),
        ("the same, final_state=False", share("forward, no last state", "fp32", **big), 1.10),
        ("backward kernels, fp32", share("backward", "fp32", **big), 1.10),
        ("forward kernels, fp16 and bf16", share("forward", "fp16", "bf16", **big), 1.05),
        (
            "the same, final_state=False",
            share("forward, no last state", "fp16", "bf16", **big),
            1.05,
        ),
        ("backward kernels, fp16 and bf16", share("backward", "fp16", "bf16", **big), 1.05),
        ("forward kernel, T=1000 N=16384 fp32", share("forward", "fp32", **long), 0.70),
        ("backward kernel, T=1000 N=16384 fp32", share("backward", "fp32", **long), 0.55),
        ("training, N*T=2^26 fp32: times SpikingJelly", faster(SJ, **large), 1.8),
        ("training, N*T=2^26 fp16: times SpikingJelly", faster(SJ, "fp16", **large), 2.8),
        ("training, N*T=2^26 fp32: torch.compile", faster("torch.compile", **large), 2.5),
        ("training, N*T=2^26 fp32: eager", faster("eager", **large), 9),
        ("training, T=500, 1000: times SpikingJelly", faster(SJ, T=(500, 1000)), 3),
        ("host time a layer, training: times SpikingJelly", layer("train"), 5),
        ("host time a layer, inference: times SpikingJelly", layer("inference"), 4),
    ]
    steps = [row["bytes"] * row["T"] / math.ceil(row["T"] / 16) for row in kept]
    return [
        *(Goal(*line) for line in table),
        Goal("PLIF's backward kernel: times LIF's", times_lif("plif"), 1.10, at_most=True),
        *(
            Goal(
                f"a user's copy of LIF, {mode}: times the built-in",
                of_lif("my lif", mode),
                1.02,
                at_most=True,
            )
            for mode in ("forward", "backward")
        ),
        Goal("bytes kept a neuron for each 16 steps", steps, 4, at_most=True),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(seconds=330, compile_max_t=16)  # GPU time is often borrowed
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: benchmarks/cpu.py measures the CPU")
    run = Run("cuda", args)
    sections.run_all(run, grids(args.quick), "gpu", goals)


if __name__ == "__main__":
    main()
