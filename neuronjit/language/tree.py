"""The tree that a text becomes; everything else in the library sees only trees."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
_PART = re.compile(r"(\w+)_\d+_", re.ASCII)  # no name of the equations ends in _


@dataclass(frozen=True)
class Node:
    """An operation: `op` is an operator, a function, or "name" or "number" with a `value`."""

    op: str
    args: tuple[Node, ...] = ()
    value: str | float = 0.0
    height: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        height = 1 + max((arg.height for arg in self.args), default=0)
        object.__setattr__(self, "height", height)

    def walk(self) -> Iterator[Node]:
        """The expression and every one within it."""
        yield self
        for arg in self.args:
            yield from arg.walk()

    def names(self) -> set[str]:
        """Every name that the expression reads."""
        return {str(node.value) for node in self.walk() if node.op == "name"}

    def substitute(self, names: Mapping[str, Node]) -> Node:
        """The same expression with some names replaced."""
        if self.op == "name":
            return names.get(str(self.value), self)
        return Node(self.op, tuple(arg.substitute(names) for arg in self.args), self.value)


def number(value: float) -> Node:
    """A constant."""
    return Node("number", value=float(value))


def name(identifier: str) -> Node:
    """What a name stands for."""
    return Node("name", value=identifier)


@dataclass(frozen=True)
class Statement:
    """`target = expression`, on line `line` (1-based) of its block."""

    target: str
    expression: Node
    line: int

    @property
    def whole(self) -> str:
        """The name that the block assigns, where this statement is a part of a long one."""
        part = _PART.fullmatch(self.target)
        return part[1] if part else self.target


def needed(statements: Sequence[Statement], outputs: set[str]) -> list[Statement]:
    """The statements that `outputs` depend on; compilers warn of the others.

    What add_grad adds is no part of a value: gradients name it where they read it.
    """
    kept: list[Statement] = []
    wanted = set(outputs)
    for statement in reversed(statements):
        if statement.target in wanted:
            kept.append(statement)
            read = statement.expression
            wanted |= (read.args[0] if read.op == "add_grad" else read).names()
    return kept[::-1]


def small_power(node: Node) -> bool:
    """x**2 and x**3 are products on every target, hence exact; other powers are the library's."""
    return node.op == "**" and node.args[1].op == "number" and node.args[1].value in (2.0, 3.0)
