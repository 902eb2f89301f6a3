"""Derivatives of expressions: one rule for each operation, with zeros and ones folded away.

Choices (where, minimum, maximum) select gradients as they select values: what is read in a branch
that was not chosen gets 0, and not 0 times a slope that may be infinite there. So a product meets
the branches of a choice one by one (`multiply`), and where a choice stands inside another
operation, it is a statement of its own first (`split_choices`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from .algebra import ONE, ZERO, add, is_number, multiply, where
from .functions import OPERATIONS, closed
from .tree import Node, Statement, name


def split_choices(statements: Iterable[Statement]) -> list[tuple[Statement, str]]:
    """The same values, with each choice inside an operation as a statement of its own.

    Each with its gate: the name of a number that is 0 where an outer choice did not take it, so
    that the gradients of what it reads are 0; "" where there is no outer choice.
    """
    found: list[tuple[Statement, str]] = []
    for statement in statements:
        splitting = _Splitting(statement)
        tree = splitting.split(statement.expression, "", root=True)
        # gates last and the outer first: they read values, and those of outer choices
        found += splitting.parts
        found += [(gate, "") for gate in reversed(splitting.gates)]
        found.append((Statement(statement.target, tree, statement.line), ""))
    return found


class _Splitting:
    """One statement, and the parts that are evaluated before it."""

    def __init__(self, whole: Statement) -> None:
        self.whole = whole
        self.parts: list[tuple[Statement, str]] = []
        self.gates: list[Statement] = []
        # no other generated name has a digit there, and no name of the equations ends in _
        self.fresh = (f"{whole.target}_{i}c_" for i in itertools.count())

    def part(self, expression: Node, gate: str) -> Node:
        target = next(self.fresh)
        self.parts.append((Statement(target, expression, self.whole.line), gate))
        return name(target)

    def split(self, node: Node, gate: str, root: bool = False) -> Node:
        if not _chooses_within(node):
            return node
        if not _chooses(node):
            return Node(node.op, tuple(self.split(a, gate) for a in node.args), node.value)
        if node.op == "**":  # as in torch: its slopes are chosen, then multiplied by those within
            args = [self.split(arg, gate) for arg in node.args]
            node = Node("**", tuple(a if a.op == "number" else self.part(a, gate) for a in args))
            return node if root else self.part(node, gate)
        *condition, a, b = node.args
        gates = [next(self.fresh) if _chooses_within(branch) else "" for branch in (a, b)]
        a, b = (self.split(branch, g) for branch, g in zip((a, b), gates, strict=True))
        node = Node(node.op, (*condition, a, b))
        opened = name(gate) if gate else ONE
        for of_gate, value in zip(gates, closed(node, opened), strict=True):
            if of_gate:
                self.gates.append(Statement(of_gate, value, self.whole.line))
        return node if root else self.part(node, gate)


def _chooses(node: Node) -> bool:
    """Whether slopes of the operation depend on a condition."""
    power = node.op == "**" and node.args[1].op != "number"
    return power or node.op in ("where", "minimum", "maximum")


def _chooses_within(node: Node) -> bool:
    if node.op == "detach":
        return False
    return _chooses(node) or any(_chooses_within(arg) for arg in node.args)


def derivative(node: Node, variable: str) -> Node:
    """d node / d variable, with zeros and ones folded away."""
    if node.op == "name":
        return ONE if node.value == variable else ZERO
    if node.op == "number" or variable not in node.names():
        return ZERO
    a, *rest = node.args
    if node.op == "where":
        return where(a, derivative(rest[0], variable), derivative(rest[1], variable))
    slopes_of = OPERATIONS[node.op].slopes
    if slopes_of is None:
        return ZERO
    parts = [derivative(arg, variable) for arg in node.args]
    slopes = slopes_of(node, *node.args)
    return add(
        multiply(slope, part)
        for slope, part in zip(slopes, parts, strict=True)
        if not is_number(part, 0)
    )


def slopes(node: Node) -> list[tuple[str, Node]]:
    """Each name that the expression reads with the derivative by it, where that is not 0."""
    found = [(read, derivative(node, read)) for read in sorted(node.names())]
    return [(read, slope) for read, slope in found if not is_number(slope, 0)]
