"""What a model's block leaves out (threshold, spike, reset), and each name assigned once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from ..language.tree import Node, Statement, name, number
from .model import NeuronModel


@dataclass(frozen=True)
class Program:
    """A model with its reset, each name assigned once: to print, evaluate and differentiate."""

    statements: tuple[Statement, ...]  # one of them assigns "s" from Node("fire", (h, theta))
    final: Mapping[str, str]  # state -> the name that holds it after the step
    h: str  # the name of the charged membrane potential


@cache
def program(model: NeuronModel, reset: str, detach_reset: bool) -> Program:
    """Write out the spike and the reset: "hard", "soft", or "own" where the block assigns v."""
    current: dict[str, str] = {}  # a name of the equations -> the name that holds its value now
    count: dict[str, int] = {}  # how often a name was assigned, the entry of a state included
    statements: list[Statement] = []

    def assign(target: str, expression: Node, line: int = 0) -> None:
        count[target] = count.get(target, target in model.state) + 1
        again = count[target] - 1
        fresh = f"new{again if again > 1 else ''}_{target}_" if again else target
        expression = expression.substitute({k: name(v) for k, v in current.items()})
        statements.append(Statement(fresh, expression, line))
        current[target] = fresh

    def fire() -> None:
        assign("s", Node("fire", (name("h"), name("theta"))))
        s = Node("detach", (name("s"),)) if detach_reset else name("s")
        if reset == "hard":  # v = h * (1 - s) + v_reset * s
            kept = Node("*", (name("h"), Node("-", (number(1), s))))
            assign("v", Node("+", (kept, Node("*", (name("v_reset"), s)))))
        elif reset == "soft":  # v = h - s * theta
            assign("v", Node("-", (name("h"), Node("*", (s, name("theta"))))))

    if not any(s.target == "theta" for s in model.statements):
        assign("theta", name("v_threshold"))
    for statement in model.statements:
        expression = statement.expression
        if "s" in expression.names() and "s" not in current:
            fire()
        if statement.whole == "v" and detach_reset:
            expression = expression.substitute({"s": Node("detach", (name("s"),))})
        assign(statement.target, expression, statement.line)
    if "s" not in current:
        fire()
    return Program(tuple(statements), {z: current.get(z, z) for z in model.state}, current["h"])
