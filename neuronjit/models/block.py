"""What a model's block leaves out (threshold, spike, reset), and each name assigned once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from ..language.parse import parse_block
from ..language.tree import Node, Statement, name
from .model import NeuronModel


@dataclass(frozen=True)
class Program:
    """A model with its reset, each name assigned once: to print, evaluate and differentiate."""

    statements: tuple[Statement, ...]  # one of them assigns "s" from Node("fire", (h, theta))
    final: Mapping[str, str]  # state -> the name that holds it after the step
    h: str  # the name of the charged membrane potential


# what v is after a spike, as the block would say it; a block that assigns v says it itself: "own"
RESETS = {
    "hard": "v = h * (1 - s) + v_reset * s",
    "soft": "v = h - s * theta",
}
_THRESHOLD = Statement("theta", name("v_threshold"), 0)
_SPIKE = Statement("s", Node("fire", (name("h"), name("theta"))), 0)
_CUT = {"s": Node("detach", (name("s"),))}


@cache
def program(model: NeuronModel, reset: str, detach_reset: bool) -> Program:
    """The model's block with its spike and reset (a key of RESETS, or "own"), in program form."""
    statements, last = _once(_written_out(model, reset, detach_reset), model.state)
    return Program(tuple(statements), {z: last.get(z, z) for z in model.state}, last["h"])


def _written_out(model: NeuronModel, reset: str, detach_reset: bool) -> list[Statement]:
    """The block with what it leaves out: the threshold, and the spike with its reset.

    The neuron fires just before the first statement that reads s, or at the end.
    """
    block = list(model.statements)
    if all(statement.target != "theta" for statement in block):
        block.insert(0, _THRESHOLD)
    fires = next((i for i, s in enumerate(block) if "s" in s.expression.names()), len(block))
    after = parse_block(RESETS[reset], ("h", "s", "theta", "v_reset")) if reset in RESETS else ()
    block[fires:fires] = [_SPIKE, *after]
    if not detach_reset:
        return block
    return [
        Statement(s.target, s.expression.substitute(_CUT), s.line) if s.whole == "v" else s
        for s in block
    ]


def _once(
    block: Iterable[Statement], states: Iterable[str]
) -> tuple[list[Statement], dict[str, str]]:
    """Static single assignment: each name assigned once; and the last name of each."""
    last: dict[str, str] = {}
    count = dict.fromkeys(states, 1)  # how often a name was assigned; a state, before the step
    found = []
    for statement in block:
        again = count.get(statement.target, 0)
        count[statement.target] = again + 1
        fresh = f"new{again if again > 1 else ''}_{statement.target}_" if again else ""
        expression = statement.expression.substitute({k: name(v) for k, v in last.items()})
        last[statement.target] = fresh or statement.target
        found.append(Statement(last[statement.target], expression, statement.line))
    return found, last
