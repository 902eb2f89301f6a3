"""The CUDA kernels run by the host's compiler, one thread after another.

Their ways through steps and lanes are checked so without a GPU. A process of its own, as it
changes what the library renders.

Usage: python cuda_on_host.py MODEL DTYPE STEPS... (the names of the oracle's models)
       python cuda_on_host.py quotients DTYPE
       python cuda_on_host.py bits DTYPE
"""

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from support import check, inputs, quotients, starts

from neuronjit.kernels import render, spec
from neuronjit.kernels.targets import cpu, cuda

SHIM = """
#include <cmath>
#include <cstring>
#define __device__
#define __forceinline__ inline
#define __shared__ static
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
static struct { unsigned x; } threadIdx, blockDim;
static unsigned __float_as_uint(float a) { unsigned b; memcpy(&b, &a, 4); return b; }
static float __uint_as_float(unsigned b) { float a; memcpy(&a, &b, 4); return a; }
template <typename R> static R __shfl_down_sync(unsigned, R, int) { return R(0); }
static void __syncthreads() {}
#define OMP_FOR_
"""
STORE_IF = "if (wanted) memcpy((void*)to, &a, sizeof a);"
# instructions of the GPU that have a word in C++
WORDS = {
    r"asm volatile\(\"\" ::: \"memory\"\);": "",
    r"asm volatile\(\"prefetch[^;]*;[^;]*;": "(void)*(const volatile char*)from;",  # must be there
    **{
        rf"asm volatile\(\"[^\"]*st\.global\.{width} [^\"]*\"[^;]*;": STORE_IF
        for width in ("b16", "b32", r"v2\.b32", r"v4\.b32")
    },
    r"asm\(\"mul\.ftz\.f32[^;]*;[^;]*;": "most = fminf(abs_(b), 1.0f) * 3.4028e38f;",
    r"asm\(\"rcp\.approx\.ftz\.f32[^;]*;[^;]*\(b\)\);": "r = 1.0f / b;",
    r"asm\(\"rcp\.approx\.ftz\.f32[^;]*;[^;]*\(1\.0f \+ e\)\);": "r = 1.0f / (1.0f + e);",
    r"asm\(\"ex2\.approx\.ftz\.f32[^;]*;[^;]*;": "e = exp2f(a * -1.44269504f);",
    r"asm\(\"cvt\.f32\.f16[^;]*;[^;]*;": "_Float16 h; memcpy(&h, &a, 2); r = h;",
    r"asm\(\"cvt\.rn\.f16\.f32[^;]*;[^;]*;": "_Float16 h = a; memcpy(&r, &h, 2);",
}


def header(templates):
    """What the CUDA target has, but for `run` and the entry: the host's are a loop over neurons."""
    entry = r"template <class M> struct Walk;(?:.*\n)*?{%- endmacro %}\n"
    host = re.search(entry, (templates / "target_cpu.h.j2").read_text())
    text = (templates / "target_cuda.h.j2").read_text()
    assert host
    text = re.sub(entry, lambda _: host[0], text)
    for instruction, word in WORDS.items():
        text, count = re.subn(instruction, lambda _, word=word: word, text)
        assert count == 1, instruction
    assert "asm" not in text.replace("#if __CUDA_ARCH__ >= 800\n    asm", ""), "a new instruction"
    return SHIM + text


def shape(direction, itemsize, model, sequences, n, steps, aligned):
    """Few neurons as a GPU walks few, multiples of 4 as it walks very many."""
    many = n << 14 if n % 4 == 0 else n
    return cuda.shape(direction, itemsize, model, sequences, many, steps, aligned)


def main(model, dtype, *steps):
    with tempfile.TemporaryDirectory(prefix="neuronjit-tests-") as folder:
        templates = shutil.copytree(spec.templates(), Path(folder, "templates"))
        (templates / "target_cpu.h.j2").write_text(header(spec.templates()))
        spec.templates = render.templates = lambda: templates
        cpu.KEEPS_RECIPROCALS = True
        cpu.shape = shape
        cpu.FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in cpu.FLAGS)
        if model == "quotients":
            check_quotients(getattr(torch, dtype))
        if model == "bits":
            check_bits(Path(folder), dtype)
        for t in map(int, steps):
            for n in (5, 12):
                compare(model, getattr(torch, dtype), t, n)
    print("right")


BITS = """
#define __global__
#define __launch_bounds__(n)
static struct { unsigned x; } blockIdx;
%s
extern "C" void run(void* numbers, void* bits, long long count, int blocks) {
  for (blockIdx.x = 0; blockIdx.x < (unsigned)blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < BLOCK; ++threadIdx.x) {
      kernel({(storage*)numbers, (unsigned char*)bits, count});
    }
  }
}
"""


def check_bits(folder, dtype):
    """Numbers of few bits, packed and unpacked, against whole numbers of Python."""
    render._header = lambda target: render._environment().get_template(
        "target_cpu.h.j2"
    ).make_module(dict(block=cuda.BLOCK, library=render.LIBRARY))  # fmt: skip
    turns = 4
    for width in (1, 2, 4, 8):
        run = {}
        for pack in (True, False):
            source = folder / f"bits_{width}_{pack}.cpp"
            source.write_text(BITS % render.render_bits("kernel", pack, dtype, width, turns))
            library = source.with_suffix(".so")
            command = ["g++", "-std=c++20", "-shared", "-fPIC", "-w", source, "-o", library]
            subprocess.run(command, check=True)
            run[pack] = ctypes.CDLL(library).run
            run[pack].argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int]
        for count in (*range(1, 20), 4095, 4096, 4097, 9003):
            numbers = torch.randint(0, 1 << width, (count,))
            whole = sum(number << (width * i) for i, number in enumerate(numbers.tolist()))
            size = -(-count * width // 8)
            blocks = -(-count // (8 * turns * cuda.BLOCK))
            flat = numbers.to(getattr(torch, dtype))
            bits = torch.full((size,), 255, dtype=torch.uint8)
            run[True](flat.data_ptr(), bits.data_ptr(), count, blocks)
            assert bytes(bits.tolist()) == whole.to_bytes(size, "little"), (width, count)
            back = torch.full_like(flat, -1)
            run[False](back.data_ptr(), bits.data_ptr(), count, blocks)
            assert torch.equal(back, flat), (width, count)


def compare(model, dtype, t, n):
    x = inputs((t, n), dtype, seed=t).requires_grad_()
    real = torch.float64 if dtype == torch.float64 else torch.float32
    state = {z: v.requires_grad_() for z, v in starts(model, (n,), real).items()}
    learned = {}
    if model == "PLIF":
        learned = dict(reciprocal_tau=torch.tensor(0.6, requires_grad=True))
    check(model, x, state, record=(), **learned)
    check(model, x, record=("h",), arriving=("s", "h_seq"), **learned)


def check_quotients(dtype):
    """Bit for bit, but next to underflow, where the last bit may be lost. Zeros may lose a sign."""
    info = torch.finfo(dtype)
    for what, value, want, slope, want_slope in quotients(dtype):
        far = (want.abs() > info.tiny / info.eps**2) | (want == 0) | ~want.isfinite()
        near = torch.isclose(value, want, rtol=2 * info.eps, atol=info.tiny, equal_nan=True)
        same = (value == want) | (value.isnan() & want.isnan())
        assert same[far].all() and near.all(), (what, value[~same & far], want[~same & far])
        near = torch.isclose(
            slope.clamp(-info.max, info.max), want_slope.clamp(-info.max, info.max),
            rtol=8 * info.eps, atol=info.tiny, equal_nan=True,
        )  # fmt: skip
        assert near.all(), (what, slope[~near], want_slope[~near])


if __name__ == "__main__":
    main(*sys.argv[1:])
