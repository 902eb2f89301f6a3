"""Spikes that autograd keeps for backward, as one bit each: see `packed_spikes`.

Which tensors are spikes is never read off their numbers, which would make the host wait for a GPU.
Each call of `multistep` notes the memory that it wrote spikes to; what autograd saves is looked up
by its memory, whatever view of it that is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
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
from .call import Call


@contextmanager
def packed_spikes() -> Iterator[None]:
    """Save spikes for backward as one bit each: `with neuronjit.packed_spikes(): loss = ...`.

    What autograd keeps of the spikes of `multistep`, and of all layers that call it, is packed in
    forward and unpacked in backward: inputs of the next convolutions, linear layers, products,
    poolings and neurons. Views of spikes count, and one copy of them (contiguous, cast to another
    floating dtype, max pooling). Gradients are the same, bit for bit. Whatever may be other than 0
    and 1 is kept as it is: sums of spikes, models that put out `y` or several levels, surrogates
    with `spiking=False`. Backward may run outside of the context.

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
    """What is known of memory that holds spikes and nothing else."""

    __slots__ = ("bits", "counter", "dtype", "version")

    def __init__(self, spikes: Tensor) -> None:
        self.dtype = spikes.dtype
        self.version = spikes._version
        # no memory, but the version counter of the spikes, which outlives them
        self.counter = spikes.detach()
        self.counter.data = spikes.new_empty(0)
        # shared by all who save the spikes on one CUDA stream, as long as one of them lives
        self.bits: dict[int, ReferenceType[Tensor]] = {}

    def unchanged(self) -> bool:
        return self.counter._version == self.version


_KEY = "neuronjit: spikes"  # in the metadata of autograd's nodes
_known: WeakKeyDictionary[torch.UntypedStorage, _Spikes] = WeakKeyDictionary()


def note(call: Call, spikes: Tensor) -> None:
    """Remember the output of a call, if it is nothing but 0 and 1."""
    if not (call.surrogate.spiking and _fires(call.model)) or spikes.is_inference():
        return
    known = _known[spikes.untyped_storage()] = _Spikes(spikes)
    node: Any = spikes.grad_fn
    if node is not None and spikes.output_nr == 0:  # what `_is_copy_of_spikes` relies on
        node.metadata[_KEY] = known


@cache
def _fires(model: NeuronModel) -> bool:
    """Whether what comes out is 0 or 1, whatever goes in, as its equations show."""
    steps = program(model, "own" if model.own_reset else "hard", False)
    made = {s.target: s.expression for s in steps.statements}

    def binary(tree: Node) -> bool:
        match tree.op:
            case "fire":
                return True
            case "name":
                return tree.value in made and binary(made[str(tree.value)])
            case "number":
                return tree.value in (0.0, 1.0)
            case "where":
                return all(map(binary, tree.args[1:]))
            case "*" | "detach":
                return all(map(binary, tree.args))
            case "-" if len(tree.args) == 2:
                return tree.args[0] == number(1) and binary(tree.args[1])
        return False

    return binary(name(steps.spikes))


# --- what autograd asks ---------------------------------------------------------------------------


class _Saved(NamedTuple):
    """What stands for a tensor from forward to backward."""

    counted: Tensor  # the tensor, or what has its version counter
    version: int
    bits: Tensor | None
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype


def _pack(x: Tensor) -> _Saved:
    known = _spikes_of(x)
    if known is None:
        counted, bits = x.detach(), None  # not x: an output that its own node keeps is never freed
    else:
        counted, bits = known.counter, _bits_of(x, known)
    offset = int(x.storage_offset())
    return _Saved(counted, counted._version, bits, x.shape, x.stride(), offset, x.dtype)


def _unpack(saved: _Saved) -> Tensor:
    if saved.counted._version != saved.version:  # hooks lose torch's own check
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace"
            f" operation: {list(saved.shape)}, {saved.dtype}, is at version"
            f" {saved.counted._version}; expected version {saved.version}, that of forward."
            " torch.autograd.set_detect_anomaly(True) tells which operation's backward failed"
        )
    if saved.bits is None:
        return saved.counted
    # the bytes that the view reads, which may be one step of many
    extent = sum((n - 1) * stride for n, stride in zip(saved.shape, saved.strides, strict=True))
    first, last = saved.offset // 8, (saved.offset + extent) // 8
    values = unpack_bits(saved.bits[first : last + 1], saved.dtype)
    return values.as_strided(saved.shape, saved.strides, saved.offset - 8 * first)


def _spikes_of(x: Tensor) -> _Spikes | None:
    """What is known of x's memory, if it is spikes."""
    if type(x) is not Tensor or x.layout is not torch.strided or not x.numel() or x.is_neg():
        return None
    storage = x.untyped_storage()
    known = _known.get(storage)
    if known is None and not x._version and _is_copy_of_spikes(x):
        known = _known[storage] = _Spikes(x)
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
_COPIES = {
    "CloneBackward0", "MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0",
    "ToCopyBackward0",
}  # fmt: skip


def _is_copy_of_spikes(x: Tensor) -> bool:
    """Whether x, which was never changed in place, is one copy of spikes that never were either.

    Not a copy of a copy: whether the first was changed in between, no one can tell.
    """
    node: Any = x.grad_fn
    output, copies = x.output_nr, 0
    while node is not None:
        spikes = node.metadata.get(_KEY)
        if spikes is not None:
            return output == 0 and spikes.unchanged() and x.is_floating_point() and x.itemsize > 1
        did = node.name()
        copies += did in _COPIES
        if copies > 1 or not (did in _COPIES or did in _VIEWS):
            return False
        if {*getattr(node, "_saved_dilation", ())} - {1}:
            return False  # a window may see padding alone, which is -inf
        node, output = node.next_functions[0]
    return False


# --- bits -----------------------------------------------------------------------------------------


def _bits_of(x: Tensor, known: _Spikes) -> Tensor:
    """The bits of all of x's memory."""
    stream = current_raw_stream(x.device.index) if x.is_cuda else 0
    kept = known.bits.get(stream)
    bits = None if kept is None else kept()
    if bits is None:
        elements = x.untyped_storage().nbytes() // x.itemsize
        bits = pack_bits(x.detach().as_strided((elements,), (1,), 0))
        known.bits[stream] = ref(bits)
    return bits


_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1: the highest byte has the bit of each


def pack_bits(flat: Tensor) -> Tensor:
    """Eight numbers a byte, the first of them lowest: its bit is set where it is not 0."""
    ones = flat.bool().view(torch.uint8)  # flat.ne(0) takes up to four times as long on a CPU
    if len(ones) % 8:
        ones = torch.nn.functional.pad(ones, (0, -len(ones) % 8))
    return ones.view(torch.int64).mul_(_GATHER).view(torch.uint8)[7::8].contiguous()


def unpack_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Eight numbers, 0 or 1, for each byte."""
    # made anew: what is kept could belong to a captured graph, or to another stream
    bit = torch.arange(8, dtype=torch.uint8, device=bits.device)
    if bits.is_cuda:  # where looking rows of eight up takes fourteen times as long
        return (bits.unsqueeze(1) >> bit).bitwise_and_(1).to(dtype).view(-1)
    byte = torch.arange(256, dtype=torch.uint8, device=bits.device)
    table = (byte.unsqueeze(1) >> bit).bitwise_and_(1).to(dtype)
    return table.index_select(0, bits.int()).view(-1)
