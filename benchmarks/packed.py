"""Memory and time of training steps with spikes kept as bits, and what packing itself costs.

The networks of networks.py, as SpikingJelly has them, with its memopt (checkpoints, whose inputs
it keeps as bits where they are spikes), after `neuronjit.accelerate`, and that within
`neuronjit.packed_spikes`, fused too. Peak memory is that of a step above what lives on: the
allocator's on a GPU; on a CPU, where `--small` is for, from the profiler's record of allocations.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import networks
import torch
from common import synchronize
from networks import RESULTS, Step, spikingjelly
from tables import markdown, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from warm_start import machine

from neuronjit.run.bits import pack_bits, unpack_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = (("float16", "channels_last"), ("float32", "NCHW"))
WHOSE = (
    "spikingjelly", "memopt", "neuronjit", "packed", "packed, memopt", "fused, packed",
)  # fmt: skip


def milliseconds(call: Callable[[], Any], rounds: int = 7, repeats: int = 3) -> float:
    """The median."""
    times = []
    for _ in range(rounds):
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        times.append((time.perf_counter() - begin) / repeats * 1e3)
    return statistics.median(times)


def checkpointed(step: Step) -> None:
    """SpikingJelly's memopt, level 1: residual blocks, or convolutions where there are none."""
    from spikingjelly.activation_based import layer, memopt

    (_, models, _), *_, functional = spikingjelly()
    blocks = [type(m) for m in step.net.modules() if isinstance(m, models.BasicBlock)]
    targets = tuple({*blocks}) or (layer.Conv2d,)
    functional.reset_net(step.net)
    memopt.optimize_memory(step.net, targets, lambda net: net(step.x), level=1)


def peak_bytes(step: Step) -> int:
    """Of one step, above what lives on after it (parameters, their gradients, momentum)."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    # the profiler does not see that memory is freed which it did not see allocated
    step.reset(step.net)
    step.optimizer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        step()
    changes = [e for e in made.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        most = max(most, now)
    return most - now


def measure(name: str, whose: str, dtype: str, layout: str, run: Any) -> dict[str, Any]:
    plain = whose in ("spikingjelly", "memopt")
    build = "spikingjelly" if plain else "fused" if "fused" in whose else "neuronjit"
    net = networks.network(name, build, dtype, layout, run)
    data = networks.batch(name, layout, run)
    step = Step(net, "spikingjelly", data, dtype, "eager", "packed" in whose)
    if "memopt" in whose:
        checkpointed(step)
    losses = [step().item() for _ in range(3)]
    gc.collect()
    return dict(
        network=name, whose=whose, dtype=dtype, layout=layout, losses=losses,
        peak_MB=peak_bytes(step) / 2**20, eager_ms=milliseconds(step),
    )  # fmt: skip


# --- packing alone --------------------------------------------------------------------------------


def by_product(flat: Tensor) -> Tensor:
    weights = (1 << torch.arange(8, device=flat.device)).to(flat.dtype)
    return (flat.view(-1, 8) @ weights).to(torch.uint8)


def by_sums(flat: Tensor) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (flat.to(torch.uint8).view(-1, 8) << shifts).sum(1, dtype=torch.uint8)


def by_shifts(bits: Tensor, dtype: torch.dtype) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) >> shifts).bitwise_and_(1).to(dtype).view(-1)


def by_table(bits: Tensor, dtype: torch.dtype) -> Tensor:
    byte, bit = (torch.arange(n, device=bits.device) for n in (256, 8))
    table = (byte.unsqueeze(1) >> bit).bitwise_and_(1).to(dtype)
    return table.index_select(0, bits.int()).view(-1)


PACK = {"ours": pack_bits, "matrix product": by_product, "shifted sums": by_sums}
UNPACK = {"ours": unpack_bits, "shifts": by_shifts, "table": by_table}


def packing(size: int) -> list[dict[str, Any]]:
    """Milliseconds of each way to pack and unpack, beside a copy."""
    rows = []
    for dtype in (torch.float32, torch.float16):
        spikes = (torch.rand(size, device=DEVICE) < 0.2).to(dtype)
        bits = pack_bits(spikes)
        row = {"numbers": size, "dtype": str(dtype)[6:], "copy": milliseconds(spikes.clone)}
        for name, pack in PACK.items():
            assert torch.equal(pack(spikes), bits), name
            row[f"pack: {name}"] = milliseconds(partial(pack, spikes))
        for name, unpack in UNPACK.items():
            assert torch.equal(unpack(bits, dtype), spikes), name
            row[f"unpack: {name}"] = milliseconds(partial(unpack, bits, dtype))
        rows.append(row)
    return rows


def page(found: dict[str, Any]) -> str:
    lines = ["# Spikes kept as bits", ""]
    for where in found.values():
        lines += [", ".join(f"{k} {v}" for k, v in where["machine"].items()), ""]
        lines += [
            "Each cell: peak MB of a training step above what lives on, ms (eager), T = 4.",
            "",
        ]
        rows = {(r["network"], r["dtype"], r["layout"], r["whose"]): r for r in where["rows"]}
        steps = []
        for key in dict.fromkeys(k[:3] for k in rows):
            cells = [rows.get((*key, whose)) for whose in WHOSE]
            told = [f"{c['peak_MB']:.1f}, {c['eager_ms']:.1f}" if c else "" for c in cells]
            steps.append([f"{key[0]}, {key[1]} {key[2]}", *told])
        lines.append(markdown(["network", *WHOSE], steps))
        names = [name for name in where["packing"][0] if name not in ("numbers", "dtype")]
        alone = [
            [f"{row['numbers']:,} {row['dtype']}", *(f"{row[name]:.3f}" for name in names)]
            for row in where["packing"]
        ]
        lines += ["", "Packing alone, ms:", "", markdown(["numbers", *names], alone)]
        lines += ["", *(f"- {note}" for note in where["notes"]), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--small", action="store_true", help="small networks, as a CPU can run")
    parser.add_argument("--seconds", type=float, default=420.0, help="begin no other after so long")
    args = parser.parse_args()
    if DEVICE == "cpu" and not args.small:
        raise SystemExit("no CUDA device: these networks are too large for a CPU; try --small")
    run = SimpleNamespace(args=args, device=DEVICE)
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    alone = packing(1 << (20 if args.small else 26))
    for name in ("SEW-ResNet-18", "CIFAR10Net"):
        for dtype, layout in SETTINGS if DEVICE == "cuda" else SETTINGS[1:]:
            for whose in WHOSE:
                what = f"{name}, {dtype} {layout}, {whose}"
                if time.perf_counter() - begin > args.seconds:
                    notes.append(f"not measured for want of time: {what}")
                    continue
                try:
                    rows.append(measure(name, whose, dtype, layout, run))
                    print(rows[-1], flush=True)
                except Exception as error:  # a peer that fails is a line, not the end
                    notes.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
                gc.collect()
                torch.cuda.empty_cache()
    file = args.out / "packed.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found[f"{DEVICE}{', small' if args.small else ''}"] = dict(
        machine=machine(DEVICE), rows=rows, packing=alone, notes=notes
    )
    write(file, found, page(found))


if __name__ == "__main__":
    main()
