"""A SpikingJelly network as it is, then with its neurons on our kernels, on handwritten digits.

    pip install spikingjelly==2.0.0
    python examples/accelerate_spikingjelly.py --epochs 2

`accelerate` is the only line that is new. Given a batch, it shows on copies of the network what
changes: nothing but time and memory.
"""

import argparse
import time

import torch
from digits import constant_current, load
from torch import nn
from torch.nn import functional as F

import neuronjit as nj

try:
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
except ImportError as error:
    raise SystemExit(f"{error}; this example needs: pip install spikingjelly==2.0.0") from None

BATCH = 64


def make_net() -> nn.Sequential:
    """`[T, N, 1, 8, 8]` to `[T, N, 10]`, with three kinds of neurons; the same at every call."""
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32, momentum=0.3),
        neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True),
        layer.AvgPool2d(2), layer.Conv2d(32, 64, 3, padding=1, bias=False),
        layer.BatchNorm2d(64, momentum=0.3),
        neuron.ParametricLIFNode(surrogate_function=surrogate.ATan(), detach_reset=True),
        layer.AvgPool2d(2), layer.Flatten(), layer.Linear(256, 128, bias=False),
        neuron.IFNode(v_threshold=0.5), layer.Linear(128, 10),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def train(net: nn.Module, epochs: int, time_steps: int, device: str) -> tuple[list[float], float]:
    """Losses of all steps, and the seconds of the last epoch."""
    images, labels, *_ = load(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    torch.manual_seed(1)
    losses = []
    for _ in range(epochs):
        begun = time.perf_counter()
        for batch in torch.randperm(len(images), device=device).split(BATCH):
            functional.reset_net(net)
            optimizer.zero_grad()
            out = net(constant_current(images[batch], time_steps))
            loss = F.cross_entropy(out.mean(0), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - begun
    return losses, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--time-steps", type=int, default=4)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, *_, test_images, test_labels = load(device)
    sample = constant_current(images[:BATCH], args.time_steps)

    plain, fast = make_net().to(device), make_net().to(device)
    print(nj.accelerate(fast, sample))
    found = {}
    for name, net in (("before", plain), ("after", fast)):
        losses, seconds = train(net, args.epochs, args.time_steps, device)
        net.eval()
        functional.reset_net(net)
        with torch.no_grad():
            answers = net(constant_current(test_images, args.time_steps)).mean(0).argmax(1)
        right = (answers == test_labels).float().mean().item()
        found[name] = losses
        print(f"{name}: {right:.2%} of the test images right; the last epoch took {seconds:.2f} s")
    apart = max(abs(a - b) / a for a, b in zip(found["before"][:3], found["after"], strict=False))
    print(f"the losses of the first three steps differ by {apart:.1e} of their size at most")


if __name__ == "__main__":
    main()
