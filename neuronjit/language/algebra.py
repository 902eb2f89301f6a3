"""Sums and products of trees, with zeros and ones folded away."""

from __future__ import annotations

from collections.abc import Iterable

from .tree import Node, number

ZERO, ONE = number(0), number(1)


def is_number(node: Node, value: float) -> bool:
    """Return whether the tree is this constant."""
    return node.op == "number" and node.value == value


def add(terms: Iterable[Node]) -> Node:
    """The sum of some terms."""
    total = ZERO
    for term in terms:
        if is_number(term, 0):
            continue
        if is_number(total, 0):
            total = term
        elif term.op == "neg":
            total = Node("-", (total, term.args[0]))
        else:
            total = Node("+", (total, term))
    return total


def multiply(a: Node, b: Node) -> Node:
    """The product of two factors."""
    if is_number(a, 0) or is_number(b, 0):
        return ZERO
    if is_number(a, 1):
        return b
    if is_number(b, 1):
        return a
    if is_number(a, -1):
        return negate(b)
    if is_number(b, -1):
        return negate(a)
    if a.op == "neg":
        return negate(multiply(a.args[0], b))
    if b.op == "neg":
        return negate(multiply(a, b.args[0]))
    if _closes(a):
        a, b = b, a
    if b.op == "where" and _closes(b):
        return where(b.args[0], multiply(a, b.args[1]), multiply(a, b.args[2]))
    if b.op in ("+", "-") and _closes(b):
        first, second = (multiply(a, arg) for arg in b.args)
        return add([first, second if b.op == "+" else negate(second)])
    if b.op == "/" and is_number(b.args[0], 1):
        a, b = b, a
    if a.op == "/" and is_number(a.args[0], 1):  # (1 / y) * b is better as b / y
        return Node("/", (b, a.args[1]))
    return Node("*", (a, b))


def _closes(node: Node) -> bool:
    """Whether a slope is 0 where a branch is closed: the other factor may be infinite there."""
    if node.op == "where":
        return any(is_number(branch, 0) or _closes(branch) for branch in node.args[1:])
    return node.op in ("+", "-", "neg") and any(_closes(arg) for arg in node.args)


def negate(a: Node) -> Node:
    """The expression with the other sign."""
    if a.op == "neg":
        return a.args[0]
    return number(-float(a.value)) if a.op == "number" else Node("neg", (a,))


def where(condition: Node, a: Node, b: Node) -> Node:
    """The choice, or the one branch where both are the same."""
    return a if a == b else Node("where", (condition, a, b))


def over(a: Node, b: Node) -> Node:
    """The quotient."""
    return Node("/", (a, b))
