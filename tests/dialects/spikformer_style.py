"""SpikingJelly 0.0.0.0.12: attention of spikes, its own threshold of 0.5 after the product."""

import torch
import torch.nn as nn
from spikingjelly.clock_driven.functional import reset_net as reset_net
from spikingjelly.clock_driven.neuron import MultiStepLIFNode


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        for name in ("q", "k", "v", "proj"):
            setattr(self, f"{name}_conv", nn.Conv1d(dim, dim, kernel_size=1, bias=False))
            setattr(self, f"{name}_bn", nn.BatchNorm1d(dim))
            setattr(
                self, f"{name}_lif", MultiStepLIFNode(tau=2.0, detach_reset=True, backend="cupy")
            )
        self.attn_lif = MultiStepLIFNode(
            tau=2.0, v_threshold=0.5, detach_reset=True, backend="cupy"
        )

    def branch(self, name, x):
        T, B, C, N = x.shape
        y = getattr(self, f"{name}_bn")(getattr(self, f"{name}_conv")(x.flatten(0, 1)))
        return getattr(self, f"{name}_lif")(y.reshape(T, B, C, N).contiguous())

    def split(self, spikes):
        T, B, C, N = spikes.shape
        return (
            spikes.transpose(-1, -2).reshape(T, B, N, self.heads, C // self.heads).transpose(2, 3)
        )

    def forward(self, x):
        T, B, C, N = x.shape
        q, k, v = (self.split(self.branch(name, x)) for name in "qkv")
        y = (q @ k.transpose(-2, -1)) @ v * 0.125
        y = y.transpose(3, 4).reshape(T, B, C, N).contiguous()
        return x + self.branch("proj", self.attn_lif(y))


def build():
    return Attention(8, 2), torch.rand(4, 2, 8, 5).round()
