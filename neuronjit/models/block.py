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

    statements: tuple[Statement, ...]  # what is in APART is a statement of its own, of names
    final: Mapping[str, str]  # state -> the name that holds it after the step
    held: Mapping[str, str]  # what the block assigns, and each state -> the name that holds it last
    spikes: str  # the name of what comes out
    again: Mapping[str, tuple[str, int]]  # a name made here -> what is assigned again, how often


# what v is after a spike, as the block would say it; a block that assigns v says it itself: "own"
RESETS = {
    "hard": "v = h * (1 - s) + v_reset * s",
    "soft": "v = h - s * theta",
}
APART = ("fire", "add_grad")  # their gradients are no products of slopes
_THRESHOLD = Statement("theta", name("v_threshold"), 0)
_SPIKE = Statement("s", Node("fire", (name("h"), name("theta"))), 0)
_CUT = {"s": Node("detach", (name("s"),))}


@cache
def program(model: NeuronModel, reset: str, detach_reset: bool) -> Program:
    """The model's block with its spike and reset (a key of RESETS, or "own"), in program form."""
    block = _fires_apart(_written_out(model, reset, detach_reset))
    statements, last, again = _once(block, model.state)
    final = {z: last.get(z, z) for z in model.state}
    spikes = last["y"] if "y" in last and "y" not in model.state else last["s"]
    return Program(tuple(statements), final, {**last, **final}, spikes, again)


def _written_out(model: NeuronModel, reset: str, detach_reset: bool) -> list[Statement]:
    """The block with what it leaves out: the threshold, and the spike with its reset.

    The neuron fires where the block assigns s; else just before the first statement that reads s,
    or at the end.
    """
    block = list(model.statements)
    if all(statement.target != "theta" for statement in block):
        block.insert(0, _THRESHOLD)
    own = next((i for i, s in enumerate(block) if s.target == "s"), None)
    reads = (i for i, s in enumerate(block) if "s" in s.expression.names())
    fires = next(reads, len(block)) if own is None else own + 1
    after = parse_block(RESETS[reset], ("h", "s", "theta", "v_reset")) if reset in RESETS else ()
    block[fires:fires] = [*([_SPIKE] if own is None else []), *after]
    if not detach_reset:
        return block
    return [
        Statement(s.target, s.expression.substitute(_CUT), s.line) if s.whole == "v" else s
        for s in block
    ]


def _fires_apart(block: Iterable[Statement]) -> list[Statement]:
    """The same block with each fire(a, b) as a statement of its own, in which a and b are names."""
    found: list[Statement] = []

    def named(tree: Node, line: int) -> Node:
        if tree.op != "name":
            found.append(Statement(f"part_{len(found)}_", tree, line))
            tree = name(found[-1].target)
        return tree

    def apart(tree: Node, line: int) -> Node:
        """The tree, in which those of APART can only be the outermost operation."""
        args = [apart(arg, line) for arg in tree.args]
        inner = tree.op in APART
        return Node(
            tree.op,
            tuple(named(arg, line) if inner or arg.op in APART else arg for arg in args),
            tree.value,
        )

    for statement in block:
        tree = apart(statement.expression, statement.line)
        found.append(Statement(statement.target, tree, statement.line))
    return found


def _once(
    block: Iterable[Statement], states: Iterable[str]
) -> tuple[list[Statement], dict[str, str], dict[str, tuple[str, int]]]:
    """Static single assignment: each name assigned once; and the last name of each."""
    last: dict[str, str] = {}
    made: dict[str, tuple[str, int]] = {}
    count = dict.fromkeys(states, 1)  # how often a name was assigned; a state, before the step
    found = []
    for statement in block:
        again = count.get(statement.target, 0)
        count[statement.target] = again + 1
        fresh = f"new{again if again > 1 else ''}_{statement.target}_" if again else ""
        made |= {fresh: (statement.target, again)} if fresh else {}
        expression = statement.expression.substitute({k: name(v) for k, v in last.items()})
        last[statement.target] = fresh or statement.target
        found.append(Statement(last[statement.target], expression, statement.line))
    return found, last, made
