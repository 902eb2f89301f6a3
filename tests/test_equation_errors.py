"""Equations that are refused: errors name the line and the word, and hostile text stays outside."""

from __future__ import annotations

import re
import subprocess
import time
from typing import Any

import pytest
import torch

import neuronjit as nj


def model(text: Any, **options: Any) -> nj.NeuronModel:
    options = {"state": {"v": 0.0}, "params": {"tau": 2.0}, **options}
    return nj.NeuronModel("m", text, **options)


# --- ordinary mistakes ---------------------------------------------------------------------------

MISTAKES = {
    # text: (line, the word that is shown, what else the message says)
    "h = v + x\ny = h + vv": (2, "vv", r"Known: .*\btau\b.*\bx\b"),
    "h = v + X": (1, "X", "Known"),
    "\n\nh = v + x\n\ny = foo(h)": (5, "foo(h)", r"Known: abs, add_grad, atan, .*where"),
    "h = v + exp()": (1, "exp()", "1"),
    "h = v + x / taw": (1, "taw", "column 13.*did you mean 'tau'"),
    "  h = v\n  y = (h + 2 * X)": (2, "X", "line 2, column 16: 'X'.*did you mean 'x'"),
    "h = beta * v + x": (1, "beta", r"1 - 1 / tau"),
    "h = v + x^2": (1, "x^2", r"write \*\*"),
    "h = torch.exp(v) + x": (1, "torch.exp(v)", r"write exp\(\.\.\.\)"),
    "h = np.maximum(v, x)": (1, "np.maximum", r"write maximum\("),
    "h = v + epx(x)": (1, "epx(x)", "did you mean 'exp'"),
    "h = v\nh += x": (2, "h += x", r"write h = h \+ x"),
    "h = v\nh *= x - v": (2, "h *= x - v", r"write h = h \* \(x - v\)"),
    "h = v + x / τ": (1, "τ", "write tau"),
    "h = v + Δ * x": (1, "Δ", "write delta"),
    "h = v\n  + θ": (2, "θ", "line 2, column 5.*write theta"),
    "h = np.clip(v, 0, x)": (1, "np.clip(v, 0, x)", "did you mean 'clamp'"),
    "h = min(v, x)": (1, "min(v, x)", "did you mean 'minimum'"),
    "h = pow(v, 2)": (1, "pow(v, 2)", r"did you mean '\*\*'"),
    "h = v + torch.sgm(x)": (1, "torch.sgm(x)", "did you mean 'sigmoid'|did you mean 'sign'"),
    "h = math.pi * v": (1, "math.pi", "write pi"),
    "h = v + x if v > 0 else x": (1, "v + x if v > 0 else x", r"write where\("),
    "h = where((v > 0) & (x > 0), v, x)": (1, "(v > 0) & (x > 0)", "takes a comparison|and"),
    "h = v + (v | x)": (1, "v | x", "write or"),
    "dv/dt = (x - v) / tau": (1, "dv/dt", "written out, such as h = v"),
    "h = v + exp(x, x)": (1, "exp(x, x)", "1"),
    "h = v + maximum(x)": (1, "maximum(x)", "2"),
    "h = v + where(x > 0, 1)": (1, "where(x > 0, 1)", "3"),
    "h = v + where(x, 1, 0)": (1, "x", "comparison"),
    "h = v + (x > 0)": (1, "x > 0", "where"),
    "h = v + where(0 < x < 1, 1, 0)": (1, "0 < x < 1", "where"),
    "h = v + where(x > 0 and x, 1, 0)": (1, "'x'", "comparison"),
    "h = v + (not x > 0)": (1, "not x > 0", "comparison"),
    "h = v + where((x > 0) == (v > 0), 1, 0)": (1, "x > 0", "where"),
    "h = v + maximum(x > 0, 1)": (1, "x > 0", "where"),
    "h = v + exp(a=x)": (1, "exp(a=x)", ""),
    "h = v + x % 2": (1, "x % 2", ""),
    "h = v + x // 2": (1, "x // 2", r"write floor\(a / b\)"),
    "h = v + (x & 1)": (1, "x & 1", "write and"),
    "h = v + x @ x": (1, "x @ x", ""),
    "h = v + ~x": (1, "~x", "write not"),
    "h = v + (x if x > 0 else 0)": (1, "x if x > 0 else 0", r"write where\("),
    "h = v + 1j": (1, "1j", ""),
    "h = v + True": (1, "True", ""),
    "h = v + None": (1, "None", ""),
    "h = v + 'x'": (1, "'x'", ""),
    "h = v + x[0]": (1, "x[0]", ""),
    "h = v + x.item": (1, "x.item", ""),
    "h = v + 1e999": (1, "1e999", "finite"),
    "h = v + 1 / 0": (1, "1 / 0", "finite"),
    "h = v + 1e300 * 1e300": (1, "1e300 * 1e300", "finite"),
    "h = v + (-8) ** 0.5": (1, "(-8) ** 0.5", "finite"),
    "h = v + x\nh += 1": (2, "h += 1", "assign"),
    "h = y = v + x": (1, "h = y = v + x", "assign"),
    "h: float = v + x": (1, "h: float = v + x", "assign"),
    "h, y = v, x": (1, "h, y", "name"),
    "h = v + x\nv[0] = h": (2, "v[0]", "name"),
    "h = v + x\nprint(h)": (2, "print(h)", "assign"),
    "h = v + x\nif x > 0: h = v": (2, "if x > 0: h = v", "assign"),
    "for i in x: h = v": (1, "for i in x", "assign"),
    "import os": (1, "import os", "assign"),
    "h = (y := v + x)": (1, "y := v + x", ""),
    "h = lambda: v": (1, "lambda: v", ""),
    "h = [v, x]": (1, "[v, x]", ""),
    "h = *v, x": (1, "*v", ""),
    "h = await_": (1, "await_", ""),
    "h = v +": (1, "h = v +", ""),
    "y = 1\nh = (v + x": (2, "(", ""),
    "h = v + x\n  y = h": (2, "y = h", "indent"),
    "tau = 3\nh = v + x": (1, "tau", "parameter"),
    "x = 3\nh = v + x": (1, "x", "input"),
    "h = v + x\ns = s + 1": (2, "s", "column 5: .*assigned"),
    "y = v + s\nh = v + x": (1, "s", "column 9: .*h"),
    "  h = v + x\n  y = (v +\n       s)\n  h = 2 * h": (4, "h", "line 4, column 3: .*fire"),
    "s = v + (x\n    + s)\nh = v": (2, "s", "line 2, column 7: 's' is read before"),
    "h = v + x\ny = s\nh = 2 * h": (3, "h", "column 1: .*fire"),
    "h = v + x\ny = s\ntheta = 2": (3, "theta", "fire"),
    "y = theta\nh = v + x\ntheta = y": (1, "theta", "assigned"),
    "h = v + x\nexp = h": (2, "exp", "function"),
    "h = v + x\npi = h": (2, "pi", "constant"),
    "h = v + x\nint = h": (2, "int", r"C\+\+"),
    "h = v + x\ny_ = h": (2, "y_", "_"),
    "h = v + x\ny__y = h": (2, "y__y", "__"),
    "h = v + x\n_y = h": (2, "_y", "letter"),
    f"h = v + x\n{'y' * 65} = h": (2, "y" * 40, "64|63"),
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: ascii(text)[:60])
def test_mistakes_name_the_line_and_the_word(text: str) -> None:
    line, word, also = MISTAKES[text]
    with pytest.raises(nj.EquationError) as caught:
        model(text)
    message = str(caught.value)
    assert re.search(also, message)
    assert re.search(rf"line {line}, column [1-9]", message)
    shown = message.replace("\\'", "'").replace("\\\\", "\\")
    assert word in shown
    assert len(message) < 600 and "\n" not in message


COLUMNS = {
    "h = v +": 8, "h = v + (x": 9, "h = v + x / τ": 13, "tau = 3": 1, "h = 9**999 + x": 5,
    "h = v + x  #define x": 12, "h = x + " + "exp(" * 150 + "x" + ")" * 150: 409,
}  # fmt: skip


@pytest.mark.parametrize("indent", [0, 3])
@pytest.mark.parametrize("text", COLUMNS, ids=lambda text: ascii(text)[:40])
def test_columns_are_those_of_the_text_as_it_was_given(text: str, indent: int) -> None:
    with pytest.raises(nj.EquationError, match=rf"line 2, column {COLUMNS[text] + indent}\b"):
        model(f"{' ' * indent}y = v\n{' ' * indent}{text}")


def test_names_of_others_in_a_call() -> None:
    """A parameter that the model does not have: the nearest, snnTorch's, or the models with it."""
    x = torch.zeros(2, 3)
    for name, words in (
        ("taw", "did you mean 'tau'"),
        ("τ", "'τ' of model 'lif'; did you mean 'tau'"),
        ("beta", "snnTorch's beta, .* is 1 - 1 / tau"),
        ("reciprocal_tau", r"Models that have it: .*\bplif\b.* Known: tau"),
    ):
        with pytest.raises(nj.SpecError, match=words):
            nj.multistep("lif", x, **{name: 0.5})
    with pytest.raises(nj.EquationError, match=r"beta.*make one of them a parameter"):
        model("h = beta * v + x", params={})
    with pytest.raises(nj.EquationError, match=r"parameter 'τ' \(write tau\) is not a name"):
        model("h = v + x", params={"τ": 2.0})


def test_a_missing_h_is_named() -> None:
    for text in ("", "\n  \n", "# nothing", "y = v + x"):
        with pytest.raises(nj.EquationError, match=r"'h'"):
            model(text)


@pytest.mark.parametrize("text", [None, 3, b"h = v + x", ["h = v + x"]], ids=repr)
def test_equations_are_text(text: Any) -> None:
    with pytest.raises(nj.EquationError, match=type(text).__name__):
        model(text)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"state": {"w": 0.0}}, "v"),
        ({"state": {"v": 0.0, "tau": 0.0}}, "tau"),
        ({"state": {"v": 0.0, "x": 0.0}}, "x"),
        ({"state": {"v": 0.0, "s": 0.0}}, "s"),
        ({"state": {"v": 0.0, "h": 0.0}}, "h"),
        ({"params": {"theta": 1.0}}, "theta"),
        ({"params": {"exp": 1.0}}, "exp"),
        ({"params": {"pi": 1.0}}, "pi"),
        ({"params": {"double": 1.0}}, "double"),
        ({"params": {"lambda": 1.0}}, "lambda"),
        ({"params": {"tau_": 1.0}}, "tau_"),
        ({"params": {"a__b": 1.0}}, "a__b"),
        ({"params": {"": 1.0}}, "''"),
        ({"params": {3: 1.0}}, "3"),
    ],
    ids=str,
)
def test_names_of_states_and_parameters(options: dict[str, Any], word: str) -> None:
    with pytest.raises(nj.EquationError) as caught:
        model("h = v + x", **options)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), 10**400],
    ids=["nan", "inf", "-inf", "1e400"],
)
def test_defaults_are_finite(value: float) -> None:
    for options in ({"params": {"tau": value}}, {"state": {"v": value}}):
        with pytest.raises(nj.SpecError, match=r"tau|v"):
            model("h = v + x", **options)


@pytest.mark.parametrize("value", [None, "1", True, 1j, [1.0]], ids=repr)
def test_defaults_are_numbers(value: Any) -> None:
    with pytest.raises(nj.InputTypeError, match="tau"):
        model("h = v + x", params={"tau": value})


@pytest.mark.parametrize(
    ("derivative", "primitive", "word"),
    [
        ("uu", None, "uu"),
        ("x", None, "x"),
        ("h - theta", None, "h"),
        ("where(u, 1, 0)", None, "comparison"),
        ("1", "u; u", "u; u"),
        ("1", "y = u", "y = u"),
        ("", None, "line 1"),
        ("u\nu", None, "line"),
        ("1 / 0", None, "finite"),
        (None, None, "NoneType"),
    ],
)
def test_mistakes_in_surrogates(derivative: Any, primitive: Any, word: str) -> None:
    with pytest.raises(nj.EquationError) as caught:
        nj.Surrogate("mine", derivative, primitive)
    assert word in str(caught.value)


# --- hostile text --------------------------------------------------------------------------------

HOSTILE_EXPRESSIONS = [
    # out of the expression and into C++
    "1);}__global__ void evil(){}//",
    "x); system(\"id\"); (0",
    "x; } extern \"C\" int system(const char*); {",
    "x /* */ + 1",
    "x */ 1",
    "x // 1",
    "x ??/\n + 1",
    "x ??= 1",
    "x <% %>",
    "x %: include",
    "x\n# 1 \"/etc/passwd\"\n+",
    "x\n#pragma GCC poison v\ny = )",
    "asm(\"int3\")",
    "__asm__(\"int3\")",
    "_Pragma(\"omp\")",
    "L'x'",
    "R\"(x)\"",
    "u8\"x\"",
    "0x1p3",
    "1.0f",
    "1'000",
    "v->x",
    "v::x",
    "&x",
    "*x",
    "!x",
    "x ? 1 : 0",
    "x++",
    "x,",
    "(x, v)",
    "x << 3",
    # into Jinja
    "{{7*7}}",
    "{{ config }}",
    "{% include 'target_cpu.h.j2' %}",
    "{# #} x",
    "${7*7}",
    "{x}",
    "{**x}",
    # into Python
    "__import__('os').system('id')",
    "__import__",
    "x.__class__",
    "x.__class__.__mro__[1].__subclasses__()",
    "().__class__",
    "exp.__globals__",
    "getattr(x, 'a')",
    "eval('1')",
    "exec('1')",
    "open('/etc/passwd')",
    "f'{x}'",
    "f'{__import__(\"os\")}'",
    "\"\"\"x\"\"\"",
    "'a' 'b'",
    "b'x'",
    "[i for i in x]",
    "(yield)",
    "(lambda: x)()",
    "exp(*x)",
    "exp(**x)",
    "where(x > 0, *v)",
    "...",
    "x.real",
    "print",
    "breakpoint()",
    # characters
    "x + \x00",
    "x\x00",
    "x + \x1b[31m",
    "x\r\n+ 1",
    "x\x0c+ 1",
    "х + 1",  # Cyrillic
    "ｘ + 1",  # full width: Python would normalise it to x
    "v + ℎ",
    "x + ²",
    "x − 1",
    "x + 1\u202e",
    "x\u00a0+ 1",
    "x + \ud800",
    "x + 😀",
    # size
    "9**9**9",
    "9.0**9**9**9",
    "2**2**2**2**2**2",
    "10**400",
    "1" + "0" * 400,
    "1e400 - 1e400",
    "1 / (1 - 1)",
    "0 ** -1",
    "exp(710) * exp(710) + 1e308 * 10",
    "(" * 10_000 + "x" + ")" * 10_000,
    "(" * 1000 + "x" + ")" * 1000,
    "-" * 10_000 + "x",
    "-" * 5000 + "x",
    "x" + " + x" * 3000,
    "exp(" * 1500 + "x" + ")" * 1500,
    "x ** " * 1000 + "x",
    "where(x > 0, " * 700 + "x",
    "x" * 5_000_000,
    "x + 1\n" * 1_500_000,
    " " * 10_000_000 + "x",
    "9" * 10_000_000,
    "y" * 300,
]  # fmt: skip
HOSTILE_NAMES = [
    "../../x", "/etc/x", "a/b", "a\\b", "a\nb", "a b", "a;b", "a{b", "{{x}}", "a\x00", "a\x1b[31m",
    "", " ", ".", "..", "-x", "1x", "x-y", "x.y", "x" * 65, "x" * 300, "х", "ｘ", "é", "a\u202eb",
    "__import__", "x" * 10_000_000,
]  # fmt: skip


def shown(text: str) -> str:
    return ascii(text[:40]) + (f" ({len(text)})" if len(text) > 40 else "")


@pytest.fixture
def nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is rendered and no program started, whatever is tried."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"hostile text got as far as this: {args!r:.200}")

    import jinja2

    monkeypatch.setattr(jinja2.Template, "render", refuse)
    monkeypatch.setattr(jinja2.Environment, "from_string", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    before = nj.stats()
    yield
    assert nj.stats() == before


def refused(build: Any) -> str:
    started = time.perf_counter()
    with pytest.raises(nj.EquationError) as caught:
        build()
    assert time.perf_counter() - started < 1.0, "too slow: this may be somebody's web form"
    message = str(caught.value)
    assert len(message) < 600, "an error must not repeat megabytes"
    assert message.isascii() and message.isprintable(), "an error must not carry terminal escapes"
    assert caught.value.__cause__ is None
    return message


def test_there_are_enough_of_them() -> None:
    assert len(set(HOSTILE_EXPRESSIONS)) >= 90


@pytest.mark.usefixtures("nothing_is_run")
@pytest.mark.parametrize("text", HOSTILE_EXPRESSIONS, ids=shown)
def test_hostile_expressions(text: str) -> None:
    """In a model's equations, in a surrogate's derivative and in its primitive."""
    refused(lambda: model(f"h = {text}"))
    refused(lambda: model(f"h = v + x\ny = {text}"))
    refused(lambda: nj.Surrogate("mine", text.replace("x", "u"), params={"v": 0.0}))
    refused(lambda: nj.Surrogate("mine", "1", text.replace("x", "u"), params={"v": 0.0}))


@pytest.mark.usefixtures("nothing_is_run")
@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=shown)
def test_hostile_names(name: str) -> None:
    refused(lambda: nj.NeuronModel(name, "h = v + x", state={"v": 0.0}))
    refused(lambda: model("h = v + x", state={"v": 0.0, name: 0.0}))
    refused(lambda: model("h = v + x", params={name: 0.0}))
    refused(lambda: nj.Surrogate(name, "1"))
    refused(lambda: nj.Surrogate("mine", "1", params={name: 0.0}))


@pytest.mark.parametrize(
    "text",
    [
        "h = v + x  # */ } { passwd {{7*7}}",
        "h = v + \\\n    x  # passwd ??/",
    ],
)
def test_comments_and_line_breaks_leave_no_trace(text: str) -> None:
    """Harmless: the C++ is printed from the tree, so nothing of the text itself gets there."""
    plain = nj.render(model("h = v + x"), target="cpu")
    assert nj.render(model(text), target="cpu") == plain
    assert "passwd" not in plain


@pytest.mark.usefixtures("nothing_is_run")
@pytest.mark.parametrize(
    "text",
    [
        'h = v + x\n#include "/etc/passwd"',
        "h = v + x  # */ } { #include </etc/passwd>",
        "#define h 1\nh = v + x",
        "# pragma once\nh = v + x",
        'h = v + x\n#line 1 "x"',
    ],
)
def test_directives_of_the_preprocessor_are_refused(text: str) -> None:
    """Even in a Python comment, which nothing of the source would hold."""
    refused(lambda: model(text))


@pytest.mark.usefixtures("nothing_is_run")
def test_many_statements_are_refused_quickly() -> None:
    refused(lambda: model("h = v + x\n" + "y = x\n" * 5000))


def test_what_is_accepted_stays_small() -> None:
    """The most that the language takes renders and compiles in seconds, not for ever."""
    text = "\n".join(["y = x", *["y = y * y"] * 200, "h = v + y"])
    started = time.perf_counter()
    nj.render(model(text), target="cpu")
    assert time.perf_counter() - started < 5
