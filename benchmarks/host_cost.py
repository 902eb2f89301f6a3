"""Where the host time of a warm call goes: checks and look-up, allocation, launch, autograd.

Sequences are small, so that the kernels themselves take next to nothing. Each part is timed in a
loop of its own; "the rest" is what the whole call takes beyond them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sections import Nothing
from torch import Tensor
from warm_start import machine

import neuronjit as nj
from neuronjit.run.plan import EagerPlan, KernelPlan, plans

RESULTS = Path(__file__).parent / "results"


def microseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median of each over rounds in which all take their turn; a round is 2,000 calls."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(2000):
                call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first warms up
                times[name].append((time.perf_counter() - begin) / 2000 * 1e6)
    return {name: statistics.median(each) for name, each in times.items()}


def the_plan() -> KernelPlan | EagerPlan:
    """The plan of the only call so far."""
    return next(iter(plans.values()))  # under two keys


def inference(x: Tensor, rounds: int) -> dict[str, float]:
    """The parts of a call without autograd."""
    plans.clear()
    call = partial(nj.multistep, nj.neurons.LIF, x, tau=2.0)
    v = call().state["v"]
    plan = the_plan()
    parts = {
        "allocation": lambda: (torch.empty_like(x), torch.empty_like(v)),
        "allocation, arguments and launch": lambda: plan.forward(x, [], save=False),
        "all": call,
    }
    took = microseconds(parts, rounds)
    return {**took, "checks and look-up": took["all"] - took["allocation, arguments and launch"]}


def training(x: Tensor, rounds: int) -> dict[str, float]:
    """Forward and backward with autograd, beside the same work called directly."""
    x = x.clone().requires_grad_()
    grad = torch.ones_like(x)
    plans.clear()

    def forward() -> Tensor:
        return nj.multistep(nj.neurons.LIF, x, tau=2.0).spikes

    spikes = forward()
    spikes.backward(grad, retain_graph=True)
    plan = the_plan()
    took = microseconds(
        {
            "forward without autograd": lambda: plan.forward(x, [], save=True),
            "forward": forward,
            "backward without autograd": lambda: plan.backward(x, None, [], [grad, None], (True,)),
            "an empty autograd.Function": lambda: torch.autograd.grad(Nothing.apply(x), x, grad),
            "forward and backward": lambda: torch.autograd.grad(forward(), x, grad),
        },
        rounds,
    )
    parts = ("forward without autograd", "backward without autograd", "an empty autograd.Function")
    return {**took, "the rest": took["forward and backward"] - sum(took[part] for part in parts)}


def page(results: dict[str, Any]) -> str:
    lines = ["# Where the host time of a warm call goes", ""]
    for device, found in results.items():
        lines += [f"## {device}", "", ", ".join(f"{k} {v}" for k, v in found["machine"].items())]
        for kind in ("inference", "training"):
            lines += ["", f"| {kind}, LIF, T = 4, N = 64 | us |", "| --- | --- |"]
            lines += [f"| {part} | {us:.1f} |" for part, us in found[kind].items()]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    file = args.out / "host_cost.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        x = torch.rand(4, 64, device=device)
        with torch.no_grad():
            parts = inference(x, args.rounds)
        results[device] = dict(
            machine=machine(device), inference=parts, training=training(x, args.rounds)
        )
    args.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
