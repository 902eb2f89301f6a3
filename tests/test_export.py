"""Rendered sources: the export compiles whole, warnings are errors, what is shared stands once."""

import itertools
import json
import os
import random
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import slow

import neuronjit as nj
from neuronjit.cache import store
from neuronjit.export import SEED_NEURONS, SEED_SURROGATES
from neuronjit.kernels.render import render_specs
from neuronjit.kernels.spec import KernelSpec
from neuronjit.kernels.targets import cpu, cuda

ARCHS = (slow("sm_75"), "sm_90")
MODELS = ("if", "lif", "lif_no_decay", "plif", "plif_no_decay", "qif", "izhikevich", "eif")
WARNINGS = ("-Wall", "-Wextra", "-Werror")


def compiled(source: str, arch: str, *options: str) -> tuple[bytes, str]:
    """The cubin, and what the compiler said."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "export.cu", (), ())
    try:
        nvrtc.compileProgram(program, [f"--gpu-architecture={arch}", *cuda.FLAGS, *options])
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program)[:2000])
    return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program).strip("\0\n ")


def nvrtc(source: str, arch: str) -> bytes:
    """The cubin; any word of the compiler, a warning too, fails the test."""
    cubin, said = compiled(source, arch)
    assert not said
    return cubin


def host(source: str, folder: Path, level: str = "-O1") -> None:
    """Compiles, with every warning an error."""
    path = folder / "export.cpp"
    path.write_text(source)
    flags = [f for f in cpu.FLAGS if f not in ("-O3", "-shared")]
    command = [*cpu.compiler(), *flags, level, *WARNINGS, "-c", "-o", str(folder / "out.o"), path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]


def exported(symbols_of: str, path: Path, **choices: object) -> list[str]:
    symbols = nj.save_cuda_codes(path / symbols_of, **choices)
    assert len(set(symbols)) == len(symbols)
    return symbols


@pytest.mark.nvrtc
@pytest.mark.parametrize("neuron", [n if n == "plif" else slow(n) for n in SEED_NEURONS])
@pytest.mark.parametrize(
    ("surrogates", "arch"),
    [
        (SEED_SURROGATES[:1], "sm_90"),
        slow(SEED_SURROGATES[:1], "sm_75"),  # the others there: see the sample of everything
        slow(SEED_SURROGATES[1:], "sm_90"),
    ],
    ids=["first-sm_90", "first-sm_75", "others-sm_90"],
)
def test_nvrtc_compiles_the_default_export(
    surrogates: tuple[str, ...], arch: str, neuron: str, tmp_path: Path
) -> None:
    symbols = exported("some.cu", tmp_path, neurons=[neuron], surrogates=surrogates)
    binary = nvrtc((tmp_path / "some.cu").read_text(), arch)
    for symbol in symbols:
        assert symbol.encode() in binary


def test_the_default_export_can_be_read(tmp_path: Path) -> None:
    symbols = exported("all.cu", tmp_path)
    # 8 variants x 2 resets x 2 dtypes forward; as many x 8 surrogates x 2 detach backward
    assert len(symbols) == 8 * 2 * 2 + 8 * 2 * 2 * 8 * 2
    text = (tmp_path / "all.cu").read_text()
    lines = text.splitlines()
    assert len(lines) < 45_000
    assert [line for line in lines if len(line) > 120] == []
    assert "[[maybe_unused]]" not in text
    assert text.count("struct Walk {") == 1
    assert text.count('extern "C" __global__') == len(symbols)


def test_what_is_ours_in_a_step_ends_in_an_underscore() -> None:
    """And nothing else does, but what a step calls: equations may use any other name."""
    for target in ("cuda", "cpu"):
        text = nj.render("izhikevich", target=target, learned=("tau",), per_neuron=("a",))
        walk = text[text.index("template <class Sizes> struct Arrays") :]
        outside = re.sub(r"  static (?:CALLED_|INLINE_)(?:.*\n)*?  }\n", "", walk)
        words = set(re.findall(r"\b[a-z]\w*_\b", re.sub(r"//.*", "", outside)))
        assert words == {"some_"} | {"abs_", "fma_", "finite_quotient_", "divide_"} & words


KINDS = [*itertools.product(("hard", "soft"), (True, False), ("float32", "float16"))]


def host_compiles(chosen: Iterable[tuple[Any, ...]], folder: Path) -> None:
    """Of each (model, surrogate, reset, detach_reset, dtype), both directions."""
    specs = {
        KernelSpec.of(model, "cpu", direction, *others, interval=4, lanes=64)
        for direction, (model, *others) in itertools.product(("forward", "backward"), chosen)
    }
    host(render_specs(sorted(specs, key=lambda s: s.symbol)), folder, "-O0")


def test_the_host_compiles_the_same_kernels(tmp_path: Path) -> None:
    """Each model with each surrogate and each kind, and each surrogate with each kind."""
    host_compiles(
        [
            (model, surrogate, *KINDS[(row + column) % len(KINDS)])
            for row, model in enumerate(MODELS)
            for column, surrogate in enumerate(SEED_SURROGATES)
        ],
        tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_host_compiles_all_of_them(model: str, tmp_path: Path) -> None:
    host_compiles(((model, s, *kind) for s in SEED_SURROGATES for kind in KINDS), tmp_path)


def sample(target: str, count: int) -> list[KernelSpec]:
    """Kernels over all other options, drawn with a fixed seed."""
    draw = random.Random(7)
    found: dict[str, KernelSpec] = {}
    while len(found) < count:
        model = nj.neurons.by_name(draw.choice(MODELS))
        direction = draw.choice(("forward", "backward"))
        surrogate = draw.choice(
            [s for s in vars(nj.surrogates).values() if isinstance(s, nj.Surrogate)]
        )
        smooth = surrogate.primitive is not None and draw.random() < 0.4
        params, states, backward = [*model.params], [*model.state, "h"], direction == "backward"
        spec = KernelSpec.of(
            model, target, direction, surrogate(spiking=not smooth), draw.choice(("hard", "soft")),
            draw.random() < 0.5, draw.choice(("float32", "float64", "float16", "bfloat16")),
            per_neuron=tuple(p for p in params if draw.random() < 0.3),
            learned=tuple(p for p in params if backward and draw.random() < 0.4),
            record=(names := tuple(n for n in states if draw.random() < 0.5)),
            arriving=("s", *names) if draw.random() < 0.8 else names,
            interval=(steps := draw.choice((4, 8, 16))),
            lanes=64 if target == "cpu" else draw.choice((1, 2, 4)),
            loads=1 if target == "cpu" else steps,
            prefetch=target == "cuda" and draw.random() < 0.5,
        )  # fmt: skip
        found[spec.symbol] = spec
    return list(found.values())


SAMPLES = [slice(6), slow(slice(6, 60))]
each_sample = pytest.mark.parametrize("some", SAMPLES, ids=["6", "54 more"])


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ARCHS)
@each_sample
def test_nvrtc_compiles_a_sample_of_everything(some: slice, arch: str) -> None:
    nvrtc(render_specs(sample("cuda", 60)[some]), arch)


@each_sample
def test_the_host_compiles_a_sample_of_everything(some: slice, tmp_path: Path) -> None:
    host(render_specs(sample("cpu", 60)[some]), tmp_path)


def test_one_file_reads_alone(tmp_path: Path) -> None:
    symbols = exported(
        "some.cu", tmp_path, neurons=["lif"], surrogates=["ATan"], dtypes=["float32"]
    )
    text = (tmp_path / "some.cu").read_text()
    assert text.count("struct half_t") == 1, "what kernels share is printed once"
    contents = re.findall(r"^//   (\w+)$", text, re.M)
    assert contents == symbols
    for symbol in symbols:
        assert text.count(f"\n{symbol}(const Kernel::Args") == 1
    assert "#include" not in text


def test_filters(tmp_path: Path) -> None:
    choices = {"neurons": [nj.neurons.QIF], "surrogates": [nj.surrogates.Erf], "resets": ["soft"]}
    symbols = exported("a.cu", tmp_path, **choices, dtypes=["float64"], detach_resets=[True])
    assert symbols == [
        "qif_forward_float64_soft_k4_l1_r4",
        "qif_backward_float64_soft_detached_Erf_seq_s_k4_l1_r4",
    ]
    only = exported("b.cu", tmp_path, neurons=["lif"], directions=["forward"], decay_inputs=[False])
    assert all(symbol.startswith("lif_no_decay_forward") for symbol in only)
    with pytest.raises(nj.SpecError, match=r"unknown neuron 'lfi'; did .*\? Known: .*lif"):
        nj.save_cuda_codes(tmp_path / "c.cu", neurons=["lfi"])
    with pytest.raises(nj.SpecError, match="no kernel"):
        nj.save_cuda_codes(tmp_path / "c.cu", neurons=[])
    assert not (tmp_path / "c.cu").exists()


@pytest.mark.nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills(arch: str, model: str) -> None:
    """All that a thread keeps fits its registers, at each of the shapes that sizes lead to."""
    sizes = [(2**24, 4), (2**22, 16), (2**18, 64), (16384, 1000)]
    for (neurons, steps), dtype in itertools.product(sizes, ("float32", "float16")):
        for direction in ("forward", "backward"):
            text = nj.render(model, direction=direction, dtype=dtype, steps=steps, neurons=neurons)
            _, said = compiled(text, arch, cuda.VERBOSE)
            assert not cuda.usage(said)["spilled"], said


@pytest.mark.nvrtc
def test_a_directory_gets_one_file_a_kernel(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    symbols = exported(
        "kernels", tmp_path, neurons=["plif"], surrogates=["Sigmoid"], resets=["hard"]
    )
    listed = json.loads((folder / "manifest.json").read_text())["kernels"]
    assert [kernel["symbol"] for kernel in listed] == symbols
    assert {path.name for path in folder.glob("*.cu")} == {kernel["file"] for kernel in listed}
    nvrtc((folder / listed[-1]["file"]).read_text(), "sm_90")


def test_render_is_what_a_call_compiles() -> None:
    # a model of its own: a kernel that another test has loaded is not looked for in this cache
    model = nj.NeuronModel("shown", "h = v + x", state=dict(v=0.0))
    text = nj.render(model, target="cpu", direction="forward", steps=4, neurons=64)
    out = nj.multistep(model, torch.zeros(4, 64), backend="cpu")
    assert out.spikes.shape == (4, 64)
    symbol = re.search(r"^(\w+)\(const Kernel::Args", text, re.M)
    assert symbol
    assert any(entry.source == text for entry in map(store.load, cached_keys()) if entry)


def cached_keys() -> list[str]:
    return [
        path.name
        for path in Path(os.environ["NEURONJIT_CACHE_DIR"]).rglob("*")
        if len(path.name) == 64
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "tpu"}, "unknown target 'tpu'. Known: cpu, cuda"),
        ({"dtype": "int8"}, "unknown dtype 'int8'. Known: bfloat16"),
        ({"surrogate": "atn"}, "unknown surrogate 'atn'. Known: ATan"),
        ({"reset": "warm"}, "unknown reset 'warm'. Known: hard"),
    ],
)
def test_unknown_names(options: dict[str, object], words: str) -> None:
    with pytest.raises(nj.SpecError) as caught:
        nj.render("lif", **options)
    assert words in str(caught.value)


def test_an_unknown_option() -> None:
    with pytest.raises(TypeError, match="colour"):
        nj.render("lif", colour=1)  # type: ignore[call-arg]


def test_choices_may_be_iterators(tmp_path: Path) -> None:
    """Each is gone through once a model."""
    symbols = exported(
        "i.cu", tmp_path, neurons=iter(["if", "qif"]), surrogates=iter(["ATan"]),
        resets=iter(["hard", "soft"]), detach_resets=iter([True]), dtypes=iter(["float32"]),
        directions=iter(["backward"]),
    )  # fmt: skip
    assert [symbol.split("_")[0] for symbol in symbols] == ["if", "if", "qif", "qif"]


# --- what is shown is what calls use --------------------------------------------------------------

NONSENSE = {
    "a spike recorded": dict(direction="forward", record=("s",)),
    "an unknown sequence": dict(direction="backward", arriving=("w",)),
    "an unknown sequence, forward": dict(direction="forward", arriving=("w",)),
    "an unknown parameter": dict(learned=("alpha",)),
    "unknown per neuron": dict(per_neuron=("x",)),
    "twice": dict(record=("v", "v")),
    "a reset": dict(reset="own"),
    "a dtype": dict(dtype="float8"),
    "a target": dict(target="rocm"),
    "a direction": dict(direction="sideways"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_render_refuses_kernels_that_no_call_uses(case: str) -> None:
    with pytest.raises(nj.SpecError):
        nj.render("lif", **NONSENSE[case])


def test_render_shows_what_a_call_compiles(tmp_path: Path) -> None:
    """The very text that lies in the cache after the call."""
    from neuronjit.cache import admin
    from neuronjit.cache.store import load

    def sources() -> dict[str, str]:
        found = {e.key: load(e.key).source for e in admin.entries()}  # others fill the cache too
        return {key: text for key, text in found.items() if "shown_" in text}

    model = nj.NeuronModel(
        "shown", "h = 0.25 * v + x / tau\nw = 0.5 * w + s", state=dict(v=0.0, w=0.0),
        params=dict(tau=2.0),
    )  # fmt: skip
    before = sources()
    x, tau = torch.rand(20, 8, requires_grad=True), torch.full((8,), 2.0, requires_grad=True)
    out = nj.multistep(model, x, tau=tau, record=("w",), detach_reset=True)
    (out.spikes.sum() + out.record["w"].sum()).backward()
    made = {text for key, text in sources().items() if key not in before}
    options = dict(
        target="cpu", detach_reset=True, steps=20, neurons=8, record=["w"], learned=["tau"],
        per_neuron=["tau"],
    )  # fmt: skip
    shown = {nj.render(model, direction=d, **options) for d in ("forward", "backward")}
    assert made == shown


@pytest.mark.parametrize("place", ["codes.cu", "folder"])
def test_two_models_of_one_name_are_refused(place: str, tmp_path: Path) -> None:
    one = nj.NeuronModel("mine", "h = v + x", state=dict(v=0.0))
    two = nj.NeuronModel("mine", "h = v - x", state=dict(v=0.0))
    with pytest.raises(nj.SpecError, match=r"mine.*one name"):
        nj.save_cuda_codes(tmp_path / place, neurons=[one, two])
    assert not list(tmp_path.rglob("*.cu"))
    slopes = [nj.Surrogate("slope", text) for text in ("1", "where(u < 0, 0, 1)")]
    with pytest.raises(nj.SpecError, match=r"slope.*one name"):
        nj.save_cuda_codes(tmp_path / place, neurons=[one], surrogates=slopes)
    nj.save_cuda_codes(tmp_path / place, neurons=[one, one], surrogates=slopes[:1])


SPEC = dict(model=nj.neurons.LIF, target="cpu", direction="backward", dtype="float32", reset="hard",
            surrogate=nj.surrogates.ATan)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        dict(reset="own"), dict(reset="gentle"), dict(surrogate=None), dict(direction="forward"),
        dict(surrogate=nj.surrogates.ATan(alpha=3.0)), dict(learned=("w",)), dict(learned=["tau"]),
        dict(learned=("v_threshold", "tau")), dict(per_neuron=("tau", "tau")),
        dict(arriving=("v", "s")), dict(arriving=("x",)), dict(interval=0), dict(interval=3),
        dict(lanes=True), dict(loads=32), dict(interval=1 << 20), dict(dtype="int8"),
        dict(record=("v",)), dict(to_inputs=False),
        dict(spiking=False, surrogate=nj.surrogates.SuperSpike), dict(model="lif"),
        dict(direction="forward", surrogate=None, detach_reset=True),
        dict(direction="forward", surrogate=None, learned=("tau",)),
        dict(direction="forward", surrogate=None, record=("s",)),
        dict(direction="forward", surrogate=None, arriving=("s",)),
    ],
    ids=str,
)  # fmt: skip
def test_a_spec_is_checked_where_it_is_made(change: dict[str, Any]) -> None:
    KernelSpec(**SPEC)
    with pytest.raises((nj.SpecError, nj.InputTypeError)):
        KernelSpec(**{**SPEC, **change})
