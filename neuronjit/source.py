"""From a spec to C++ text: what one kernel is, what it is called, and how it is rendered."""

from __future__ import annotations

import hashlib
import json
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from .derivatives import add, derivative, multiply, negate
from .errors import SpecError, known
from .expressions import Node, Statement, name, needed, number
from .neurons import NeuronModel, as_model, program
from .printing import divided_by, exact_divisions, fast_divisions, to_cpp
from .surrogates import Surrogate, as_surrogate

STORAGE = {"float32": "float", "float64": "double", "float16": "half_t", "bfloat16": "bfloat16_t"}
TARGETS = ("cuda", "cpu")
DIRECTIONS = ("forward", "backward")
RESETS = ("hard", "soft", "own")
CUDA_BLOCK = 128  # threads; small, so that short rows still spread over all multiprocessors


@dataclass(frozen=True)
class KernelSpec:
    """Everything that selects one kernel. Numbers are arguments of the kernel and not in here."""

    model: NeuronModel
    target: str
    direction: str  # "forward" or "backward"
    dtype: str  # of the sequences; arithmetic is float32, or float64 for float64
    reset: str  # "hard", "soft" or "own"
    surrogate: Surrogate | None = None  # None where only the Heaviside step is needed
    spiking: bool = True
    detach_reset: bool = False
    per_neuron: tuple[str, ...] = ()  # parameters that differ between neurons
    learned: tuple[str, ...] = ()  # backward: parameters whose gradient is wanted
    # forward: recorded besides s; backward: those whose gradient arrives
    sequences: tuple[str, ...] = ()
    steps: int = 16  # K: steps between checkpoints, recomputed together
    lanes: int = 1  # neurons handled together
    loads: int = 1  # forward: rows of x on their way before the first is used
    prefetch: bool = False  # load the rows of the next steps before the current ones are used

    def __post_init__(self) -> None:
        choices = dict(target=TARGETS, direction=DIRECTIONS, dtype=STORAGE, reset=RESETS)
        for field, allowed in choices.items():
            if (given := getattr(self, field)) not in allowed:
                raise SpecError(f"unknown {field} {ascii(given)[:80]}. {known(allowed)}")

    @cached_property
    def summed(self) -> tuple[str, ...]:
        """Learned parameters that all neurons share: their gradients are summed, block by block."""
        return tuple(p for p in self.learned if p not in self.per_neuron)

    @cached_property
    def symbol(self) -> str:
        """The readable, unique name: C symbol, listing, test id."""
        parts = [self.model.name, self.direction, self.dtype, self.reset]
        parts += ["detached"] if self.detach_reset else []
        parts += [self.surrogate.name] if self.surrogate else []
        parts += [] if self.spiking else ["smooth"]
        lists = dict(per=self.per_neuron, learn=self.learned, seq=self.sequences)
        for word, names in lists.items():
            parts += [f"{word}_{'_'.join(names)}"] if names else []
        parts += [f"k{self.steps}", f"l{self.lanes}", f"r{self.loads}"]
        parts += ["ahead"] if self.prefetch else []
        return "_".join(parts)

    @cached_property
    def request(self) -> str:
        """Digest of all that decides the rendered text, found without rendering it."""
        described: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        model = self.model
        parts = model._identity[:2], [*model.state], model.params.keys(), model.strict
        described["model"] = "".join(map(repr, parts))
        described["surrogate"] = self.surrogate and repr(self.surrogate._identity)
        text = json.dumps([described, _renderer()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@cache
def _renderer() -> str:
    """Digest of the code and the templates that render: when they change, so may every text."""
    digest = hashlib.sha256(metadata.version("jinja2").encode())
    for file in ("expressions.py", "derivatives.py", "printing.py", "neurons.py", "source.py"):
        digest.update(pkgutil.get_data(__package__, file) or b"")
    for template in sorted(templates().glob("*.j2")):
        digest.update(template.name.encode() + b"\0" + template.read_bytes())
    return digest.hexdigest()


@cache
def templates() -> Path:
    """The templates: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "templates"
    return inside if inside.is_dir() else package.parent / "templates"


@dataclass(frozen=True)
class Field:
    """One member of a kernel's argument struct; `code` is its letter for `struct.Struct`."""

    ctype: str
    name: str
    code: str


def arguments(spec: KernelSpec) -> list[Field]:
    """The argument struct in the order in which a plan packs it: pointers, counts, numbers, T."""
    states, params = list(spec.model.state), list(spec.model.params)
    shared = [p for p in params if p not in spec.per_neuron]
    pointers = ["const storage* x_"]
    if spec.direction == "forward":
        pointers += ["storage* s_", *(f"storage* {n}_seq_" for n in spec.sequences)]
        pointers += [f"real* {z}_last_" for z in states] + ["real* checkpoints_"]
    else:
        pointers += ["storage* x_grad_", *(f"const storage* {n}_dseq_" for n in spec.sequences)]
        pointers += [f"const real* {z}_dlast_" for z in states]
        pointers += [f"real* {z}_grad_" for z in states] + ["const real* checkpoints_"]
        pointers += [f"real* {p}_grad_" for p in spec.learned if p in spec.per_neuron]
    pointers += ["real* partials_"]
    pointers += [f"const real* {n}_ptr_" for n in [*states, *params]]
    counts = [f"long long {p}_{w}_" for p in spec.per_neuron for w in ("inner", "count")]
    counts += ["long long N_"]
    reals = [f"real {n}_value_" for n in states + shared]
    reals += [f"real {p}_sg_" for p in surrogate_arguments(spec)]
    number_code = "d" if spec.dtype == "float64" else "f"
    text_codes = [(pointers, "Q"), (counts, "q"), (reals, number_code), (["int T_"], "i")]
    declared = [(text.rpartition(" "), code) for texts, code in text_codes for text in texts]
    return [Field(ctype, name, code) for (ctype, _, name), code in declared]


def surrogate_arguments(spec: KernelSpec) -> list[str]:
    """The surrogate's parameters, where the kernel evaluates the surrogate at all."""
    return list(spec.surrogate.params) if spec.surrogate else []


def spec_of(
    model: NeuronModel | str,
    target: str,
    direction: str,
    surrogate: Any,
    reset: str,
    detach_reset: bool,
    dtype: str,
    **options: Any,
) -> KernelSpec:
    """The spec that a call with these choices would select, its sizes apart."""
    model, surrogate = as_model(model), as_surrogate(surrogate)
    names = {f.name for f in fields(KernelSpec)}
    if unknown := options.keys() - names:
        raise SpecError(f"unknown option {sorted(unknown)}. {known(names)}")
    backward = direction == "backward"
    if backward:
        options.setdefault("sequences", ("s",))
    return KernelSpec(
        model,
        target,
        direction,
        str(dtype).removeprefix("torch."),
        "own" if model.own_reset else reset,
        surrogate=surrogate.form if backward or not surrogate.spiking else None,
        spiking=surrogate.spiking,
        detach_reset=detach_reset and backward,
        **options,
    )


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
                part = Node("where", (name(carried.replace("after", "some", 1)), part, number(0)))
            if part != number(0):
                terms.setdefault(read, []).append(part)
    results = [(f"zd_{z}_ = ", z) for z in spec.model.state] + [("xd_ = ", "x")]
    for before, source in [*results, *((f"pd_{p}_ += ", p) for p in spec.learned)]:
        value = add(terms.get(source, []))
        lines.append((before, value, value.names()))
    # a gradient that nothing reads (of a parameter not learned, say) is not printed
    used: set[str] = set()
    kept: list[str] = []
    for before, expression, reads in reversed(lines):
        declares = before.startswith("const real ")
        if not declares or before.split()[2] in used:
            if isinstance(expression, Node):
                expression = to_cpp(fast_divisions(expression, divisors(spec)))
            kept.append(f"{before}{expression};")
            used |= reads
    recomputed = needed(lowered.statements, used)
    return [_print_statement(spec, s) for s in recomputed] + kept[::-1]
