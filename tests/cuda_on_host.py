"""The CUDA kernels run by the host's compiler, one thread after another.

Their ways through steps and lanes are checked so without a GPU; and helpers, whose threads wait for
each other, in threads of the host. A process of its own, as it changes what the library renders.

Usage: python cuda_on_host.py MODEL DTYPE STEPS... (the names of the oracle's models)
       python cuda_on_host.py quotients DTYPE
       python cuda_on_host.py helpers DTYPE
"""

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path

import torch
from support import check, compare_pooling, inputs, poolings, quotients, starts

from neuronjit.kernels import render, spec
from neuronjit.kernels.targets import cpu, cuda
from neuronjit.run import bits, pooling, statistics

SHIM = """
#include <cmath>
#include <cstring>
#define __device__
#define __forceinline__ inline
#define __shared__ static
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x; };
static unsigned __float_as_uint(float a) { unsigned b; memcpy(&b, &a, 4); return b; }
static float __uint_as_float(unsigned b) { float a; memcpy(&a, &b, 4); return a; }
"""
ALONE = """
static Index threadIdx, blockDim;
template <typename R> static R __shfl_down_sync(unsigned, R, int) { return R(0); }
static void __syncthreads() {}
#define OMP_FOR_
"""
# a block's threads, which wait for each other
TOGETHER = """
#include <barrier>
#include <deque>
#include <thread>
#define __global__
#define __launch_bounds__(n)
static thread_local Index threadIdx;
static Index blockIdx, blockDim, gridDim;
static std::deque<std::barrier<>> waits;  // of the block, then of each warp
static void __syncthreads() { waits[0].arrive_and_wait(); }
template <typename R> static R __shfl_down_sync(unsigned, R a, int down) {
  static R all[1024];
  const unsigned t = threadIdx.x;
  all[t] = a;
  waits[1 + t / 32].arrive_and_wait();
  const R found = t % 32 + down < 32 ? all[t + down] : a;
  waits[1 + t / 32].arrive_and_wait();
  return found;
}
template <class A>
static void launch(void (*kernel)(A), const void* packed, int blocks, int threads) {
  blockDim.x = threads;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    waits.clear();
    waits.emplace_back(threads);
    for (int w = 0; w < threads / 32; ++w) { waits.emplace_back(32); }
    std::deque<std::jthread> running;
    for (unsigned t = 0; t < (unsigned)threads; ++t) {
      running.emplace_back([=] {
        threadIdx.x = t;
        kernel(*(const std::remove_cv_t<A>*)packed);
        waits[1 + t / 32].arrive_and_drop();
        waits[0].arrive_and_drop();
      });
    }
  }
}
// the same, one after the other, of a kernel whose threads do not wait for each other
template <class A>
static void launch_each(void (*kernel)(A), const void* packed, int blocks, int threads) {
  blockDim.x = threads;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < (unsigned)threads; ++threadIdx.x) {
      kernel(*(const std::remove_cv_t<A>*)packed);
    }
  }
}
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


def header(templates, together=False):
    """What the CUDA target has, but for `run` and the entry: the host's are a loop over neurons.

    Those, too, for threads that run together.
    """
    entry = r"template <class M> struct Walk;(?:.*\n)*?{%- endmacro %}\n"
    host = re.search(entry, (templates / "target_cpu.h.j2").read_text())
    text = (templates / "target_cuda.h.j2").read_text()
    assert host
    text = text if together else re.sub(entry, lambda _: host[0], text)
    for instruction, word in WORDS.items():
        text, count = re.subn(instruction, lambda _, word=word: word, text)
        assert count == 1, instruction
    assert "asm" not in text.replace("#if __CUDA_ARCH__ >= 800\n    asm", ""), "a new instruction"
    return SHIM + (TOGETHER if together else ALONE) + text


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
        if model == "helpers":
            (templates / "target_cuda.h.j2").write_text(header(spec.templates(), together=True))
            check_helpers(Path(folder), getattr(torch, dtype))
        for t in map(int, steps):
            for n in (5, 12):
                compare(model, getattr(torch, dtype), t, n)
    print("right")


class OnHost(cuda.Kernel):
    """A helper's kernel in threads of the host, and its grid as on a GPU that runs few blocks."""

    def __init__(self, given, folder):
        super().__init__(0, given.lanes, 5, 0, None)
        source = folder / f"{given.symbol}.cpp"
        run = 'extern "C" void run(const void* packed, int blocks) {'
        call = "launch" if given.template == "statistics.cu.j2" else "launch_each"
        call = f"{call}({given.symbol}, packed, blocks, {cuda.BLOCK});"
        source.write_text(f"{render.render_helper(given)}\n{run} {call} }}\n")
        library = source.with_suffix(".so")
        command = ["g++", "-std=c++20", "-pthread", "-shared", "-fPIC", "-w", source, "-o", library]
        subprocess.run(command, check=True)
        self._run = ctypes.CDLL(library).run

    def launch(self, packed, grid, n, steps):
        self._run(packed, grid.blocks)


def check_helpers(folder, dtype):
    @cache
    def on_host(given, device):
        return OnHost(given, folder)

    bits.helper = statistics.helper = pooling.helper = on_host
    check_bits(dtype)
    shapes = [
        (2, 2, 3, 5, 5),
        (1, 6, 8, 6, 6),
        (5, 1, 16, 4),
        (3, 7, 300),
        (4, 9, 1, 40),
        (2, 2, 6),
    ]
    for shape in shapes:
        for last in (False, True):
            check_statistics(shape, last, dtype)
    x = torch.randn(4 * 3 * 16 * 8 + 1).to(dtype)[1:].view(4, 3, 16, 8)  # not aligned
    compare_statistics(x)
    for x, size, ceil_mode in poolings(dtype, "cpu"):
        plan = pooling._Pooling(x, size, ceil_mode)
        assert plan.has_kernels()
        y, places = plan.forward(x, save=True)
        assert torch.equal(plan.forward(x, save=False)[0].nan_to_num(9), y.nan_to_num(9))
        compare_pooling(x, size, ceil_mode, y, partial(plan.backward, places=places))
    assert on_host.cache_info().currsize > 20


def check_statistics(shape, last, dtype):
    generator = torch.Generator().manual_seed(len(shape))
    x = (torch.randn(shape, generator=generator) * 2 + 3).to(dtype)
    compare_statistics(x.movedim(2, -1).contiguous().movedim(-1, 2) if last else x)


def compare_statistics(x):
    """Against torch's batch norm in float64, with running statistics of all kinds."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    near = dict(rtol=1e-12, atol=1e-12) if real == torch.float64 else dict(rtol=5e-5, atol=5e-5)
    for momentum, track in ((0.1, True), (None, True), (0.3, False)):
        norm = torch.nn.BatchNorm1d(x.shape[2], momentum=momentum).double()
        own = [norm.running_mean.to(real), norm.running_var.to(real), norm.num_batches_tracked + 0]
        running = statistics.Running(*own, momentum) if track else statistics.Running()
        for batch in range(3):
            now = x + batch if batch else x
            flat = now.double().movedim(2, 0).flatten(1)
            norm(flat.t())
            mean, invstd = statistics._Statistics(now).run(now, norm.eps, running)
            want = torch.var_mean(flat, 1, correction=0)
            assert mean.shape == invstd.shape == (1, x.shape[2], *(1,) * (x.dim() - 3))
            torch.testing.assert_close(mean.flatten().double(), want[1], **near)
            torch.testing.assert_close(
                invstd.flatten().double(), (want[0] + norm.eps).rsqrt(), **near
            )
        if track:
            for got, wanted in zip(own, norm.buffers(), strict=True):
                torch.testing.assert_close(got.double(), wanted.double(), **near)


def check_bits(dtype):
    """Numbers of few bits, packed and unpacked, against whole numbers of Python."""
    for width in bits.WIDTHS:
        for count in (*range(1, 20), 4095, 4096, 4097, 9003):
            numbers = torch.randint(0, 1 << width, (count,))
            whole = sum(number << (width * i) for i, number in enumerate(numbers.tolist()))
            size = -(-count * width // 8)
            flat = numbers.to(dtype)
            packed = torch.full((size,), 255, dtype=torch.uint8)
            assert bits._ran(True, flat, packed, width)
            assert bytes(packed.tolist()) == whole.to_bytes(size, "little"), (width, count)
            back = torch.full_like(flat, -1)
            assert bits._ran(False, back, packed, width)
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
