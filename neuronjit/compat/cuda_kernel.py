"""`spikingjelly.activation_based.cuda_kernel`: the multistep functions, on both targets."""

from .. import neuron_kernel
from ..neuron_kernel import (
    multistep_eif_ptt,
    multistep_if_ptt,
    multistep_izhikevich_ptt,
    multistep_lif_ptt,
    multistep_plif_ptt,
    multistep_qif_ptt,
    save_cuda_codes,
)

__all__ = [
    "multistep_eif_ptt", "multistep_if_ptt", "multistep_izhikevich_ptt", "multistep_lif_ptt",
    "multistep_plif_ptt", "multistep_qif_ptt", "neuron_kernel", "save_cuda_codes",
]  # fmt: skip
