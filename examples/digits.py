"""Train a convolutional spiking network on scikit-learn's 1,797 handwritten digits, and draw it.

    python examples/digits.py                  # on the GPU where there is one, else on the CPU
    python examples/digits.py --neuron plif --epochs 10 --time-steps 16 --out picture.png

Each image is shown as a constant current for all time steps. The first layer turns it into spikes;
what the last layer says, averaged over time, is the answer.
"""

import argparse
import copy
import os
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuronjit as nj

try:
    from matplotlib.figure import Figure
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit(f"{error}; the examples need more: pip install -e '.[examples]'") from None

NEURONS = {name.lower(): getattr(nj.nn, name) for name in ("IF", "LIF", "PLIF", "QIF", "EIF")}
NEURONS["izhikevich"] = nj.nn.Izhikevich


def make_net(neuron: str) -> nn.Sequential:
    """`[T, N, 1, 8, 8]` to `[T, N, 10]`: two convolutions and a dense layer that spike."""

    def spiking() -> nj.nn.Neuron:
        return NEURONS[neuron](detach_reset=True)

    return nn.Sequential(
        nj.nn.EachStep(
            nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32, momentum=0.3)
        ),
        spiking(),
        nj.nn.EachStep(nn.AvgPool2d(2), nn.Conv2d(32, 64, 3, padding=1, bias=False)),
        nj.nn.EachStep(nn.BatchNorm2d(64, momentum=0.3)),
        spiking(),
        nj.nn.EachStep(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 128, bias=False)),
        nj.nn.EachStep(nn.BatchNorm1d(128, momentum=0.3)),
        spiking(),
        nn.Linear(128, 10),
    )


def load(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images `[N, 8, 8]` between 0 and 1 and labels `[N]`: to train on, then to test on.

    The images come writer by writer, each of whom begins with 0 to 9 three times over. The last
    three writers, from image 1415 on, are kept for the test: a random fifth would show hands that
    the network was trained on (and is 1 to 2 % easier).
    """
    digits = load_digits()
    images = torch.as_tensor(digits.images / 16, dtype=torch.float32, device=device)
    labels = torch.as_tensor(digits.target, device=device)
    return images[:1415], labels[:1415], images[1415:], labels[1415:]


def constant_current(images: Tensor, time_steps: int) -> Tensor:
    """`[N, 8, 8]` to `[T, N, 1, 8, 8]`."""
    return images[None, :, None].expand(time_steps, -1, -1, -1, -1)


def answer(net, x_seq):
    """`[N, 10]`: the output averaged over time."""
    return net(x_seq).mean(0)


def train_epoch(net, optimizer, data, encode, read=answer, batch=64, after=lambda: None):
    """Mean loss of one pass over the training images in random order."""
    net.train()
    x, y, total = data[0], data[1], 0.0
    for chosen in torch.randperm(len(x), device=x.device).split(batch):
        nj.nn.reset_net(net)
        loss = F.cross_entropy(read(net, encode(x[chosen])), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(chosen)
        after()
    return total / len(x)


@torch.no_grad()
def accuracy(net, x, y, encode, read=answer):
    net.eval()
    nj.nn.reset_net(net)
    return (read(net, encode(x)).argmax(1) == y).double().mean().item()


def train(net, data, encode, epochs, read=answer, lr=2e-3, batch=64):
    """Train with a progress bar; returns a dict of numbers for each epoch."""
    x, y, x_test, y_test = data
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history = []
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("batches"), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("", total=epochs * -(-len(x) // batch))
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            loss = train_epoch(
                net, optimizer, data, encode, read, batch, partial(progress.advance, task)
            )
            seconds = time.perf_counter() - start  # loss.item() has waited for the GPU
            schedule.step()
            seen, unseen = (
                accuracy(net, *part, encode, read) for part in ((x, y), (x_test, y_test))
            )
            history.append({"loss": loss, "train": seen, "test": unseen, "seconds": seconds})
            progress.console.print(
                f"epoch {epoch:2}  loss {loss:.3f}  test accuracy {unseen:6.2%}  {seconds:.2f} s",
                highlight=False,
            )
    return history


# --- what the kernels save ------------------------------------------------------------------------


def with_backend(net, backend):
    """A copy of the network whose neurons run on this backend."""
    twin = copy.deepcopy(net)
    for module in twin.modules():
        if isinstance(module, nj.nn.Neuron):
            module.backend = backend
    return twin


def compare_epochs(net, data, encode, rounds=3):
    """Seconds for an epoch of training with kernels and with neurons in eager PyTorch, by turns."""
    seconds = {None: [], "eager": []}
    for backend in [*seconds] * rounds:
        twin = with_backend(net, backend)
        optimizer = torch.optim.Adam(twin.parameters(), lr=1e-4)
        start = time.perf_counter()
        train_epoch(twin, optimizer, data, encode)
        seconds[backend].append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds.values()]


def compare_neurons(net, x_seq, rounds=20):
    """The same for the layers of neurons alone, forward and backward on one batch."""
    inputs = []
    layers = [module for module in net.modules() if isinstance(module, nj.nn.Neuron)]
    hooks = [m.register_forward_hook(lambda _, given, __: inputs.append(given[0])) for m in layers]
    nj.nn.reset_net(net)
    net(x_seq)
    for hook in hooks:
        hook.remove()
    inputs = [x.detach().requires_grad_() for x in inputs]
    grads = [torch.randn_like(x) for x in inputs]
    twins = {b: with_backend(nn.ModuleList(layers), b) for b in (None, "eager")}
    synchronize = torch.cuda.synchronize if x_seq.is_cuda else lambda: None
    seconds = {backend: [] for backend in twins}
    for backend in [*twins] * (rounds + 1):
        nj.nn.reset_net(twins[backend])
        synchronize()
        start = time.perf_counter()
        for layer, x, grad in zip(twins[backend], inputs, grads, strict=True):
            torch.autograd.grad(layer(x), x, grad)
        synchronize()
        seconds[backend].append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds.values()]  # the first warms up


# --- the picture ----------------------------------------------------------------------------------


def hardest(net, x, y, encode):
    """The index of the image whose first step says its digit least, and whose last is right."""
    net.eval()
    nj.nn.reset_net(net)
    with torch.no_grad():
        said = net(encode(x))
    first = said[0].softmax(1).gather(1, y[:, None])[:, 0]
    return int(torch.where(said.mean(0).argmax(1) == y, first, 2.0).argmin())


def watch(net, x_seq):
    """For one image: (name, spikes `[T, neurons]`) of each layer of neurons; the output by step."""
    seen, hooks, before = [], [], ""
    for module in net.modules():
        before = {nn.Conv2d: "Convolution", nn.Linear: "Dense"}.get(type(module), before)
        if isinstance(module, nj.nn.Neuron):
            keep = partial(
                lambda name, _, __, out: seen.append((name, out.flatten(1).cpu())), before
            )
            hooks.append(module.register_forward_hook(keep))
    net.eval()
    nj.nn.reset_net(net)
    with torch.no_grad():
        said = net(x_seq)[:, 0].cpu()
    for hook in hooks:
        hook.remove()
    return seen, said


INK, BLUE, PALE, RED = "#22303c", "#1f6fb2", "#b9c4cd", "#d1495b"


def draw_accuracy(axes, history):
    epochs = range(1, len(history) + 1)
    for key, color in (("train", PALE), ("test", BLUE)):
        values = [100 * row[key] for row in history]
        axes.plot(epochs, values, "o-", color=color, lw=2, ms=4, label=f"{key}: {values[-1]:.1f} %")
    axes.axhline(95, color=INK, lw=0.8, ls=":")
    axes.set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy")
    axes.set_ylim(min(90, 100 * min(row["test"] for row in history)) - 2, 101)
    axes.legend(loc="lower right", frameon=False)


def draw_answer(axes, said, label):
    steps = torch.arange(1, len(said) + 1)
    belief = 100 * (said.cumsum(0) / steps[:, None]).softmax(1)
    for digit in sorted(range(10), key=label.__eq__):  # the right one on top
        color, width = (RED, 2.5) if digit == label else (PALE, 1.5)
        axes.plot(steps, belief[:, digit], color=color, lw=width)
        if belief[:, digit].max() > 15:
            step = int(belief[:, digit].argmax()) if digit != label else len(steps) - 1
            place = (int(steps[step]), float(belief[step, digit]))
            axes.annotate(str(digit), place, (5, 4), textcoords="offset points", color=color)
    axes.set(xlabel="time steps seen", ylabel="probability (%)", ylim=(-4, 108))
    axes.set_title("How the answer forms")


def draw_spikes(axes, name, spikes, color, most=72):
    """A bar for each spike: time to the right, neurons from the first that fires to the last."""
    fired = spikes.any(0).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    chosen = fired[torch.randperm(len(fired), generator=generator)[:most]]
    shown = spikes[:, chosen]
    order = (shown.argmax(0) * 1000 - shown.sum(0)).argsort(stable=True)
    when, who = shown[:, order].nonzero(as_tuple=True)
    axes.barh(who, 0.9, 0.72, left=when + 0.55, color=color)
    axes.set(xlim=(0.4, len(spikes) + 0.6), ylim=(len(chosen), -1), yticks=[], xlabel="time step")
    axes.set_ylabel(f"{len(chosen)} of the {len(fired):,} that fire")
    axes.set_title(f"{name}: {spikes.shape[1]:,} neurons, {spikes.mean():.0%} fire in a step")


def draw(path, title, history, image, label, layers, said):
    """Accuracy by epoch; one digit, how its answer forms, and its spikes layer by layer."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.08)
    figure.suptitle(title, fontsize=12, color=INK)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.2])
    curve, picture, forming = top.subplots(1, 3, width_ratios=[2, 1, 2])
    draw_accuracy(curve, history)
    picture.imshow(image, cmap="gray_r")
    picture.set(title=f"A {label}, unsure at first", xticks=[], yticks=[])
    draw_answer(forming, said, label)
    rasters = bottom.subplots(1, len(layers))
    for axes, (name, spikes), color in zip(rasters, layers, (INK, BLUE, RED), strict=True):
        draw_spikes(axes, name, spikes, color)
    for axes in (curve, forming, *rasters):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in figure.axes:
        axes.title.set_size(10.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def arguments(description, epochs):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--device", help="cuda or cpu; else the GPU where there is one")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the order of images"
    )
    return parser


def report(device):
    """Which target ran, and where its kernels came from."""
    kernels = nj.stats()
    target = f"{device} kernels" if sum(kernels.values()) else "none, eager PyTorch"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores"
    print(f"target: {target} on {where}; PyTorch {torch.__version__}")
    print(f"kernels: {kernels['compiled']} compiled, {kernels['loaded']} loaded from the cache")


def main():
    parser = arguments(__doc__.splitlines()[0], epochs=15)
    parser.add_argument("--time-steps", type=int, default=8, help="for which each image is shown")
    parser.add_argument("--neuron", choices=NEURONS, default="lif")
    default = Path(__file__).parent / "out" / "digits.png"
    parser.add_argument("--out", type=Path, default=default, help="the picture (%(default)s)")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)

    data = load(device)
    x_test, y_test = data[2:]
    net = make_net(args.neuron).to(device)
    encode = partial(constant_current, time_steps=args.time_steps)
    start = time.perf_counter()
    history = train(net, data, encode, args.epochs)
    seconds = time.perf_counter() - start
    right = history[-1]["test"]
    report(device)
    print(
        f"test accuracy: {right:.2%} of {len(x_test)} images after {args.epochs} epochs,", end=" "
    )
    print(f"{seconds:.1f} s with compiling and testing")

    epoch, eager_epoch = compare_epochs(net, data, encode)
    alone, eager_alone = compare_neurons(net, encode(data[0][:64]))
    ratio, ratio_alone = eager_epoch / epoch, eager_alone / alone
    print(f"one epoch: {epoch:.2f} s, eager neurons {eager_epoch:.2f} s ({ratio:.1f} times)")
    print(
        f"its neurons alone, one batch forward and backward: {alone * 1e3:.2f} ms,"
        f" eager {eager_alone * 1e3:.2f} ms ({ratio_alone:.1f} times)"
    )
    title = (
        f"{args.neuron.upper()} neurons read {right:.1%} of {len(x_test)} digits in hands they"
        f" never saw; an epoch takes {epoch:.2f} s ({device}),"
        f" with eager neurons {eager_epoch:.2f} s"
    )
    one = hardest(net, x_test, y_test, encode)
    layers, said = watch(net, encode(x_test[one : one + 1]))
    draw(args.out, title, history, x_test[one].cpu(), y_test[one].item(), layers, said)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
