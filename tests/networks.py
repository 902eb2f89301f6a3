"""SpikingJelly's own networks, reduced, with our layers in them or with its own."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import neuronjit as nj


def spikingjelly() -> Any:
    """Its models' modules, neuron and functional."""
    # its models import these, of which nothing is used here
    names = ["h5py", "torchvision", "torchvision._internally_replaced_utils"]
    stubs = [name for name in names if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in stubs:
        sys.modules[name] = stub = types.ModuleType(name)
        stub.load_state_dict_from_url = None  # type: ignore[attr-defined]
    try:
        from spikingjelly.activation_based import functional, neuron
        from spikingjelly.activation_based.model import parametric_lif_net, sew_resnet, spikformer
    finally:
        for name in stubs:
            del sys.modules[name]
    return (parametric_lif_net, sew_resnet, spikformer), neuron, functional


def cifar10net(neurons: Any = nj.nn, channels: int = 8) -> torch.nn.Module:
    """Fang et al. 2021: convolutions, batch norms, PLIF, pooling, voting; without dropout."""
    (models, _, _), _, functional = spikingjelly()
    torch.manual_seed(0)
    net = models.CIFAR10Net(channels, neurons.ParametricLIFNode, detach_reset=True)
    functional.set_step_mode(net, "m")
    for name, module in net.conv_fc.named_children():
        if "Dropout" in type(module).__name__:  # it keeps a mask of its own from call to call
            setattr(net.conv_fc, name, torch.nn.Identity())
    return louder(net)


def sew_resnet18(neurons: Any = nj.nn) -> torch.nn.Module:
    """Fang et al. 2021: additions after the neurons."""
    (_, models, _), _, functional = spikingjelly()
    torch.manual_seed(0)
    net = models.sew_resnet18(
        num_classes=10, cnf="ADD", spiking_neuron=neurons.IFNode, detach_reset=True
    )
    functional.set_step_mode(net, "m")
    return net


def sew_resnet10(neurons: Any) -> torch.nn.Module:
    """The same with half the blocks."""
    (_, models, _), _, functional = spikingjelly()
    torch.manual_seed(0)
    net = models.SEWResNet(
        models.BasicBlock, [1, 1, 1, 1], num_classes=10, cnf="ADD", spiking_neuron=neurons.IFNode,
        detach_reset=True,
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def spikformer(neurons: Any, size: int = 32, depths: int = 2) -> torch.nn.Module:
    """Zhou et al. 2023: attention of spikes."""
    (_, _, models), _, _ = spikingjelly()
    torch.manual_seed(0)
    return models.Spikformer(
        img_size_h=size, img_size_w=size, patch_size=4, num_classes=10, embed_dims=2 * size,
        num_heads=4, depths=depths, spiking_neuron=neurons.LIFNode,
    )  # fmt: skip


def mlp(neurons: Any = nj.nn) -> torch.nn.Module:
    """Dense layers of images, `[T, N, 3, 8, 8]`, and two kinds of neurons."""
    spiking = neurons.LIFNode(step_mode="m"), neurons.ParametricLIFNode(step_mode="m")
    torch.manual_seed(0)
    dense = [torch.nn.Linear(*sizes) for sizes in ((192, 24), (24, 24), (24, 10))]
    return louder(
        torch.nn.Sequential(
            torch.nn.Flatten(2), dense[0], spiking[0], dense[1], spiking[1], dense[2]
        )
    )


def normed_mlp(neurons: Any) -> torch.nn.Module:
    """Dense layers with batch norms, as for speech."""
    from spikingjelly.activation_based import layer

    torch.manual_seed(0)
    layers = [
        block
        for sizes in ((192, 24), (24, 24))
        for block in (
            layer.Linear(*sizes, bias=False, step_mode="m"),
            layer.BatchNorm1d(24, step_mode="m"),
            neurons.LIFNode(tau=5.0, detach_reset=True, step_mode="m"),
        )
    ]
    return torch.nn.Sequential(torch.nn.Flatten(2), *layers, torch.nn.Linear(24, 10))


def convolutional() -> torch.nn.Module:
    """Of our own layers alone: the fold of time into batch, and learned thresholds."""
    torch.manual_seed(0)
    first = nj.nn.EachStep(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6))
    last = nj.nn.EachStep(torch.nn.AvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(54, 10))
    lif = nj.nn.LIF(learnable="v_threshold", channels=6, detach_reset=True)
    return torch.nn.Sequential(first, lif, last)


def louder(net: torch.nn.Module) -> torch.nn.Module:
    """Dense weights times 6: without a batch norm nothing would fire, and losses stay at ln 10."""
    for module in net.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data *= 6
    return net


def without_neurons(net: torch.nn.Module) -> torch.nn.Module:
    """The network with identities in the place of its neurons, SpikingJelly's or ours."""
    for parent in list(net.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nj.nn.Neuron) or hasattr(child, "surrogate_function"):
                setattr(parent, key, torch.nn.Identity())
    return net


# with the size of their images; at 32 pixels the last features of the ResNet are 1 x 1, for which
# torch 2.11 fails to compile the convolutions' backward, whatever the neurons are
NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "cifar10net": (cifar10net, 32),
    "sew_resnet18": (sew_resnet18, 64),
}


def batches(
    count: int, device: str, size: int, counts: tuple[int, ...] = (2,)
) -> list[tuple[Tensor, Tensor]]:
    """`[4, N, 3, size, size]` and labels; the batch sizes N take turns."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for turn in range(count):
        samples = counts[turn % len(counts)]
        x = torch.rand((4, samples, 3, size, size), generator=generator)
        y = torch.randint(0, 10, (samples,), generator=generator)
        made.append((x.to(device), y.to(device)))
    return made


def train(
    net: torch.nn.Module,
    run: Callable[[Tensor], Tensor],
    data: list[tuple[Tensor, Tensor]],
    *,
    carry: bool = False,
    amp: torch.dtype | None = None,
) -> list[float]:
    """The losses of some steps of SGD; the state is reset before each, or carried and detached."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    nj.nn.reset_net(net)
    losses = []
    for x, y in data:
        if carry:
            nj.nn.detach_net(net)
        else:
            nj.nn.reset_net(net)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, amp or torch.bfloat16, enabled=amp is not None):
            out = run(x).float()
            out = out.mean(0) if out.dim() == 3 else out
            loss = torch.nn.functional.cross_entropy(out, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
