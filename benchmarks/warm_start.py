"""What a new process waits for before its first spikes, with a warm cache and with a cold one.

    python benchmarks/warm_start.py             # about two minutes; CUDA too where there is a GPU
    python benchmarks/warm_start.py --rounds 3  # does it run?

Writes warm_start.json and warm_start.md to benchmarks/results/; a run replaces the figures of the
devices that it had, others stay. Without a GPU, CUDA kernels are compiled (for sm_90), not run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("if", "lif", "izhikevich")  # izhikevich has the longest kernels of the built-in ones
GOALS = {
    "warm_ms": ("first spikes from a warm cache, after torch and the device are up", 150.0, "ms"),
    "lookup_us": ("a warm call finding its kernel", 2.0, "us"),
    "cold_s": ("a kernel that was never compiled, compiling included", 1.0, "s"),
    "cold_cuda_s": ("the same with NVRTC", 0.5, "s"),
}


# --- in the new process --------------------------------------------------------------------------


def begin(device: str) -> Any:
    """What a program has without us: torch, a device that is up (with CuPy, on CUDA), an input."""
    import torch

    x = torch.rand(16, 65536, device=device, requires_grad=True)
    if device == "cuda":
        import cupy  # noqa: F401

        torch.cuda.synchronize()
    return x


def finish(device: str) -> float:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def child_torch(device: str, model: str) -> dict[str, Any]:
    begin(device)
    return {"ready": finish(device)}


def child_first(device: str, model: str) -> dict[str, Any]:
    """Clock readings (of the whole machine) at torch and device ready, spikes, gradient."""
    x = begin(device)
    ready, before = finish(device), set(sys.modules)
    import neuronjit as nj

    imported = finish(device)
    spikes = nj.multistep(nj.neurons.by_name(model), x).spikes
    fired = finish(device)
    spikes.sum().backward()
    done = finish(device)
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    return {
        "ready": ready,
        "import_ms": 1e3 * (imported - ready),
        "warm_ms": 1e3 * (fired - ready),
        "fired": fired,
        "forward_s": fired - imported,
        "backward_s": done - fired,
        "imports": sorted(new & {"sympy", "jinja2"}),
        **nj.stats(),
    }


def child_stages(device: str, model: str) -> dict[str, Any]:
    """Milliseconds in each part of the first call."""
    x = begin(device)
    start = finish(device)
    import neuronjit as nj
    from neuronjit.cache import store
    from neuronjit.kernels import build, spec, targets

    spent = {"import neuronjit": 1e3 * (finish(device) - start)}

    def watch(name: str, owner: Any, attribute: str) -> None:
        original = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + 1e3 * (time.perf_counter() - start)

        setattr(owner, attribute, timed)

    start = time.perf_counter()
    target = targets.by_name(device)
    spent["import the target"] = 1e3 * (time.perf_counter() - start)
    watch("ask the compiler its version", target, "fingerprint")
    watch("digest what would render", spec, "_renderer")
    watch("read and verify the kernel", store, "load")
    watch("load the binary", target, "load")
    start = finish(device)
    nj.multistep(nj.neurons.by_name(model), x)
    first = finish(device)
    nj.multistep(nj.neurons.by_name(model), x)
    again = finish(device)
    spent["run it"] = 1e3 * (again - first)
    known = sum(spent.values()) - spent["import neuronjit"] - spent["import the target"]
    spent["the rest of the first call"] = 1e3 * (first - start) - known
    build.stats()
    return {"stages": spent}


def child_lookup(device: str, model: str) -> dict[str, Any]:
    """Microseconds of finding the plan of a call, and the kernel of a spec, used before."""
    x = begin(device)
    import importlib

    import torch

    import neuronjit as nj
    from neuronjit.kernels import build

    front = importlib.import_module("neuronjit.multistep")
    x = x[:, :64].detach()
    with torch.no_grad():
        call = functools.partial(nj.multistep, nj.neurons.by_name(model), x, v_threshold=1.0)
        call()
        parts, plan = next(iter(front._plans.items()))

        def find_plan() -> Any:  # as every call does: describe the tensor, make the key, look it up
            front.signature(x)
            return front._plans.get((*parts,))

        assert find_plan() is plan
        (spec, index), kernel = next(iter(build._kernels.items()))
        assert build.load_kernel(spec, index) is kernel
        return {
            "lookup_us": 1e6 * each(find_plan),
            "load_kernel_us": 1e6 * each(lambda: build.load_kernel(spec, index)),
            "call_us": 1e6 * each(call, 200),
        }


def each(call: Callable[[], Any], number: int = 5000) -> float:
    """Seconds of one call: the fastest of several rounds, since others only add to it."""
    rounds = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(number):
            call()
        rounds.append((time.perf_counter() - start) / number)
    return min(rounds)


def child_compile(device: str, model: str) -> dict[str, Any]:
    """Seconds to build forward and backward for a GPU that is not here."""
    from neuronjit.kernels import ahead, build

    took = {}
    chosen = ahead.choices([model], "cuda", surrogates=["atan"])
    for direction in ("forward", "backward"):
        spec = next(
            s for s in chosen if s.direction == direction and s.interval == 16 and s.prefetch
        )
        build.targets.by_name("cuda").fingerprint("sm_90")  # imports CuPy
        start = time.perf_counter()
        build.entry(spec, "sm_90")
        took[f"{direction}_s"] = time.perf_counter() - start
    return {**took, **build.stats()}


# --- in this process -----------------------------------------------------------------------------


def child(kind: str, device: str, folder: str, model: str = "lif") -> dict[str, Any]:
    """What a new process says, its clock readings counted from its start."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NEURONJIT", "PYTHONDONT"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**kept, "PYTHONPATH": path, "NEURONJIT_CACHE_DIR": folder}
    environment["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir(), "neuronjit-bench-pyc"))
    start = time.perf_counter()
    command = [sys.executable, __file__, "--child", kind, device, model]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(done.stderr)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said | {key: said[key] - start for key in ("ready", "fired") if key in said}


def middle(rows: list[dict[str, Any]], key: str) -> float:
    return round(statistics.median(row[key] for row in rows), 3)


def fastest(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Compiling keeps a core busy: whatever else runs only adds to it."""
    return {key: round(min(row[key] for row in rows), 3) for key in ("forward_s", "backward_s")}


def measure(device: str, rounds: int) -> dict[str, Any]:
    """All figures of a device."""
    with tempfile.TemporaryDirectory() as base:
        cold = {}
        for model in MODELS:
            rows = [child("first", device, f"{base}/{model}{i}", model) for i in range(3)]
            if any(row["compiled"] != 2 for row in rows):
                raise SystemExit(f"a cold cache was not cold: {rows}")
            cold[model] = fastest(rows)
        warm_dir = f"{base}/lif0"
        child("first", device, warm_dir)
        bare, warm = [], []
        for _ in range(rounds):  # in turn: the machine's mood is the same for both
            bare.append(child("torch", device, warm_dir))
            warm.append(child("first", device, warm_dir))
        if any(row["compiled"] for row in warm):
            raise SystemExit("a warm cache was not warm")
        stages = [child("stages", device, warm_dir)["stages"] for _ in range(min(rounds, 7))]
        return {
            "machine": machine(device),
            "rounds": rounds,
            "torch_alone_s": middle(bare, "ready"),
            "first_spikes_s": middle(warm, "fired"),
            "import_ms": middle(warm, "import_ms"),
            "warm_ms": middle(warm, "warm_ms"),
            "warm_ms_worst": round(max(row["warm_ms"] for row in warm), 3),
            "first_gradient_ms": round(1e3 * middle(warm, "backward_s"), 3),
            "imports": sorted(set().union(*(row["imports"] for row in warm))),
            "stages_ms": {key: middle(stages, key) for key in stages[0]},
            **{k: round(v, 3) for k, v in child("lookup", device, warm_dir).items()},
            "cold": cold,
            "cold_s": max(max(took.values()) for took in cold.values()),
        }


def measure_nvrtc() -> dict[str, Any]:
    """Compiling alone, where there is NVRTC and no GPU."""
    with tempfile.TemporaryDirectory() as base:
        cold = {}
        for model in MODELS:
            rows = [child("compile", "cuda", f"{base}/{model}{i}", model) for i in range(3)]
            cold[model] = fastest(rows)
        worst = max(max(took.values()) for took in cold.values())
        return {"machine": machine("cpu"), "cold": cold, "cold_s": worst}


def machine(device: str) -> dict[str, Any]:
    import torch

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(": ")[1]
            break
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    load = round(os.getloadavg()[0], 1)
    return {
        **gpu, "cpu": name, "cores": os.cpu_count(), "load": load,
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip


def page(results: dict[str, Any]) -> str:
    lines = ["# From the start of a process to the first spikes", ""]
    for device, found in results.items():
        about = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
        lines += [
            f"## {device}",
            "",
            about,
            "",
            "| figure | goal | measured | met |",
            "| --- | --- | --- | --- |",
        ]
        keys = [key for key in ("warm_ms", "lookup_us") if key in found]
        keys += ["cold_cuda_s" if "cuda" in device else "cold_s"]
        for key in keys:
            text, goal, unit = GOALS[key]
            value = found[key.replace("_cuda", "")]
            met = "yes" if value <= goal else "NO"
            lines.append(f"| {text} | at most {goal:g} {unit} | {value:.3g} {unit} | {met} |")
        if "imports" in found:
            said = ", ".join(found["imports"]) or "neither"
            met = "NO" if found["imports"] else "yes"
            lines.append(f"| sympy or jinja2 imported by a warm start | neither | {said} | {met} |")
            lines += [
                "",
                "Torch alone is up after {torch_alone_s:.2f} s, the first spikes are there after"
                " {first_spikes_s:.2f} s (medians of {rounds} processes each, in turn); the worst"
                " warm start took {warm_ms_worst:.0f} ms. The first gradient takes"
                " {first_gradient_ms:.1f} ms more. `build.load_kernel` of a spec that it has:"
                " {load_kernel_us:.2f} us; a whole warm call on 16 x 64 numbers:"
                " {call_us:.1f} us.".format(**found),
                "",
                "| part of a warm start | ms |",
                "| --- | --- |",
            ]
            parts = sorted(found["stages_ms"].items(), key=lambda part: -part[1])
            lines += [f"| {name} | {ms:.2f} |" for name, ms in parts]
        lines += ["", "| cold, fastest of 3 (T = 16) | forward s | backward s |"]
        lines.append("| --- | --- | --- |")
        for model, took in found["cold"].items():
            lines.append(f"| {model} | {took['forward_s']:.2f} | {took['backward_s']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("cpu", "cuda"), help="one device; default: both")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, device, model = args.child
        print(json.dumps(globals()[f"child_{kind}"](device, model)))
        return
    import torch

    sys.path.insert(0, str(ROOT))
    found = {}
    if args.only != "cuda":
        found["cpu"] = measure("cpu", args.rounds)
    if args.only != "cpu" and torch.cuda.is_available():
        found["cuda"] = measure("cuda", args.rounds)
    elif args.only != "cpu":
        try:
            found["cuda, compiled without a GPU"] = measure_nvrtc()
        except SystemExit as error:
            print(f"no CUDA figures: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "warm_start.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results |= found
    file.write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "warm_start.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
