"""Batch norm and neuron (and residual), apart and in the neuron's kernels.

Forward and backward of a training step in passes: the time in which half a copy of x is made. 8 are
the fewest with training statistics, 9 with a residual. On a GPU as one CUDA graph; without one, by
wall clock on one thread of the CPU, into files of their own.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import markdown, write
from torch import Tensor, nn
from warm_start import machine

import neuronjit as nj
from neuronjit.nn import batch_norm

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # [T, N, C, H, W]
    "cuda": ((4, 32, 64, 56, 56), (4, 64, 128, 32, 32), (4, 32, 128, 28, 28)),
    "cpu": ((4, 8, 64, 56, 56), (4, 16, 128, 32, 32), (4, 8, 128, 28, 28)),
}
RESIDUALS = (None, "after", "before")


def took_ms(call: Callable[[], Any], repeats: int = 5, rounds: int = 9) -> float:
    """Milliseconds of a call (on a GPU captured), as the median of some rounds."""
    for _ in range(3):
        call()
    if DEVICE == "cpu":
        return statistics.median(timeit.repeat(call, number=1, repeat=rounds)) * 1e3
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=torch.cuda.current_stream()):
        kept = call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            captured.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    del kept
    return statistics.median(times)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> Tensor:
    x = torch.randn(shape, device=DEVICE).to(dtype)
    if last:
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    return x.requires_grad_()


def measure(shape: tuple[int, ...], dtype: torch.dtype, last: bool, residual: Any) -> dict:
    x, skip = numbers(shape, dtype, last), numbers(shape, dtype, last)
    weight = torch.randn_like(x)
    norm = nn.BatchNorm2d(shape[2]).to(DEVICE)
    fused = nj.nn.NormedNeuron(copy.deepcopy(norm), nj.nn.IF(), residual)
    neuron = nj.nn.IF()

    def apart() -> Any:
        neuron.reset()
        y = norm(x.flatten(0, 1)).unflatten(0, shape[:2])
        out = neuron(y + skip if residual == "before" else y)
        out = out + skip if residual == "after" else out
        asked = [x, norm.weight, norm.bias, *([skip] if residual else [])]
        return torch.autograd.grad(out, asked, weight)

    def together() -> Any:
        fused.neuron.reset()
        out = fused(x, *([skip] if residual else []))
        asked = [x, fused.norm.weight, fused.norm.bias, *([skip] if residual else [])]
        return torch.autograd.grad(out, asked, weight)

    errors = [
        ((a - b).float().norm() / a.float().norm()).item()
        for a, b in zip(apart(), together(), strict=True)
    ]
    target = torch.empty_like(x)
    with torch.no_grad():
        one = took_ms(lambda: target.copy_(x)) / 2
    took = {name: took_ms(call) / one for name, call in (("apart", apart), ("fused", together))}
    return dict(
        shape=list(shape), dtype=str(dtype)[6:], layout="channels_last" if last else "NCHW",
        residual=residual, pass_us=one * 1e3, error=max(errors), **took,
    )  # fmt: skip


def page(rows: list[dict], where: dict[str, Any]) -> str:
    lines = ["# Batch norm and neuron: training step in passes over x", ""]
    lines += [", ".join(f"{k} {v}" for k, v in where.items()), ""]
    header = "[T, N, C, H, W]", "dtype, layout", "residual", "apart", "fused", "times", "error"
    cells = [
        [
            str(row["shape"]), f"{row['dtype']} {row['layout']}", row["residual"] or "",
            f"{row['apart']:.1f}", f"{row['fused']:.1f}", f"{row['apart'] / row['fused']:.2f}",
            f"{row['error']:.0e}",
        ]
        for row in rows
    ]  # fmt: skip
    return "\n".join([*lines, markdown([*header], cells), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    batch_norm._pays = lambda x: True  # measured where it does not pay, too
    if DEVICE == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())
    else:
        torch.set_num_threads(1)
    rows = [
        measure(shape, dtype, last, residual)
        for shape in SHAPES[DEVICE]
        for dtype in (torch.float32, torch.float16 if DEVICE == "cuda" else torch.bfloat16)
        for last in (False, True)
        for residual in RESIDUALS
    ]
    found = {"machine": machine(DEVICE), "rows": rows}
    base = args.out / f"batch_norm{'' if DEVICE == 'cuda' else '_cpu'}"
    write(base, found, page(rows, found["machine"]))


if __name__ == "__main__":
    main()
