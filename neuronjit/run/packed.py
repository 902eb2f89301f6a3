"""Spikes that autograd keeps for backward, as one bit each, and their sums: see `packed_spikes`.

Which tensors are spikes is never read off their numbers, which would make the host wait for a GPU.
Each call of `multistep` notes the memory that it wrote spikes to; what autograd saves is looked up
by its memory, whatever view of it that is.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..language.tree import Node, name, number
from ..models.block import program
from ..models.model import NeuronModel
from ..torch_private import current_raw_stream
from .bits import WIDTHS, pack_bits, unpack_bits
from .call import Call


@contextmanager
def packed_spikes() -> Iterator[None]:
    """Save spikes for backward as one bit each: `with neuronjit.packed_spikes(): loss = ...`.

    What autograd keeps of the spikes of `multistep`, and of all layers that call it, is packed in
    forward and unpacked in backward: inputs of the next convolutions, linear layers, products,
    poolings and neurons. Views of spikes count, and one copy of them (contiguous, cast to another
    floating dtype, max pooling). Sums, products and concatenations of spikes, as residuals make
    them, take 1, 2, 4 or 8 bits, by how great they can be. Gradients are the same, bit for bit.
    Whatever may be another number is kept as it is: averages, the outputs of models whose equations
    may give others, surrogates with `spiking=False`. Backward may run outside of the context.

    It holds for one thread, as torch's `saved_tensors_hooks` do, with which it is made: within
    other such hooks, or `torch.utils.checkpoint`, the innermost are asked. Compiled graphs decide
    by themselves what they keep.

    Raises:
        RuntimeError: in backward, where a saved tensor was changed in place, as without packing.
    """
    # disabled: between compiled graphs, Dynamo would compile the hooks too, and fail
    pack, unpack = torch.compiler.disable(_pack), torch.compiler.disable(_unpack)
    here.contexts += 1
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        here.contexts -= 1


class _Here(threading.local):
    contexts = 0  # of packed_spikes that are open in this thread


here = _Here()


class _Spikes:
    """What is known of memory that holds spikes, or numbers made of them, and nothing else."""

    __slots__ = ("bits", "counter", "dtype", "most", "version")

    def __init__(self, spikes: Tensor, most: int = 1) -> None:
        """`most`: none of the numbers is greater."""
        self.dtype = spikes.dtype
        self.most = most
        self.version = spikes._version
        # no memory, but the version counter of the spikes, which outlives them
        self.counter = spikes.detach()
        self.counter.data = spikes.new_empty(0)
        # shared by all who save the spikes on one CUDA stream, as long as one of them lives
        self.bits: dict[int, ReferenceType[Tensor]] = {}

    @property
    def width(self) -> int:
        """The bits that hold one of the numbers."""
        return next(width for width in WIDTHS if self.most < 1 << width)

    def unchanged(self) -> bool:
        return self.counter._version == self.version


_KEY = "neuronjit: spikes"  # in the metadata of autograd's nodes
_noted: set[str] = set()  # the names of nodes that may have it: others make a dict to be asked
_known: WeakKeyDictionary[torch.UntypedStorage, _Spikes] = WeakKeyDictionary()
_NONE: Mapping[str, Tensor] = {}


def note(call: Call, spikes: Tensor, inputs: Mapping[str, Tensor] = _NONE) -> None:
    """Remember the output of a call, if it is nothing but 0 and 1, or sums of these.

    `inputs` are those of the model of which something may be known.
    """
    if not call.surrogate.spiking or spikes.is_inference():
        return
    known = {name: _spikes_of(tensor) for name, tensor in inputs.items()}
    most = _greatest(call.model, tuple((n, k.most) for n, k in known.items() if k is not None))
    if not most:
        return
    made = _known[spikes.untyped_storage()] = _Spikes(spikes, most)
    node: Any = spikes.grad_fn
    if node is not None and spikes.output_nr == 0:  # what `_made_of_spikes` relies on
        node.metadata[_KEY] = made
        _noted.add(node.name())


_Combine = Callable[[Iterable[int]], int]
_COMBINED: dict[str, _Combine] = {"*": math.prod, "+": sum}  # of others, the greatest


@cache
def _greatest(model: NeuronModel, inputs: tuple[tuple[str, int], ...]) -> int:
    """The greatest whole number that comes out, as the equations show; 0: it may be any number.

    `inputs` are whole numbers up to these; whatever else goes in may be any number.
    """
    steps = program(model, "own" if model.own_reset else "hard", False)
    made = {s.target: s.expression for s in steps.statements}

    def most(tree: Node) -> int | None:
        match tree.op:
            case "fire":
                return 1
            case "name" if tree.value in made:
                return most(made[str(tree.value)])
            case "name":
                return dict(inputs).get(str(tree.value))
            case "number":
                return int(tree.value) if tree.value in (0.0, 1.0) else None
            case "-" if len(tree.args) == 2 and tree.args[0] == number(1):
                return 1 if most(tree.args[1]) in (0, 1) else None
            case "where" | "*" | "detach" | "+":
                found = [most(arg) for arg in tree.args[tree.op == "where" :]]
                known = [greatest for greatest in found if greatest is not None]
                return _COMBINED.get(tree.op, max)(known) if known == found else None
        return None

    return _whole(most(name(steps.spikes)) or 0)


def _whole(most: int) -> int:
    """`most`, or 0 where a byte does not hold it."""
    return most if most < 1 << 8 else 0


# --- what autograd asks ---------------------------------------------------------------------------


class _Packed(NamedTuple):
    """Numbers that are kept as bits, and the view of them that was saved."""

    bits: Tensor
    width: int
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype


_Saved = tuple[Tensor, int, _Packed | None]  # the tensor or what has its version counter; version


def _pack(x: Tensor) -> _Saved:
    known = _spikes_of(x)
    if known is None:
        kept = x.detach()  # not x: an output that its own node keeps is never freed
        return kept, kept._version, None
    bits, offset = _bits_of(x, known), int(x.storage_offset())
    packed = _Packed(bits, known.width, x.shape, x.stride(), offset, x.dtype)
    return known.counter, known.counter._version, packed


def _unpack(saved: _Saved) -> Tensor:
    counted, version, packed = saved
    if counted._version != version:  # hooks lose torch's own check
        like = packed or counted
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace"
            f" operation: {list(like.shape)}, {like.dtype}, is at version {counted._version};"
            f" expected version {version}, that of forward."
            " torch.autograd.set_detect_anomaly(True) tells which operation's backward failed"
        )
    if packed is None:
        return counted
    bits, width, shape, strides, offset, dtype = packed
    # the bytes that the view reads, which may be one step of many
    extent = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    each = 8 // width
    first, last = offset // each, (offset + extent) // each
    values = unpack_bits(bits[first : last + 1], dtype, width)
    return values.as_strided(shape, strides, offset - each * first)


def _spikes_of(x: Tensor) -> _Spikes | None:
    """What is known of x's memory, if it is spikes."""
    if type(x) is not Tensor or x.layout is not torch.strided or not x.numel() or x.is_neg():
        return None
    storage = x.untyped_storage()
    known = _known.get(storage)
    if known is None and not x._version and (known := _made_of_spikes(x)):
        _known[storage] = known
    if known is None or x.dtype != known.dtype:
        return None
    return known if known.unchanged() and x._version == known.version else None


# operations whose results hold the numbers of their input and no others
_VIEWS = {
    "AliasBackward0", "ExpandBackward0", "PermuteBackward0", "ReshapeAliasBackward0",
    "SelectBackward0", "SliceBackward0", "SplitBackward0", "SqueezeBackward0", "SqueezeBackward1",
    "SqueezeBackward2", "TBackward0", "TransposeBackward0", "UnbindBackward0",
    "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
}  # fmt: skip
# operations whose results are whole numbers where their inputs are, and how great these can be
_COPIES = (
    "CloneBackward0", "MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0",
    "ToCopyBackward0", "_MaxPoolBackward",
)  # fmt: skip
_GREATEST: dict[str, _Combine] = {
    **dict.fromkeys((*_COPIES, "CatBackward0", "StackBackward0"), max),
    "AddBackward0": sum,
    "MulBackward0": math.prod,
}


def _made_of_spikes(x: Tensor) -> _Spikes | None:
    """What is known of x's memory, never changed in place, by the operation that wrote it.

    It made them of spikes, or of what is known from here, that never were changed either. Of its
    other inputs no one can tell whether they were changed before it.
    """
    node = _past_views(x.grad_fn, x.output_nr)
    if node is None or not x.is_floating_point() or x.itemsize == 1:
        return None
    if most := _most(node):
        return _Spikes(x, most)
    greatest = _GREATEST.get(node.name())
    if greatest is None or getattr(node, "_saved_alpha", 1) != 1:
        return None
    if {*getattr(node, "_saved_dilation", ())} - {1}:
        return None  # a window may see padding alone, which is -inf
    inputs = [_most(_past_views(*of)) for of in node.next_functions]
    most = _whole(greatest(inputs)) if all(inputs) else 0
    if not most:
        return None
    made = node.metadata[_KEY] = _Spikes(x, most)
    _noted.add(node.name())
    return made


def _past_views(node: Any, output: int) -> Any:
    """The node of autograd that wrote the memory of this result, if as its first result."""
    while node is not None and (kind := node.name()) in _VIEWS:
        if kind in _noted and _KEY in node.metadata:
            break
        node, output = node.next_functions[0]
    return None if output else node


def _most(node: Any) -> int:
    """How great the numbers that it wrote can be, as far as is known and they were not changed."""
    if node is None or node.name() not in _noted:
        return 0
    known = node.metadata.get(_KEY)
    return known.most if known is not None and known.unchanged() else 0


def _bits_of(x: Tensor, known: _Spikes) -> Tensor:
    """The bits of all of x's memory."""
    stream = current_raw_stream(x.device.index) if x.is_cuda else 0
    kept = known.bits.get(stream)
    bits = None if kept is None else kept()
    if bits is None:
        elements = x.untyped_storage().nbytes() // x.itemsize
        bits = pack_bits(x.detach().as_strided((elements,), (1,), 0), known.width)
        known.bits[stream] = ref(bits)
    return bits
