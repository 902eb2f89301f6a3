"""Whole numbers of few bits, packed and unpacked: against whole numbers of Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import each_device

import neuronjit as nj
from neuronjit.kernels import build
from neuronjit.run.bits import WIDTHS, pack_bits, unpack_bits

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def whole(numbers: list[int], width: int) -> list[int]:
    """The bytes of all numbers, each of `width` bits, the first of them lowest."""
    number = sum(n << (width * i) for i, n in enumerate(numbers))
    return [*number.to_bytes(-(-len(numbers) * width // 8), "little")]


def compare(dtype: torch.dtype, width: int, device: str) -> None:
    for count in (*range(1, 18), 4096, 5001):
        generator = torch.Generator().manual_seed(count)
        numbers = torch.randint(0, 1 << width, (count,), generator=generator)
        flat = numbers.to(device, dtype)
        bits = pack_bits(flat, width)
        assert bits.tolist() == whole(numbers.tolist(), width)
        back = unpack_bits(bits, dtype, width)
        assert back.dtype == dtype and torch.equal(back[:count], flat)
        assert len(back) == len(bits) * 8 // width and not back[count:].any()
        each = 8 // width
        part = unpack_bits(bits[1:3], dtype, width)  # where words of bits are not aligned
        assert torch.equal(part, back[each : 3 * each])
        torch.testing.assert_close(pack_bits(flat[1:], width), pack_bits(flat[1:].clone(), width))


@each_device
@pytest.mark.parametrize("width", WIDTHS)
def test_there_and_back(width: int, device: str) -> None:
    for dtype in DTYPES:
        compare(dtype, width, device)


@each_device
def test_no_numbers(device: str) -> None:
    none = torch.empty(0, device=device)
    assert pack_bits(none).shape == unpack_bits(pack_bits(none), torch.float32).shape == (0,)


@pytest.mark.cuda
def test_kernels_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch's operations where there is none."""
    monkeypatch.setattr(build, "_helpers", kernels := {})
    compare(torch.float32, 1, "cuda")
    assert len(kernels) == 2 and None not in kernels.values()

    def nothing(error: Exception) -> dict[Any, Any]:
        def load_kernel(*_: object) -> None:
            raise error

        monkeypatch.setattr(build, "_helpers", kernels := {})
        monkeypatch.setattr(build, "load_kernel", load_kernel)
        return kernels

    kernels = nothing(nj.BackendError("none here"))
    compare(torch.float16, 2, "cuda")
    assert {*kernels.values()} == {None}
    kernels = nothing(nj.MissingKernelError("NEURONJIT_NO_COMPILE is set"))
    compare(torch.float16, 2, "cuda")
    assert {*kernels.values()} == {None}


@pytest.mark.cuda
def test_first_packed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_helpers", {})
    monkeypatch.setattr(build, "_kernels", {})
    flat = (torch.rand(1000, device="cuda") < 0.5).half()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        bits = pack_bits(flat)
        back = unpack_bits(bits, torch.float16)
    graph.replay()
    assert bits.tolist() == whole(flat.int().tolist(), 1) and torch.equal(back[:1000], flat)
    assert not build._helpers  # torch's operations were captured; the next call may find a kernel
    assert torch.equal(pack_bits(flat), bits) and len(build._helpers) == 1
