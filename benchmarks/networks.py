"""Training steps of SpikingJelly's own networks: its neurons, ours, and none; a GPU is needed.

A step is reset, forward, loss, backward and SGD. `eager` is its wall clock, `captured` the replay
of one CUDA graph of it. Ours is SpikingJelly's network after `neuronjit.accelerate`, and "fused"
after `neuronjit.accelerate(fuse=True)`; "none" the same network with identities in place of the
neurons, which is the floor.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from warm_start import machine

import neuronjit as nj

RESULTS = Path(__file__).parent / "results"
T = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cache
def spikingjelly() -> Any:
    """Its models, nodes and functions. Its models import what is not needed here."""
    names = ["h5py", "torchvision", "torchvision._internally_replaced_utils"]
    stubs = [name for name in names if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in stubs:
        sys.modules[name] = stub = types.ModuleType(name)
        stub.load_state_dict_from_url = None
    from spikingjelly.activation_based import functional, neuron
    from spikingjelly.activation_based.model import parametric_lif_net, sew_resnet, spikformer

    return (parametric_lif_net, sew_resnet, spikformer), neuron, functional


def sew_resnet18() -> nn.Module:
    (_, models, _), neuron, _ = spikingjelly()
    return models.sew_resnet18(
        num_classes=1000, cnf="ADD", spiking_neuron=neuron.IFNode, detach_reset=True
    )


def cifar10net() -> nn.Module:
    (models, _, _), neuron, _ = spikingjelly()
    return models.CIFAR10Net(128, neuron.ParametricLIFNode, detach_reset=True)


def spikformer() -> nn.Module:
    (_, _, models), neuron, _ = spikingjelly()
    return models.Spikformer(
        img_size_h=32, img_size_w=32, patch_size=4, num_classes=10, embed_dims=384, num_heads=12,
        depths=4, spiking_neuron=neuron.LIFNode,
    )  # fmt: skip


# the network, batch size, image size
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "SEW-ResNet-18": (sew_resnet18, 32, 224),
    "CIFAR10Net": (cifar10net, 64, 32),
    "Spikformer": (spikformer, 64, 32),
}
SETTINGS = (("float32", "NCHW"), ("float16", "channels_last"))
WHOSE = ("spikingjelly", "neuronjit", "fused", "none")


def network(name: str, whose: str, layout: str) -> nn.Module:
    make, _, _ = NETWORKS[name]
    _, neuron, functional = spikingjelly()
    torch.manual_seed(0)
    net = make()
    functional.set_step_mode(net, "m")
    for parent in list(net.modules()):
        for key, child in list(parent.named_children()):
            neurons = whose == "none" and isinstance(child, neuron.BaseNode)
            # Dropout of SpikingJelly's keeps a mask from call to call
            if neurons or "Dropout" in type(child).__name__:
                setattr(parent, key, nn.Identity())
    if whose in ("neuronjit", "fused"):
        nj.accelerate(net, strict=True, fuse=whose == "fused")
    net = net.to(DEVICE)
    if layout == "channels_last":
        for weight in net.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return net


def batch(name: str, layout: str) -> tuple[Tensor, Tensor]:
    _, count, size = NETWORKS[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((T * count, 3, size, size), generator=generator).to(DEVICE)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (count,), generator=generator).to(DEVICE)
    return x.unflatten(0, (T, count)), y


class Step:
    """A training step."""

    context: Callable[[], Any] = nullcontext  # in which forward runs

    def __init__(self, name: str, whose: str, dtype: str, layout: str) -> None:
        _, _, self.functional = spikingjelly()
        self.net = network(name, whose, layout)
        self.x, self.y = batch(name, layout)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.half = dtype == "float16"

    def __call__(self) -> Tensor:
        self.functional.reset_net(self.net)
        self.optimizer.zero_grad(set_to_none=True)
        with self.context(), torch.autocast(DEVICE, torch.float16, enabled=self.half):
            out = self.net(self.x)
            out = out.mean(0) if out.dim() == 3 else out
        loss = nn.functional.cross_entropy(out.float(), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def captured(step: Step) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph.replay


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], rounds: int = 7, repeats: int = 3) -> float:
    times = []
    for _ in range(rounds):
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        times.append((time.perf_counter() - begin) / repeats * 1e3)
    return statistics.median(times)


def measure(name: str, whose: str, dtype: str, layout: str) -> dict[str, Any]:
    step = Step(name, whose, dtype, layout)
    begin = time.perf_counter()
    losses = [step().item()]
    first_s = time.perf_counter() - begin
    losses += [step().item() for _ in range(2)]
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    eager = milliseconds(step)
    peak = torch.cuda.max_memory_allocated() - held
    replayed = milliseconds(captured(step), repeats=5)
    return dict(
        network=name, whose=whose, dtype=dtype, layout=layout, eager_ms=eager,
        captured_ms=replayed, peak_MB=peak / 2**20, first_s=first_s, losses=losses,
    )  # fmt: skip


def page(rows: list[dict[str, Any]], notes: list[str], where: dict[str, Any]) -> str:
    lines = ["# Whole networks: ms a training step, T = 4", ""]
    lines += [", ".join(f"{k} {v}" for k, v in where.items()), ""]
    lines += [
        "Each cell: eager / captured as one CUDA graph; peak memory of a step above what lives on.",
        "",
    ]
    columns = "network|dtype, layout|SpikingJelly|neuronjit|times|fused|times|no neurons|peak MB"
    lines += [f"| {' | '.join(columns.split('|'))} |", "| --- " * 9 + "|"]
    found = {(r["network"], r["dtype"], r["layout"], r["whose"]): r for r in rows}
    kinds = ("eager_ms", "captured_ms")
    for key in dict.fromkeys(k[:3] for k in found):
        of = {whose: found.get((*key, whose)) for whose in WHOSE}
        theirs = of["spikingjelly"]
        cells = [key[0], f"{key[1]} {key[2]}"]
        for whose, r in of.items():
            cells.append(" / ".join(f"{r[kind]:.1f}" for kind in kinds) if r else "")
            if whose in ("neuronjit", "fused"):
                both = theirs and r
                cells.append(" / ".join(f"{theirs[k] / r[k]:.2f}" for k in kinds) if both else "")
        peaks = [f"{r['peak_MB']:.0f}" for whose, r in of.items() if r and whose != "none"]
        lines.append(f"| {' | '.join([*cells, ', '.join(peaks)])} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=420.0, help="begin no other after so long")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: these networks are too large for a CPU")
    torch.cuda.set_stream(torch.cuda.Stream())
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    begin = time.perf_counter()
    for name in NETWORKS:
        for dtype, layout in SETTINGS:
            for whose in WHOSE:
                what = f"{name}, {dtype} {layout}, {whose}"
                if time.perf_counter() - begin > args.seconds:
                    notes.append(f"not measured for want of time: {what}")
                    continue
                try:
                    rows.append(measure(name, whose, dtype, layout))
                except Exception as error:  # a peer that fails is a line, not the end
                    notes.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
                gc.collect()
                torch.cuda.empty_cache()
                print(
                    what, {k: v for k, v in (rows or [{}])[-1].items() if k != "losses"}, flush=True
                )
    for row in rows:
        if row["whose"] in ("neuronjit", "fused") and row["dtype"] == "float32":
            same = [
                r["losses"] for r in rows
                if r["whose"] == "spikingjelly" and r["dtype"] == "float32"
                and r["network"] == row["network"]
            ]  # fmt: skip
            for losses in same:
                worst = max(abs(a - b) / abs(a) for a, b in zip(losses, row["losses"], strict=True))
                notes.append(
                    f"{row['network']}, float32, {row['whose']}: losses of three steps within"
                    f" {worst:.0e}"
                )
    found = {"machine": machine("cuda"), "notes": notes, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "networks.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "networks.md").write_text(page(rows, notes, found["machine"]))
    print(page(rows, notes, found["machine"]))


if __name__ == "__main__":
    main()
