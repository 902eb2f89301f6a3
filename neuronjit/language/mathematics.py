"""Expressions to read: as text in Python's syntax, and as LaTeX.

Text has exactly the tree's association. LaTeX shows products without brackets that mathematics
does not need. Both have every number in full.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from .tree import COMPARISONS, Node

# how strongly an operation binds its arguments; a name binds most
_BINDS = {
    "||": 1,
    "&&": 2,
    "!": 3,
    **dict.fromkeys(COMPARISONS, 4),
    "+": 5,
    "-": 5,
    "*": 6,
    "/": 6,
    "neg": 7,
    "**": 8,
}
_SUM, _PRODUCT, _NEGATION, _ATOM = 5, 6, 7, 9
_WORDS = {"&&": "and", "||": "or", "!": "not ", "neg": "-"}

_GREEK = re.compile(
    "alpha|beta|[Gg]amma|[Dd]elta|epsilon|zeta|eta|[Tt]heta|iota|kappa|[Ll]ambda|mu|nu|[Xx]i|[Pp]i"
    "|rho|[Ss]igma|tau|[Uu]psilon|[Pp]hi|chi|[Pp]si|[Oo]mega"
)
_SIGNS = {
    "<=": r"\leq", ">=": r"\geq", "==": "=", "!=": r"\neq", "&&": r"\wedge", "||": r"\vee",
    "!": r"\neg ", "neg": "-",
}  # fmt: skip
_TIMES, _THIN = r"\cdot", r"\,"
_NAMED = {"atan": r"\arctan", "minimum": r"\min", "maximum": r"\max"}
_NAMED |= {name: rf"\{name}" for name in ("exp", "log", "tanh", "sin", "cos")}
_BRACKETS = {
    "/": r"\frac{%s}{%s}",
    "sqrt": r"\sqrt{%s}",
    "abs": r"\left|%s\right|",
    "floor": r"\left\lfloor %s\right\rfloor",
    "grad": r"\frac{\partial L}{\partial %s}",
    "partial": r"\frac{\partial %s}{\partial %s}",
}
_CASES = r"\begin{cases} %s & \mathrm{if}\ %s \\ %s & \mathrm{otherwise} \end{cases}"


def to_text(node: Node) -> str:
    """The expression in the syntax of the equations."""
    return _text(node)[0]


def _text(node: Node) -> tuple[str, int]:
    if node.op == "name":
        return str(node.value), _ATOM
    if node.op == "number":
        value = float(node.value)
        return _digits(value), _ATOM if math.copysign(1, value) > 0 else _NEGATION
    printed = [_text(arg) for arg in node.args]
    if node.op == "partial":
        return "d{}/d{}".format(*(text for text, _ in printed)), _PRODUCT
    own = _BINDS.get(node.op)
    if own is None:
        return f"{node.op}({', '.join(text for text, _ in printed)})", _ATOM
    sign = _WORDS.get(node.op, node.op)
    if node.op in ("neg", "!"):
        return sign + _wrapped(*printed[0], own + 1), own
    if node.op == "**":
        return "**".join(_wrapped(*side, _ATOM) for side in printed), own
    left = own + 1 if own == _BINDS["<"] else own  # Python reads a < b < c in its own way
    return f"{_wrapped(*printed[0], left)} {sign} {_wrapped(*printed[1], own + 1)}", own


def _wrapped(text: str, binds: int, least: int) -> str:
    return text if binds >= least else f"({text})"


def _digits(value: float) -> str:
    if abs(value) == math.pi:
        return "pi" if value > 0 else "-pi"
    whole = value == int(value) and abs(value) < 1e15 and repr(value) != "-0.0"
    return str(int(value)) if whole else repr(value)


def to_latex(node: Node) -> str:
    r"""The expression in LaTeX, for KaTeX and MathJax too; Greek names become Greek letters."""
    return _latex(node)[0]


def _latex(node: Node) -> tuple[str, int]:
    if node.op == "name":
        return latex_name(str(node.value)), _ATOM
    if node.op == "number":
        return _latex_number(float(node.value))
    if node.op == "fire":  # the Heaviside step
        return rf"\Theta\left({to_latex(Node('-', node.args))}\right)", _ATOM
    printed = [_latex(arg) for arg in node.args]
    texts = tuple(text for text, _ in printed)
    if node.op == "where":
        condition, a, b = texts
        return _CASES % (a, condition, b), 0
    if node.op in _BRACKETS:
        fraction = node.op in ("/", "grad", "partial")
        return _BRACKETS[node.op] % texts, _PRODUCT if fraction else _ATOM
    own = _BINDS.get(node.op)
    if own is None:
        named = _NAMED.get(node.op, rf"\operatorname{{{node.op}}}")
        return rf"{named}\left({', '.join(texts)}\right)", _ATOM
    if node.op == "**":
        return f"{_braced(*printed[0], _ATOM)}^{{{texts[1]}}}", own
    sign = _SIGNS.get(node.op, node.op)
    if node.op in ("neg", "!"):
        binds = _SUM if node.op == "neg" else own
        return sign + _braced(*printed[0], binds + 1), binds
    if node.op == "*":
        a, b = (_braced(*side, _PRODUCT) for side in printed)
        return f"{a} {_TIMES if b[0].isdigit() else _THIN} {b}", own
    return f"{_braced(*printed[0], own)} {sign} {_braced(*printed[1], own + 1)}", own


def _braced(text: str, binds: int, least: int) -> str:
    return text if binds >= least else rf"\left({text}\right)"


def _latex_number(value: float) -> tuple[str, int]:
    mantissa, _, exponent = _digits(value).partition("e")
    shown = mantissa.replace("pi", r"\pi")
    if exponent:
        times = "" if mantissa == "1" else rf"{mantissa} \cdot "
        shown = rf"{times}10^{{{int(exponent)}}}"
    return shown, _SUM if value < 0 else _PRODUCT if exponent else _ATOM


def latex_name(name: str) -> str:
    r"""A name in LaTeX: what follows its first _ or letters is an index, tau_w -> \tau_{w}."""
    if name.startswith("out."):  # of a call
        return rf"\mathrm{{{name}}}".replace("_", r"\_")
    bare = re.split(r"['\[]", name)[0]  # h of h', v of v[t+1]
    first, *further = [part for part in bare.split("_") if part]
    if numbered := re.fullmatch(r"([A-Za-z]+)(\d+)", first):
        first, further = numbered[1], [numbered[2], *further]
    index = f"_{{{', '.join(map(_word, further))}}}" if further else ""
    return f"{_word(first)}{index}{name[len(bare) :]}"


def _word(word: str) -> str:
    if _GREEK.fullmatch(word):
        return rf"\{word}"
    return word if len(word) == 1 or word.isdigit() else rf"\mathrm{{{word}}}"


def aligned(equations: Iterable[tuple[str, str, str]], environment: str = "aligned") -> str:
    """Equations in LaTeX under each other, each given as its left side, its sign, its right side.

    `environment` is "aligned" within $$, "align*" for a document.
    """
    lines = " \\\\\n".join(f"{left} &{sign} {right}" for left, sign, right in equations)
    return f"\\begin{{{environment}}}\n{lines}\n\\end{{{environment}}}"
