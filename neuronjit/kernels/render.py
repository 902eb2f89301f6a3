"""From a spec to C++ text: the target's names once, then a template filled for each kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, reduce
from typing import Any

from ..language.algebra import add, multiply, negate
from ..language.calculus import derivative, split_choices
from ..language.cpp import divided_by, exact_divisions, fast_divisions, functions, to_cpp
from ..language.functions import LIBRARY
from ..language.tree import Node, Statement, name, needed, number
from ..models.block import program
from .spec import CUDA_BLOCK, DTYPES, KernelSpec, arguments, surrogate_arguments, templates

# a GPU's division takes ten times as long as a product; a CPU's is hidden behind the memory
KEEP_RECIPROCALS = ("cuda",)


def render_specs(specs: Sequence[KernelSpec]) -> str:
    """The source of some kernels of one target: the target's names once, then each kernel."""
    environment = _environment()
    header = environment.get_template(f"target_{specs[0].target}.h.j2").render(
        block=CUDA_BLOCK, library=LIBRARY
    )
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
        "real": DTYPES[spec.dtype].real,
        "storage": DTYPES[spec.dtype].storage,
        "fields": arguments(spec),
        "states": list(spec.model.state),
        "params": list(spec.model.params),
        "divisors": divisors(spec),
        "surrogate_params": surrogate_params,
        "smooth_params": [] if spec.spiking else surrogate_params,
        "surrogate_functions": _surrogate_functions(spec),
        "step": _step(spec),
        **(_adjoint(spec) if spec.direction == "backward" else {}),
    }


def _surrogate_functions(spec: KernelSpec) -> list[dict[str, str]]:
    surrogate = spec.surrogate
    if surrogate is None:
        return []
    functions: list[tuple[str, Node, str]] = []
    if not spec.spiking and surrogate.primitive_tree:
        functions.append(("smooth_spike_", surrogate.primitive_tree, "the smooth spike"))
    if spec.spiking and spec.direction == "backward":
        functions.append(("slope_", fast_divisions(surrogate.derivative_tree, ()), "ds/du"))
    comment = f"{surrogate.name}: {{}} at u = h - theta"
    return [dict(name=n, body=to_cpp(t), comment=comment.format(w)) for n, t, w in functions]


def _print_statement(spec: KernelSpec, statement: Statement) -> str:
    expression = statement.expression
    if expression.op != "fire":
        exact = exact_divisions(expression, divisors(spec))
        return f"const real {statement.target} = {to_cpp(exact)};"
    if spec.spiking:
        comparison = to_cpp(Node(">" if spec.model.strict else ">=", expression.args))
        return f"const real s = {comparison} ? real(1) : real(0);"
    return f"const real s = {to_cpp(Node('smooth_spike', _distance(spec, *expression.args)))};"


def _distance(spec: KernelSpec, h: Node, theta: Node) -> tuple[Node, ...]:
    """The arguments of the surrogate's functions: u = h - theta, and its numbers."""
    return Node("-", (h, theta)), *(name(f"sg_{p}_") for p in surrogate_arguments(spec))


@cache
def divisors(spec: KernelSpec) -> tuple[str, ...]:
    """Parameters that states are divided by at every step, where threads keep their reciprocals."""
    if spec.target not in KEEP_RECIPROCALS:
        return ()
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


ALWAYS = "always"


def _adjoint(spec: KernelSpec) -> dict[str, Any]:
    """Reverse-mode differentiation, one statement at a time: d_<name>_ is the gradient of <name>.

    A gradient exists where a path leads to it from a gradient that arrives. Where none does, it is
    0, and 0 times an infinite slope must not make a NaN of it. Sequences' gradients arrive at every
    step, those of states after the last step in some calls only: `some_<z>_` says so for a state.

    Every generated name is <prefix>_<name>_; names of the equations never end in _,
    so no two can meet.
    """
    lowered = program(spec.model, spec.reset, spec.detach_reset)
    statements = split_choices(_smooth(spec, lowered.statements))
    terms: dict[str, list[Node]] = {}
    # by which gradients one exists: ALWAYS, or those of states after the step
    exists: dict[str, set[str]] = {}
    # each the text before an expression, the expression, and what it reads
    lines: list[tuple[str, Node]] = []

    def arrive(target: str, gradient: Node, by: set[str]) -> None:
        terms.setdefault(target, []).append(gradient)
        exists.setdefault(target, set()).update(by)

    def let(target: str, value: Node) -> Node:
        gradient = f"d{target}" if target.endswith("_") else f"d_{target}_"
        lines.append((f"const real {gradient} = ", value))
        return name(gradient)

    def guarded(part: Node, slope: Node, by: set[str]) -> Node:
        """The part of a gradient that may not exist, through a slope that may be infinite."""
        if ALWAYS in by or not slope.names() - {"s"}:
            return part
        some = [name(f"some_{z}_") for z in spec.model.state if z in by]
        return Node("only_if", (reduce(lambda a, b: Node("||", (a, b)), some), part))

    for z, last in lowered.final.items():
        lines.append((f"const real after_{z}_ = ", name(f"zd_{z}_")))
        arrive(last, name(f"after_{z}_"), {ALWAYS if z in spec.sequences else z})
    for given, target in (("h", lowered.h), ("s", "s")):
        if given in spec.sequences:
            arrive(target, name(f"{given}d_"), {ALWAYS})
    for statement, gate in reversed(statements):
        arrived = terms.pop(statement.target, [])
        if not arrived:
            continue
        total, by = add(arrived), exists.pop(statement.target)
        if len(arrived) > 1 or total.op != "name":
            total = let(statement.target, total)
        if statement.expression.op == "fire":
            h, theta = statement.expression.args
            slope = Node("slope", _distance(spec, h, theta))
            lines.append(("const real fired_ = ", guarded(multiply(total, slope), slope, by)))
            arrive(str(h.value), name("fired_"), by)
            arrive(str(theta.value), negate(name("fired_")), by)
            continue
        for read in sorted(statement.expression.names()):
            slope = derivative(statement.expression, read)
            part = multiply(total, slope)
            if gate:
                part = Node("where", (Node("==", (name(gate), number(0))), number(0), part))
            if slope != number(0):
                arrive(read, guarded(part, slope, by), by)
    results = [(f"zd_{z}_ = ", z) for z in spec.model.state] + [("xd_ = ", "x")]
    for before, source in [*results, *((f"pd_{p}_ += ", p) for p in spec.learned)]:
        lines.append((before, add(terms.get(source, []))))
    evaluated = set().union(*(functions(s.expression) for s, _ in statements))
    # a gradient that nothing reads (of a parameter not learned, say) is not printed
    used: set[str] = set()
    kept: list[str] = []
    for before, expression in reversed(lines):
        declares = before.startswith("const real ")
        if not declares or before.split()[2] in used:
            kept.append(f"{before}{to_cpp(fast_divisions(expression, divisors(spec), evaluated))};")
            used |= expression.names()
    recomputed = needed([s for s, _ in statements], used)
    printed = [_print_statement(spec, s) for s in recomputed] + kept[::-1]
    return {"adjoint": printed, "exists": _existing(spec, exists)}


def _existing(spec: KernelSpec, exists: dict[str, set[str]]) -> list[str]:
    """Statements that find which gradients of states exist before a step, from those after it."""
    found, later = [], []
    for z in spec.model.state:
        by = exists.get(z, set())
        some = [f"some_{other}_" for other in spec.model.state if other in by]
        value = "true" if ALWAYS in by else " || ".join(some) or "false"
        if z in spec.sequences or value == f"some_{z}_":
            continue
        if value in ("true", "false"):
            later.append(f"some_{z}_ = {value};")
        else:
            found.append(f"const bool before_{z}_ = {value};")
            later.append(f"some_{z}_ = before_{z}_;")
    return found + later


def _smooth(spec: KernelSpec, statements: Sequence[Statement]) -> list[Statement]:
    """With the smooth spike's own equation in place of the spike, where the output is smooth."""
    if spec.spiking or spec.surrogate is None or spec.surrogate.primitive_tree is None:
        return list(statements)
    written: list[Statement] = []
    for statement in statements:
        if statement.expression.op != "fire":
            written.append(statement)
            continue
        names = {p: name(f"sg_{p}_") for p in surrogate_arguments(spec)}
        smooth = spec.surrogate.primitive_tree.substitute({**names, "u": name("u_")})
        distance = Node("-", statement.expression.args)
        written += [Statement("u_", distance, 0), Statement("s", smooth, 0)]
    return written
