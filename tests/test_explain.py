"""What `explain` prints is true: its text, evaluated, is what autograd finds from the equations."""

from __future__ import annotations

import ast
import math
import re
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_surrogates import SURROGATES
from support import slow
from torch import Tensor

import neuronjit as nj
from neuronjit.kernels.targets import cpu, cuda

PI, ALPHA = math.pi, 2.0


# --- an oracle of one step: the author's text, run by Python with torch's functions ---------------


class Heaviside(torch.autograd.Function):
    """1 from 0 on (strict: above 0), with ATan's slope."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, strict: bool) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0 if strict else u >= 0).to(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return grad * (ALPHA / 2) / (1 + (PI / 2 * ALPHA * u) ** 2), None


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, function: Any) -> Tensor:
        return function(a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def number(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def functions(strict: bool) -> dict[str, Any]:
    """The functions of the language, of 0-dim tensors."""
    of_one = (
        torch.exp, torch.log, torch.sqrt, torch.tanh, torch.sigmoid, torch.sin, torch.cos,
        torch.atan, torch.erf, torch.erfc, torch.abs, torch.sign, torch.relu,
    )  # fmt: skip
    found = {f.__name__: lambda a, f=f: f(number(a)) for f in of_one}
    return {
        **found,
        "pi": PI,
        "minimum": lambda a, b: torch.minimum(number(a), number(b)),
        "maximum": lambda a, b: torch.maximum(number(a), number(b)),
        "clamp": lambda a, low, high: torch.clamp(number(a), number(low), number(high)),
        "where": lambda c, a, b: number(a if c else b),
        "detach": lambda a: number(a).detach(),
        "round": lambda a: StraightThrough.apply(a, torch.round),
        "floor": lambda a: StraightThrough.apply(a, torch.floor),
        "fire": lambda a, b: Heaviside.apply(a - b, strict),
    }


def oracle(
    model: nj.NeuronModel, given: dict[str, Tensor], reset: str, detach: bool
) -> dict[str, Any]:
    """Every name after one step; what comes out is "out"."""
    env = {**functions(model.strict), **given}
    statements = ast.parse(textwrap.dedent(model.equations)).body
    targets = [statement.targets[0].id for statement in statements]
    reads = [{n.id for n in ast.walk(s.value) if isinstance(n, ast.Name)} for s in statements]
    if "theta" not in targets:
        env["theta"] = env["v_threshold"]

    def after_the_spike() -> None:
        if "v" in targets:
            return
        s = env["s"].detach() if detach else env["s"]
        h = env["h"]
        env["v"] = h * (1 - s) + env["v_reset"] * s if reset == "hard" else h - s * env["theta"]

    for statement, target, read in zip(statements, targets, reads, strict=True):
        if "s" not in targets and "s" in read and "s" not in env:
            env["s"] = env["fire"](env["h"], env["theta"])
            after_the_spike()
        seen = {**env, "s": env["s"].detach()} if target == "v" and detach and "s" in env else env
        code = compile(ast.Expression(statement.value), "", "eval")
        env[target] = number(eval(code, seen))  # noqa: S307 (the models of this file)
        if target == "s":
            after_the_spike()
    if "s" not in env:
        env["s"] = env["fire"](env["h"], env["theta"])
        after_the_spike()
    env["out"] = env["y"] if "y" in targets and "y" not in model.state else env["s"]
    return env


# --- the printed text, evaluated ------------------------------------------------------------------


def sections(text: str) -> dict[str, list[tuple[str, str, str]]]:
    """First word of a heading -> the equations below it."""
    found = {}
    for block in text.split("\n\n")[1:]:
        title, *lines = block.split("\n")
        matches = [re.fullmatch(r"    (\S+) (\+?=) (.+)", line) for line in lines]
        found[re.split(r"\W", title)[0]] = [m.groups() for m in matches if m]
    return found


def python(text: str) -> str:
    """Printed names in Python: v' -> v_p, grad(v[t+1]) -> G["v[t+1]"]."""
    text = re.sub(r"grad\(([^()]+)\)", r'G["\1"]', text)
    return re.sub(r"(?<=\w)'+(?![^\[]*\"\])", lambda m: "_p" * len(m[0]), text)


def evaluated(text: str, env: dict[str, Any]) -> Tensor:
    return number(eval(python(text), {**env}))  # noqa: S307 (our own text)


OWN = {
    "where": ("h = where(x > v and not v < 0, tau * (v + x), 0.5 * v)", {}),
    "power": ("h = v**2 + abs(x)**tau - (-v)**3 / 2**tau", {}),
    "delayed": ("r = detach(where(v > v_threshold, 1, 0))\nh = k * v + x - r * v_threshold\nv = h",
                {"strict": True}),
    "ternary": ("h = v + (x - v) / tau\ns = fire(h, theta) - fire(-h, theta)", {}),
    "integer": ("h = v + (x - v) / tau\ns = round(clamp(h / theta, 0, 4)) + floor(k * x)", {}),
    "bounded": ("h = clamp(v + k * x, -1, tau) - relu(-x * v)", {}),
    "extremes": ("h = minimum(v * tau, x) + k * maximum(x, v - 0.1) * sign(x)", {}),
    "adaptive": ("theta = v_threshold + k * a\nh = v + (x - v) / tau\na = 0.9 * a + s", {"a": 0.1}),
    "residual": ("h = v + x / tau\ny = s * relu(h) + x", {}),
    "again": ("h = v + x\nh = h * exp(-k * h)\nv = h - s\nv = v / tau\na = a + v", {"a": 0.2}),
    "smooth": ("h = sqrt(abs(x) + 1) + sin(v) * cos(x) + erf(v * k) - erfc(x) + log(tau + x**2)"
               " + tanh(v) + sigmoid(x) * atan(v / x)", {}),
    "chain": ("h = v" + " + k * x - v / tau" * 40, {}),
    "clif": ("h = v - v / tau + x\na = a * sigmoid(h / tau) + s\nv = h - s * (theta + sigmoid(a))",
             {"a": 0.3}),
    "names": ("new_v = x - v\nnew_v = new_v * k\nnewest = new_v" + " + v * x" * 60
              + "\nh = v + newest", {}),
}  # fmt: skip


def own(name: str) -> nj.NeuronModel:
    text, more = OWN[name]
    strict = more.get("strict", False)
    state = {"v": 0.0} | {k: v for k, v in more.items() if k != "strict"}
    return nj.NeuronModel(name, text, state=state, params=dict(tau=2.0, k=0.7), strict=strict)


BUILT_IN = list(nj.neurons.built_in())
MODELS = [*BUILT_IN, *OWN]


ORDINARY = 6  # points; more, with a larger x, where the model fired at all of them or at none


def values(model: nj.NeuronModel, seed: int) -> dict[str, Tensor]:
    """A point of x, the states and the parameters, each a leaf; some x reach any threshold."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    middles = dict.fromkeys(model.inputs, 0.4) | {**model.state, **model.params}
    for name, middle in middles.items():
        spread = 1.5 if name in model.inputs else min(0.3, abs(middle) or 0.3)
        value = middle + spread * torch.randn((), generator=draw, dtype=torch.float64)
        found[name] = value.abs() if name in model.positive or name == "tau" else value
    if seed >= ORDINARY:
        found["x"] = found["x"].abs() * (10.0, 300.0)[seed % 2]
    return found


def slope_of(shown: dict[str, list[tuple[str, str, str]]], env: dict[str, Any]) -> Any:
    text = next(right for left, _, right in shown["surrogate"] if left == "slope(u)")
    return lambda u: evaluated(text, {**env, "u": u, "alpha": number(ALPHA)})


@pytest.mark.parametrize(
    ("name", "reset", "detach"),
    [
        (name, reset, detach)
        if detach
        == ((reset == "soft") ^ (i % 2))  # each model meets both resets, and both of these
        else slow(name, reset, detach)
        for i, name in enumerate(MODELS)
        for reset in ("hard", "soft")
        for detach in (False, True)
    ],
)
def test_what_is_shown_is_true(name: str, reset: str, detach: bool) -> None:
    """Values, derivatives and the way back, against autograd through the author's own text."""
    model = own(name) if name in OWN else nj.neurons.by_name(name)
    text = str(nj.explain(model, reset=reset, detach_reset=detach))
    shown, fired = sections(text), set()
    derivatives = {left: right for left, _, right in shown["derivatives"]}
    for seed in range(30):
        if seed >= ORDINARY and len(fired) > 1:
            break
        given = {n: v.requires_grad_() for n, v in values(model, seed).items()}
        wanted = oracle(model, given, reset, detach)
        fired.add(float(wanted["s"].detach()))
        env = {**functions(model.strict), **{n: v.detach() for n, v in given.items()}}
        env["slope"] = slope_of(shown, env)

        # one step: each equation, and its derivatives by all that it reads
        told = set()
        for target, _, right in shown["one"]:
            words = set(re.findall(r"[A-Za-z]\w*'*", right))
            reads = {word for word in words if isinstance(env.get(python(word)), Tensor)}
            leaves = {r: env[python(r)].clone().requires_grad_() for r in sorted(reads)}
            value = evaluated(right, {**env, **{python(r): leaf for r, leaf in leaves.items()}})
            found = [None] * len(leaves)
            if value.requires_grad:
                found = torch.autograd.grad(value, [*leaves.values()], allow_unused=True)
            for read, gradient in zip(leaves, found, strict=True):
                key = f"d{target}/d{read}"
                near(evaluated(derivatives.get(key, "0"), env), gradient, key)
                told.add(key)
            env[python(target)] = value.detach()
        assert derivatives.keys() <= told

        # the values, and the gradients of a loss that reads all that comes out
        last = {z: [t for t, *_ in shown["one"] if t.rstrip("'") == z] for z in model.state}
        comes_out = re.search(r"out\.spikes is ([\w']+);", text)[1]
        for z, targets in last.items():
            near(env[python(targets[-1])] if targets else given[z].detach(), wanted[z], z)
        near(env[python(comes_out)], wanted["out"], "out.spikes")
        weights = {f"{z}[t+1]": 0.3 + 0.4 * i for i, z in enumerate(model.state)}
        weights["out.spikes"] = 1.1
        loss = 1.1 * wanted["out"] + sum(weights[f"{z}[t+1]"] * wanted[z] for z in model.state)
        gradients = dict.fromkeys(given)
        if loss.requires_grad:
            asked = torch.autograd.grad(loss, [*given.values()], allow_unused=True)
            gradients = dict(zip(given, asked, strict=True))
        env["G"] = {n: number(w) for n, w in weights.items()}
        for left, sign, right in shown["backward"]:
            of = re.fullmatch(r"grad\((.+)\)", left)[1]
            env["G"][of] = evaluated(right, env)
            assert (sign == "+=") == (of in model.params), left
        for n, gradient in gradients.items():
            near(env["G"].get(n, number(0)), gradient, f"{name}: grad({n})")
    assert name in ("smooth", "chain", "power") or len(fired) > 1, fired


def near(actual: Tensor, expected: Tensor | None, what: str) -> None:
    expected = number(0.0) if expected is None else expected.detach()
    torch.testing.assert_close(
        actual.detach(), expected, rtol=1e-9, atol=1e-12, msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_surrogates_are_shown_as_they_are(name: str) -> None:
    theirs = SURROGATES[name]
    surrogate = getattr(nj.surrogates, name)
    surrogate = surrogate() if name == "SquarewaveFourierSeries" else surrogate
    numbers = {n: number(v) for n, v in surrogate.params.items()}
    both = [surrogate] if surrogate.primitive is None else [surrogate, surrogate(spiking=False)]
    for each in both:
        shown = sections(str(nj.explain("if", surrogate=each)))["surrogate"]
        printed = {left: right for left, _, right in shown}
        for u in (-1.3, -0.21, 0.17, 0.9, 2.2):
            at = number(u).requires_grad_()
            env = {**functions(False), **numbers, "u": number(u)}
            slope = theirs.derivative(at, oracle_values(theirs.defaults))
            if theirs.primitive:
                smooth = theirs.primitive(at, oracle_values(theirs.defaults))
                near(evaluated(printed["smooth(u)"], env), smooth, f"{name}: smooth")
                if not each.spiking:
                    (slope,) = torch.autograd.grad(smooth, at)
            near(evaluated(printed["slope(u)"], env), slope, f"{name}: slope")


def oracle_values(numbers: Any) -> Any:
    return type("Values", (), {k: number(v) for k, v in numbers.items()})()


def test_the_text_of_lif() -> None:
    """As it is meant to be read."""
    text = str(nj.explain("lif", tau=3.0))
    assert text == repr(nj.explain(nj.neurons.LIF, tau=3.0))
    assert text.startswith("lif: hard reset, surrogate ATan(alpha=2, spiking=True)\n")
    for line in (
        "v = 0", "tau = 3 (> 0)", "v_threshold = 1", "theta = v_threshold",
        "h = v + (x - (v - v_reset)) / tau", "s = fire(h, theta)",
        "v' = h * (1 - s) + v_reset * s", "dh/dv = 1 - 1 / tau", "dv'/dh = 1 - s",
        "ds/dh = slope(h - theta)", "slope(u) = 0.5 * alpha / (1 + (0.5 * pi * alpha * u)**2)",
        "grad(s) = grad(out.spikes) + grad(v') * (-h + v_reset)",
        "grad(v) = grad(h) * (1 - 1 / tau)",
    ):  # fmt: skip
        assert f"\n    {line}\n" in text
    assert "h >= theta, else 0" in text and "h > theta, else 0" in str(nj.explain(own("delayed")))
    assert "detach(s)" not in text and "detach(s)" in str(nj.explain("lif", detach_reset=True))
    assert "grad(out.record.h)" in str(nj.explain("lif", record="h"))


def test_a_smooth_output_is_shown_as_one() -> None:
    explained = nj.explain("lif", surrogate=nj.surrogates.ATan(3.0, spiking=False))
    text, latex = str(explained), explained.latex()
    assert "\n    s = smooth(h - theta)\n" in text and "\n    ds/dh = slope(h - theta)\n" in text
    assert "fire(" not in text and "alpha = 3\n" in text
    assert r"s &= \operatorname{smooth}\left(h - \theta\right) \\" in latex
    assert r"\Theta" not in latex


def test_what_the_readme_shows_is_printed() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    made, shown = re.search(
        r"```python\n([^`]*?nj\.explain\([^`]*)```[^`]*```text\n(.*?)```", readme, re.S
    ).groups()
    names: dict[str, Any] = {}
    exec(made, names)  # noqa: S102 (test_readme.py runs it too)
    printed = str(nj.explain(names["alif"])).split("\n")
    lines = [line for line in shown.split("\n") if line not in ("", "...")]
    assert len(lines) > 8 and set(lines) <= set(printed)


def test_what_a_call_refuses_explain_refuses() -> None:
    for wrong, options in (
        ("unknown neuron 'lfi'", dict(model="lfi")),
        ("unknown parameter 'taw'", dict(taw=2.0)),
        ("unknown reset 'half'", dict(reset="half")),
        ("unknown dtype 'int8'", dict(dtype="int8")),
        ("unknown surrogate 'atn'", dict(surrogate="atn")),
        ("cannot record 'q'", dict(record="q")),
        ("tau must be finite and > 0", dict(tau=-1.0)),
    ):
        with pytest.raises(nj.SpecError, match=wrong):
            nj.explain(**{"model": "lif", **options})
    soft = str(nj.explain("qif", v_reset=None))
    assert soft.startswith("qif: soft reset") and "v_reset = 0\n" in soft


# --- LaTeX ----------------------------------------------------------------------------------------


def test_the_latex_of_lif() -> None:
    latex = nj.explain("lif").latex()
    for line in (
        r"h &= v + \frac{x - \left(v - v_{\mathrm{reset}}\right)}{\tau} \\",
        r"s &= \Theta\left(h - \theta\right) \\",
        r"v' &= h \, \left(1 - s\right) + v_{\mathrm{reset}} \, s",
        r"\frac{\partial h}{\partial v} &= 1 - \frac{1}{\tau} \\",
        r"\frac{\partial L}{\partial v} &= \frac{\partial L}{\partial h} \, "
        r"\left(1 - \frac{1}{\tau}\right) \\",
    ):
        assert f"\n{line}\n" in latex
    assert latex.count(r"\begin{align*}") == latex.count(r"\end{align*}") == 4


def lines_of(latex: str) -> list[str]:
    """The equations, with cases as lists, which mathtext of matplotlib can read."""
    latex = re.sub(r"(?m)^%.*\n|\\(begin|end)\{align(ed|\*)\}\n?", "", latex)
    latex = latex.replace(r"\mathrel{+}", "+")
    cases = re.compile(r"\\begin\{cases\}((?:(?!\\begin).)*?)\\end\{cases\}")
    while found := cases.search(latex):
        one = found[1].replace("&", ",").replace(r"\\", ";")
        latex = latex[: found.start()] + r"\{" + one + r"\}" + latex[found.end() :]
    return [line.replace("&", "") for line in re.split(r" \\\\\n|\n", latex) if line.strip()]


@pytest.mark.parametrize("name", MODELS)
def test_latex_is_well_formed(name: str) -> None:
    model = own(name) if name in OWN else nj.neurons.by_name(name)
    explained = nj.explain(model, surrogate="s2nn", record="v")
    latex = explained.latex()
    markdown = [explained._repr_markdown_(), model._repr_markdown_()]
    for text in (latex, *markdown):
        bare = re.sub(r"\\[{}]", "", text)
        assert bare.count("{") == bare.count("}")
        assert text.count(r"\left") == text.count(r"\right") + text.count(r"\leftarrow")
        assert text.count(r"\begin{cases}") == text.count(r"\end{cases}")
        assert text.isascii()


@pytest.mark.parametrize(
    "name", ["eif", *(n if n in ("where", "ternary", "names") else slow(n) for n in OWN)]
)
def test_matplotlib_reads_the_latex(name: str) -> None:
    mathtext = pytest.importorskip("matplotlib.mathtext", reason="pip install 'neuronjit[plot]'")
    model = own(name) if name in OWN else nj.neurons.by_name(name)
    explained = nj.explain(model, surrogate="s2nn")
    parser = mathtext.MathTextParser("path")
    for line in lines_of(explained.latex()):
        if len(line) < 300:  # it takes seconds for long ones
            parser.parse(f"${line}$")


def test_names_in_latex() -> None:
    text = "h = v + tau_w * delta_T * a0 * beta2_x * Omega * foo_bar_mu * 1e-5 * 2.5e7 * pi * x"
    params = dict.fromkeys(("tau_w", "delta_T", "a0", "beta2_x", "Omega", "foo_bar_mu"), 1.0)
    latex = nj.explain(nj.NeuronModel("n", text, state=dict(v=0.0), params=params)).latex()
    assert (
        r"h &= v + \tau_{w} \, \delta_{T} \, a_{0} \, \beta_{2, x} \, \Omega \, "
        r"\mathrm{foo}_{\mathrm{bar}, \mu} \cdot 10^{-5} \cdot 25000000 \, \pi \, x"
    ) in latex


# --- reprs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_repr_of_a_model_makes_it_again(name: str) -> None:
    model = own(name) if name in OWN else nj.neurons.by_name(name)
    again = eval(repr(model), {"NeuronModel": nj.NeuronModel})  # noqa: S307
    assert again == model and repr(again) == repr(model)
    assert "h = " in repr(model)
    assert model.name in model._repr_markdown_() and r"\leftarrow" in model._repr_markdown_()


def test_the_repr_of_a_surrogate_makes_it_again() -> None:
    for surrogate in (nj.surrogates.ATan(3.0), nj.surrogates.Sigmoid(spiking=False)):
        again = eval(repr(surrogate), {"Surrogate": nj.Surrogate})  # noqa: S307
        assert again == surrogate and surrogate.derivative in repr(surrogate)
    assert str(nj.surrogates.ATan(3.0)) == "ATan(alpha=3, spiking=True)"
    assert r"\frac{0.5 \, \alpha}{1 + " in nj.surrogates.ATan._repr_markdown_()


# --- what kernels move and are --------------------------------------------------------------------


def moved(**options: Any) -> list[str]:
    text = str(nj.explain(**{"model": "lif", **options}))
    lines = text[text.index("bytes that kernels move") :].split("\n\n")[0].split("\n    ")
    return lines[1:]


def test_bytes_that_kernels_move() -> None:
    """X and s are 4 bytes, backward has grad_x too; v is 4 bytes, before and after."""
    both = "(cuda, cpu)"
    assert moved() == [
        f"forward: 8 a step, 8 a call for states {both}",
        f"backward: 12 a step, 12 a call for states {both}",
    ]
    assert moved(steps=64, dtype="float16") == [
        f"forward: 4 a step, 4 every 16 steps, 8 a call for states {both}",
        f"backward: 6 a step, 4 every 16 steps, 12 a call for states {both}",
    ]
    assert moved(model="izhikevich", record=("v", "h"), dtype="float64") == [
        f"forward: 32 a step, 32 a call for states {both}",
        f"backward: 40 a step, 48 a call for states {both}",
    ]


def test_compiled_kernels_are_measured(tmp_path: Path) -> None:
    text = str(nj.explain("lif", compile=True, arch="sm_80"))
    lines = text[text.index("kernels, compiled") :].split("\n    ")[1:]
    number = r"[1-9]\d*"
    code = f"{number} bytes of code"
    on_cpu = [line for line in lines if line.startswith("cpu ")]
    assert len(on_cpu) == 2
    assert all(re.fullmatch(rf"cpu \S+, (for|back)ward: {code}", line) for line in on_cpu)
    if not cuda.why_unavailable() or "NVRTC" not in cuda.why_unavailable():
        on_gpu = [line for line in lines if line.startswith("cuda sm_80")]
        facts = rf"{code}, {number} registers a thread, \d+ bytes spilled"
        assert len(on_gpu) == 2
        assert all(re.fullmatch(rf"cuda sm_80, \w+: {facts}", line) for line in on_gpu)
    # the size of its code, as binutils sees it
    source = nj.render("lif", target="cpu", direction="forward")
    symbol = re.search(r"namespace (\w+)_ns", source)[1]
    path = tmp_path / "kernel.so"
    path.write_bytes(cpu.compile(source, symbol, cpu.arch()))
    sizes = subprocess.run(["size", "-A", path], capture_output=True, text=True, check=True).stdout
    wanted = sum(map(int, re.findall(r"^\.text\S*\s+(\d+)", sizes, re.M)))
    shape = cpu.measure(source, symbol, cpu.arch())
    assert shape == {"code": wanted}


def test_what_ptxas_said_is_read() -> None:
    said = """ptxas info    : Compiling entry function 'a' for 'sm_90'
        8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
    ptxas info    : Used 80 registers, used 0 barriers"""
    assert cuda.usage(said) == {"registers": 80, "spilled": 12}


def test_without_a_compiler_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    text = str(nj.explain("lif", compile=True, arch="sm_80"))
    assert re.search(r"\n    cpu: not compiled, .*no-such-compiler", text)
    with pytest.raises(nj.SpecError, match="sm_1"):
        nj.explain("lif", compile=True, arch="sm_1")
