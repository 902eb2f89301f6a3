"""The equations stepped in eager PyTorch: what kernels are tested against, and the fallback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..language.functions import OPERATIONS
from ..language.tree import Node, small_power
from ..models.block import program
from ..models.model import NeuronModel
from ..models.surrogate import Surrogate
from . import layout
from .checks import arithmetic


class _Spike(torch.autograd.Function):
    """The Heaviside step forward, the surrogate's slope for all derivatives of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, theta: Tensor, strict: bool, surrogate: Surrogate) -> Tensor:
        return ((h > theta) if strict else (h >= theta)).to(h.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        h, theta, _, ctx.surrogate = inputs
        ctx.save_for_backward(h, theta)
        ctx.save_for_forward(h, theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        h, theta = ctx.saved_tensors
        slope = grad * _surrogate(ctx.surrogate, ctx.surrogate.derivative_tree, h - theta)
        return slope.sum_to_size(h.shape), -slope.sum_to_size(theta.shape), None, None

    @staticmethod
    def jvp(ctx: Any, h_tangent: Any, theta_tangent: Any, *_: Any) -> Any:
        h, theta = ctx.saved_tensors
        slope = _surrogate(ctx.surrogate, ctx.surrogate.derivative_tree, h - theta)
        moved = h_tangent if theta_tangent is None else h_tangent - theta_tangent
        return slope * moved


def _surrogate(surrogate: Surrogate, tree: Any, u: Tensor) -> Tensor:
    numbers = {name: u.new_tensor(value) for name, value in surrogate.params.items()}
    return evaluate(tree, {"u": u, **numbers}, u.new_tensor)  # type: ignore[no-any-return]


def run(
    model: NeuronModel,
    x_seq: Tensor,
    values: Mapping[str, Tensor | float],
    surrogate: Surrogate,
    reset: str,
    detach_reset: bool,
    record: Sequence[str],
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Spikes, last states and recorded sequences. `values` has every state and parameter."""
    real = arithmetic(x_seq.dtype)
    steps = program(model, reset, detach_reset)

    def as_tensor(value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(real)
        return torch.tensor(value, dtype=real, device=x_seq.device)

    known = {name: as_tensor(values[name]) for name in (*model.state, *model.params)}
    inputs = [_steps(values[name], x_seq, real) for name in model.inputs[1:]]
    known.update({z: known[z].expand(x_seq.shape[1:]) for z in model.state})
    outputs: dict[str, list[Tensor]] = {"s": [], **{name: [] for name in record}}
    for x, *others in zip(x_seq.unbind(), *inputs, strict=True):
        now = {**known, **dict(zip(model.inputs, [x.to(real), *others], strict=True))}
        for statement in steps.statements:
            if statement.expression.op != "fire":
                now[statement.target] = evaluate(statement.expression, now, as_tensor)
                continue
            h, theta = (now[str(arg.value)] for arg in statement.expression.args)
            if not surrogate.spiking:
                fired = _surrogate(surrogate, surrogate.primitive_tree, h - theta)
            else:
                h, theta = torch.broadcast_tensors(h, theta)
                fired = _Spike.apply(h, theta, model.strict, surrogate)  # type: ignore[no-untyped-call]
            now[statement.target] = fired
        known.update({z: now[last].expand(x.shape) for z, last in steps.final.items()})
        for name, sequence in outputs.items():
            value = now[steps.spikes if name == "s" else steps.held[name]]
            sequence.append(value.expand(x.shape).to(x_seq.dtype))
    # with T = 0 there is nothing to stack: the empty sequence that still has x_seq's gradient
    stacked = {name: torch.stack(s) if s else x_seq * 0 for name, s in outputs.items()}
    return stacked.pop("s"), {z: known[z].clone() for z in model.state}, stacked


def _steps(given: Any, x_seq: Tensor, real: torch.dtype) -> Sequence[Tensor]:
    """What a further input is at each step: stored as x_seq is, unless all neurons share it."""
    if not layout.shared_by_neurons(given.shape, x_seq.shape):
        given = given.to(x_seq.dtype)
    return given.to(real).expand(x_seq.shape).unbind()  # type: ignore[no-any-return]


def evaluate(node: Node, values: Mapping[str, Any], constant: Callable[[float], Any]) -> Any:
    """Evaluate with torch, one operation a node.

    `constant` makes 0-dim tensors of the arithmetic dtype from numbers, because torch may turn a
    division by a Python number into a multiplication.
    """
    return _Evaluation(constant).run(node, values)


class _Evaluation:
    """Of one expression. As in the kernels, what is read in a closed branch gets the gradient 0.

    In torch alone it gets 0 times the slopes on its way, which is NaN where one is infinite.
    """

    def __init__(self, constant: Callable[[float], Any]) -> None:
        self.constant = constant
        self.plain: dict[int, Any] = {}  # values by the id of a node, without gradients

    def run(self, node: Node, values: Mapping[str, Any]) -> Any:
        if node.op == "name":
            return values[str(node.value)]
        if node.op == "number":
            return self.constant(float(node.value))
        if node.op == "where":
            condition = self.run(node.args[0], values)
            kept = (condition, condition.logical_not())
            branches = map(self.behind, node.args[1:], kept, (values, values))
            return torch.where(condition, *branches)
        if node.op in ("minimum", "maximum") and any(map(_may_be_infinite, node.args)):
            a, b = (self.without_gradients(arg, values) for arg in node.args)
            less = torch.lt if node.op == "maximum" else torch.gt
            kept = less(a, b).logical_not(), less(b, a).logical_not()
            return OPERATIONS[node.op].torch(*map(self.behind, node.args, kept, (values, values)))
        if node.op == "sign":
            return torch.sign(self.behind(node.args[0], torch.tensor(False), values))
        return self.operation(node, [self.run(arg, values) for arg in node.args])

    def behind(self, branch: Node, kept: Tensor, values: Mapping[str, Any]) -> Any:
        """A branch whose names get the gradient 0 where it is not `kept`."""
        if _may_be_infinite(branch):
            kept = kept.to(next(iter(values.values())).device)
            names = branch.names()
            gated = {n: torch.where(kept, values[n], values[n].detach()) for n in names}
            values = {**values, **gated}
        return self.run(branch, values)

    def without_gradients(self, node: Node, values: Mapping[str, Any]) -> Any:
        if id(node) not in self.plain:
            with torch.no_grad():
                if node.args:
                    args = [self.without_gradients(arg, values) for arg in node.args]
                    self.plain[id(node)] = self.operation(node, args)
                else:
                    self.plain[id(node)] = self.run(node, values)
        return self.plain[id(node)]

    def operation(self, node: Node, args: list[Any]) -> Any:
        if small_power(node):
            return args[0] * args[0] if node.args[1].value == 2.0 else args[0] * args[0] * args[0]
        return OPERATIONS[node.op].torch(*args)


def _may_be_infinite(node: Node) -> bool:
    """Whether a slope within may be infinite or NaN."""
    if node.op == "detach":
        return False
    finite = node.op not in OPERATIONS or OPERATIONS[node.op].finite  # a name or number, else
    return not finite or any(map(_may_be_infinite, node.args))
