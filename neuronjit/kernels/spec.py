"""What one kernel is: the choices that select it, its name, its arguments, and its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import InputTypeError, SpecError, expect_known, known
from ..language.cpp import divided_by
from ..models.block import RESETS, program
from ..models.model import NeuronModel
from ..models.surrogate import Surrogate
from ..neurons import as_model
from ..surrogates import as_surrogate
from . import targets
from .targets import TARGETS
from .targets.base import MOST_TERMS, is_long, terms


@dataclass(frozen=True)
class Dtype:
    """How sequences of one dtype are stored, and what their neurons are computed in."""

    tensor: torch.dtype
    storage: str  # the C++ type
    arithmetic: torch.dtype = torch.float32
    real: str = "float"  # the C++ type of the arithmetic
    code: str = "f"  # its letter for `struct`


DTYPES = {
    "float32": Dtype(torch.float32, "float"),
    "float16": Dtype(torch.float16, "half_t"),
    "bfloat16": Dtype(torch.bfloat16, "bfloat16_t"),
    "float64": Dtype(torch.float64, "double", torch.float64, "double", "d"),
}
NAMES = {dtype.tensor: name for name, dtype in DTYPES.items()}
DIRECTIONS = ("forward", "backward")
PACKAGE = Path(__file__).parent.parent
# the folders whose code decides a rendered text and how it is compiled: whole, so that none of
# their files can be forgotten
RENDERERS = ("language", "models", "kernels")
MOST = 256  # intervals, lanes and loads become code that many times over


@dataclass(frozen=True)
class Group:
    """Members of a kernel's argument struct that are packed together: an array, or one member."""

    ctype: str
    name: str
    of: tuple[str, ...] | None = None  # what its elements belong to; None: it is no array
    code: str = "Q"  # the letter of an element for `struct.Struct`

    @property
    def count(self) -> int:
        """How many elements it has."""
        return 1 if self.of is None else len(self.of)


class Traffic(NamedTuple):
    """Bytes of memory that a kernel reads and writes for each neuron."""

    step: int  # at every time step: sequences
    checkpoint: int  # every K steps, where T is greater than K: states
    call: int  # once: states before the first and after the last step, parameters of neurons


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
    by_channel: bool = False  # those repeat alike, and threads stay with their channels
    per_step: tuple[str, ...] = ()  # inputs that all neurons share: one number a step
    learned: tuple[str, ...] = ()  # backward: parameters whose gradient is wanted
    record: tuple[str, ...] = ()  # forward: sequences that are returned besides the spikes
    arriving: tuple[str, ...] = ()  # backward: sequences whose gradients arrive
    to_inputs: bool = True  # backward: it gives gradients of the inputs, not of parameters alone
    interval: int = 16  # K: steps between checkpoints, recomputed together
    lanes: int = 1  # neurons handled together
    loads: int = 1  # forward: rows of x on their way before the first is used
    prefetch: bool = False  # load the rows of the next steps before the current ones are used
    whole: bool = False  # T is K, so that nothing is done for other numbers of steps

    def __post_init__(self) -> None:
        """Raise SpecError for all that no call would use: what is shown or built ahead is used."""
        choices = dict(target=TARGETS, direction=DIRECTIONS, dtype=DTYPES, reset=(*RESETS, "own"))
        for field, allowed in choices.items():
            expect_known(getattr(self, field), allowed, field)
        model, backward = self.model, self.direction == "backward"
        if not isinstance(model, NeuronModel):
            raise InputTypeError(f"model must be a NeuronModel, got {type(model).__name__}")
        if (self.reset == "own") != model.own_reset:
            raise SpecError(f"reset {self.reset!r} does not fit model '{model.name}'")
        wanted = backward or not self.spiking
        if (self.surrogate is not None) != wanted:
            how = "needs a surrogate" if wanted else "evaluates no surrogate"
            raise SpecError(f"a {self.direction} kernel with spiking={self.spiking} {how}")
        if self.surrogate is not None:
            if self.surrogate != self.surrogate.form:
                raise SpecError("the surrogate's numbers are arguments: a kernel has its form")
            if not self.spiking and self.surrogate.primitive is None:
                raise SpecError(f"surrogate '{self.surrogate.name}' has no primitive")
        if not backward and (self.detach_reset or self.learned or self.arriving):
            fields = "detach_reset, learned parameters and arriving gradients"
            raise SpecError(f"{fields} concern backward kernels only")
        if not self.to_inputs and not self.learned:
            raise SpecError(
                "to_inputs=False concerns backward kernels with learned parameters only"
            )
        if backward and self.record:
            raise SpecError("record concerns forward kernels only")
        for field, names in (
            ("per_neuron", model.params), ("per_step", model.inputs[1:]),
            ("learned", model.params),
            ("record", model.recordable), ("arriving", ("s", *model.recordable)),
        ):  # fmt: skip
            given = getattr(self, field)
            if given != in_order(given, names, field):
                raise SpecError(f"{field} must be in the model's order, got {given}")
        for field in ("interval", "lanes", "loads"):
            number = getattr(self, field)
            if type(number) is not int or not 1 <= number <= MOST or number & (number - 1):
                raise SpecError(
                    f"{field} must be a power of two from 1 to {MOST}, got {ascii(number)[:80]}"
                )
        if self.by_channel and not self.per_neuron:
            raise SpecError("by_channel concerns parameters that differ between neurons")
        if self.loads > self.interval:
            raise SpecError(f"loads={self.loads} must be at most interval={self.interval}")

    @classmethod
    def of(
        cls,
        model: NeuronModel | str,
        target: str,
        direction: str,
        surrogate: Any,
        reset: str,
        detach_reset: bool,
        dtype: str,
        *,
        per_neuron: Iterable[str] = (),
        per_step: Iterable[str] = (),
        learned: Iterable[str] = (),
        record: Iterable[str] = (),
        arriving: Iterable[str] = (),
        to_inputs: bool = True,
        **shape: Any,
    ) -> KernelSpec:
        """The kernel that a call with these choices uses in this direction.

        What does not concern the direction is left out: forward has no slope, backward no record.
        """
        model, surrogate = as_model(model), as_surrogate(surrogate)
        backward = direction == "backward"
        record = in_order(record, model.recordable, "record")
        arriving = in_order(arriving, ("s", *model.recordable), "arriving")
        learned = in_order(learned, model.params, "learned") if backward else ()
        return cls(
            model,
            target,
            direction,
            str(dtype).removeprefix("torch."),
            "own" if model.own_reset and reset in [*RESETS] else reset,
            surrogate=surrogate.form if backward or not surrogate.spiking else None,
            spiking=surrogate.spiking,
            detach_reset=bool(detach_reset) and backward,
            per_neuron=in_order(per_neuron, model.params, "per_neuron"),
            per_step=in_order(per_step, model.inputs[1:], "per_step"),
            learned=learned,
            record=() if backward else record,
            arriving=arriving if backward else (),
            to_inputs=to_inputs or not learned,
            **shape,
        )

    @property
    def sequences(self) -> tuple[str, ...]:
        """What it writes besides the spikes, or reads besides x."""
        return (*self.record, *self.arriving)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The model's inputs: those that differ between neurons first."""
        return (*(n for n in self.model.inputs if n not in self.per_step), *self.per_step)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The sequences that it writes: in backward, of the gradients of these inputs."""
        if self.direction == "forward":
            return ("s", *self.record)
        return self.inputs if self.to_inputs else ()

    @cached_property
    def divisors(self) -> frozenset[str]:
        """Parameters that states are divided by at every step, where threads keep reciprocals."""
        if not targets.by_name(self.target).KEEPS_RECIPROCALS:
            return frozenset()
        statements = program(self.model, self.reset, self.detach_reset).statements
        found = set().union(*(divided_by(s.expression) for s in statements))
        return frozenset(found & self.model.params.keys())

    @cached_property
    def each(self) -> tuple[str, ...]:
        """Parameters that differ between neurons; those that something is divided by first."""
        return tuple(sorted(self.per_neuron, key=lambda p: p not in self.divisors))

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """Parameters that all neurons share; those that something is divided by first."""
        shared = [p for p in self.model.params if p not in self.per_neuron]
        return tuple(sorted(shared, key=lambda p: p not in self.divisors))

    @cached_property
    def each_learned(self) -> tuple[str, ...]:
        """Learned parameters that differ between neurons: each neuron has its gradient."""
        return tuple(p for p in self.learned if p in self.per_neuron)

    @cached_property
    def summed(self) -> tuple[str, ...]:
        """Learned parameters that all neurons share: their gradients are summed, block by block."""
        return tuple(p for p in self.learned if p not in self.per_neuron)

    @cached_property
    def numbers_of_surrogate(self) -> tuple[str, ...]:
        """The surrogate's parameters, where the kernel evaluates the surrogate at all."""
        return self.surrogate.names if self.surrogate else ()

    @cached_property
    def is_large(self) -> bool:
        """Whether compilers must take less trouble with the kernel, to be done in seconds."""
        surrogate = self.surrogate
        trees = (surrogate.derivative_tree, surrogate.primitive_tree) if surrogate else ()
        return is_long(self.model) or any(terms(tree) > MOST_TERMS // 8 for tree in trees if tree)

    @cached_property
    def arguments(self) -> tuple[Group, ...]:
        """The argument struct: what is printed, and the order in which a plan packs it."""
        states = tuple(self.model.state)
        dtype = DTYPES[self.dtype]
        own = tuple(n for n in self.inputs if n not in self.per_step)
        if self.direction == "forward":
            pointers = [
                Group("const storage*", "in", own),
                Group("storage*", "out", self.outputs),
                Group("real*", "last", states),
                Group("real*", "checkpoints"),
            ]
        else:
            pointers = [
                Group("const storage*", "in", (*own, *self.arriving)),
                Group("storage*", "out", self.outputs),
                Group("const real*", "last_grad", states),
                Group("real*", "start_grad", states),
                Group("const real*", "checkpoints"),
                Group("real*", "each_grad", () if self.by_channel else self.each_learned),
                Group(
                    "real*",
                    "channel_partials",
                    None if self.by_channel and self.each_learned else (),
                ),
                Group("real*", "partials", None if self.summed else ()),
            ]
        pointers += [
            Group("const real*", "start", states),
            Group("const real*", "each", self.each),
            Group("const real*", "shared", self.shared),
            Group("const real*", "step", self.per_step),
        ]
        counts = [
            Group("long long", "inner", self.each, "q"),
            Group("long long", "count", self.each, "q"),
            Group("long long", "N", None, "q"),
        ]
        numbers = [
            Group("real", "start_value", states, dtype.code),
            Group("real", "shared_value", self.shared, dtype.code),
            Group("real", "surrogate", self.numbers_of_surrogate, dtype.code),
            Group("int", "T", None, "i"),
        ]
        return tuple(g for g in (*pointers, *counts, *numbers) if g.of != ())

    @property
    def traffic(self) -> Traffic:
        """What its arguments make it move, where all of them are given as tensors."""
        dtype = DTYPES[self.dtype]
        real, owned = dtype.arithmetic.itemsize, {*self.model.state, *self.each}
        arrays = [g for g in self.arguments if g.ctype.endswith("*") and g.of]
        sequences = sum(g.count for g in arrays if "storage" in g.ctype)
        numbers = sum(g.count for g in arrays if "real" in g.ctype and owned.issuperset(g.of or ()))
        checkpoint = real * len(self.model.state)
        return Traffic(sequences * dtype.tensor.itemsize, checkpoint, numbers * real)

    @cached_property
    def symbol(self) -> str:
        """The readable, unique name: C symbol, listing, test id."""
        parts = [self.model.name, self.direction, self.dtype, self.reset]
        parts += ["detached"] if self.detach_reset else []
        parts += [self.surrogate.name] if self.surrogate else []
        parts += [] if self.spiking else ["smooth"]
        lists = dict(
            per=self.per_neuron, step=self.per_step, learn=self.learned, seq=self.sequences
        )
        for word, names in lists.items():
            parts += [f"{word}_{'_'.join(names)}"] if names else []
        parts += [] if self.to_inputs else ["alone"]
        parts += ["by_channel"] if self.by_channel else []
        parts += [f"k{self.interval}", f"l{self.lanes}", f"r{self.loads}"]
        parts += ["ahead"] if self.prefetch else []
        parts += ["whole"] if self.whole else []
        return "_".join(parts)

    @cached_property
    def request(self) -> str:
        """Digest of all that decides the rendered text, found without rendering it."""
        described: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        model = self.model.to_dict()
        del model["positive"]  # of numbers, which are arguments
        described["model"] = {**model, "state": [*model["state"]], "params": [*model["params"]]}
        described["surrogate"] = self.surrogate and repr(self.surrogate._identity)
        text = json.dumps([described, _renderer()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@cache
def _renderer() -> str:
    """Digest of the code and the templates that render: when they change, so may every text."""
    digest = hashlib.sha256(metadata.version("jinja2").encode())
    folders = [(PACKAGE / folder, "*.py") for folder in RENDERERS] + [(templates(), "*.*")]
    for folder, pattern in folders:  # whatever folder they are installed in
        for path in sorted(folder.rglob(pattern)):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def templates() -> Path:
    """The templates: inside an installed package, beside it in a checkout."""
    inside = PACKAGE / "templates"
    return inside if inside.is_dir() else PACKAGE.parent / "templates"


def in_order(names: Iterable[str], allowed: Iterable[str], what: str) -> tuple[str, ...]:
    """These names in the order of `allowed`. Raises SpecError for others, and for one twice."""
    given, allowed = [names] if isinstance(names, str) else [*names], [*allowed]
    if len(set(map(ascii, given))) < len(given) or any(name not in allowed for name in given):
        raise SpecError(f"{what}: {ascii(given)[:80]} is not a choice of names. {known(allowed)}")
    return tuple(name for name in allowed if name in given)
