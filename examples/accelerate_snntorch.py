"""A snnTorch network as it is, accelerated, and over whole sequences, on handwritten digits.

    pip install snntorch==1.0.0
    python examples/accelerate_snntorch.py --epochs 2

`accelerate` leaves the network's loop over time as it is, and makes each call of a neuron one
kernel. `Sequence` takes the place of the loop: one kernel for all time steps of a layer.
"""

import argparse
import time

import torch
from digits import constant_current, load
from torch import Tensor, nn
from torch.nn import functional as F

import neuronjit as nj
from neuronjit.integrations.snntorch import Sequence

try:
    import snntorch as snn
except ImportError as error:
    raise SystemExit(f"{error}; this example needs: pip install snntorch==1.0.0") from None

BATCH = 64


class Net(nn.Module):
    """`[T, N, 64]` to the spikes of 10 neurons, `[T, N, 10]`; the same numbers at every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        slope = snn.surrogate.fast_sigmoid(slope=10)
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 10)
        self.lif1 = snn.Leaky(beta=0.8, learn_beta=True, spike_grad=slope)
        self.lif2 = snn.Synaptic(alpha=0.5, beta=0.8, spike_grad=slope)
        self.lif3 = snn.Leaky(beta=0.9, threshold=0.5, learn_threshold=True, spike_grad=slope)

    def forward(self, x_seq: Tensor) -> Tensor:
        mem1, (syn2, mem2), mem3 = [
            neuron.reset_mem() for neuron in (self.lif1, self.lif2, self.lif3)
        ]
        out = []
        for x in x_seq:
            spikes, mem1 = self.lif1(self.fc1(x), mem1)
            spikes, syn2, mem2 = self.lif2(self.fc2(spikes), syn2, mem2)
            spikes, mem3 = self.lif3(self.fc3(spikes), mem3)
            out.append(spikes)
        return torch.stack(out)


class WholeSequences(Net):
    """The same without a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lif1, self.lif2, self.lif3 = map(Sequence, (self.lif1, self.lif2, self.lif3))

    def forward(self, x_seq: Tensor) -> Tensor:
        for neuron in (self.lif1, self.lif2, self.lif3):
            neuron.reset_mem()
        spikes, _ = self.lif1(self.fc1(x_seq))
        spikes, _, _ = self.lif2(self.fc2(spikes))
        spikes, _ = self.lif3(self.fc3(spikes))
        return spikes


def train(net: nn.Module, epochs: int, time_steps: int, device: str) -> tuple[list[float], float]:
    """Losses of all steps, and the seconds of the last epoch."""
    images, labels, *_ = load(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    torch.manual_seed(1)
    losses = []
    for _ in range(epochs):
        begun = time.perf_counter()
        for batch in torch.randperm(len(images), device=device).split(BATCH):
            optimizer.zero_grad()
            out = net(constant_current(images[batch], time_steps).flatten(2))
            loss = F.cross_entropy(out.sum(0), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        seconds = time.perf_counter() - begun
    return losses, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--time-steps", type=int, default=16)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, *_, test_images, test_labels = load(device)
    sample = constant_current(images[:BATCH], args.time_steps).flatten(2)

    nets = {"before": Net(), "accelerated": Net(), "whole sequences": WholeSequences()}
    for net in nets.values():
        net.to(device)
    print(nj.accelerate(nets["accelerated"], sample))
    with torch.no_grad():
        want, *others = (net(sample) for net in nets.values())
    differing = sum(int((spikes != want).sum()) for spikes in others)
    print(f"before training, {differing} of {want.numel()} spikes of the last layer differ")

    found = {}
    for name, net in nets.items():
        losses, seconds = train(net, args.epochs, args.time_steps, device)
        net.eval()
        with torch.no_grad():
            out = net(constant_current(test_images, args.time_steps).flatten(2))
        right = (out.sum(0).argmax(1) == test_labels).float().mean().item()
        found[name] = losses[:3]
        print(f"{name}: {right:.2%} of the test images right; the last epoch took {seconds:.2f} s")
    apart = max(
        abs(a - b) / a for name in nets for a, b in zip(found["before"], found[name], strict=True)
    )
    print(f"the losses of the first three steps differ by {apart:.1e} of their size at most")


if __name__ == "__main__":
    main()
