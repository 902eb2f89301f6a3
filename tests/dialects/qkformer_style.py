"""SpikingJelly 0.0.0.0.12: token attention, a sum of queries that fires and masks the keys."""

import torch
import torch.nn as nn
from spikingjelly.clock_driven.functional import reset_net as reset_net
from spikingjelly.clock_driven.neuron import MultiStepLIFNode, MultiStepParametricLIFNode
from spikingjelly.clock_driven.surrogate import ATan


class TokenAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q_conv, self.q_bn = nn.Conv1d(dim, dim, 1, bias=False), nn.BatchNorm1d(dim)
        self.k_conv, self.k_bn = nn.Conv1d(dim, dim, 1, bias=False), nn.BatchNorm1d(dim)
        self.q_lif = MultiStepLIFNode(tau=2.0, detach_reset=True, backend="cupy")
        self.k_lif = MultiStepLIFNode(tau=2.0, detach_reset=True, backend="cupy")
        self.attn_lif = MultiStepLIFNode(
            tau=2.0, v_threshold=0.5, detach_reset=True, backend="cupy"
        )
        self.proj_conv, self.proj_bn = nn.Conv1d(dim, dim, 1, bias=False), nn.BatchNorm1d(dim)
        self.proj_lif = MultiStepParametricLIFNode(
            init_tau=2.0, v_reset=None, surrogate_function=ATan(alpha=3.0), backend="cupy"
        )

    def forward(self, x):
        T, B, C, N = x.shape
        flat = x.flatten(0, 1)
        q = self.q_lif(self.q_bn(self.q_conv(flat)).reshape(T, B, C, N))
        k = self.k_lif(self.k_bn(self.k_conv(flat)).reshape(T, B, C, N))
        q = q.unflatten(2, (self.heads, C // self.heads)).sum(dim=3, keepdim=True)
        mask = self.attn_lif(q - 1.0)
        y = (mask * k.unflatten(2, (self.heads, C // self.heads))).flatten(2, 3)
        y = self.proj_bn(self.proj_conv(y.flatten(0, 1))).reshape(T, B, C, N)
        return x + self.proj_lif(y)


def build():
    return TokenAttention(8, 2), torch.rand(4, 2, 8, 5).round()
