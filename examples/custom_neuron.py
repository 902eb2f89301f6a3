"""A neuron of one's own: three lines of equations, their CUDA source, and what they are good for.

    python examples/custom_neuron.py

Handwritten digits are shown row by row, and the network is asked after the last row: it has to
remember the rows before. The threshold of the adaptive neuron rises with every spike and decays
slowly, a memory that the leaky neuron it is compared with has not (Bellec et al. 2018,
arXiv:1803.09574). Both learn their time constants, from the same spread of starting values.
"""

import torch
from digits import accuracy, arguments, load, report, train
from torch import nn

import neuronjit as nj

EQUATIONS = """
    h = v * sigmoid(leak) + x
    theta = v_threshold + beta * a
    a = a * sigmoid(fade) + s
"""
ADAPTIVE = nj.NeuronModel(
    "adaptive",
    EQUATIONS,
    state={"v": 0.0, "a": 0.0},
    params={"leak": 0.0, "fade": 2.0, "beta": 0.3},
)
LEAKY = nj.NeuronModel(  # the first line alone
    "leaky", "h = v * sigmoid(leak) + x", state={"v": 0.0}, params={"leak": 0.0}
)
STEPS = 2  # for each row


def spread(low, high, count):
    """A parameter whose sigmoids decay with time constants from low to high steps, in any order."""
    tau = low * (high / low) ** torch.linspace(0, 1, count)
    return nn.Parameter(torch.exp(-1 / tau[torch.randperm(count)]).logit())


def leaky(count):
    return nj.nn.Neuron(LEAKY, reset="soft", channels=count, leak=spread(0.7, 16, count))


def adaptive(count):
    return nj.nn.Neuron(
        ADAPTIVE,
        reset="soft",
        channels=count,
        leak=spread(0.7, 16, count),
        fade=spread(2, 50, count),
        learnable="beta",
    )


def make_net(neurons, count=128):
    """`[T, N, 8]` to `[T, N, 10]`."""
    return nn.Sequential(
        nn.Linear(8, count),
        neurons(count),
        nn.Linear(count, count),
        neurons(count),
        nn.Linear(count, 10),
    )


def rows(images):
    """`[N, 8, 8]` to `[16, N, 8]`: one row after the other, two steps each."""
    return 2 * images.transpose(0, 1).repeat_interleave(STEPS, 0)


def last_answer(net, x_seq):
    """`[N, 10]`: what the network says while it sees the last row."""
    return net(x_seq)[-STEPS:].mean(0)


def main():
    args = arguments(__doc__.splitlines()[0], epochs=20).parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")

    print("the neuron:")
    print(EQUATIONS)
    print("its kernel, rendered for CUDA:\n")
    print(nj.render(ADAPTIVE, target="cuda", reset="soft"))

    data = load(device)
    right = {}
    for neurons in (leaky, adaptive):
        torch.manual_seed(args.seed)
        net = make_net(neurons).to(device)
        size = sum(p.numel() for p in net.parameters())
        print(f"training with {neurons.__name__} neurons ({size:,} parameters)")
        train(net, data, rows, args.epochs, last_answer, lr=3e-3)
        right[neurons.__name__] = accuracy(net, *data[2:], rows, last_answer)
    report(device)
    for name, fraction in right.items():
        print(f"{name} neurons: {fraction:.2%} of {len(data[2])} test images right")


if __name__ == "__main__":
    main()
