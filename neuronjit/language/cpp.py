"""Expressions as C++: in the written order, with divisions by parameters as kernels want them."""

from __future__ import annotations

from collections.abc import Container

from .functions import is_call
from .tree import COMPARISONS, Node, name, number, small_power

_PRECEDENCE = {
    "||": 0,
    "&&": 1,
    **dict.fromkeys(COMPARISONS, 2),
    "+": 3,
    "-": 3,
    "*": 4,
    "/": 4,
    "neg": 5,
    "!": 5,
}


def to_cpp(node: Node) -> str:
    """Print in the written order: parentheses force exactly the tree's association."""
    return _print(node)[0]


def _print(node: Node) -> tuple[str, int]:
    if node.op == "name":
        return str(node.value), 9
    if node.op == "number":
        return cpp_number(float(node.value)), 9
    if node.op == "detach":  # matters to derivatives only
        return _print(node.args[0])
    if node.op == "**":
        return _print_power(node)
    printed = [_print(arg) for arg in node.args]
    if node.op == "where":
        (c, _), (a, pa), (b, pb) = printed
        return f"({c} ? {_wrap(a, pa, 3)} : {_wrap(b, pb, 3)})", 9
    if node.op not in _PRECEDENCE:
        return f"{node.op}_({', '.join(text for text, _ in printed)})", 9
    own = _PRECEDENCE[node.op]
    if node.op in ("neg", "!"):
        return f"{node.op.replace('neg', '-')}{_wrap(*printed[0], 9)}", own
    (a, pa), (b, pb) = printed
    return f"{_wrap(a, pa, own)} {node.op} {_wrap(b, pb, own + 1)}", own


def _wrap(text: str, precedence: int, least: int) -> str:
    return text if precedence >= least else f"({text})"


def _print_power(node: Node) -> tuple[str, int]:
    base, exponent = (_print(arg)[0] for arg in node.args)
    if small_power(node):
        return f"pow{int(float(node.args[1].value))}_({base})", 9
    return f"pow_({base}, {exponent})", 9


def cpp_number(value: float) -> str:
    """A literal of the arithmetic type, rounded once from the double that Python read."""
    if value == int(value) and abs(value) < 1e6:
        return f"real({int(value)})" if value >= 0 else f"real({int(value)}.0)"
    return f"real({value!r})"


def exact_divisions(node: Node, divisors: Container[str]) -> Node:
    """The same rounded values, from what a thread keeps of its `divisors`.

    `divide` gives the quotient by the scaled divisor. The scale is a power of two, nearly always 1:
    a sum takes it in without a rounding or an instruction more, as a fused multiply-add.
    """
    args = tuple(exact_divisions(arg, divisors) for arg in node.args)
    if node.op == "/" and args[1].op == "name" and args[1].value in divisors:
        kept = kept_of(args[1])
        return Node("*", (Node("divide", (args[0], name(kept))), name(f"{kept}.scale")))
    if node.op in ("+", "-") and _is_quotient(args[1]):
        quotient, scale = args[1].args
        return Node("fma", (_signed(quotient, node.op), scale, args[0]))
    if node.op in ("+", "-") and _is_quotient(args[0]):
        return Node("fma", (*args[0].args, _signed(args[1], node.op)))
    return Node(node.op, args, node.value)


def _is_quotient(node: Node) -> bool:
    return node.op == "*" and node.args[0].op == "divide"


def _signed(node: Node, sign: str) -> Node:
    return node if sign == "+" else Node("neg", (node,))


def approximate(
    node: Node, divisors: Container[str], evaluated: Container[Node] = frozenset()
) -> Node:
    """For gradients: products with reciprocals; divisions and sigmoids to the last bit or two.

    Exact are comparisons, so that a choice of slopes falls as that of values did, and functions
    that the step has `evaluated`: written alike, compilers find that they are needed only once.
    """
    if node.op in COMPARISONS or (is_call(node) and node in evaluated):
        return exact_divisions(node, divisors)
    args = tuple(approximate(arg, divisors, evaluated) for arg in node.args)
    if node.op == "sigmoid":
        return Node("near_sigmoid", args)
    if node.op != "/":
        return Node(node.op, args, node.value)
    a, b = args
    if b.op == "name" and b.value in divisors:
        kept = kept_of(b)
        if a == number(1):
            return name(f"{kept}.inverse")
        return Node("*", (Node("*", (a, name(f"{kept}.r"))), name(f"{kept}.scale")))
    return Node("ratio", (a, b))


def functions(node: Node) -> set[Node]:
    """Every call of a function, and every power, within an expression."""
    return {within for within in node.walk() if is_call(within)}


def kept_of(divisor: Node) -> str:
    """What generated code calls a divisor's reciprocal, scale and scaled value."""
    return f"r_{divisor.value}_"


def divided_by(node: Node) -> set[str]:
    """Every name that something is divided by."""
    divisors = [within.args[1] for within in node.walk() if within.op == "/"]
    return {str(divisor.value) for divisor in divisors if divisor.op == "name"}
