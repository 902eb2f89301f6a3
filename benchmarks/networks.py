"""Whole training steps of networks: SpikingJelly's neurons (or snnTorch's, Norse's), ours, none.

    python benchmarks/networks.py               # a GPU, full sizes: 8 minutes on an H100
    python benchmarks/networks.py --add --modes eager,graph,overhead,compile --only SEW-ResNet-18
    python benchmarks/networks.py --small       # reduced sizes, on a CPU too: does it run?

A step is reset, forward, loss, backward and SGD, by autocast in half precision. All that is
compared in a table's row takes turns in one process. What costs most and says least comes last,
so that `--seconds` cuts that off.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.util
import inspect
import json
import math
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, Run, save, synchronize, wall
from peers import Skip
from tables import markdown
from torch import Tensor, nn

import neuronjit as nj
from neuronjit.kernels import build

RESULTS = Path(__file__).parent / "results"
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES = ("float16", "float32", "bfloat16")
# how a step runs, and what that is called
MODES = {
    "eager": "Eager: Python starts every operation",
    "graph": "The whole step replayed as one CUDA graph: the GPU's time alone",
    "overhead": 'torch.compile(net, mode="reduce-overhead")',
    "compile": "torch.compile(net)",
    "compile-plain": "torch.compile(net) without its layout optimisation",
}
COMPILED: dict[str, dict[str, Any]] = {
    "overhead": dict(mode="reduce-overhead"),
    "compile": dict(),
    "compile-plain": dict(options={"layout_optimization": False}),
}
# whose neurons, and what the tables call them; the order in which they are compiled is COMPILE
WHOSE = {
    "spikingjelly": "SpikingJelly",
    "tuned": "SpikingJelly, tuned",
    "snntorch": "snnTorch",
    "norse": "Norse",
    "stepped": "neuronjit, step by step",
    "neuronjit": "neuronjit",
    "fused": "neuronjit, fused",
    "packed": "neuronjit, fused and packed",
    "none": "no neurons",
}
OURS = ("neuronjit", "fused", "packed", "stepped")
PEERS = ("spikingjelly", "tuned", "snntorch", "norse")
COMPILE = ("fused", "neuronjit", "tuned", "none", "spikingjelly", "stepped", "norse", "snntorch")
# whose neurons there are in networks of each library's layers; a library's own come first
LIBRARIES = {
    "spikingjelly": ("spikingjelly", "tuned", "neuronjit", "fused", "packed", "none"),
    "snntorch": ("snntorch", "stepped", "neuronjit", "none"),
    "norse": ("norse", "neuronjit", "none"),
}


# --- the networks ---------------------------------------------------------------------------------


def spikingjelly() -> Any:
    """Its models, nodes, layers and functions. Its models import what is not needed here."""
    names = ["h5py", "torchvision", "torchvision._internally_replaced_utils"]
    stubs = [name for name in names if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in stubs:
        sys.modules[name] = stub = types.ModuleType(name)
        stub.load_state_dict_from_url = None
    try:
        from spikingjelly.activation_based import functional, layer, neuron
        from spikingjelly.activation_based.model import parametric_lif_net, sew_resnet, spikformer
    finally:
        for name in stubs:
            del sys.modules[name]
    return (parametric_lif_net, sew_resnet, spikformer), neuron, layer, functional


def sew_resnet18(small: bool) -> nn.Module:
    """Fang et al. 2021, arXiv:2102.04159."""
    (_, models, _), neuron, *_ = spikingjelly()
    return models.sew_resnet18(
        num_classes=10 if small else 1000, cnf="ADD", spiking_neuron=neuron.IFNode,
        detach_reset=True,
    )  # fmt: skip


def cifar10net(small: bool) -> nn.Module:
    """Fang et al. 2021, arXiv:2007.05785."""
    (models, _, _), neuron, *_ = spikingjelly()
    net = models.CIFAR10Net(8 if small else 128, neuron.ParametricLIFNode, detach_reset=True)
    return louder(net)


def spikformer(small: bool) -> nn.Module:
    """Zhou et al. 2023, arXiv:2209.15425."""
    (_, _, models), neuron, *_ = spikingjelly()
    return models.Spikformer(
        img_size_h=32, img_size_w=32, patch_size=4, num_classes=10,
        embed_dims=64 if small else 384, num_heads=4 if small else 12, depths=1 if small else 4,
        spiking_neuron=neuron.LIFNode,
    )  # fmt: skip


def vgg(small: bool) -> nn.Module:
    """For events of a DVS camera, as in Deng et al. 2022, arXiv:2202.11946."""
    _, neuron, layer, _ = spikingjelly()
    layers: list[nn.Module] = []
    before, width = 2, 8 if small else 64
    for blocks in ((1, 2), (4, 4), (8, 8), (8, 8)):
        for times in blocks:
            layers += [layer.Conv2d(before, times * width, 3, padding=1, bias=False)]
            layers += [layer.BatchNorm2d(times * width), neuron.LIFNode(detach_reset=True)]
            before = times * width
        layers.append(layer.AvgPool2d(2))
    return nn.Sequential(*layers, layer.Flatten(), layer.Linear(before * 9, 10))


def mlp(small: bool) -> nn.Module:
    _, neuron, layer, _ = spikingjelly()
    wide = 64 if small else 512
    return louder(
        nn.Sequential(
            layer.Linear(784, wide), neuron.LIFNode(),
            layer.Linear(wide, wide), neuron.LIFNode(),
            layer.Linear(wide, 10),
        )
    )  # fmt: skip


def speech(small: bool) -> nn.Module:
    """Spikes of a cochlea, 700 channels, as in Cramer et al. 2020, arXiv:1910.07407."""
    _, neuron, layer, _ = spikingjelly()
    wide, layers = 64 if small else 512, []
    for before in (700, wide):
        layers += [layer.Linear(before, wide, bias=False), layer.BatchNorm1d(wide)]
        layers += [neuron.LIFNode(tau=5.0, detach_reset=True)]
    return nn.Sequential(*layers, layer.Linear(wide, 35), Membrane(0.95))


def dense(library: str, channels: int, classes: int, *readout: nn.Module) -> Any:
    """Makes a dense network of snnTorch's or Norse's neurons, without batch norm."""

    def make(small: bool) -> nn.Module:
        if library == "snntorch":
            from snntorch import Leaky

            kind, neuron = Steps, partial(Leaky, beta=0.8, init_hidden=True)
        else:
            from norse.torch import LIF

            kind, neuron = Whole, LIF
        wide = 64 if small else 512
        first, *others = (nn.Linear(*sizes) for sizes in
                          ((channels, wide), (wide, wide), (wide, classes)))  # fmt: skip
        layers = [first, *(layer for dense in others for layer in (neuron(), dense))]
        return louder(nn.Sequential(kind(*layers), *readout))

    return make


def start_anew(layers: nn.Sequential) -> None:
    """Reset those of snnTorch's."""
    for layer in layers:
        if hasattr(layer, "reset_mem"):
            layer.reset_mem()


class Whole(nn.Sequential):
    """Layers that take a sequence, `[T, N, C]`, and may return their last states with it."""

    def forward(self, x: Any) -> Tensor:
        start_anew(self)
        for layer in self:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


class Steps(nn.Sequential):
    """snnTorch's layers as it shows them: a loop over time, and in each step all layers."""

    def forward(self, x_seq: Tensor) -> Tensor:
        start_anew(self)
        step = super().forward
        return torch.stack([step(x) for x in x_seq])


class Membrane(nn.Module):
    """Leaky integrators that do not spike: v[t] = leak v[t - 1] + (1 - leak) x[t], `[T, N, C]`.

    As one product with a matrix of the leak's powers, whoever's neurons the network has.
    """

    def __init__(self, leak: float) -> None:
        super().__init__()
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(len(x), device=x.device, dtype=torch.float32)
        ago = steps[:, None] - steps
        weights = torch.where(ago >= 0, (1 - self.leak) * self.leak ** ago.clamp(min=0), 0.0)
        return torch.tensordot(weights.to(x.dtype), x, 1)


def louder(net: nn.Module) -> nn.Module:
    """Weights of dense layers times 6: without a batch norm, nothing would fire at the start."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 6
    return net


@dataclass(frozen=True)
class Network:
    make: Callable[[bool], nn.Module]
    shape: tuple[int, ...]  # of an input: [T, N, *]
    small: tuple[int, ...]
    library: str = "spikingjelly"

    @property
    def layouts(self) -> tuple[str, ...]:
        return ("channels_last", "NCHW") if len(self.shape) == 5 else ("",)


NETWORKS = {
    "SEW-ResNet-18": Network(sew_resnet18, (4, 32, 3, 224, 224), (2, 2, 3, 64, 64)),
    "CIFAR10Net": Network(cifar10net, (4, 64, 3, 32, 32), (2, 2, 3, 32, 32)),
    "Spikformer": Network(spikformer, (4, 64, 3, 32, 32), (2, 2, 3, 32, 32)),
    "MLP": Network(mlp, (25, 128, 784), (5, 8, 784)),
    "VGG (DVS)": Network(vgg, (16, 16, 2, 48, 48), (3, 2, 2, 48, 48)),
    "speech": Network(speech, (250, 128, 700), (20, 8, 700)),
    "SEW-ResNet-18 (8)": Network(sew_resnet18, (4, 8, 3, 224, 224), (2, 1, 3, 64, 64)),
    "MLP (snnTorch)": Network(dense("snntorch", 784, 10), (25, 128, 784), (5, 8, 784), "snntorch"),
    "speech (snnTorch)": Network(
        dense("snntorch", 700, 35, Membrane(0.95)), (250, 128, 700), (20, 8, 700), "snntorch"
    ),
    "MLP (Norse)": Network(dense("norse", 784, 10), (25, 128, 784), (5, 8, 784), "norse"),
    "speech (Norse)": Network(
        dense("norse", 700, 35, Membrane(0.95)), (250, 128, 700), (20, 8, 700), "norse"
    ),
}


def network(name: str, whose: str, dtype: str, layout: str, run: Run) -> nn.Module:
    """A network with these neurons; Skip, where it cannot be, says why."""
    _, neuron, _, functional = spikingjelly()
    torch.manual_seed(0)
    net = NETWORKS[name].make(run.args.small)
    functional.set_step_mode(net, "m")
    for parent in list(net.modules()):
        for key, child in list(parent.named_children()):
            known = isinstance(child, neuron.BaseNode) or type(child).__name__ in ("Leaky", "LIF")
            neurons = whose == "none" and known
            # Dropout of SpikingJelly's keeps a mask from call to call
            if neurons or "Dropout" in type(child).__name__:
                setattr(parent, key, nn.Identity())
    net, library = net.to(run.device), NETWORKS[name].library
    if library == "norse" and whose in OURS and dtype in HALF:
        raise Skip("accelerate leaves half precision to Norse, which mixes it")
    if whose == "tuned":
        tune(net, dtype, run.device)
    elif library == "snntorch" and whose in ("neuronjit", "none"):
        net[0] = Whole(*map(at_once, net[0]))
    elif whose in ("neuronjit", "stepped"):
        nj.accelerate(net, strict=True)
    elif whose in OURS:
        fuse(net, name)
    if layout == "channels_last":
        for weight in net.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return net


def at_once(layer: nn.Module) -> nn.Module:
    """snnTorch's neuron over a whole sequence, by one kernel; any other layer as it is."""
    from neuronjit.integrations.snntorch import Sequence

    return Sequence(layer) if hasattr(layer, "reset_mem") else layer


def tune(net: nn.Module, dtype: str, device: str) -> None:
    """SpikingJelly's neurons by its Triton kernels in half precision, too."""
    if dtype not in HALF or device != "cuda":
        raise Skip("in float32, and on a CPU, there is nothing to tune")
    from spikingjelly.activation_based import precision

    mode = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    config = precision.PrecisionConfig(mode=mode, neuron_storage=mode)
    precision.prepare_model_for_precision(net, device, config)


def fuse(net: nn.Module, name: str) -> None:
    """Accelerated, and each batch norm in the kernels of the neuron that follows it."""
    if "fuse" in inspect.signature(nj.accelerate).parameters:
        nj.accelerate(net, strict=True, fuse=True)
        return
    nj.accelerate(net, strict=True)
    if not nj.nn.fuse(net):
        raise Skip(f"{name} has no batch norm that could be fused with a neuron")


def batch(name: str, layout: str, run: Run) -> tuple[Tensor, Tensor]:
    shape = NETWORKS[name].small if run.args.small else NETWORKS[name].shape
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(shape, generator=generator)
    if name.startswith("speech"):
        x = (x < 0.05).float()
    x = x.flatten(0, 1).to(run.device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (shape[1],), generator=generator)
    return x.unflatten(0, shape[:2]), y.to(run.device)


# --- a step, and what is measured of it -----------------------------------------------------------


class ThenReset(nn.Module):
    """A network to compile: states that are reset do not leave the graph, to be differentiated."""

    def __init__(self, net: nn.Module, reset: Callable[[nn.Module], None] | None) -> None:
        super().__init__()
        self.net, self.reset = net, reset

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        if self.reset:
            self.reset(self.net)
        return out


class Step:
    """A training step; returns its loss."""

    def __init__(
        self, net: nn.Module, library: str, data: tuple[Tensor, Tensor], dtype: str, mode: str,
        packed: bool,
    ) -> None:  # fmt: skip
        # networks of other libraries start anew in their forwards
        self.reset = spikingjelly()[3].reset_net if library == "spikingjelly" else None
        self.net, self.mode = net, mode
        self.forward: Callable[[Tensor], Tensor] = net
        if mode in COMPILED:
            self.forward = torch.compile(ThenReset(net, self.reset), **COMPILED[mode])
        self.x, self.y = data
        self.half = HALF.get(dtype)
        self.packed = nj.packed_spikes if packed else contextlib.nullcontext
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def __call__(self) -> Tensor:
        if self.mode == "overhead":
            torch.compiler.cudagraph_mark_step_begin()
        if self.reset:
            self.reset(self.net)
        self.optimizer.zero_grad(set_to_none=True)
        kind = self.x.device.type
        with self.packed(), torch.autocast(kind, self.half, enabled=self.half is not None):
            out = self.forward(self.x)
            out = out.mean(0) if out.dim() == 3 else out
        loss = nn.functional.cross_entropy(out.float(), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def captured(step: Step) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph.replay


@dataclass
class Turn:
    """What is compared with each other: one network, dtype and layout, in some modes."""

    name: str
    dtype: str
    layout: str
    modes: tuple[str, ...]
    calls: dict[tuple[str, str], Callable[[], Any]] = field(default_factory=dict)
    found: dict[tuple[str, str], Row] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.dtype, self.layout)))

    def prepare(self, whose: str, mode: str, run: Run) -> None:
        """Build the network and run its first steps; then it can take its turns."""
        begin = time.perf_counter()
        if mode == "graph":
            if (whose, "eager") not in self.calls:
                return  # why is noted already
            self.calls[whose, mode] = captured(self.calls[whose, "eager"])
            synchronize()
            eager = self.found[whose, "eager"]
            first = time.perf_counter() - begin + eager["first_s"]
            self.found[whose, mode] = {**eager, "first_s": first}
            return
        if whose == "packed" and not hasattr(nj, "packed_spikes"):
            raise Skip("this neuronjit has no packed_spikes")
        net = network(self.name, whose, self.dtype, self.layout, run)
        data = batch(self.name, self.layout, run)
        library = NETWORKS[self.name].library
        step = Step(net, library, data, self.dtype, mode, whose == "packed")
        losses = [step().item()]
        row: Row = {"first_s": time.perf_counter() - begin}
        losses += [step().item() for _ in range(2)]
        if run.device == "cuda":
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            synchronize()
            row["peak_MB"] = (torch.cuda.max_memory_allocated() - held) / 2**20
        self.calls[whose, mode], self.found[whose, mode] = step, {**row, "losses": losses}

    def measure(self, run: Run) -> None:
        """Prepare all that there is time for, then let them take turns."""
        late, library = [], NETWORKS[self.name].library
        if importlib.util.find_spec(library) is None:
            run.note(f"{self.name} left out: {library} is not installed")
            return
        for mode in self.modes:
            for whose in COMPILE if mode in COMPILED else WHOSE:
                if whose not in LIBRARIES[library] or whose not in run.args.whose.split(","):
                    continue
                if time.perf_counter() - run.started > run.args.seconds:
                    late.append(mode)
                    continue
                # Dynamo does not bear to be interrupted: what it compiles later would fail
                limit = 1e6 if mode in COMPILED else None
                with run.attempt(f"{self}, {WHOSE[whose]}, {mode}", limit):
                    try:
                        self.prepare(whose, mode, run)
                    except Skip as reason:
                        run.note(f"{WHOSE[whose]} left out: {reason}")
        if late:
            modes = ", ".join(dict.fromkeys(late))
            run.note(f"{self}: the time was over (--seconds) before {len(late)} steps of {modes}")
        where = dict(network=self.name, dtype=self.dtype, layout=self.layout)
        if self.calls:  # what was measured of it in an earlier turn, in fewer modes, is done anew
            run.rows = [row for row in run.rows if not where.items() <= row.items()]
        rounds = 3 if run.args.small else 7
        named = {" ".join(key): (key, call) for key, call in self.calls.items()}
        calls = {name: call for name, (_, call) in named.items()}
        times: dict[str, Row] = {}
        with run.attempt(f"{self}: taking turns", limit=1e6):
            times = wall(run, str(self), calls, rounds, block=0.05)
        if not times:  # one of them does not bear the others in between
            for name, call in calls.items():
                with run.attempt(f"{self}, {name}"):
                    times |= wall(run, str(self), {name: call}, rounds, block=0.05)
        for name, took in times.items():
            (whose, mode), _ = named[name]
            row = self.found[whose, mode]
            row |= {"ms": took["us"] / 1e3, "ms_min": took["us_min"] / 1e3}
            error = row["loss_error"] = self.loss_error(whose, mode)
            if error is not None and error > (0.2 if self.dtype in HALF else 0.01):
                run.note(f"{self}, {name}: losses of three steps differ by up to {error:.0%}")
            which = {"turn": run.turn, "measured": run.measured, **where}
            run.rows.append({**which, "whose": whose, "mode": mode, **row})
            print(f"{self}, {name}: {row['ms']:.2f} ms, first {row['first_s']:.1f} s", flush=True)
        run.turn += 1

    def loss_error(self, whose: str, mode: str) -> float | None:
        """The greatest relative distance of three losses from the library's own eager ones."""
        first = self.found.get((NETWORKS[self.name].library, "eager"))
        if first is None or whose == "none":
            return None
        pairs = zip(first["losses"], self.found[whose, mode]["losses"], strict=True)
        return max(abs(a - b) / abs(a) if math.isfinite(b) else math.inf for a, b in pairs)


def turns(args: argparse.Namespace, device: str) -> Iterator[Turn]:
    """All of it, the most important first."""
    names = [name for name in NETWORKS if name in args.only.split(",")]
    asked = args.modes.split(",")
    quick = tuple(mode for mode in ("eager", "graph") if mode in asked)
    slow = tuple(mode for mode in COMPILED if mode in asked)
    if device == "cpu":
        yield from (Turn(n, "float32", NETWORKS[n].layouts[-1], quick + slow) for n in names)
        yield from (Turn(n, "bfloat16", NETWORKS[n].layouts[0], quick) for n in names)
        return
    foreign = [name for name in names if NETWORKS[name].library != "spikingjelly"]
    others = [(name, dtype, "") for dtype in ("float16", "float32") for name in foreign]
    names = [name for name in names if name not in foreign]
    images = [name for name in names if len(NETWORKS[name].layouts) == 2]
    order = [(name, "float16", NETWORKS[name].layouts[0]) for name in names]
    order += [(name, "float32", NETWORKS[name].layouts[-1]) for name in names]
    order += others
    order += [(name, "float16", "NCHW") for name in images]
    order += [(name, "float32", "channels_last") for name in images]
    rest = [(name, "bfloat16", layout) for name in names for layout in NETWORKS[name].layouts]
    rest = sorted(rest, key=lambda turn: turn[2] == "NCHW")
    yield from (Turn(*turn, quick + slow) for turn in order + rest)


# --- what is written ------------------------------------------------------------------------------


def place(row: Row) -> tuple[int, ...]:
    """Where a row stands in the tables: by network, then by dtype and layout."""
    layouts = ["channels_last", "", "NCHW"]
    kinds = DTYPES.index(row["dtype"]), layouts.index(row["layout"])
    return ([*NETWORKS].index(row["network"]), *kinds, row["turn"])


def label(row: Row) -> str:
    return f"{row['network']}, {row['dtype']} {row['layout']}".strip()


def table(rows: list[Row], value: str, form: str, over: bool = False) -> str:
    """A line for each network, dtype and layout; a column for each kind of neuron."""
    columns = [whose for whose in WHOSE if any(row["whose"] == whose for row in rows)]
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["turn"], label(row)), {})[row["whose"]] = row
    cells = []
    for (_, name), found in lines.items():
        ours = found.get("neuronjit")
        cells.append([name])
        for whose in columns:
            row = found.get(whose)
            text = "" if row is None or value not in row else form.format(row[value])
            if over and text and ours and whose != "neuronjit":
                text += f" ({row[value] / ours[value]:.2f}x)"
            cells[-1].append(text)
    return markdown(["network", *(WHOSE[whose] for whose in columns)], cells)


def best(rows: list[Row], whose: tuple[str, ...]) -> Row | None:
    found = [row for row in rows if row["whose"] in whose]
    return min(found, key=lambda row: row["ms"], default=None)


def glance(rows: list[Row]) -> str:
    """As people run the library, each library's fastest mode, and the floor."""
    header = ["network", "SpikingJelly (or as named) as it comes, eager", "its fastest"]
    header += ["our fastest", "we are faster than each by", "fastest without neurons"]
    lines = []
    for turn in dict.fromkeys(row["turn"] for row in rows):
        mine = [row for row in rows if row["turn"] == turn]
        plain = best([row for row in mine if row["mode"] == "eager"], tuple(LIBRARIES))
        theirs, ours, none = (best(mine, w) for w in (PEERS, OURS, ("none",)))
        cells = [f"{plain['ms']:.2f}" if plain else ""]
        for row in (theirs, ours):
            how = f" ({row['whose']}, {row['mode']})" if row else ""
            cells.append(f"{row['ms']:.2f}{how}" if row else "")
        times = [f"{row['ms'] / ours['ms']:.2f}x" for row in (plain, theirs) if row and ours]
        cells += [", ".join(times), f"{none['ms']:.2f} ({none['mode']})" if none else ""]
        lines.append([label(mine[0]), *cells])
    return markdown(header, lines)


def sizes(small: bool) -> str:
    found = ((name, net.small if small else net.shape) for name, net in NETWORKS.items())
    return "; ".join(f"{name} {list(shape)}" for name, shape in found)


def page(run: Run, machine: Row) -> str:
    parts = [
        "# Whole networks: milliseconds a training step",
        ", ".join(f"{k} {v}" for k, v in machine.items()),
        "A step is reset, forward, loss, backward and SGD, in half precision by autocast. The"
        " networks are SpikingJelly's own, or built of its layers. *SpikingJelly* is the network"
        " as it comes, *tuned* with its PrecisionConfig (neuron_storage), which keeps its neurons"
        " on Triton in half precision; *neuronjit* is the same network after `nj.accelerate`,"
        " *fused* with each batch norm in the kernels of the neuron that follows it, *packed* with"
        " spikes kept as bits for backward. Networks named (snnTorch) and (Norse) are of their"
        " layers: snnTorch's loop over time, which *step by step* keeps after `nj.accelerate`, and"
        " *neuronjit* replaces by `Sequence`; Norse's layers after `nj.accelerate`. *No neurons*:"
        " identities stand in their place; no library can be faster than that. What stands in a row"
        " was measured in turns, in one process; medians.",
        f"Inputs `[T, N, *]`: {sizes(run.args.small)}.",
        "## At a glance: each library in its fastest mode",
        glance(run.rows),
    ]
    for mode, title in MODES.items():
        if rows := [row for row in run.rows if row["mode"] == mode]:
            parts += [
                f"## {title}",
                "ms, and how many times ours.",
                table(rows, "ms", "{:.2f}", True),
            ]
    eager = [row for row in run.rows if row["mode"] == "eager"]
    if any("peak_MB" in row for row in eager):
        parts += ["## Peak memory of a step, MB above what lives from step to step"]
        parts += [table(eager, "peak_MB", "{:.0f}", True)]
    parts += ["## Time to the first step, seconds"]
    parts += [
        "From nothing to the end of the first step, compilation included (in graphs, capture too),"
        " with empty caches; kernels that an earlier row compiled are there already."
    ]
    for mode in MODES:
        if rows := [row for row in run.rows if row["mode"] == mode]:
            parts += [f"{mode}:", table(rows, "first_s", "{:.1f}")]
    parts += ["## When rows were measured", *measured(run.rows)]
    parts += ["## Notes", "\n".join(f"- {note}" for note in run.notes) or "None."]
    return "\n\n".join(parts) + "\n"


def measured(rows: list[Row]) -> Iterator[str]:
    """The runs that rows are of: what stands in different rows is not compared."""
    for when in dict.fromkeys(row["measured"] for row in rows):
        found = dict.fromkeys(label(row) for row in rows if row["measured"] == when)
        yield f"{when}: {'; '.join(found)}."


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Each way to run a network, as time over that of our captured step; a line a network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    turns = list(dict.fromkeys(row["turn"] for row in rows))
    shapes = dict(zip(MODES, "os^v<", strict=True))
    names: dict[int, str] = {}
    figure, axis = pyplot.subplots(figsize=(11, 2 + 0.32 * len(turns)))
    for place, turn in enumerate(turns):
        mine = [row for row in rows if row["turn"] == turn]
        names[place] = label(mine[0])
        one = best(mine, OURS) or mine[0]
        for row in mine:
            color = f"C{list(WHOSE).index(row['whose'])}"
            axis.plot(row["ms"] / one["ms"], place, shapes[row["mode"]], color=color, alpha=0.8)
    used = {key: [v for v in known if any(row[key] == v for row in rows)]
            for key, known in (("whose", WHOSE), ("mode", MODES))}  # fmt: skip
    for whose in used["whose"]:
        axis.plot([], [], "o", color=f"C{list(WHOSE).index(whose)}", label=WHOSE[whose])
    for mode in used["mode"]:
        axis.plot([], [], shapes[mode], color="grey", label=mode)
    axis.set(xscale="log", yticks=list(names), yticklabels=list(names.values()))
    axis.set(xlabel="time of a training step over our fastest", title=title)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.invert_yaxis()
    axis.axvline(1, color="black", lw=0.8)
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the files")
    parser.add_argument("--only", default=",".join(NETWORKS), help="networks")
    parser.add_argument("--modes", help=f"of {','.join(MODES)}; on a CPU eager, else eager,graph")
    parser.add_argument("--whose", default=",".join(WHOSE), help="neurons, the columns")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of the rows")
    parser.add_argument("--name", default="networks", help="of the files")
    parser.add_argument("--add", action="store_true", help="to the results that the folder has")
    parser.add_argument("--small", action="store_true", help="reduced sizes: does it run?")
    parser.add_argument(
        "--seconds", type=float, help="prepare no step after these; 420, or 60 if small"
    )
    parser.add_argument(
        "--peer-seconds",
        type=float,
        default=90,
        help="limit to prepare a step that is not compiled",
    )
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not args.small:
        parser.error("no CUDA device; these networks are too large for a CPU without --small")
    args.modes = args.modes or ("eager,graph" if cuda else "eager")
    listed: list[tuple[str, Iterable[str]]] = [
        (args.only, NETWORKS), (args.modes, MODES), (args.whose, WHOSE), (args.dtypes, DTYPES),
    ]  # fmt: skip
    for given, known in listed:
        if unknown := set(given.split(",")) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}. Known: {','.join(known)}")
    if not cuda and {"graph", "overhead"} & set(args.modes.split(",")):
        parser.error("graph and overhead are modes of CUDA devices")
    args.seconds = args.seconds or (60.0 if args.small else 420.0)
    args.quick, args.peers = args.small, "neuronjit,spikingjelly"
    return args


def main() -> None:
    args = arguments()
    spikingjelly()  # without it there is nothing to measure
    run = Run("cuda" if torch.cuda.is_available() else "cpu", args)
    run.measured = f"{datetime.date.today()}, neuronjit {build.version()}"
    if args.add:
        earlier = json.loads((args.out / f"{args.name}.json").read_text())
        run.rows, run.notes = earlier["rows"], earlier["notes"]
        run.turn = 1 + max(row["turn"] for row in run.rows)
    if run.device == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs are captured on it
    torch._dynamo.config.recompile_limit = 64  # all variants of a network share one forward
    # fresh caches, so that all first steps start from nothing
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        for name in ("NEURONJIT_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            os.environ[name] = f"{caches}/{name}"
        with run.attempt("warming up"):  # libraries that are loaded once are nobody's first step
            name = args.only.split(",")[0]
            Turn(name, "float32", NETWORKS[name].layouts[-1], ()).prepare("none", "eager", run)
        for turn in turns(args, run.device):
            if turn.dtype not in args.dtypes.split(","):
                continue
            with run.attempt(str(turn), limit=1e6):
                turn.measure(run)
            turn.calls.clear()
            torch._dynamo.reset()
            gc.collect()
            if run.device == "cuda":
                torch.cuda.empty_cache()
            run.rows.sort(key=place)
            text = page(run, save(run, args.name))
            (args.out / f"{args.name}.md").write_text(text)
    print(text)
    with run.attempt("the picture"):  # matplotlib may not be there
        plot(run.rows, args.out / f"{args.name}.png", f"Training steps, {run.device}")


if __name__ == "__main__":
    main()
