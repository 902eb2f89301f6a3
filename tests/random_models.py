"""Random models and calls, and an evaluator of their own that shares no code with the library.

A model is text; the evaluator runs it with Python's own `ast` on torch tensors, and torch's
autograd differentiates it. What is read in a branch that was not chosen is gated there, as the
language promises: it gets the gradient 0.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NUMBERS = ("0.5", "0.25", "2", "1.5", "0.1", "3", "0.9", "-0.75")


@dataclass
class Case:
    """One model and one call of it."""

    seed: int
    text: str
    state: dict[str, float]
    params: dict[str, float]
    strict: bool
    reset: str
    detach_reset: bool
    spiking: bool
    dtype: torch.dtype
    x: Tensor
    record: list[str]
    arriving: list[str]
    inputs: tuple[str, ...] = ()  # besides x; their tensors are in `given`
    initial: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)


def expression(draw: random.Random, names: list[str], depth: int) -> str:
    """Any expression of the language that reads some of `names`; values stay moderate."""

    def inner() -> str:
        return expression(draw, names, depth - 1)

    def bounded() -> str:
        return f"tanh({inner()})"

    def compared() -> str:
        return f"{inner()} {draw.choice(('<', '<=', '>', '>=', '==', '!='))} {inner()}"

    def condition() -> str:
        if draw.random() < 0.7:
            return compared()
        word = draw.choice(("and", "or", "and not", "or not"))
        return f"{draw.choice(('', 'not '))}({compared()}) {word} {compared()}"

    if depth == 0 or draw.random() < 0.15:
        return draw.choice(NUMBERS) if draw.random() < 0.2 else draw.choice(names)
    kinds: list[Callable[[], str]] = [
        lambda: f"({inner()} {draw.choice('+-')} {inner()})",
        lambda: f"({inner()} {draw.choice('+-')} {inner()})",
        lambda: f"({draw.choice(NUMBERS)} * {inner()})",
        lambda: f"({bounded()} * {inner()})",
        lambda: f"({inner()} / {draw.choice(('2', '1.5', '(2 + sin(' + inner() + '))'))})",
        lambda: f"-{inner()}",
        lambda: f"{draw.choice(('tanh', 'sigmoid', 'sin', 'cos', 'atan', 'erf'))}({inner()})",
        lambda: f"{draw.choice(('abs', 'sign', 'detach'))}({inner()})",
        lambda: f"exp({bounded()})",
        lambda: f"log(1.5 + {bounded()})",
        lambda: f"sqrt({draw.choice(('maximum(' + inner() + ', 0)', 'abs(' + inner() + ')'))})",
        lambda: f"{bounded()}**{draw.choice(('2', '3'))}",
        lambda: f"maximum({inner()}, 0)**{draw.choice(('0.5', '1.5', '2'))}",
        lambda: f"(1.5 + {bounded()})**{draw.choice(('0.5', '-1', bounded()))}",
        lambda: f"{draw.choice(('minimum', 'maximum'))}({inner()}, {inner()})",
        lambda: f"where({condition()}, {inner()}, {inner()})",
        lambda: f"relu({inner()})",
        lambda: f"fire({inner()}, {draw.choice((*NUMBERS, inner()))})",
        lambda: f"clamp({inner()}, {draw.choice(('-0.5', '0'))}, {draw.choice(('1', '0.75'))})",
        lambda: f"{draw.choice(('round', 'floor'))}({draw.choice(NUMBERS)} * {inner()})",
        lambda: "where({0} > 0, sqrt({0}), {1})".format(draw.choice(names), inner()),
    ]
    return draw.choice(kinds)()


def model(
    draw: random.Random,
) -> tuple[str, tuple[str, ...], dict[str, float], dict[str, float]]:
    """The equations, inputs besides x, states and parameters."""
    states = ["v", "w", "r2", "z"][: draw.randint(1, 4)]
    params = ["tau", "a", "b", "c"][: draw.randint(0, 4)]
    numbers = dict(zip(params, (1.75, 0.5, -0.25, 1.0), strict=False))
    inputs = ("skip", "gain")[: draw.choice((0, 0, 1, 2))]
    known = ["x", *inputs, *states, *params]
    lines = []
    for i in range(draw.randint(0, 2)):
        lines.append(f"y{i} = {expression(draw, known, 3)}")
        known.append(f"y{i}")
    for z in draw.sample(states[1:], draw.randint(0, len(states) - 1)):
        lines += [f"{z} = 0.5 * {z} + tanh({expression(draw, known, 2)})"]
    divided = f"({expression(draw, known, 3)}) / tau" if "tau" in params else "x"
    charge = draw.choice(("x", "x + 0.5 * w" if "w" in states else "x", f"0.5 * {known[-1]} + x"))
    charge = " + ".join([charge, *(f"0.25 * {name}" for name in inputs)])
    lines.append(f"h = 0.5 * v + {charge} + tanh({divided}) * {draw.choice(('1', '0.5'))}")
    known.append("h")
    if draw.random() < 0.3:
        lines.append(f"theta = v_threshold + 0.1 * tanh({expression(draw, known, 1)})")
    if draw.random() < 0.2:
        own = ("fire(h, theta) - fire(-h, theta)", "fire(h, theta) * (1 + fire(h, 1.5))",
               "round(clamp(h / theta, 0, 3))", "0.5 * fire(h - 0.25, theta)")  # fmt: skip
        lines.append(f"s = {draw.choice(own)}")
    known += ["s", "v_threshold", "v_reset"]
    for z in [z for z in states[1:] if draw.random() < 0.6]:
        lines += [f"{z} = 0.75 * {z} + 0.5 * tanh({expression(draw, known, 2)})"]
    if draw.random() < 0.25:
        lines.append(f"v = h - s * {draw.choice(('theta', 'tanh(h)', '0.5'))}")
    if draw.random() < 0.2:
        lines.append(f"y = {draw.choice(('s * relu(h)', 's + x', 'h', 's * tanh(x)'))}")
    start = {z: draw.choice((0.0, 0.25, -0.5)) for z in states}
    return "\n".join(lines), inputs, start, numbers


def numbers(draw: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of which some lie exactly on kinks."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    kinks = torch.tensor([0.0, 1.0, 0.5, -0.0, -1.0], dtype=torch.float64)
    at = kinks[torch.randint(5, shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.15, at, values).to(dtype)


def case(seed: int) -> Case:
    """The model and call of a seed."""
    draw = random.Random(seed)
    text, inputs, state, params = model(draw)
    dtype = draw.choice((torch.float64, torch.float64, torch.float32))
    shape = draw.choice(((5,), (13,), (3, 7), (2, 3, 5), (1,), (4, 3, 3)))
    steps = draw.choice((0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 40))
    x = numbers(draw, (steps, *shape), dtype)
    layout = draw.choice(("plain", "plain", "permuted", "gaps"))
    if layout == "permuted":
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    elif layout == "gaps":
        x = torch.stack([x, x], -1)[..., 0]
    reset = draw.choice(("hard", "soft"))
    targets = dict.fromkeys(line.split(" = ")[0] for line in text.splitlines())
    assigned = [n for n in targets if n not in (*state, "h", "s", "y")]
    made = Case(
        seed, text, state, params, draw.random() < 0.3, reset, draw.random() < 0.3,
        draw.random() < 0.6, dtype, x.requires_grad_(draw.random() < 0.85),
        draw.sample([*state, "h", *assigned], draw.randint(0, len(state) + 1)), [], inputs,
    )  # fmt: skip
    outputs = ["s", *(f"{z}_last" for z in state), *(f"{n}_seq" for n in made.record)]
    made.arriving = draw.sample(outputs, draw.randint(1, len(outputs)))
    for z in state:
        if (kind := draw.random()) < 0.4:
            made.initial[z] = (numbers(draw, shape, dtype) * 0.5).requires_grad_(kind < 0.25)
        elif kind < 0.5:
            made.initial[z] = draw.choice((0.5, 0.0, -0.25))
    for name, value in draw.sample([*params.items(), ("v_threshold", 0.75), ("v_reset", 0.25)],
                                   len(params) + 2):  # fmt: skip
        kind = draw.choice(("default", "number", "one", "channel", "neuron", "half"))
        if kind == "default":
            continue
        if kind == "number":
            made.given[name] = value + draw.choice((0.0, 0.25, -0.0625))
            continue
        sizes = {
            "one": draw.choice(((), (1,))),
            "channel": (shape[0], *(1 for _ in shape[1:])),
            "neuron": shape,
            "half": (shape[-1],),
        }
        noise = torch.rand(
            sizes[kind], dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        tensor = (value + 0.25 * noise).to(dtype)
        made.given[name] = tensor.requires_grad_(draw.random() < 0.6)
    for name in inputs:
        padded = (steps, *(1 for _ in shape))
        size = draw.choice(((steps, *shape), (steps, *shape), padded, shape, (1,)))
        tensor = numbers(draw, size, draw.choice((dtype, torch.float32)))
        made.given[name] = tensor.requires_grad_(draw.random() < 0.7)
    return made


# --- the evaluator --------------------------------------------------------------------------------

_COMPARE = {
    ast.Lt: torch.lt, ast.LtE: torch.le, ast.Gt: torch.gt, ast.GtE: torch.ge,
    ast.Eq: torch.eq, ast.NotEq: torch.ne,
}  # fmt: skip
_OPERATORS = {
    ast.Add: torch.add, ast.Sub: torch.sub, ast.Mult: torch.mul, ast.Div: torch.div,
}  # fmt: skip


def gated(values: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    return {n: torch.where(kept, v, v.detach()) for n, v in values.items()}


def evaluate(
    node: ast.expr,
    values: dict[str, Tensor],
    real: torch.dtype,
    spike: Callable[[Tensor], Tensor],
) -> Tensor:
    def go(node: ast.expr, values: dict[str, Tensor] = values) -> Tensor:
        return evaluate(node, values, real, spike)

    match node:
        case ast.Constant(value=value):
            return torch.tensor(float(value), dtype=real)
        case ast.Name(id=name):
            return values[name]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~go(operand)
        case ast.UnaryOp(operand=operand):
            return -go(operand)
        case ast.BoolOp(op=op, values=parts):
            both = torch.stack(torch.broadcast_tensors(*map(go, parts)))
            return both.all(0) if isinstance(op, ast.And) else both.any(0)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base = go(left)
            if isinstance(right, ast.Constant) and right.value in (2, 3):
                return base * base if right.value == 2 else base * base * base
            return torch.pow(base, go(right))
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](go(left), go(right))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _COMPARE[type(op)](go(left), go(right))
        case ast.Call(func=ast.Name(id="where"), args=[condition, a, b]):
            kept = go(condition)
            return torch.where(kept, go(a, gated(values, kept)), go(b, gated(values, ~kept)))
        case ast.Call(func=ast.Name(id="minimum" | "maximum" as f), args=[a, b]):
            with torch.no_grad():
                less = go(a) < go(b)
                more = go(a) > go(b)
            if f == "minimum":
                less, more = more, less
            return getattr(torch, f)(go(a, gated(values, ~less)), go(b, gated(values, ~more)))
        case ast.Call(func=ast.Name(id="fire"), args=[a, b]):
            return spike(go(a) - go(b))
        case ast.Call(func=ast.Name(id="relu"), args=[a]):
            kept = go(a) > 0
            return torch.where(kept, go(a, gated(values, kept)), 0.0)
        case ast.Call(func=ast.Name(id="clamp"), args=[a, low, high]):
            kept = (go(a) >= go(low)) & (go(a) <= go(high))
            ends = torch.where(go(a) < go(low), go(low), go(high))
            return torch.where(kept, go(a, gated(values, kept)), ends)
        case ast.Call(func=ast.Name(id="round" | "floor" as f), args=[a]):
            inner = go(a)
            return getattr(torch, f)(inner).detach() + (inner - inner.detach())
        case ast.Call(func=ast.Name(id="detach"), args=[a]):
            return go(a).detach()
        case ast.Call(func=ast.Name(id="sign"), args=[a]):
            return go(a).detach().sign()
        case ast.Call(func=ast.Name(id=f), args=[a]):
            return getattr(torch, f)(go(a))
    raise AssertionError(ast.dump(node))


class Fire(torch.autograd.Function):
    """The step function with the slope of the arc tangent, alpha = 2."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, strict: bool) -> Tensor:
        ctx.save_for_backward(u)
        return ((u > 0) if strict else (u >= 0)).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return grad / (1 + (torch.pi * u) ** 2), None


def run(case: Case, x: Tensor, initial: dict[str, Any], given: dict[str, Any]) -> dict[str, Tensor]:
    """Every output by name, and "u": the distances to the nearest threshold."""
    real, shape = x.dtype, x.shape[1:]

    def tensor(value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=real)

    v_reset = 0.0
    defaults = {"v_threshold": 1.0, "v_reset": v_reset, **case.params}
    params = {n: tensor(v) for n, v in {**defaults, **given}.items() if n not in case.inputs}
    inputs = {n: given[n].to(real).expand(x.shape) for n in case.inputs}
    states = {z: tensor({**case.state, **initial}[z]).expand(shape) for z in case.state}
    block = [(s.targets[0].id, s.value) for s in ast.parse(case.text).body]  # type: ignore
    own, own_s, own_y = (any(target == n for target, _ in block) for n in ("v", "s", "y"))
    others = [n for n in case.record if n not in ("h", *states)]
    seen: dict[str, list[Tensor]] = {n: [] for n in ("s", "u", "h", *states, *others)}
    for t, now in enumerate(x):
        values = {**params, **states, "x": now, "theta": params["v_threshold"]}
        values |= {n: sequence[t] for n, sequence in inputs.items()}
        distances: list[Tensor] = []

        def spike(u: Tensor, distances: list[Tensor] = distances) -> Tensor:
            distances.append(u.detach().expand(shape))
            if case.spiking:
                return Fire.apply(u, case.strict)  # type: ignore[no-any-return]
            return torch.atan(torch.pi * u) / torch.pi + 0.5

        def reset(values: dict[str, Tensor]) -> None:
            cut = values["s"].detach() if case.detach_reset else values["s"]
            if not own and case.reset == "hard":
                values["v"] = values["h"] * (1 - cut) + values["v_reset"] * cut
            elif not own:
                values["v"] = values["h"] - cut * values["theta"]

        for target, value in block:
            if not (own_s or "s" in values) and any(
                isinstance(n, ast.Name) and n.id == "s" for n in ast.walk(value)
            ):
                values["s"] = spike(values["h"] - values["theta"])
                reset(values)
            read = values
            if target == "v" and case.detach_reset:
                read = {**values, "s": values["s"].detach()}
            values[target] = evaluate(value, read, real, spike)
            if target == "s":
                reset(values)
        if "s" not in values:
            values["s"] = spike(values["h"] - values["theta"])
            reset(values)
        distances.append(torch.full(shape, torch.inf, dtype=real))
        states = {z: values[z].expand(shape) for z in states}
        seen["u"].append(torch.stack(distances).abs().nan_to_num(torch.inf).amin(0))
        for n in seen:
            if n != "u":
                held = values["y" if n == "s" and own_y else n]
                seen[n].append(held.expand(shape))
    stacked = {n: torch.stack(q) if q else x.new_zeros(x.shape) for n, q in seen.items()}
    return {
        "s": stacked["s"], "u": stacked["u"], **{f"{z}_last": states[z] for z in states},
        **{f"{n}_seq": stacked[n] for n in case.record},
    }  # fmt: skip
