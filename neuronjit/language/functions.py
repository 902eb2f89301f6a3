"""Every operation of the language, one row each.

A new function is one row here; where no function of the C library has its name (`library`), also
one line in templates/math.h.j2, as `<name>_`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .algebra import ONE, ZERO, is_number, multiply, negate, over
from .tree import Node, number

Slopes = Callable[..., Sequence[Node]]  # of (the call itself, *its arguments), one an argument


@dataclass(frozen=True)
class Operation:
    """One operation: how torch does it, its slopes, and what is known of its code."""

    arity: int
    torch: Callable[..., Any]
    slopes: Slopes | None = None  # None: no gradient passes, or (where) it is a choice
    finite: bool = False  # its slopes are finite, whatever its arguments
    library: bool = False  # a function of the C library, of the same name
    written: Callable[..., Node] | None = None  # in other operations: all that is known of it
    long: bool = False  # a page of code: kernels that contain many compile slowly


class _StraightThrough(torch.autograd.Function):
    """A step function with slope 1 (Bengio et al. 2013, arXiv:1308.3432), of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: torch.Tensor, function: Callable[..., Any]) -> Any:
        return function(a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing of the call is needed again."""

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Any, _: Any) -> Any:
        return tangent.clone()


class _AddGrad(torch.autograd.Function):
    """Identity forward; backward adds a number to the gradient that arrives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: torch.Tensor, extra: torch.Tensor) -> Any:
        return a.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Any, None]:
        (extra,) = ctx.saved_tensors
        return grad + extra, None


def _add_grad(a: torch.Tensor, extra: torch.Tensor) -> Any:
    return _AddGrad.apply(*torch.broadcast_tensors(a, extra.detach()))  # type: ignore[no-untyped-call]


def _straight_through(function: Callable[..., Any], library: bool = False) -> Operation:
    def straight(a: torch.Tensor) -> Any:
        return _StraightThrough.apply(a, function)  # type: ignore[no-untyped-call]

    return Operation(1, straight, lambda n, a: (ONE,), finite=True, library=library)


def _relu(a: Node) -> Node:
    """As torch.relu: slope 0 at 0, and NaN stays NaN."""
    return Node("where", (Node("<=", (a, ZERO)), ZERO, a))


def _clamp(a: Node, low: Node, high: Node) -> Node:
    """As torch.clamp: slope 1 at both ends, and NaN stays NaN."""
    above = Node("where", (Node(">", (a, high)), high, a))
    return Node("where", (Node("<", (a, low)), low, above))


def closed(node: Node, opened: Node) -> Sequence[Node]:
    """For both branches of a choice: 0 where it does not take the branch, else `opened`."""
    *condition, a, b = node.args
    if condition:
        return Node("where", (*condition, opened, ZERO)), Node("where", (*condition, ZERO, opened))
    less = "<" if node.op == "maximum" else ">"
    return [Node("where", (Node(less, pair), ZERO, opened)) for pair in ((a, b), (b, a))]


def _power_slopes(n: Node, a: Node, b: Node) -> Sequence[Node]:
    if is_number(b, 0):
        return ZERO, ZERO
    lower = number(float(b.value) - 1) if b.op == "number" else Node("-", (b, ONE))
    by_base = multiply(b, a if is_number(lower, 1) else Node("**", (a, lower)))
    if b.op != "number":  # as torch: slopes are 0, not 0 times infinity, for an exponent of 0 ...
        by_base = Node("where", (Node("==", (b, ZERO)), ZERO, by_base))
    slope = multiply(n, Node("log", (a,)))
    at_zero = Node("where", (Node(">=", (b, ZERO)), ZERO, slope))  # ... and by it for a base of 0
    by_exponent = Node("where", (Node("==", (a, ZERO)), at_zero, slope))
    return by_base, by_exponent


def _choice(node: Node, a: Node, b: Node) -> Sequence[Node]:
    """Slopes of minimum and maximum: one half each at a tie, and both 1 beside a NaN, as torch."""
    shared = Node("where", (Node("==", (a, b)), number(0.5), ONE))
    return closed(node, shared)


def _gauss(scale: float, a: Node) -> Node:
    return multiply(number(scale), Node("exp", (negate(multiply(a, a)),)))


def _page(torch: Callable[..., Any], slopes: Slopes) -> Operation:
    """A function of the C library that is a page of code."""
    return Operation(1, torch, slopes, library=True, long=True)


OPERATORS = {
    "+": Operation(2, torch.add, lambda n, a, b: (ONE, ONE), finite=True),
    "-": Operation(2, torch.sub, lambda n, a, b: (ONE, negate(ONE)), finite=True),
    "neg": Operation(1, torch.neg, lambda n, a: (negate(ONE),), finite=True),
    "*": Operation(2, torch.mul, lambda n, a, b: (b, a)),
    "/": Operation(2, torch.div, lambda n, a, b: (over(ONE, b), negate(over(n, b)))),
    "**": Operation(2, torch.pow, _power_slopes, long=True),
    "<": Operation(2, torch.lt),
    "<=": Operation(2, torch.le),
    ">": Operation(2, torch.gt),
    ">=": Operation(2, torch.ge),
    "==": Operation(2, torch.eq),
    "!=": Operation(2, torch.ne),
    "&&": Operation(2, torch.logical_and),
    "||": Operation(2, torch.logical_or),
    "!": Operation(1, torch.logical_not),
}
FUNCTIONS = {
    "exp": _page(torch.exp, lambda n, a: (n,)),
    "log": _page(torch.log, lambda n, a: (over(ONE, a),)),
    "sqrt": Operation(1, torch.sqrt, lambda n, a: (over(number(0.5), n),), library=True),
    "tanh": _page(torch.tanh, lambda n, a: (Node("-", (ONE, multiply(n, n))),)),
    "sigmoid": Operation(
        1, torch.sigmoid, lambda n, a: (multiply(n, Node("-", (ONE, n))),), long=True
    ),
    "sin": _page(torch.sin, lambda n, a: (Node("cos", (a,)),)),
    "cos": _page(torch.cos, lambda n, a: (negate(Node("sin", (a,))),)),
    "atan": _page(torch.atan, lambda n, a: (over(ONE, Node("+", (ONE, multiply(a, a)))),)),
    "erf": _page(torch.erf, lambda n, a: (_gauss(2 / math.sqrt(math.pi), a),)),
    "erfc": _page(torch.erfc, lambda n, a: (_gauss(-2 / math.sqrt(math.pi), a),)),
    "abs": Operation(1, torch.abs, lambda n, a: (Node("sign", (a,)),), finite=True),
    "sign": Operation(1, torch.sign),
    "round": _straight_through(torch.round),
    "floor": _straight_through(torch.floor, library=True),
    "relu": Operation(1, torch.relu, written=_relu),
    "clamp": Operation(3, torch.clamp, written=_clamp),
    "minimum": Operation(2, torch.minimum, _choice, finite=True),
    "maximum": Operation(2, torch.maximum, _choice, finite=True),
    "where": Operation(3, torch.where, finite=True),
    # its slope is the surrogate's: see models/block.py
    "fire": Operation(2, torch.ge, finite=True),
    # its slopes are no products: see kernels/render.py
    "add_grad": Operation(2, _add_grad, lambda n, a, b: (ONE, ZERO), finite=True),
    "detach": Operation(1, torch.Tensor.detach, finite=True),
}
OPERATIONS = OPERATORS | FUNCTIONS
LIBRARY = [name for name, function in FUNCTIONS.items() if function.library]


def is_call(node: Node) -> bool:
    """Return whether the tree calls a function, or is a power, which is one too."""
    return node.op in FUNCTIONS or node.op == "**"
