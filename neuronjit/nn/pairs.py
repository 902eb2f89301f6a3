"""Which batch norm stands directly before which neuron: read off the forwards of a network.

torch.fx runs the forward of a container with stand-ins for tensors, and only notes the calls of its
children. A forward that branches on its input cannot be traced, so what is noted happens whatever
the input is.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Tracer
from torch.nn import Module, Sequential
from torch.nn.modules.batchnorm import _BatchNorm

from ..torch_private import has_hooks

_NONE = "none stands directly before it, or others take its output too"


class _Calls(NamedTuple):
    """What a container's forward does with its children."""

    times: Counter[Module]  # how often it calls each
    takers: dict[Module, Module | None]  # of outputs with one use, that follows: a child, or return


def preceding(net: Module, neurons: Collection[Module]) -> dict[Module, Module | str]:
    """For each of `neurons` in `net` the batch norm that it follows, or why there is none.

    It is called right after the norm, with its output, which nothing else takes; containers that
    end in the norm may stand between them. The norm sees time folded into its batch.
    """
    calls, found = _read_all(net, neurons)
    times: Counter[Module] = Counter()
    for read in calls.values():
        times += read.times
    places = Counter(module for _, module in net.named_modules(remove_duplicate=False))
    for read in calls.values():
        for first, neuron in read.takers.items():
            *containers, norm = _ends(first, calls)
            if neuron is None or neuron not in neurons or not isinstance(norm, _BatchNorm):
                continue
            chain = [*containers, norm, neuron]
            folded = sum(map(folds, containers)) + (getattr(norm, "step_mode", "s") == "m")
            if any(times[module] > 1 or places[module] > 1 for module in chain):
                found[neuron] = "it or what stands before it is used several times"
            elif any(map(has_hooks, chain)):
                found[neuron] = "hooks on it or on what stands before it would see other numbers"
            elif folded != 1:
                found[neuron] = (
                    "the batch norm before it gets single steps, or time not folded into its batch"
                )
            else:
                found[neuron] = norm
    return found


def folds(module: Module) -> bool:
    """Whether a container folds time into the batch for what stands in it."""
    return has_forward(module, "EachStep", "SeqToANNContainer")


def has_forward(module: Module, *classes: str) -> bool:
    """Whether its forward is that of one of these classes, ours or SpikingJelly's."""
    forward = type(module).forward
    package, _, _ = forward.__module__.partition(".")
    owner, _, _ = forward.__qualname__.rpartition(".")
    return package in ("neuronjit", "spikingjelly") and owner in classes


def _read_all(
    net: Module, neurons: Collection[Module]
) -> tuple[dict[Module, _Calls], dict[Module, Module | str]]:
    """What each container that is called does, and of each neuron why no norm is known yet."""
    calls: dict[Module, _Calls] = {}
    found: dict[Module, Module | str] = dict.fromkeys(neurons, _NONE)
    todo: list[tuple[Module, str]] = [(net, "")]
    while todo:
        module, why = todo.pop()
        if module in neurons:
            found[module] = why or _NONE
        elif module not in calls and any(
            isinstance(below, _BatchNorm) or below in neurons
            for child in module.children()
            for below in child.modules()
        ):
            read = _read(module)
            if isinstance(read, str):  # its children are called, in ways that are not known
                lists = type(module).forward is Module.forward  # a ModuleList has no forward
                todo += [(child, why if lists else read) for child in module.children()]
            else:
                calls[module] = read
                todo += [(child, "") for child in read.times]
    return calls, found


def _ends(module: Module, calls: dict[Module, _Calls]) -> Iterator[Module]:
    """The module, the child whose output is its output, that one's child, and so on."""
    yield module
    if module in calls:
        for child, taker in calls[module].takers.items():
            if taker is None:
                yield from _ends(child, calls)


def _read(container: Module) -> _Calls | str:
    """What its forward does, in training and in evaluation; why that cannot be known."""
    times: Counter[Module] = Counter()
    takers: list[dict[Module, Module | None]] = []
    for training in (True, False):
        try:
            graph, children = _traced(container, training)
        except Exception as error:  # whatever a forward does with what is no tensor
            said = str(error).partition("\n")[0][:80]
            return f"{type(container).__name__}.forward cannot be followed: {said}"
        nodes = {node: children[node.target] for node in graph.nodes if node.op == "call_module"}
        times |= Counter(nodes.values())
        takers.append({})
        for node, module in nodes.items():
            taker = node.next  # nothing runs between, which could change the norm's input in place
            if [*node.users] == [taker] and taker.args == (node,) and not taker.kwargs:
                if taker.op == "output":
                    takers[-1][module] = None
                elif taker in nodes:
                    takers[-1][module] = nodes[taker]
    return _Calls(times, dict(takers[0].items() & takers[1].items()))


def _traced(container: Module, training: bool) -> tuple[Graph, dict[str, Module]]:
    """The graph of a container's forward, and the modules that it names."""
    if "forward" in vars(container):
        raise TypeError("the instance has one of its own")
    if folds(container):
        stand_in: Module = Sequential(*container)  # type: ignore[misc]  # both are Sequentials
    else:
        _, *parameters = inspect.signature(type(container).forward).parameters.values()
        if any(
            p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters
        ):
            raise TypeError("it has optional arguments")
        # attributes that a forward sets, and lists that it adds to, are those of a copy
        stand_in = object.__new__(type(container))
        stand_in.__dict__ = {
            name: copy.copy(value) if isinstance(value, dict | list | set) else value
            for name, value in vars(container).items()
        }
    stand_in.training = training
    with torch.random.fork_rng(devices=[]):
        graph = _OwnForward().trace(stand_in)
    return graph, dict(stand_in.named_modules())


class _OwnForward(Tracer):
    """Traces the forward of a container, and none of its children's."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        """Every child."""
        return True

    def to_bool(self, obj: Any) -> bool:
        """A condition on the input that guards nothing but an error is as if all is well."""
        frame = sys._getframe(2)
        source = ast.parse(textwrap.dedent(inspect.getsource(frame.f_code)))
        line = frame.f_lineno - frame.f_code.co_firstlineno + 1
        for node in ast.walk(source):
            if isinstance(node, ast.Assert) or (
                isinstance(node, ast.If) and [*map(type, node.body)] == [ast.Raise]
            ):
                first, last = node.test.lineno, node.test.end_lineno or 0
                if first <= line <= last:
                    negated = isinstance(node.test, ast.UnaryOp)
                    return isinstance(node, ast.Assert) is not negated
        return super().to_bool(obj)
