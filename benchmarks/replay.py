"""Compare the kernels of two trees: what a change did to their text and to their machine code.

A is a git revision, B the working tree. Each renders the same calls in a process of its own: 200 of
the seed's models and two more, and backward of every other built-in model of the working tree. Both
texts are then compiled here with B's flags, with NVRTC for two architectures and with the host's
compiler, so that only the text can make a difference. No GPU is needed.

    python benchmarks/replay.py                    # against the merge base with main
    python benchmarks/replay.py --base v0.1.0
    python benchmarks/replay.py --strict           # exit 1 on new spills or code 2 % larger
    python benchmarks/replay.py --quick            # 60 of the 200; compiles only what differs
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("sm_75", "sm_90")
HOST = "host"
BUILDS = (*ARCHS, HOST)
GROWTH = 0.02  # of a kernel's code, the most that --strict lets pass
QUICK = 60  # calls of --quick
LISTED = 40  # kernels that are printed, of those whose machine code differs

# --- the calls ------------------------------------------------------------------------------------

EQUATIONS: dict[str, dict[str, Any]] = {  # models that are not built in
    "current_alif": dict(  # three states, a threshold and a reset of its own
        equations="""
        i = i * alpha + x
        h = v * beta + i
        theta = v_threshold + a
        a = a * rho + kappa * s
        v = h - s * theta
        """,
        state=dict(v=0.0, i=0.0, a=0.0),
        params=dict(alpha=0.8, beta=0.9, rho=0.95, kappa=0.2),
    ),
}
ONE, TWO, THREE = ("v",), ("v", "w"), ("v", "i", "a")
MODELS = {  # by their states: those that have calls of each shape
    ONE: ("if", "lif", "lif_no_decay", "plif", "plif_no_decay", "qif", "eif"),
    TWO: ("izhikevich", "adex"),
    THREE: ("current_alif",),
}
ENDS = ("v_threshold", "v_reset")
PARAMS: dict[str, tuple[str, ...]] = {  # in the models' order, as calls name them
    "if": ENDS,
    "lif": ("tau", *ENDS),
    "lif_no_decay": ("tau", *ENDS),
    "plif": ("reciprocal_tau", *ENDS),
    "plif_no_decay": ("reciprocal_tau", *ENDS),
    "qif": ("tau", "v_c", "a0", "v_rest", "v_reset", "v_threshold"),
    "eif": ("tau", "delta_T", "theta_rh", "v_rest", "v_reset", "v_threshold"),
    "izhikevich": ("tau", "v_c", "a0", "v_rest", "tau_w", "a", "b", *ENDS),
    "adex": ("tau", "v_rest", "delta_T", "theta_rh", "a", "b", "tau_w", *ENDS),
    **{name: (*model["params"], *ENDS) for name, model in EQUATIONS.items()},
}
SURROGATES = (
    "ATan", "Sigmoid", "PiecewiseLeakyReLU", "S2NN", "QPseudoSpike", "LeakyKReLU",
    "FakeNumericalGradient", "LogTailedReLU", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign",
    "SuperSpike", "Erf", "NonzeroSignLogAbs", "Rect", "StraightThrough", "Gaussian", "Tanh",
    "FastSigmoid", "SpikeRateEscape",
)  # fmt: skip
SMOOTH = ("ATan", "Sigmoid", "SoftSign", "Erf")  # of those with a primitive

# (N, T) that lead to each shape of a kernel: checkpoints of 4, 8 and 16 steps, one to four lanes,
# few and many threads, rows ahead, as many steps as between checkpoints and others.
# tests/test_replay.py holds them against `targets.shapes`.
NARROW = ((2**14, 4), (2**14, 8), (2**14, 16), (2**14, 64), (2**24 + 1, 64))
PAIRS = (*NARROW, (2**24, 4), (2**24, 8), (2**18, 16), (2**18, 64), (2**24, 64))
FOURS = (*PAIRS, (2**24 + 2, 4), (2**24 + 2, 8), (2**24 + 2, 64), (2**19, 64))
FOURS += (2**24, 3), (2**24, 7), (2**24, 16)
DTYPES = ("float64", "float32", "float16", "bfloat16")
SIZES = {  # by states: those that 8, 4 and 2 bytes an element tell apart
    ONE: {"float64": NARROW, "float32": PAIRS, "float16": FOURS, "bfloat16": FOURS},
    TWO: {"float64": NARROW, "float32": PAIRS, "float16": PAIRS, "bfloat16": PAIRS},
    THREE: dict.fromkeys(DTYPES, NARROW),
}


@dataclass(frozen=True)
class Case:
    """One kernel of one call, in the words of the public interface, which outlive a redesign."""

    model: str
    direction: str
    dtype: str
    N: int
    T: int
    surrogate: str = "ATan"
    spiking: bool = True
    reset: str = "hard"
    detach_reset: bool = False
    per_neuron: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    record: tuple[str, ...] = ()  # forward: sequences besides the spikes
    arriving: tuple[str, ...] = ()  # backward: sequences whose gradients arrive

    def __str__(self) -> str:
        words = [self.model, self.direction, self.dtype, f"N={self.N}", f"T={self.T}", self.reset]
        words += ["detached"] * self.detach_reset
        words += [self.surrogate] * (self.direction == "backward" or not self.spiking)
        words += [] if self.spiking else ["smooth"]
        for name in ("per_neuron", "learned", "record", "arriving"):
            words += [f"{name}={','.join(getattr(self, name))}"] if getattr(self, name) else []
        return " ".join(words)


@cache
def described() -> dict[str, dict[str, Any]]:
    """The models that a tree is given as equations, because A may not have them."""
    sys.path.insert(0, str(ROOT))
    import neuronjit as nj

    built_in = nj.neurons.built_in()
    seed = {*MODELS[ONE], "izhikevich"}
    fields = ("equations", "state", "params", "strict")
    return EQUATIONS | {
        name: {field: getattr(model, field) for field in fields}
        | ({"inputs": model.inputs} if len(model.inputs) > 1 else {})
        for name, model in built_in.items()
        if name not in seed
    }


def cases() -> list[Case]:
    """All calls, always the same: the grid, and backward of every other built-in model once."""
    draw = random.Random(8)
    found = grid()
    others = {name: given for name, given in described().items() if name not in PARAMS}
    for i, (name, given) in enumerate(others.items()):
        dtype, size = [*DTYPES][i % len(DTYPES)], NARROW[i % len(NARROW)]
        case = Case(name, "backward", dtype, *size, SURROGATES[i % len(SURROGATES)])
        found.append(_drawn(draw, case, tuple(given["state"]), tuple(given["params"])))
    return found


def grid() -> list[Case]:
    """The covering set of MODELS: each model x direction x dtype, and each shape.

    The other choices are drawn with a fixed seed: grids would repeat the same pairs of them.
    """
    draw = random.Random(8)
    found = []
    for direction in ("forward", "backward"):
        for states, models in MODELS.items():
            for offset, (dtype, sizes) in enumerate(SIZES[states].items()):
                for i in range(max(len(sizes), len(models))):
                    model, size = models[(i + offset) % len(models)], sizes[i % len(sizes)]
                    surrogate = SURROGATES[len(found) % len(SURROGATES)]
                    case = Case(model, direction, dtype, *size, surrogate)
                    found.append(_drawn(draw, case, states, PARAMS[model]))
    return found


def _drawn(
    draw: random.Random, case: Case, states: tuple[str, ...], params: tuple[str, ...]
) -> Case:
    def some(names: Iterable[str], share: float) -> tuple[str, ...]:
        return tuple(n for n in names if draw.random() < share)

    backward = case.direction == "backward"
    smooth = draw.random() < 0.15
    recorded = some((*states, "h"), 0.5) if draw.random() < 0.5 else ()
    if (case.N, case.T) not in NARROW:  # two sequences would make a wide kernel a narrow one
        recorded = () if backward else recorded[:1]
    return replace(
        case,
        surrogate=SMOOTH[int(draw.random() * len(SMOOTH))] if smooth else case.surrogate,
        spiking=not smooth,
        reset="hard" if draw.random() < 0.6 else "soft",
        detach_reset=backward and draw.random() < 0.4,
        per_neuron=some(params, 0.3) if draw.random() < 0.5 else (),
        learned=(params[0], *some(params[1:], 0.4)) if backward and draw.random() < 0.6 else (),
        record=() if backward else recorded,
        arriving=(*some(("s",), 0.9), *recorded) if backward else (),
    )


def thinned(found: Sequence[Case], count: int) -> list[Case]:
    """Those that bring a new model, dtype or size, and of the others as many as there is room."""
    seen: set[tuple[object, ...]] = set()
    first = []
    for case in found:
        brings = {(case.model,), (case.dtype,), (case.N, case.T)}
        brings = {(case.direction, *each) for each in brings}
        first += [] if brings <= seen else [case]
        seen |= brings
    others, room = [case for case in found if case not in first], count - len(first)
    return [*first, *(others[i * len(others) // room] for i in range(room))]


# --- what is asked of a tree: the only part that knows its interface ------------------------------

WORDS = (  # how trees name what a case says to `neuronjit.render`; a new name is a new line
    dict(N="neurons", T="steps"),
    dict(N="neurons", T="steps", record="sequences", arriving="sequences"),
)


def source(case: Case, target: str, models: dict[str, dict[str, Any]]) -> str:
    """The text that this process's neuronjit renders for a case; `models` are sent as equations."""
    import neuronjit as nj

    given = models.get(case.model)
    model = nj.NeuronModel(case.model, **given) if given else case.model
    surrogate = getattr(nj.surrogates, case.surrogate)(spiking=case.spiking)
    chosen = asdict(case) | dict(target=target, surrogate=surrogate)
    del chosen["model"], chosen["spiking"]
    del chosen["record" if case.direction == "backward" else "arriving"]

    def rendered(words: dict[str, str]) -> str | Exception:
        try:
            return nj.render(model, **{words.get(name, name): v for name, v in chosen.items()})
        except (TypeError, nj.NeuronJitError) as reason:
            return reason

    answers = [rendered(words) for words in WORDS]
    if texts := [answer for answer in answers if isinstance(answer, str)]:
        return texts[0]
    raise ValueError("; ".join(f"{type(reason).__name__}: {reason}" for reason in answers))


def toolchain() -> dict[str, Any]:
    """How this process's neuronjit compiles: NVRTC's flags, the host compiler's command."""
    try:
        from neuronjit.kernels.targets import cpu, cuda
    except ImportError:  # trees before the folders
        from neuronjit.targets import cpu, cuda  # type: ignore[import-not-found,no-redef]

    host = None
    with contextlib.suppress(cpu.BackendError):
        level = cpu.arch()
        march = [f"-march={level}"] if level.startswith("x86-64") else []
        host = [*cpu.compiler(), *cpu.FLAGS, *march, cpu.OPENMP]
    return {"nvrtc": list(cuda.FLAGS), "host": host}


def tell(models: dict[str, dict[str, Any]], wanted: list[dict[str, Any]]) -> dict[str, Any]:
    """What a tree's own process answers: where it found the library, the texts, the toolchain."""
    import neuronjit

    texts = {}
    for given in wanted:
        case = Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        for target in ("cuda", "cpu"):
            try:
                text = {"text": source(case, target, models)}
            except Exception as reason:  # a tree that cannot render a case differs: it is reported
                text = {"error": f"{reason}"[:500]}
            texts[f"{target} {case}"] = text
    return {"file": neuronjit.__file__, "texts": texts, "toolchain": toolchain()}


def ask(tree: Path, found: Sequence[Case]) -> dict[str, Any]:
    """Run `tell` in a process that imports the library of `tree`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("NEURONJIT_")}
    env |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory(prefix="neuronjit-replay-") as folder:
        path = Path(folder, "answer.json")
        wanted = json.dumps([described(), [asdict(case) for case in found]])
        command = [sys.executable, __file__, "--tell", str(path)]
        subprocess.run(command, input=wanted, text=True, check=True, env=env, cwd=folder)
        answer: dict[str, Any] = json.loads(path.read_text())
    if not Path(answer["file"]).resolve().is_relative_to(tree.resolve()):
        raise SystemExit(f"replay: {tree} was asked, but {answer['file']} answered")
    return answer


# --- machine code ---------------------------------------------------------------------------------


def machine_code(binary: bytes) -> tuple[int, str]:
    """Bytes of instructions; and a digest of them, their constants and the functions they import.

    Names of kernels are not in it: a kernel that is only renamed has the same machine code.
    """
    from neuronjit.kernels.targets.binary import sections  # here: tree A need not have it

    size, digest = 0, hashlib.sha256()
    found = list(sections(binary))
    for name, data in found:
        kind = re.match(r"\.(text|rodata|data|nv\.constant\d+|nv\.global)\b", name)
        if kind:
            size += len(data) if kind[1] == "text" else 0
            digest.update(f"{kind[1]} {len(data)} ".encode() + data)
    tables = dict(found)
    strings = tables.get(".dynstr", b"")
    for name, _, _, place, *_ in struct.iter_unpack("<IBBHQQ", tables.get(".dynsym", b"")):
        if place == 0:  # not defined here: expf, GOMP_parallel
            digest.update(strings[name : strings.index(b"\0", name)] + b" ")
    return size, digest.hexdigest()


@dataclass(frozen=True)
class Compilers:
    """The compilers of this machine with the flags of one tree. A result is kept by its text."""

    nvrtc: tuple[str, ...]  # flags
    host: tuple[str, ...]  # command; empty where there is no compiler
    kept: Path

    def missing(self, build: str) -> str | None:
        if build == HOST:
            return None if self.host else "no C++ compiler"
        return _nvrtc_version()[1]

    def build(self, text: str, build: str) -> dict[str, Any]:
        how = [self.version(build), build, *(self.host if build == HOST else self.nvrtc), text]
        path = self.kept / f"{hashlib.sha256(json.dumps(how).encode()).hexdigest()}.json"
        with contextlib.suppress(OSError, ValueError):
            kept: dict[str, Any] = json.loads(path.read_text())
            return kept
        result = self._host(text) if build == HOST else self._nvrtc(text, build)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(result))
        new.replace(path)
        return result

    def version(self, build: str) -> str:
        return _host_version(self.host) if build == HOST else _nvrtc_version()[0]

    def _nvrtc(self, text: str, arch: str) -> dict[str, Any]:
        from cupy.cuda import nvrtc

        from neuronjit.kernels.targets import cuda

        program = nvrtc.createProgram(text, "kernel.cu", (), ())
        try:
            options = [f"--gpu-architecture={arch}", *self.nvrtc, cuda.VERBOSE]
            nvrtc.compileProgram(program, options)
            said, cubin = nvrtc.getProgramLog(program), bytes(nvrtc.getCUBIN(program))
        except nvrtc.NVRTCError:
            return {"error": nvrtc.getProgramLog(program)[:500]}
        finally:
            nvrtc.destroyProgram(program)
        size, digest = machine_code(cubin)
        return {"code": digest, "size": size, **cuda.usage(said)}

    def _host(self, text: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="neuronjit-replay-") as folder:
            path, binary = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
            path.write_text(text)
            command = [*self.host, "-o", str(binary), str(path), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return {"error": done.stderr[:500]}
            size, digest = machine_code(binary.read_bytes())
        return {"code": digest, "size": size, "registers": 0, "spilled": 0}


@cache
def _nvrtc_version() -> tuple[str, str | None]:
    """The version, or why there is none."""
    try:
        from cupy.cuda import nvrtc

        return "nvrtc {}.{}".format(*nvrtc.getVersion()), None
    except Exception as reason:  # CuPy fails in many ways where libraries are missing
        return "", f"no NVRTC ({type(reason).__name__})"


@cache
def _host_version(command: tuple[str, ...]) -> str:
    done = subprocess.run([command[0], "--version"], capture_output=True, text=True)
    return done.stdout.splitlines()[0]


# --- the comparison -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One kernel of one build, in both trees. Empty results: nobody asked for the machine code."""

    case: str
    build: str
    same_text: bool
    a: dict[str, Any]
    b: dict[str, Any]

    @property
    def same_code(self) -> bool:
        return self.same_text or ("code" in self.b and self.a.get("code") == self.b["code"])

    def grown(self, what: str) -> int:
        return int(self.b.get(what, 0) - self.a.get(what, 0)) if "code" in self.a else 0

    @property
    def growth(self) -> float:
        return self.grown("size") / self.a["size"] if "size" in self.a and "size" in self.b else 0.0

    @property
    def faults(self) -> list[str]:
        """What --strict does not let pass."""
        found = ["does not build"] if "error" in self.b and "error" not in self.a else []
        spills = self.b.get("spilled", 0) > self.a.get("spilled", 0)
        found += ["spills"] if spills else []
        return found + ([f"code {GROWTH:.0%} larger"] if self.growth > GROWTH else [])

    def __str__(self) -> str:
        start = f"{self.build:6} {self.case}: "
        sides = {"A": self.a, "B": self.b}
        if errors := [f"{n}: {r['error']}" for n, r in sides.items() if "error" in r]:
            return start + "; ".join(errors)
        if self.same_code:
            return start + "other text, the same machine code"
        changes = [f"code {self.a['size']} -> {self.b['size']} bytes ({self.growth:+.1%})"]
        others = [what for what in ("registers", "spilled") if self.grown(what)]
        changes += [f"{what} {self.a[what]} -> {self.b[what]}" for what in others]
        return start + ", ".join([*changes, *map(str.upper, self.faults)])


def compare(
    a: Path, b: Path, found: Sequence[Case], kept: Path, quick: bool = False
) -> tuple[list[Pair], list[str]]:
    """Every kernel in both trees, and notes on builds that this machine cannot make.

    With `quick`, each call is compiled for one of ARCHS in turn, and only where its text differs.
    """
    with ThreadPoolExecutor(2) as pool:
        told_a, told_b = pool.map(lambda tree: ask(tree, found), (a, b))
        tools = told_b["toolchain"]
        compilers = Compilers(tuple(tools["nvrtc"]), tuple(tools["host"] or ()), kept)
        missing = {build: why for build in BUILDS if (why := compilers.missing(build))}
        rows = []
        for build in [build for build in BUILDS if build not in missing]:
            for i, case in enumerate(found):
                if quick and build in ARCHS and build != ARCHS[i % len(ARCHS)]:
                    continue
                key = f"{'cpu' if build == HOST else 'cuda'} {case}"
                rows.append((str(case), build, told_a["texts"][key], told_b["texts"][key]))
        wanted: dict[tuple[str, str], Any] = {}  # each text is compiled once, whoever has it
        for _, build, *both in rows:
            for told in both if not quick or both[0] != both[1] else ():
                if "text" in told and (told["text"], build) not in wanted:
                    wanted[told["text"], build] = pool.submit(compilers.build, told["text"], build)

        def result(told: dict[str, str], build: str) -> dict[str, Any]:
            if "error" in told:
                return dict(told)
            future = wanted.get((told["text"], build))
            return future.result() if future else {}

        pairs = [
            Pair(case, build, in_a == in_b, result(in_a, build), result(in_b, build))
            for case, build, in_a, in_b in rows
        ]
    return pairs, [f"{build} is left out: {why}" for build, why in missing.items()]


def table(pairs: Sequence[Pair]) -> str:
    """A line of counts for each build."""
    heads = (
        "build", "kernels", "same text", "same code", "registers -/+", "code -/+", "bytes of code",
        "spilling A, B", "failing A, B",
    )  # fmt: skip
    lines = [heads]
    for build in dict.fromkeys(pair.build for pair in pairs):
        of = [pair for pair in pairs if pair.build == build]
        ways = [
            f"{sum(p.grown(w) < 0 for p in of)} / {sum(p.grown(w) > 0 for p in of)}"
            for w in ("registers", "size")
        ]
        sides = [p.a for p in of], [p.b for p in of]
        sizes = [sum(r.get("size", 0) for r in side) for side in sides]
        total = f"{sizes[0]:,} -> {sizes[1]:,}" if sizes[0] != sizes[1] else f"{sizes[0]:,}"
        counts = len(of), sum(p.same_text for p in of), sum(p.same_code for p in of)
        spills = ", ".join(str(sum(r.get("spilled", 0) > 0 for r in side)) for side in sides)
        fails = ", ".join(str(sum("error" in r for r in side)) for side in sides)
        lines.append((build, *map(str, counts), *ways, total, spills, fails))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    return "\n".join("  ".join(line) for line in padded)


def differing(pairs: Sequence[Pair]) -> list[Pair]:
    """The kernels whose text differs, the worst first."""
    differ = [pair for pair in pairs if not pair.same_text]
    return sorted(differ, key=lambda p: (-len(p.faults), p.same_code, -abs(p.growth)))


# --- the trees ------------------------------------------------------------------------------------


def git(*words: str) -> str | None:
    """What git says, None where it refuses (or is not there)."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def default_base() -> str | None:
    """The merge base with main; the commit before where that is HEAD itself."""
    head = git("rev-parse", "HEAD")
    for main in ("origin/main", "main"):
        if (base := git("merge-base", "HEAD", main)) and base != head:
            return base
    return git("rev-parse", "HEAD~")


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """The files of a revision, in a folder of their own: the checkout is left alone."""
    with tempfile.TemporaryDirectory(prefix="neuronjit-replay-") as folder:
        command = ["git", "archive", "--format=tar", "-o", f"{folder}/tree.tar", revision]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"replay: {shlex.join(command)}: {done.stderr.strip()}")
        tree = Path(folder, "tree")
        tree.mkdir()
        subprocess.run(["tar", "-x", "-C", tree, "-f", f"{folder}/tree.tar"], check=True)
        yield tree


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="A: a git revision; else the merge base with main, or HEAD~")
    parser.add_argument("--strict", action="store_true", help="exit 1 on spills, on larger code")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} calls, only what differs")
    parser.add_argument("--all", action="store_true", help="list all kernels whose text differs")
    kept = Path(tempfile.gettempdir(), f"neuronjit-replay-{os.getuid()}")
    parser.add_argument("--kept", type=Path, default=kept, help="folder of results, by their text")
    parser.add_argument("--tell", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tell:
        args.tell.write_text(json.dumps(tell(*json.load(sys.stdin))))
        return 0
    base = args.base or default_base()
    if base is None:
        parser.error("no commit to compare with: name one with --base")
    begin = time.perf_counter()
    args.kept.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = thinned(grid(), QUICK) if args.quick else cases()
    with checked_out(base) as tree:
        pairs, notes = compare(tree, ROOT, found, args.kept, args.quick)
    name = git("describe", "--always", base) or base
    seconds = time.perf_counter() - begin
    print(f"replay: {len(found)} calls; A is {name}, B the working tree; {seconds:.0f} s")
    print("\n".join([*notes, table(pairs)]))
    differ = differing(pairs)
    listed = differ if args.all else [p for p in differ if not p.same_code][:LISTED]
    for pair in listed:
        print(pair)
    if len(differ) > len(listed):
        print(f"... and {len(differ) - len(listed)} more (--all)")
    for pair in [pair for pair in pairs if pair.same_text and pair.b.get("spilled")]:
        print(f"{pair.build:6} {pair.case}: spills {pair.b['spilled']} bytes, in both trees")
    faults = [pair for pair in pairs if pair.faults]
    print(f"{len(differ)} kernels with other text, {len(faults)} that --strict refuses")
    return 1 if args.strict and faults else 0


if __name__ == "__main__":
    sys.exit(main())
