"""Derivatives of expressions: one rule for each operation, with zeros and ones folded away.

Choices (where, minimum, maximum) select gradients as they select values: what is read in a branch
that was not chosen gets 0, and not 0 times a slope that may be infinite there. So a product meets
the branches of a choice one by one (`multiply`), and where a choice stands inside another
operation, it is a statement of its own first (`split_choices`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from .tree import Node, Statement, name, number

_ZERO, _ONE = number(0), number(1)


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
        opened = name(gate) if gate else _ONE
        for of_gate, closed in zip(gates, _closed(node, opened), strict=True):
            if of_gate:
                self.gates.append(Statement(of_gate, closed, self.whole.line))
        return node if root else self.part(node, gate)


def _closed(node: Node, opened: Node) -> Sequence[Node]:
    """For both branches of a choice: 0 where it does not take the branch, else `opened`."""
    *condition, a, b = node.args
    if condition:
        return Node("where", (*condition, opened, _ZERO)), Node(
            "where", (*condition, _ZERO, opened)
        )
    less = "<" if node.op == "maximum" else ">"
    return [Node("where", (Node(less, pair), _ZERO, opened)) for pair in ((a, b), (b, a))]


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
    if _closes(a):
        a, b = b, a
    if b.op == "where" and _closes(b):
        return _where(b.args[0], multiply(a, b.args[1]), multiply(a, b.args[2]))
    if b.op in ("+", "-") and _closes(b):
        first, second = (multiply(a, arg) for arg in b.args)
        return add([first, second if b.op == "+" else negate(second)])
    if b.op == "/" and _is(b.args[0], 1):
        a, b = b, a
    if a.op == "/" and _is(a.args[0], 1):  # (1 / y) * b is better as b / y
        return Node("/", (b, a.args[1]))
    return Node("*", (a, b))


def _closes(node: Node) -> bool:
    """Whether a slope is 0 where a branch is closed: the other factor may be infinite there."""
    if node.op == "where":
        return any(_is(branch, 0) or _closes(branch) for branch in node.args[1:])
    return node.op in ("+", "-", "neg") and any(_closes(arg) for arg in node.args)


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


def _choice(node: Node, a: Node, b: Node) -> Sequence[Node]:
    """Slopes of minimum and maximum: one half each at a tie, and both 1 beside a NaN, as torch."""
    shared = Node("where", (Node("==", (a, b)), number(0.5), _ONE))
    return _closed(node, shared)


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
    "minimum": _choice,
    "maximum": _choice,
}
