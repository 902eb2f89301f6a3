"""From a spec to C++ text: the target's names once, then a template filled for each kernel.

What is printed of a kernel are its sizes, its arguments and its step; templates/walk.h has the
loops. Within a step, names that end in _ are ours, and all others the equations'.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, reduce
from typing import Any, NamedTuple

from ..language.algebra import add, multiply, negate
from ..language.calculus import slopes, split_choices
from ..language.cpp import approximate, exact_divisions, functions, kept_of, to_cpp
from ..language.functions import LIBRARY
from ..language.parse import plain
from ..language.tree import Node, Statement, name, needed, number
from ..models.block import RESETS, program
from . import targets
from .helpers import HelperSpec
from .spec import DTYPES, KernelSpec, templates

WIDTH = 120  # of a rendered line


def render_specs(specs: Sequence[KernelSpec]) -> str:
    """The source of some kernels of one target: the target's names once, then each kernel."""
    header = _header(specs[0].target)
    walk = (templates() / "walk.h").read_text("ascii")
    kernel = _environment().get_template("kernel.cu.j2")
    texts = [kernel.render(_context(spec), entry=header.entry) for spec in specs]
    return "\n".join([f"{header}{walk}", *map(_tidy, texts)])


def render_helper(spec: HelperSpec) -> str:
    """The source of a kernel that is no neuron's."""
    row, header = DTYPES[spec.dtype], _header(spec.target)
    text = _environment().get_template(spec.template).render(
        asdict(spec), symbol=spec.symbol, storage=row.storage, real=row.real, entry=header.entry,
        block=targets.by_name(spec.target).BLOCK,
    )  # fmt: skip
    return f"{header}{_tidy(text)}"


def _header(target: str) -> Any:
    """What all kernels of a target use."""
    template = _environment().get_template(f"target_{target}.h.j2")
    return template.make_module(dict(block=targets.by_name(target).BLOCK, library=LIBRARY))


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


def _tidy(text: str) -> str:
    """Lines of at most WIDTH characters, as far as names allow: C++ may be cut at any space."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        comment = line.lstrip().startswith("//")
        if len(line) > WIDTH and (comment or "//" not in line):
            further = f"{indent}//     " if comment else f"{indent}    "
            lines += textwrap.wrap(
                line, WIDTH, subsequent_indent=further, break_long_words=False,
                break_on_hyphens=False,
            )  # fmt: skip
        else:
            lines.append(line)
    return "\n".join([*lines, ""])


def _context(spec: KernelSpec) -> dict[str, Any]:
    dtype, backward = DTYPES[spec.dtype], spec.direction == "backward"
    return {
        "spec": spec,
        "title": spec.symbol.replace("_", " "),
        "equations": _equations(spec),
        "real": dtype.real,
        "storage": dtype.storage,
        "sizes": {
            "LANES": spec.lanes,
            "K": spec.interval,
            "LOADS": spec.loads,
            "INPUTS": len(spec.inputs),
            "PER_STEP": len(spec.per_step),
            "SEQUENCES": len(spec.inputs) + len(spec.arriving),
            "OUTPUTS": len(spec.outputs),
            "STATES": len(spec.model.state),
            "SHARED": len(spec.shared),
            "SHARED_DIVISORS": len(spec.divisors.intersection(spec.shared)),
            "EACH": len(spec.each),
            "EACH_DIVISORS": len(spec.divisors.intersection(spec.each)),
            "SURROGATE": len(spec.numbers_of_surrogate),
            "EACH_LEARNED": len(spec.each_learned),
            "SUMS": len(spec.summed),
        },
        "facts": {
            "FORWARD": not backward,
            "AHEAD": spec.prefetch,
            "WHOLE": spec.whole,
            "BY_CHANNEL": spec.by_channel,
        },
        "surrogate_functions": _surrogate_functions(spec),
        "step": _step(spec),
        **(_adjoint(spec) if backward else {}),
    }


def _equations(spec: KernelSpec) -> list[str]:
    """The model as its author wrote it, and what it leaves out."""
    model = spec.model
    assigned = {statement.target for statement in model.statements}
    said = [] if "theta" in assigned else ["theta = v_threshold"]
    said += [] if "s" in assigned else [f"s = h {'>' if model.strict else '>='} theta"]
    lines = [*plain(model.equations), *([f"it fires: {'; '.join(said)}"] if said else [])]
    if spec.reset in RESETS:
        lines.append(f"reset ({spec.reset}): {RESETS[spec.reset]}")
    return lines


def _surrogate_functions(spec: KernelSpec) -> list[dict[str, str]]:
    surrogate = spec.surrogate
    if surrogate is None:
        return []
    functions: list[tuple[str, Node, str]] = []
    if not spec.spiking and surrogate.primitive_tree:
        functions.append(("smooth_spike_", surrogate.primitive_tree, "the smooth spike"))
    if spec.spiking and spec.direction == "backward":
        functions.append(("slope_", approximate(surrogate.derivative_tree, ()), "ds/du"))
    comment = f"{surrogate.name}: {{}} at u = h - theta"
    return [dict(name=n, body=to_cpp(t), comment=comment.format(w)) for n, t, w in functions]


class _Line(NamedTuple):
    """A line of a step: `const real s = `, and an expression."""

    before: str
    value: Node

    @property
    def declared(self) -> str | None:
        """The name that it declares, if it declares one."""
        return self.before.split()[2] if self.before.startswith("const real ") else None


def _let(target: str, value: Node) -> _Line:
    return _Line(f"const real {target} = ", value)


def _own(prefix: str, target: str) -> str:
    """A name that belongs to `target` alone: names of the equations never end in _, ours do."""
    return f"{prefix}{target}" if target.endswith("_") else f"{prefix}_{target}_"


def _evaluated(spec: KernelSpec, statement: Statement) -> _Line:
    """A statement of the step, with the values that eager PyTorch gives."""
    expression = statement.expression
    if expression.op == "add_grad":
        return _let(statement.target, expression.args[0])
    if expression.op != "fire":
        return _let(statement.target, exact_divisions(expression, spec.divisors))
    if spec.spiking:
        fires = Node(">" if spec.model.strict else ">=", expression.args)
        return _let(statement.target, Node("where", (fires, number(1), number(0))))
    return _let(statement.target, Node("smooth_spike", _distance(spec, *expression.args)))


def _distance(spec: KernelSpec, h: Node, theta: Node) -> tuple[Node, ...]:
    """The arguments of the surrogate's functions: u = h - theta, and its numbers."""
    return Node("-", (h, theta)), *(name(f"sg_{p}_") for p in spec.numbers_of_surrogate)


def _printed(spec: KernelSpec, lines: Sequence[_Line]) -> list[str]:
    """The lines, after declarations of what they read of arguments."""
    read = {n.partition(".")[0] for line in lines for n in line.value.names()}
    found = []
    for kind, sources in _sources(spec).items():
        named = [f"{n}~=~{source}" for n, source in sources.items() if n in read]
        # cut where one of them ends
        cut = textwrap.wrap(f", {kind[1]}".join(named), WIDTH - 20, break_long_words=False)
        lines_of = "\n        ".join(cut).replace("~", " ")
        found += [f"{kind[0]} {kind[1]}{lines_of};"] if named else []
    return [*found, *(f"{before}{to_cpp(value)};" for before, value in lines)]


def _sources(spec: KernelSpec) -> dict[tuple[str, str], dict[str, str]]:
    """Where a step finds what it reads, by the type as which it is declared."""
    reals = {n: f"in_[{i}][l_]" for i, n in enumerate(spec.inputs)}
    reals |= {z: f"z_[{i}][l_]" for i, z in enumerate(spec.model.state)}
    kept = {}
    for group, lane in (("shared", ""), ("each", "[l_]")):
        for i, p in enumerate(getattr(spec, group)):
            reals[p] = f"p_.{group}[{i}]{lane}"
            kept[kept_of(name(p))] = f"p_.{group}_divisor[{i}]{lane}"
    reals |= {f"sg_{p}_": f"p_.surrogate[{i}]" for i, p in enumerate(spec.numbers_of_surrogate)}
    some = {f"some_{z}_": f"some_[{i}]" for i, z in enumerate(spec.model.state)}
    return {("const real", ""): reals, ("const auto", "&"): kept, ("const bool", ""): some}


def _step(spec: KernelSpec) -> list[str]:
    lowered = program(spec.model, spec.reset, spec.detach_reset)
    ends = [
        _Line(f"z_[{i}][l_] = ", name(last))
        for i, (z, last) in enumerate(lowered.final.items())
        if last != z
    ]
    if spec.direction == "forward":
        outputs = (lowered.spikes, *(lowered.held[n] for n in spec.record))
        ends += [_Line(f"out_[{i}][l_] = ", name(n)) for i, n in enumerate(outputs)]
    wanted = set().union(*(line.value.names() for line in ends))
    statements = needed(lowered.statements, wanted)
    return _printed(spec, [*(_evaluated(spec, s) for s in statements), *ends])


ALWAYS = "always"


def _adjoint(spec: KernelSpec) -> dict[str, Any]:
    """Reverse-mode differentiation, one statement at a time: d_<name>_ is the gradient of <name>.

    It reads the gradients of the states after the step in d_.z, and leaves there those before it.

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
    lines: list[_Line] = []
    place = enumerate(spec.arriving, len(spec.inputs))
    arriving = {n: name(f"in_[{i}][l_]") for i, n in place}

    def arrive(target: str, gradient: Node, by: set[str]) -> None:
        terms.setdefault(target, []).append(gradient)
        exists.setdefault(target, set()).update(by)

    def let(target: str, value: Node) -> Node:
        gradient = _own("d", target)
        lines.append(_let(gradient, value))
        return name(gradient)

    def guarded(part: Node, slope: Node, by: set[str]) -> Node:
        """The part of a gradient that may not exist, through a slope that may be infinite."""
        if ALWAYS in by or not slope.names() - {"s"}:
            return part
        some = [name(f"some_{z}_") for z in spec.model.state if z in by]
        return Node("only_if", (reduce(lambda a, b: Node("||", (a, b)), some), part))

    for i, (z, last) in enumerate(lowered.final.items()):
        after = name(f"d_.z[{i}][l_]")
        arrived = Node("+", (after, arriving[z])) if z in spec.arriving else after
        lines.append(_let(f"after_{z}_", arrived))
        arrive(last, name(f"after_{z}_"), {ALWAYS if z in spec.arriving else z})
    for given in reversed(spec.arriving):
        if given not in spec.model.state:
            lines.append(_let(f"given_{given}_", arriving[given]))
            target = lowered.spikes if given == "s" else lowered.held[given]
            arrive(target, name(f"given_{given}_"), {ALWAYS})
    for statement, gate in reversed(statements):
        parts = terms.pop(statement.target, [])
        if statement.expression.op == "add_grad":  # at every step, whatever arrives
            of, extra = statement.expression.args
            arrive(str(of.value), extra, {ALWAYS})
        if not parts:
            continue
        total, by = add(parts), exists.pop(statement.target)
        if len(parts) > 1 or total.op != "name":
            total = let(statement.target, total)
        if statement.expression.op == "fire":
            h, theta = statement.expression.args
            slope = Node("slope", _distance(spec, h, theta))
            fired = _own("fired", statement.target)
            lines.append(_let(fired, guarded(multiply(total, slope), slope, by)))
            arrive(str(h.value), name(fired), by)
            arrive(str(theta.value), negate(name(fired)), by)
            continue
        for read, slope in slopes(statement.expression):
            part = multiply(total, slope)
            if gate:
                part = Node("where", (Node("==", (name(gate), number(0))), number(0), part))
            arrive(read, guarded(part, slope, by), by)
    results = {z: f"d_.z[{i}][l_] = " for i, z in enumerate(spec.model.state)}
    results |= {n: f"out_[{i}][l_] = " for i, n in enumerate(spec.outputs)}
    for i, p in enumerate((*spec.each_learned, *spec.summed)):
        results[p] = f"d_.learned[{i}][l_] += "
    lines += [_Line(before, add(terms.get(source, []))) for source, before in results.items()]
    evaluated = set().union(*(functions(s.expression) for s, _ in statements))
    # a gradient that nothing reads (of a parameter not learned, say) is not printed
    used: set[str] = set()
    kept: list[_Line] = []
    for line in reversed(lines):
        if line.declared is None or line.declared in used:
            kept.append(_Line(line.before, approximate(line.value, spec.divisors, evaluated)))
            used |= line.value.names()
    recomputed = [_evaluated(spec, s) for s in needed([s for s, _ in statements], used)]
    return {
        "adjoint": _printed(spec, [*recomputed, *reversed(kept)]),
        "exists": _existing(spec, exists),
    }


def _existing(spec: KernelSpec, exists: dict[str, set[str]]) -> list[str]:
    """Statements that find which gradients of states exist before a step, from those after it."""
    at = {z: f"some_[{i}]" for i, z in enumerate(spec.model.state)}
    found, later = [], []
    for z, some in at.items():
        by = exists.get(z, set())
        others = [at[other] for other in at if other in by]
        value = "true" if ALWAYS in by else " || ".join(others) or "false"
        if z in spec.arriving or value == some:
            continue
        if value in ("true", "false"):
            later.append(f"{some} = {value};")
        else:
            found.append(f"const bool before_{z}_ = {value};")
            later.append(f"{some} = before_{z}_;")
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
        names = {p: name(f"sg_{p}_") for p in spec.numbers_of_surrogate}
        u = _own("u", statement.target)
        smooth = spec.surrogate.primitive_tree.substitute({**names, "u": name(u)})
        distance = Node("-", statement.expression.args)
        written += [Statement(u, distance, 0), Statement(statement.target, smooth, 0)]
    return written
