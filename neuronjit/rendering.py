"""From a spec to C++ text: the target's names once, then a template filled for each kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from .derivatives import add, derivative, multiply, negate
from .expressions import Node, Statement, name, needed, number
from .neurons import program
from .printing import divided_by, exact_divisions, fast_divisions, functions, to_cpp
from .source import CUDA_BLOCK, STORAGE, KernelSpec, arguments, surrogate_arguments, templates


def render_specs(specs: Sequence[KernelSpec]) -> str:
    """The source of some kernels of one target: the target's names once, then each kernel."""
    environment = _environment()
    header = environment.get_template(f"target_{specs[0].target}.h.j2").render(block=CUDA_BLOCK)
    kernel = environment.get_template("multistep.cu.j2")
    return "\n".join([header, *(_squeeze(kernel.render(_context(spec))) for spec in specs)])


@cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,  # an included header must not swallow the next line
        autoescape=False,  # C++, not HTML; only printed trees of the user's reach it
    )


def _squeeze(text: str) -> str:
    """Drop the empty lines that macros leave behind."""
    lines = text.split("\n")
    before = ["", *lines]
    return "\n".join(b for a, b in zip(before, lines, strict=False) if a.strip() or b.strip())


def _context(spec: KernelSpec) -> dict[str, Any]:
    surrogate_params = surrogate_arguments(spec)
    return {
        "spec": spec,
        "real": "double" if spec.dtype == "float64" else "float",
        "storage": STORAGE[spec.dtype],
        "fields": arguments(spec),
        "states": list(spec.model.state),
        "params": list(spec.model.params),
        "divisors": divisors(spec),
        "surrogate_params": surrogate_params,
        "smooth_params": [] if spec.spiking else surrogate_params,
        "surrogate_functions": _surrogate_functions(spec),
        "step": _step(spec),
        "adjoint": _adjoint(spec) if spec.direction == "backward" else [],
    }


def _surrogate_functions(spec: KernelSpec) -> list[dict[str, str]]:
    surrogate = spec.surrogate
    if surrogate is None:
        return []
    functions: list[tuple[str, Node, str]] = []
    if not spec.spiking and surrogate.primitive_tree:
        functions.append(("smooth_spike_", surrogate.primitive_tree, "the smooth spike"))
    if spec.direction == "backward":
        tree = surrogate.derivative_tree if spec.spiking else surrogate.smooth_derivative_tree
        functions.append(("slope_", fast_divisions(tree, ()), "ds/du"))
    comment = f"{surrogate.name}: {{}} at u = h - theta"
    return [dict(name=n, body=to_cpp(t), comment=comment.format(w)) for n, t, w in functions]


def _print_statement(spec: KernelSpec, statement: Statement) -> str:
    expression = statement.expression
    if expression.op != "fire":
        exact = exact_divisions(expression, divisors(spec))
        return f"const real {statement.target} = {to_cpp(exact)};"
    h, theta = expression.args
    if spec.spiking:
        comparison = to_cpp(Node(">" if spec.model.strict else ">=", (h, theta)))
        return f"const real s = {comparison} ? real(1) : real(0);"
    return f"const real s = {_of_distance(spec, 'smooth_spike_', h, theta)};"


def _of_distance(spec: KernelSpec, function: str, h: Node, theta: Node) -> str:
    """A function of the surrogate's, called at u = h - theta."""
    numbers = [f"sg_{p}_" for p in surrogate_arguments(spec)]
    return f"{function}({', '.join([to_cpp(Node('-', (h, theta))), *numbers])})"


@cache
def divisors(spec: KernelSpec) -> tuple[str, ...]:
    """Parameters that states are divided by at every step: threads keep their reciprocals."""
    statements = program(spec.model, spec.reset, spec.detach_reset).statements
    found = set().union(*(divided_by(s.expression) for s in statements))
    return tuple(p for p in spec.model.params if p in found)


def _step(spec: KernelSpec) -> list[str]:
    lowered = program(spec.model, spec.reset, spec.detach_reset)
    statements = needed(lowered.statements, {"s", lowered.h, *lowered.final.values()})
    read = set().union(*(s.expression.names() for s in statements)) | set(lowered.final.values())
    lines = [f"const real {z} = z_{z}_;" for z in spec.model.state if z in read]
    lines += [_print_statement(spec, s) for s in statements]
    lines += [f"z_{z}_ = {last};" for z, last in lowered.final.items() if last != z]
    return [*lines, "s_ = s;", f"h_ = {lowered.h};"]


def _adjoint(spec: KernelSpec) -> list[str]:
    """Reverse-mode differentiation, one statement at a time: d_<name>_ is the gradient of <name>.

    Every generated name is <prefix>_<name>_; names of the equations never end in _,
    so no two can meet.
    """
    lowered = program(spec.model, spec.reset, spec.detach_reset)
    terms: dict[str, list[Node]] = {}
    # each the text before an expression, the expression, and what it reads
    lines: list[tuple[str, Node | str, set[str]]] = []

    def let(target: str, value: Node) -> Node:
        gradient = f"d{target}" if target.endswith("_") else f"d_{target}_"
        lines.append((f"const real {gradient} = ", value, value.names()))
        return name(gradient)

    for z, last in lowered.final.items():
        lines.append((f"const real after_{z}_ = ", name(f"zd_{z}_"), set()))
        terms.setdefault(last, []).append(name(f"after_{z}_"))
    for given, target in (("h", lowered.h), ("s", "s")):
        if given in spec.sequences:
            terms.setdefault(target, []).append(name(f"{given}d_"))
    for statement in reversed(lowered.statements):
        arrived = terms.pop(statement.target, [])
        if not arrived:
            continue
        total = add(arrived)
        if len(arrived) > 1 or total.op != "name":
            total = let(statement.target, total)
        if statement.expression.op == "fire":
            h, theta = statement.expression.args
            fired = f"{to_cpp(total)} * {_of_distance(spec, 'slope_', h, theta)}"
            lines.append(("const real fired_ = ", fired, total.names() | h.names() | theta.names()))
            terms.setdefault(str(h.value), []).append(name("fired_"))
            terms.setdefault(str(theta.value), []).append(negate(name("fired_")))
            continue
        carried = str(total.value) if total.op == "name" else ""
        for read in sorted(statement.expression.names()):
            slope = derivative(statement.expression, read)
            part = multiply(total, slope)
            if carried.startswith("after_") and slope.names() - {"s", *spec.model.params}:
                # where no gradient arrives after the last step, 0 * inf must not make one
                part = Node("only_if", (name(carried.replace("after", "some", 1)), part))
            if part != number(0):
                terms.setdefault(read, []).append(part)
    results = [(f"zd_{z}_ = ", z) for z in spec.model.state] + [("xd_ = ", "x")]
    for before, source in [*results, *((f"pd_{p}_ += ", p) for p in spec.learned)]:
        value = add(terms.get(source, []))
        lines.append((before, value, value.names()))
    evaluated = set().union(*(functions(s.expression) for s in lowered.statements))
    # a gradient that nothing reads (of a parameter not learned, say) is not printed
    used: set[str] = set()
    kept: list[str] = []
    for before, expression, reads in reversed(lines):
        declares = before.startswith("const real ")
        if not declares or before.split()[2] in used:
            if isinstance(expression, Node):
                fast = fast_divisions(expression, divisors(spec), evaluated)
                expression = to_cpp(fast)
            kept.append(f"{before}{expression};")
            used |= reads
    recomputed = needed(lowered.statements, used)
    return [_print_statement(spec, s) for s in recomputed] + kept[::-1]
