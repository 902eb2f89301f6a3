"""A whole training step as one CUDA graph, on scikit-learn's handwritten digits.

    python examples/train_graph.py --epochs 5

A graph is captured once and replayed for each batch: the GPU no longer waits for Python. The
state of the neurons is reset inside the step, so every replay does it too. Without a GPU the same
step runs in eager mode.
"""

import argparse
import time
from collections.abc import Callable

import torch
from digits import accuracy, constant_current, load, make_net
from torch import Tensor, nn
from torch.nn import functional as F

import neuronjit as nj

BATCH = 64


def training_step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor):
    """One step on what is in `x` and `y` when it runs; returns a function that gives the loss."""

    def step() -> Tensor:
        nj.nn.reset_net(net)
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(net(x).mean(0), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a CUDA graph: a few eager runs compile and allocate, then one is recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def train(graph: bool, epochs: int, time_steps: int) -> tuple[float, float]:
    """Test accuracy, and milliseconds a training step in the last epoch."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y, x_test, y_test = load(device)
    net = make_net("lif").to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3, capturable=device == "cuda")
    inputs = torch.zeros(time_steps, BATCH, 1, 8, 8, device=device)
    labels = torch.zeros(BATCH, dtype=torch.long, device=device)
    step = training_step(net, optimizer, inputs, labels)
    run = captured(step) if graph else step
    milliseconds = 0.0
    for epoch in range(1, epochs + 1):
        start, count = time.perf_counter(), 0
        for chosen in torch.randperm(len(x), device=device).split(BATCH):
            if len(chosen) < BATCH:  # a graph has one size
                continue
            inputs.copy_(constant_current(x[chosen], time_steps))
            labels.copy_(y[chosen])
            loss, count = run(), count + 1
        last = loss.item()  # waits for the GPU, once an epoch
        milliseconds = (time.perf_counter() - start) / count * 1e3
        print(f"epoch {epoch:2d}  loss of the last batch {last:.3f}  {milliseconds:.2f} ms a step")
    found = accuracy(net, x_test, y_test, lambda images: constant_current(images, time_steps))
    return found, milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--time-steps", type=int, default=8)
    args = parser.parse_args()
    print("eager")
    eager, slow = train(False, args.epochs, args.time_steps)
    print(f"test accuracy: {eager:.2%}")
    if not torch.cuda.is_available():
        print("CUDA graphs need a GPU: torch finds none")
        return
    print("one CUDA graph")
    found, fast = train(True, args.epochs, args.time_steps)
    print(f"test accuracy: {found:.2%}")
    print(f"a training step: {fast:.2f} ms, eager {slow:.2f} ms ({slow / fast:.1f} times)")


if __name__ == "__main__":
    main()
