"""The cache's promises P1 to P16 at full size: figures to benchmarks/results/cache.{json,md}.

The experiments are those that tests/test_cache_promises.py runs small. What other caches do in the
same tests is quoted from the measurements of 2026-11 that the design rests on (2 CPU cores; CuPy
14.2, cuda.core 1.2.2, Triton 3.9, Inductor and cpp_extension of PyTorch 2.13, Numba 0.68, JAX 0.10,
Warp 1.19, ccache 4.7.5): they are not measured again here.

    python benchmarks/cache_torture.py             # about 15 minutes on two cores
    python benchmarks/cache_torture.py --quick     # a minute: does it run?
    python benchmarks/cache_torture.py --only P1,P3     # again; the other rows stay
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cachekit  # noqa: E402 (found through the path set above)
import promises  # noqa: E402
import promises_bundle  # noqa: E402
import promises_keys  # noqa: E402
import promises_places  # noqa: E402

import neuronjit as nj  # noqa: E402
from neuronjit.kernels import build, targets  # noqa: E402
from neuronjit.kernels.spec import KernelSpec  # noqa: E402

Figures = dict[str, Any]


@dataclass
class Promise:
    """An experiment, what its figures must be, and what other caches did (2026-11)."""

    name: str
    text: str
    run: Callable[[Path, bool], Figures]
    kept: Callable[[Figures], bool]
    anchors: str
    needs: str = ""  # "root" or "strace"


def p1(base: Path, quick: bool) -> Figures:
    return promises.p1_race(base, *((8, 2, 4) if quick else (64, 20, 8)))


def p2(base: Path, quick: bool) -> Figures:
    """Real entries: a shared object by the host compiler, a cubin by NVRTC."""
    cachekit.use(base / "made")
    total: Figures = {}
    for target, arch in (("cpu", None), ("cuda", "sm_90")):
        try:
            arch = arch or targets.by_name(target).arch()
            spec = KernelSpec(nj.neurons.LIF, target, "forward", "float32", "hard")
            entry = build.entry(spec, arch)
        except nj.NeuronJitError as error:
            total[target] = f"not made here: {str(error).splitlines()[0][:80]}"
            continue
        offsets = range(0, len(entry.binary), 100) if quick else None
        found = promises.p2_flips(base / target, entry, offsets, 200 if quick else 2000)
        total |= {f"{target}: {name}": value for name, value in found.items()}
    return total


def p2_kept(figures: Figures) -> bool:
    targets = {name.split(":")[0] for name in figures if ":" in name}
    return bool(targets) and all(
        figures[f"{t}: tried"] == figures[f"{t}: rejected"]
        and len(set(figures[f"{t}: healed"].split("/"))) == 1
        and figures[f"{t}: sound again"]
        for t in targets
    )


def p3(base: Path, quick: bool) -> Figures:
    figures = promises.p3_kills(base, 20 if quick else 500)
    if cachekit.STRACE:
        (base / "calls").mkdir()
        calls = list(promises.CALLS.values())[:2] if quick else None
        found = promises.p3_kills_at_calls(base / "calls", calls)
        figures |= {f"at the k-th call: {name}": value for name, value in found.items()}
    return figures


def p5(base: Path, quick: bool) -> Figures:
    return promises.p5_errors(base, promises.ERRORS[:2] if quick else promises.ERRORS)


def p6(base: Path, quick: bool) -> Figures:
    cells = {}
    for name in promises_places.ENVIRONMENTS:
        place = base / name.replace(" ", "-")
        place.mkdir(mode=0o755)
        cells[name] = promises_places.p6_environment(place, name)[0]
    failed = [name for name, good in cells.items() if not good]
    return {"cells": len(cells), "right": sum(cells.values()), "failed": failed}


def p11(base: Path, quick: bool) -> Figures:
    return promises_places.p11_nodes(base, hidden=1.0 if quick else 60.0)


def p12(base: Path, quick: bool) -> Figures:
    cap, writers, seconds = (2_000_000, 4, 3) if quick else (64_000_000, 16, 60)
    return promises.p12_cap(base, cap, writers, seconds)


def p13(base: Path, quick: bool) -> Figures:
    ran = named = good = 0
    for number, name in enumerate(promises_places.HOSTILE):
        place = base / str(number)
        place.mkdir(mode=0o755)
        found = promises_places.p13_layout(place, name)
        ran, named, good = ran + found[0], named + found[1], good + found[2]
    swaps = base / "swaps"
    swaps.mkdir(mode=0o755)
    return {
        "layouts": len(promises_places.HOSTILE),
        "planted code loaded": ran,
        "one warning with path, owner and mode": named,
        "right": good,
        **{
            f"swapped: {name}": value
            for name, value in promises_places.p13_swaps(swaps, 500 if quick else 10_000).items()
        },
    }


def p14(base: Path, quick: bool) -> Figures:
    figures = promises_bundle.p14_bundles(base, 50 if quick else 1000)
    found = promises_bundle.fuzz(5000 if quick else 1_000_000)
    return figures | {f"malformed headers: {name}": value for name, value in found.items()}


def p15(base: Path, quick: bool) -> Figures:
    (base / "cache").mkdir(mode=0o700)
    return promises.p15_verify(base / "cache", 1000, 100)


PROMISES = [
    Promise(
        "P1",
        "N processes on a cold cache compile each kernel once, all are right",
        p1,
        lambda f: f["most"] == 1 and f["wrong"] == f["exceptions"] == 0,
        "compiles a key, 16 processes x 5 rounds: Inductor, cpp_extension 1; CuPy, cuda.core, "
        "Triton, Numba, JAX, Warp, ccache 16; all right",
    ),
    Promise(
        "P2",
        "an entry with any byte changed is never loaded",
        p2,
        p2_kept,
        "flips that were loaded: CuPy 0/1000 (but it takes another kernel's file), ccache 0/1000, "
        "JAX 1/500, Numba 189/300, Warp 300/300, Triton 497/500, Inductor 500/500, "
        "cuda.core 1000/1000",
    ),
    Promise(
        "P3",
        "kill -9 at any point leaves the cache usable",
        p3,
        lambda f: (
            f["bad"] == f["hangs"] == f["after the next sweep"] == 0
            and f.get("at the k-th call: bad", 0) == f.get("at the k-th call: hangs", 0) == 0
            and f["slowest next call, s"] < 5
        ),
        "100 kills: CuPy, cuda.core, Triton, Numba 0 bad; JAX 1 poisoned; Inductor 30 broken for "
        "good; cpp_extension 20/20 hang; Warp 0/40; ccache 0/60 (180 temporary files left)",
    ),
    Promise(
        "P4",
        "a damaged entry heals without help",
        lambda base, quick: promises.p4_heal(base),
        lambda f: f["healed"] == f["of"],
        "CuPy, ccache 4/4; Triton 2/4; JAX, Inductor, Numba, Warp, cuda.core 0/4",
    ),
    Promise(
        "P5",
        "no error of the disk fails a call, at most one warning",
        p5,
        lambda f: f["right"] == f["cells"],
        "rename answers ESTALE, EBUSY, EDQUOT: JAX goes on; CuPy, cuda.core, Triton, Numba, "
        "Inductor raise",
        needs="strace",
    ),
    Promise(
        "P6",
        "read-only, noexec, no HOME, unknown user, full disk, limits",
        p6,
        lambda f: f["right"] == f["cells"],
        "HOME cannot be written: only JAX runs; read-only and cold: JAX, Numba run",
        needs="root",
    ),
    Promise(
        "P7",
        "the holder's death, or a forked child, never blocks others",
        lambda base, quick: promises.p7_holders(base, 1.0 if quick else 120.0),
        lambda f: (
            f["killed: right"]
            and f["stopped: right"]
            and f["killed: seconds"] < 1
            and f["waiting was told"] == 2
        ),
        "lock free after: plain flock 6.03 s (as long as the child lives), filelock 0.00 s, "
        "FileBaton (cpp_extension) never",
    ),
    Promise(
        "P8",
        "fork and threads are safe",
        lambda base, quick: promises.p8_threads(base, 5 if quick else 200),
        lambda f: f["hangs"] == f["wrong"] == 0 and f["most"] == 1,
        "not measured",
    ),
    Promise(
        "P9",
        "many kernels in one process never cross",
        lambda base, quick: promises.p9_many(base, 50 if quick else 500),
        lambda f: f["wrong"] == f["descriptors more than before"] == 0,
        "memfd loaded by its plain path: wrong",
    ),
    Promise(
        "P10",
        "same input, same key; another input, another key",
        lambda base, quick: promises_keys.p10_keys(base),
        lambda f: f["the same in all processes"] == f["specs"] and not f["that do not"],
        "not measured (cuda.core is the model)",
    ),
    Promise(
        "P11",
        "several machines, one directory",
        p11,
        lambda f: (
            f["most compiles per key and node"] <= 1
            and f["wrong"] == f["rebuilt for a clock a day off"] == 0
            and f["right while lookups are hidden"]
        ),
        "not measured",
    ),
    Promise(
        "P12",
        "the size cap holds and hurts nobody",
        p12,
        lambda f: f["wrong"] == f["exceptions"] == f["warnings"] == 0,
        "not measured",
    ),
    Promise(
        "P13",
        "code is not loaded from an unsafe place",
        p13,
        lambda f: (
            f["planted code loaded"] == f["swapped: planted code loaded"] == 0
            and f["layouts"] == f["right"] == f["one warning with path, owner and mode"]
        ),
        "planted code ran without a warning: CuPy, cuda.core, Triton, Inductor",
        needs="root",
    ),
    Promise(
        "P14",
        "bundles are safe and exact",
        p14,
        lambda f: (
            f["restored byte for byte"] == f["kernels"]
            and f["refused"] == f["archives"]
            and f["escaped"] == f["malformed headers: wrong"] == 0
        ),
        "not measured",
    ),
    Promise(
        "P15",
        "verify tells the truth",
        p15,
        lambda f: (
            f["found"] == f["removed by --fix"] == f["damaged"]
            and f["false alarms"] == f["sound ones removed"] == 0
        ),
        "none has a verify of the whole cache",
    ),
    Promise(
        "P16",
        "all this costs little: first load of a 32 KB kernel, microseconds",
        lambda base, quick: promises.p16_cost(base, 100 if quick else 2000),
        lambda f: f["all"] < 5000,
        "not measured; SHA-256 alone 100 us for 32 KB",
    ),
]


def measure(promise: Promise, quick: bool) -> Figures:
    missing = {"root": os.geteuid() != 0, "strace": cachekit.STRACE is None}
    if missing.get(promise.needs):
        return {"kept": None, "why": f"needs {promise.needs}"}
    base = Path(tempfile.mkdtemp(prefix="neuronjit-torture-"))
    base.chmod(0o755)  # for the other users of P6 and P13
    before, start = dict(os.environ), time.monotonic()
    try:
        figures = promise.run(base, quick)
    finally:
        os.environ.clear()
        os.environ.update(before)
        cachekit.forget()
        shutil.rmtree(base, ignore_errors=True)
    seconds = round(time.monotonic() - start, 1)
    return {"kept": promise.kept(figures), "took, s": seconds, "figures": figures}


def table(found: dict[str, Figures], about: Figures) -> str:
    lines = ["# The cache's promises", ", ".join(f"{k} {v}" for k, v in about.items()), ""]
    lines += ["| | promise | kept | figures | other caches (2026-11) |", "|---|---|---|---|---|"]
    for promise in PROMISES:
        if result := found.get(promise.name):
            shown = [
                f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in result.get("figures", {"not run": result.get("why")}).items()
            ]
            kept = {True: "yes", False: "**NO**", None: "not run"}[result["kept"]]
            cells = [promise.name, promise.text, kept, "; ".join(shown), promise.anchors]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def earlier(path: Path, about: Figures) -> dict[str, Figures]:
    """What an earlier run of this size found on this machine, for --only to complete."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    same = all(before["about"].get(name) == about[name] for name in about if name != "measured")
    return dict(before["promises"]) if same else {}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", default=",".join(promise.name for promise in PROMISES))
    parser.add_argument("--quick", action="store_true", help="small: does it run?")
    args = parser.parse_args()
    about = {
        "cores": len(os.sched_getaffinity(0)),
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "neuronjit": nj.__version__,
        "size": "quick" if args.quick else "full",
        "measured": time.strftime("%Y-%m-%d"),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    found = earlier(args.out / "cache.json", about)
    for promise in PROMISES:
        if promise.name in args.only.split(","):
            found[promise.name] = result = measure(promise, args.quick)
            print(promise.name, json.dumps(result), flush=True)
            anchors = {promise.name: promise.anchors for promise in PROMISES}
            text = json.dumps(
                {"about": about, "promises": found, "anchors 2026-11": anchors}, indent=1
            )
            args.out.joinpath("cache.json").write_text(text + "\n")
            args.out.joinpath("cache.md").write_text(table(found, about))
    return int(any(result["kept"] is False for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
