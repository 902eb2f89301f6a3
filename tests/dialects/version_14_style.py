"""SpikingJelly 0.0.0.0.14: one module for both step modes, and backends set from outside."""

import torch
import torch.nn as nn
from spikingjelly.activation_based import cuda_kernel, functional, layer, neuron, surrogate


class OwnNode(nn.Module):
    """Calls the kernel itself."""

    def forward(self, x_seq):
        v = torch.zeros_like(x_seq[0])
        spikes, v_seq = cuda_kernel.multistep_lif_ptt(
            x_seq.flatten(1), v.flatten(), True, 2.0, 0.6, 0.0, False, surrogate.Sigmoid()
        )
        return spikes.reshape(x_seq.shape) + 0.1 * v_seq.reshape(x_seq.shape)


def build():
    net = nn.Sequential(
        layer.Conv2d(2, 4, kernel_size=3, padding=1, bias=False),
        layer.BatchNorm2d(4),
        neuron.IFNode(surrogate_function=surrogate.ATan(), step_mode="m", backend="cupy"),
        layer.MaxPool2d(2, 2),
        layer.Flatten(),
        layer.Linear(4 * 3 * 3, 20, bias=False),
        neuron.ParametricLIFNode(init_tau=2.0, detach_reset=True, store_v_seq=True),
        OwnNode(),
        layer.VotingLayer(10),
    )
    nn.init.uniform_(net[5].weight, -0.1, 0.3)
    functional.set_step_mode(net, "m")
    functional.set_backend(net, "cupy", neuron.ParametricLIFNode)
    return net, torch.rand(4, 2, 2, 6, 6) * 2


reset_net = functional.reset_net
