"""What a model does, to read: its equations as they run, their derivatives, what kernels move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from .errors import BackendError
from .export import specs_of
from .kernels import targets
from .kernels.render import render_specs
from .kernels.spec import DIRECTIONS, KernelSpec
from .kernels.targets import TARGETS
from .language.algebra import add, multiply, negate
from .language.calculus import derivative, slopes
from .language.mathematics import aligned, to_latex, to_text
from .language.tree import Node, Statement, name, number
from .models.block import Program, program
from .models.model import NeuronModel
from .models.surrogate import Surrogate
from .neurons import as_model
from .run.call import Call, Values, settle
from .surrogates import ATan

ARCH = "sm_90"  # where there is no GPU to ask


class Equation(NamedTuple):
    """Two sides and the sign between them, as trees; str() gives text."""

    left: Node
    right: Node
    sign: str = "="

    def __str__(self) -> str:
        return f"{to_text(self.left)} {self.sign} {to_text(self.right)}"


class Section(NamedTuple):
    """A heading, equations under it, and what is to be said of them."""

    title: str
    equations: tuple[Equation, ...] = ()
    notes: tuple[str, ...] = ()


class Explanation:
    """What `explain` found. print() it; notebooks show it in mathematics; `latex()` is for papers.

    Attributes:
        title: the model, its reset and surrogate, in one line.
        sections: headings with their equations and notes, in the order in which they are printed.
    """

    def __init__(self, title: str, sections: Iterable[Section]) -> None:
        self.title = title
        self.sections = tuple(sections)

    def __str__(self) -> str:
        blocks = [self.title]
        for title, equations, notes in self.sections:
            blocks.append("\n    ".join([f"{title}:", *map(str, equations), *notes]))
        return "\n\n".join(blocks)

    def __repr__(self) -> str:
        return str(self)

    def latex(self) -> str:
        """The equations of all sections for a LaTeX document with the package amsmath."""
        return "\n\n".join(
            f"% {title}\n{aligned(map(_in_latex, equations), 'align*')}"
            for title, equations, _ in self.sections
            if equations
        )

    def _repr_markdown_(self) -> str:
        blocks = [f"**{self.title}**"]
        for title, equations, notes in self.sections:
            shown = f"\n$$\n{aligned(map(_in_latex, equations))}\n$$\n" if equations else ""
            listed = "".join(f"\n- `{note}`" for note in notes)
            blocks.append(f"*{title}*\n{shown}{listed}")
        return "\n\n".join(blocks)


def _in_latex(equation: Equation) -> tuple[str, str, str]:
    left, right, sign = equation
    return to_latex(left), sign.replace("+=", r"\mathrel{+}="), to_latex(right)


def explain(
    model: NeuronModel | str,
    *,
    surrogate: Any = ATan,
    reset: str = "hard",
    detach_reset: bool = False,
    record: Iterable[str] = (),
    dtype: str = "float32",
    steps: int = 16,
    neurons: int = 1 << 20,
    compile: bool = False,
    arch: str | None = None,
    **params: Any,
) -> Explanation:
    """The equations of one step as they run, their derivatives, and what the kernels move.

    What the block leaves out (threshold, firing, reset) is written out. Derivatives are those of
    the kernels; zeros and ones are folded away, nothing else. v' is v after the step.

    Args:
        model: a `NeuronModel`, or the name of a built-in one.
        surrogate, reset, detach_reset, record, **params: as for `neuronjit.multistep`; parameters
            are numbers here.
        dtype: of the sequences, "float32", "float64", "float16" or "bfloat16".
        steps, neurons: T and N of the call, which decide the shape of its kernels.
        compile: also compile the kernels for each target that this machine has a compiler for
            (about a second), and tell registers, spills and the size of their code.
        arch: the CUDA architecture to compile for, such as "sm_80"; this machine's by default, or
            sm_90 where it has no GPU.

    Raises:
        SpecError, InputTypeError: as `multistep`.
        CompileError: with `compile`, the compiler refused a kernel.
    """
    x = torch.empty(1, 1)  # the call is checked with it, and never made
    model = as_model(model)
    params = {**dict.fromkeys(model.inputs[1:], x), **params}
    asked = (surrogate, reset, detach_reset, record, True, "eager", params)
    call, values = settle(model, x, None, *asked)
    specs = {
        target: specs_of(
            call.model, target, DIRECTIONS, call.surrogate, call.reset, call.detach_reset, dtype,
            steps=steps, neurons=neurons, record=call.record,
        )
        for target in TARGETS
    }  # fmt: skip
    sections = [*_equations(call, values), _traffic(specs, dtype, steps)]
    if compile:
        notes = [note for target in TARGETS for note in _compiled(specs[target], target, arch)]
        sections.append(Section(f"kernels, compiled for T = {steps}, N = {neurons}", (), (*notes,)))
    how = "its own reset" if call.reset == "own" else f"{call.reset} reset"
    detached = ", detached" if call.detach_reset else ""
    return Explanation(f"{call.model.name}: {how}{detached}, surrogate {call.surrogate}", sections)


def _equations(call: Call, values: Values) -> Iterator[Section]:
    model, surrogate = call.model, call.surrogate
    steps = program(model, call.reset, call.detach_reset)
    shown = _shown(steps)
    names = {made: name(seen) for made, seen in shown.items()}
    step = [
        Statement(shown[s.target], _fired(s.expression, surrogate).substitute(names), s.line)
        for s in steps.statements
    ]
    slopes_of = {s.target: _slopes(s) for s in step}
    if about := getattr(model, "about", ""):
        yield Section("about", (), (about,))
    for title, of in ("states before the first step", model.state), ("parameters", model.params):
        rules = {n: " (> 0)" if n in model.positive else "" for n in of}
        given = (f"{n} = {_number(values[n])}{rule}" for n, rule in rules.items())
        yield Section(title, (), tuple(given))
    compared = ">" if model.strict else ">="
    fires = f"; fire(h, theta) is 1 where h {compared} theta, else 0" if surrogate.spiking else ""
    yield Section(
        "one step, in this order",
        tuple(Equation(name(s.target), s.expression) for s in step),
        (f"out.spikes is {shown[steps.spikes]}{fires}",),
    )
    derivatives = (
        Equation(Node("partial", (name(target), name(read))), slope)
        for target, found in slopes_of.items()
        for read, slope in found
    )
    yield Section("derivatives", tuple(derivatives))
    yield _of_surrogate(surrogate)
    yield Section(
        "backward, from the last equation to the first",
        tuple(_backward(call, steps, shown, step, slopes_of)),
        (
            "grad(h) is the loss's derivative by h; grad(v[t+1]) is grad(v) of the next step",
            "parameters' (+=) are summed over steps, and over neurons that share one number",
        ),
    )


def _number(value: Any) -> str:
    return to_text(number(float(value)))


def _shown(steps: Program) -> dict[str, str]:
    """What the names of a program are shown as: v' is what v is after it was assigned."""
    found = {s.target: s.target for s in steps.statements}
    return found | {made: name + "'" * often for made, (name, often) in steps.again.items()}


def _fired(tree: Node, surrogate: Surrogate) -> Node:
    """What comes out where spikes do: the smooth function of h - theta, if that is asked for."""
    if tree.op != "fire" or surrogate.spiking:
        return tree
    return Node("smooth", (Node("-", tree.args),))


def _slopes(statement: Statement) -> list[tuple[str, Node]]:
    """Each name that a statement reads with the derivative by it, where that is not 0."""
    tree = statement.expression
    if tree.op not in ("fire", "smooth"):
        return slopes(tree)
    distance = Node("-", tree.args) if tree.op == "fire" else tree.args[0]
    h, theta = distance.args
    slope = Node("slope", (distance,))
    return [(str(h.value), slope), (str(theta.value), negate(slope))]


def _of_surrogate(surrogate: Surrogate) -> Section:
    smooth = surrogate.primitive_tree
    slope = surrogate.derivative_tree
    if smooth and not surrogate.spiking:
        slope = derivative(smooth, "u")
    equations = [Equation(Node("slope", (name("u"),)), slope)]
    if smooth:
        equations.append(Equation(Node("smooth", (name("u"),)), smooth))
    numbers = tuple(f"{n} = {_number(value)}" for n, value in surrogate.params.items())
    unused = smooth and surrogate.spiking
    notes = ("smooth(u) comes out instead of spikes where spiking=False",) if unused else ()
    return Section(f"surrogate {surrogate.name}", tuple(equations), numbers + notes)


def _backward(
    call: Call,
    steps: Program,
    shown: Mapping[str, str],
    step: Iterable[Statement],
    slopes_of: Mapping[str, list[tuple[str, Node]]],
) -> Iterator[Equation]:
    """Reverse-mode differentiation of one step, as the kernels do it."""
    terms: dict[str, list[Node]] = {}

    def arrive(target: str, gradient: Node) -> None:
        terms.setdefault(target, []).append(gradient)

    for z, last in steps.final.items():  # a state that is not assigned is shown as it is
        arrive(shown.get(last, last), _gradient(f"{z}[t+1]"))
    arrive(shown[steps.spikes], _gradient("out.spikes"))
    for recorded in call.record:
        last = steps.held[recorded]
        arrive(shown.get(last, last), _gradient(f"out.record.{recorded}"))
    for statement in reversed([*step]):
        if statement.expression.op == "add_grad":
            of, extra = statement.expression.args
            arrive(str(of.value), extra)
        if parts := terms.pop(statement.target, []):
            total = _gradient(statement.target)
            yield Equation(total, add(parts))
            for read, slope in slopes_of[statement.target]:
                arrive(read, multiply(total, slope))
    for source in (*call.model.inputs, *steps.final):
        yield Equation(_gradient(source), add(terms.get(source, [])))
    for p in call.model.params:
        if p in terms:
            yield Equation(_gradient(p), add(terms[p]), "+=")


def _gradient(of: str) -> Node:
    return Node("grad", (name(of),))


def _traffic(specs: Mapping[str, list[KernelSpec]], dtype: str, steps: int) -> Section:
    said: dict[str, list[str]] = {}  # what is the same for several targets is said once
    for target, kernels in specs.items():
        for spec in kernels:
            step, checkpoint, call = spec.traffic
            kept = f"{checkpoint} every {spec.interval} steps, " if steps > spec.interval else ""
            line = f"{spec.direction}: {step} a step, {kept}{call} a call for states"
            said.setdefault(line, []).append(target)
    notes = tuple(f"{line} ({', '.join(by)})" for line, by in said.items())
    return Section(f"bytes that kernels move for a neuron, {dtype}, T = {steps}", (), notes)


def _compiled(kernels: Iterable[KernelSpec], target: str, arch: str | None) -> Iterator[str]:
    module = targets.by_name(target)
    try:
        if target == "cuda":
            here = arch or (module.arch() if torch.cuda.is_available() else ARCH)
            machine = module.check_arch(here)
        else:
            machine = module.arch()
        for spec in kernels:
            text = render_specs([spec])
            found = module.measure(text, spec.symbol, machine, spec.is_large)
            facts = _facts(found) or "PTX, which the driver compiles"
            yield f"{target} {machine}, {spec.direction}: {facts}"
    except BackendError as error:
        yield f"{target}: not compiled, {error}"


def _facts(found: Mapping[str, int]) -> str:
    said = dict(
        code="{} bytes of code", registers="{} registers a thread", spilled="{} bytes spilled"
    )
    return ", ".join(said[what].format(number) for what, number in found.items())
