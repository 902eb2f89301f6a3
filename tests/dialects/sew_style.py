"""SpikingJelly 0.0.0.0.12: convolution, batch norm, IF, and the sum after the neuron."""

import torch
import torch.nn as nn
from spikingjelly.clock_driven import functional, layer, neuron, surrogate


def conv_bn(channels):
    return layer.SeqToANNContainer(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
    )


def spiking():
    return neuron.MultiStepIFNode(
        detach_reset=True, surrogate_function=surrogate.ATan(), backend="cupy"
    )


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.sn1 = conv_bn(channels), spiking()
        self.conv2, self.sn2 = conv_bn(channels), spiking()

    def forward(self, x_seq):
        return self.sn2(self.conv2(self.sn1(self.conv1(x_seq)))) + x_seq


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(4)
        self.flatten = layer.SeqToANNContainer(nn.Flatten())
        self.fc = nn.Linear(4 * 6 * 6, 10)
        self.readout = neuron.LIFNode(tau=2.0)  # a single-step node, step by step

    def forward(self, x_seq):
        x_seq = self.flatten(self.block(x_seq))
        return functional.multi_step_forward(x_seq, [self.fc, self.readout]).mean(0)


def build():
    return Net(), torch.rand(4, 2, 4, 6, 6) * 2


reset_net = functional.reset_net
