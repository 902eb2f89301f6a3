"""Where the host time of a warm call goes: checks and look-up, allocation, launch, autograd.

Sequences are small, so that the kernels themselves take next to nothing. Each part is timed in a
loop of its own; "the rest" is what the whole call takes beyond them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sections import Nothing
from tables import markdown, write
from torch import Tensor
from warm_start import machine

import neuronjit as nj
from neuronjit.run.plan import EagerPlan, KernelPlan, plans

RESULTS = Path(__file__).parent / "results"


def microseconds(
    timed: dict[str, Callable[[], Any]], rounds: int, calls: int = 2000
) -> dict[str, float]:
    """The median of each over rounds in which all take their turn; a round is so many calls."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(rounds + 1):
        for name, call in timed.items():
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first warms up
                times[name].append((time.perf_counter() - begin) / calls * 1e6)
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


CHAIN = 20  # layers


def chain(device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Host time of a training step a layer, in a chain, so that starting backward weighs little."""
    x = torch.rand(4, 64 if device == "cpu" else 4096, device=device, requires_grad=True)

    def step(layer: Callable[[Tensor], Tensor]) -> None:
        y = x
        for _ in range(CHAIN):
            y = layer(y)
        y.sum().backward()

    def of(net: torch.nn.Module) -> None:
        nj.nn.reset_net(net)
        net(x).sum().backward()

    def layers(kind: Any) -> Callable[[], None]:
        net = torch.nn.Sequential(*(kind(step_mode="m") for _ in range(CHAIN)))
        return partial(of, net.to(device))

    found = {}
    for front_end in ("python", "compiled"):
        os.environ["NEURONJIT_FRONT_END"] = front_end
        plans.clear()
        steps: dict[str, Callable[[], None]] = {
            "no layers": partial(step, lambda y: y),
            "torch.sigmoid": partial(step, torch.sigmoid),
            "an empty autograd.Function": partial(step, Nothing.apply),
            "multistep, LIF": partial(
                step, lambda y: nj.multistep(nj.neurons.LIF, y, tau=2.0).spikes
            ),
            "nn.LIFNode": layers(nj.nn.LIFNode),
            "nn.ParametricLIFNode": layers(nj.nn.ParametricLIFNode),
        }
        took = microseconds(steps, rounds, calls=20)
        nothing = took.pop("no layers")
        found[front_end] = {name: (us - nothing) / CHAIN for name, us in took.items()}
    del os.environ["NEURONJIT_FRONT_END"]
    return found


def page(results: dict[str, Any]) -> str:
    lines = ["# Where the host time of a warm call goes", ""]
    for device, found in results.items():
        lines += [f"## {device}", "", ", ".join(f"{k} {v}" for k, v in found["machine"].items())]
        for kind in ("inference", "training"):
            cells = [[part, f"{us:.1f}"] for part, us in found[kind].items()]
            lines += ["", markdown([f"{kind}, LIF, T = 4, N = 64", "us"], cells)]
        ways = found["chain"]
        cells = [[name, *(f"{way[name]:.1f}" for way in ways.values())] for name in ways["python"]]
        header = [f"a layer's training step in a chain of {CHAIN}, T = 4: us", *ways]
        lines += ["", markdown(header, cells), ""]
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
            machine=machine(device),
            inference=parts,
            training=training(x, args.rounds),
            chain=chain(device, args.rounds),
        )
    write(file, results, page(results))


if __name__ == "__main__":
    main()
