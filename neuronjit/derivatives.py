"""Derivatives of expressions: one rule for each operation, with zeros and ones folded away."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from .expressions import Node, number

_ZERO, _ONE = number(0), number(1)


def derivative(node: Node, variable: str) -> Node:
    """d node / d variable, with zeros and ones folded away."""
    if node.op == "name":
        return _ONE if node.value == variable else _ZERO
    if node.op in ("number", "detach", "sign") or variable not in node.names():
        return _ZERO
    a, *rest = node.args
    if node.op == "where":
        return _where(a, derivative(rest[0], variable), derivative(rest[1], variable))
    parts = [derivative(arg, variable) for arg in node.args]
    slopes = _PARTIALS[node.op](node, *node.args)
    return add(
        multiply(slope, part) for slope, part in zip(slopes, parts, strict=True) if not _is(part, 0)
    )


def _is(node: Node, value: float) -> bool:
    return node.op == "number" and node.value == value


def add(terms: Iterable[Node]) -> Node:
    """The sum of some terms."""
    total = _ZERO
    for term in terms:
        if _is(term, 0):
            continue
        if _is(total, 0):
            total = term
        elif term.op == "neg":
            total = Node("-", (total, term.args[0]))
        else:
            total = Node("+", (total, term))
    return total


def multiply(a: Node, b: Node) -> Node:
    """The product of two factors."""
    if _is(a, 0) or _is(b, 0):
        return _ZERO
    if _is(a, 1):
        return b
    if _is(b, 1):
        return a
    if _is(a, -1):
        return negate(b)
    if _is(b, -1):
        return negate(a)
    if a.op == "neg":
        return negate(multiply(a.args[0], b))
    if b.op == "neg":
        return negate(multiply(a, b.args[0]))
    if a.op == "/" and _is(a.args[0], 1):  # (1 / y) * b is better as b / y
        return Node("/", (b, a.args[1]))
    return Node("*", (a, b))


def negate(a: Node) -> Node:
    """The expression with the other sign."""
    if a.op == "neg":
        return a.args[0]
    return number(-float(a.value)) if a.op == "number" else Node("neg", (a,))


def _where(condition: Node, a: Node, b: Node) -> Node:
    return a if a == b else Node("where", (condition, a, b))


def _over(a: Node, b: Node) -> Node:
    return Node("/", (a, b))


def _power_slopes(n: Node, a: Node, b: Node) -> Sequence[Node]:
    if _is(b, 0):
        return _ZERO, _ZERO
    lower = number(float(b.value) - 1) if b.op == "number" else Node("-", (b, _ONE))
    by_base = multiply(b, a if _is(lower, 1) else Node("**", (a, lower)))
    if b.op != "number":  # as torch: slopes are 0, not 0 times infinity, for an exponent of 0 ...
        by_base = Node("where", (Node("==", (b, _ZERO)), _ZERO, by_base))
    slope = multiply(n, Node("log", (a,)))
    at_zero = Node("where", (Node(">=", (b, _ZERO)), _ZERO, slope))  # ... and by it for a base of 0
    by_exponent = Node("where", (Node("==", (a, _ZERO)), at_zero, slope))
    return by_base, by_exponent


def _choice(a: Node, b: Node, op: str) -> Sequence[Node]:
    """Slopes of minimum and maximum: one half each at a tie, as torch."""
    tie = number(0.5)
    first = Node("where", (Node(op, (a, b)), _ONE, Node("where", (Node("==", (a, b)), tie, _ZERO))))
    second = Node(
        "where", (Node(op, (b, a)), _ONE, Node("where", (Node("==", (a, b)), tie, _ZERO)))
    )
    return first, second


_PARTIALS: dict[str, Callable[..., Sequence[Node]]] = {
    "+": lambda n, a, b: (_ONE, _ONE),
    "-": lambda n, a, b: (_ONE, negate(_ONE)),
    "neg": lambda n, a: (negate(_ONE),),
    "*": lambda n, a, b: (b, a),
    "/": lambda n, a, b: (_over(_ONE, b), negate(_over(n, b))),
    "**": _power_slopes,
    "exp": lambda n, a: (n,),
    "log": lambda n, a: (_over(_ONE, a),),
    "sqrt": lambda n, a: (_over(number(0.5), n),),
    "tanh": lambda n, a: (Node("-", (_ONE, multiply(n, n))),),
    "sigmoid": lambda n, a: (multiply(n, Node("-", (_ONE, n))),),
    "sin": lambda n, a: (Node("cos", (a,)),),
    "cos": lambda n, a: (negate(Node("sin", (a,))),),
    "atan": lambda n, a: (_over(_ONE, Node("+", (_ONE, multiply(a, a)))),),
    "erf": lambda n, a: (
        multiply(number(2 / math.sqrt(math.pi)), Node("exp", (negate(multiply(a, a)),))),
    ),
    "erfc": lambda n, a: (
        multiply(number(-2 / math.sqrt(math.pi)), Node("exp", (negate(multiply(a, a)),))),
    ),
    "abs": lambda n, a: (Node("sign", (a,)),),
    "minimum": lambda n, a, b: _choice(a, b, "<"),
    "maximum": lambda n, a, b: _choice(a, b, ">"),
}
