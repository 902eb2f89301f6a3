"""Max pooling, torch's and ours, forward and backward: milliseconds, and times of the least bytes.

The least that can be moved: x read and y written, y's gradient read and x's written, and a byte a
window written and read. As one CUDA graph.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from batch_norm import RESULTS, took_ms
from tables import markdown, write
from torch import nn
from warm_start import machine

from neuronjit.nn.pooling import lighten

SHAPES = {  # [T * N, C, H, W] of the networks' stems, and the windows
    "SEW-ResNet-18": ((128, 64, 112, 112), (3, 2, 1)),
    "CIFAR10Net": ((256, 256, 32, 32), (2,)),
    "a VGG's stem": ((256, 64, 48, 48), (2,)),
}


def measure(name: str, dtype: torch.dtype, last: bool) -> dict:
    shape, window = SHAPES[name]
    x = (torch.randn(shape, device="cuda") > 1).to(dtype)
    x = (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()
    theirs, ours = nn.MaxPool2d(*window), nn.MaxPool2d(*window)
    lighten(ours)
    grad = torch.randn_like(theirs(x))

    def step(pool: nn.Module) -> torch.Tensor:
        return torch.autograd.grad(pool(x), x, grad)[0]

    error = (step(theirs) - step(ours)).abs().max().item()
    target, least = torch.empty_like(x), 2 * (x.nbytes + grad.nbytes + grad.numel())
    with torch.no_grad():
        copied = took_ms(lambda: target.copy_(x)) * least / (2 * x.nbytes)
    took = {"torch": took_ms(lambda: step(theirs)), "neuronjit": took_ms(lambda: step(ours))}
    layout = "channels_last" if last else "NCHW"
    return dict(of=name, dtype=str(dtype)[6:], layout=layout, least=copied, error=error, **took)


def page(rows: list[dict], where: dict[str, str]) -> str:
    lines = ["# Max pooling: milliseconds forward and backward", ""]
    lines += [", ".join(f"{k} {v}" for k, v in where.items()), ""]
    lines += ["*Least*: the fewest bytes at the speed of a copy of x.", ""]
    cells = [
        [
            f"{row['of']} {list(SHAPES[row['of']][0])}", f"{row['dtype']} {row['layout']}",
            *(f"{row[name]:.3f}" for name in ("least", "torch", "neuronjit")),
            f"{row['torch'] / row['neuronjit']:.1f}", f"{row['error']:.0e}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["of", "dtype, layout", "least", "torch", "neuronjit", "times", "error"]
    return "\n".join([*lines, markdown(header, cells), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.cuda.set_stream(torch.cuda.Stream())
    rows = [
        measure(name, dtype, last)
        for name in SHAPES
        for dtype in (torch.float32, torch.float16)
        for last in (False, True)
    ]
    where = machine("cuda")
    write(args.out / "pooling", {"machine": where, "rows": rows}, page(rows, where))


if __name__ == "__main__":
    main()
