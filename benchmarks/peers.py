"""The same neurons, by neuronjit and by the others: `x_seq [T, N, *] -> spikes [T, N, *]`.

All have threshold 1, hard reset to 0 with its gradient kept, the ATan surrogate with alpha 2 and a
float32 state, whatever the dtype of x_seq. A peer that cannot say this raises Skip with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
IZHIKEVICH = dict(tau=2.0, v_c=0.8, a0=1.0, v_rest=-0.1, tau_w=2.0, a=0.1, b=0.1)
ADEX = """
    h = v + (x - (v - v_rest) + delta_T * exp((v - theta_rh) / delta_T) - w) / tau
    w = w + (a * (h - v_rest) - w) / tau_w + b * s
"""  # the user's own neuron: built into no peer
MY_LIF = "h = v + (x - (v - v_reset)) / tau"  # a user's copy of the built-in one
ADEX_PARAMS = dict(tau=2.0, v_rest=0.0, delta_T=1.0, theta_rh=0.8, a=0.1, b=0.1, tau_w=2.0)


@dataclass(frozen=True)
class Work:
    neuron: str  # a key of STEPS
    dtype: str  # a key of DTYPES
    T: int
    N: int

    def __str__(self) -> str:
        return f"{self.neuron} {self.dtype} T={self.T} N={self.N}"


@dataclass
class Call:
    forward: Callable[[torch.Tensor], torch.Tensor]
    params: list[torch.Tensor] = field(default_factory=list)  # learnt beside the input
    exact: bool = True  # False: another surrogate, so only its spikes can be compared
    stateless: Callable[[torch.Tensor], torch.Tensor] | None = None  # the same without a last state


class Skip(Exception):
    """Why a peer does not take part in some work."""


class Spike(torch.autograd.Function):
    """Heaviside forward, ATan (alpha 2) backward: what a PyTorch user writes."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, grad):
        (u,) = ctx.saved_tensors
        return grad / (1.0 + (torch.pi * u) ** 2)


def _fire(h, spike=Spike.apply):
    s = spike(h - 1.0)
    return s, h * (1.0 - s)


def _if(x, r, v):
    return _fire(v + x)


def _lif(x, r, v):
    return _fire(v + (x - v) / 2.0)


def _plif(x, r, v):
    return _fire(v + (x - v) * r)


def _izhikevich(x, r, v, w):
    h = v + (x + (v + 0.1) * (v - 0.8) - w) / 2.0
    s, v = _fire(h)
    return s, v, w + (0.1 * (h + 0.1) - w) / 2.0 + 0.1 * s


def _ilif(x, r, v):
    h = v - v / 2.0 + x
    s = h.clamp(0.0, 4.0)
    s = s + (s.round() - s).detach()
    return s, h - s


def _adex(x, r, v, w, spike=Spike.apply):
    h = v + (x - v + torch.exp(v - 0.8) - w) / 2.0
    s, v = _fire(h, spike)
    return s, v, w + (0.1 * h - w) / 2.0 + 0.1 * s


STEPS = {
    "if": (_if, 1),
    "lif": (_lif, 1),
    "plif": (_plif, 1),
    "my lif": (_lif, 1),
    "ilif": (_ilif, 1),
    "izhikevich": (_izhikevich, 2),
    "adex": (_adex, 2),
}


def _call(work: Work, device: str, make: Callable[..., Callable]) -> Call:
    """PLIF learns w with 1/tau = sigmoid(w); 0 starts it at tau = 2."""
    if work.neuron != "plif":
        return Call(make(None))
    w = torch.zeros((), device=device, requires_grad=True)
    return Call(make(w), [w])


def _loop(work: Work) -> Callable[..., Callable]:
    step, states = STEPS[work.neuron]

    def make(w):
        def loop(x_seq):
            state = [torch.zeros_like(x_seq[0], dtype=torch.float32)] * states
            rate = None if w is None else w.sigmoid()
            spikes = []
            for x in x_seq.unbind(0):
                s, *state = step(x.float(), rate, *state)
                spikes.append(s.to(x_seq.dtype))
            return torch.stack(spikes)

        return loop

    return make


def eager(work: Work, device: str, max_t: int) -> Call:
    return _call(work, device, _loop(work))


def compiled(work: Work, device: str, max_t: int) -> Call:
    if max_t < work.T:
        raise Skip(f"beyond T={max_t} the unrolled loop compiles for minutes (--compile-max-t)")
    torch._dynamo.reset()  # each work is a compilation of its own; recompilations are limited
    make = _loop(work)
    return _call(work, device, lambda w: torch.compile(make(w), fullgraph=True, dynamic=False))


def neuronjit(work: Work, device: str, max_t: int) -> Call:
    import neuronjit as nj

    if work.neuron == "adex":
        model = nj.NeuronModel("adex", ADEX, state=dict(v=0.0, w=0.0), params=ADEX_PARAMS)
    elif work.neuron == "my lif":
        model = nj.NeuronModel("mine", MY_LIF, state=dict(v=0.0), params=dict(tau=2.0))
    else:
        model = nj.neurons.by_name(work.neuron)
    values: dict = dict(surrogate=nj.surrogates.ATan())
    given = {"lif": dict(tau=2.0), "ilif": dict(tau=2.0), "izhikevich": IZHIKEVICH}
    values |= given.get(work.neuron, {})

    def make(w):
        if w is None:
            return lambda x: nj.multistep(model, x, **values).spikes
        return lambda x: nj.multistep(model, x, reciprocal_tau=w.sigmoid(), **values).spikes

    call = _call(work, device, make)
    if not call.params:
        call.stateless = lambda x: nj.multistep(model, x, final_state=False, **values).spikes
    return call


def spikingjelly(work: Work, device: str, max_t: int) -> Call:
    """The functional interface: less host work than the layers, and fused for 16-bit input too."""
    from spikingjelly.activation_based import functional, neuron, surrogate

    values = dict(v_reset=0.0, surrogate_function=surrogate.ATan(alpha=2.0))
    if work.neuron == "ilif":
        values = dict(tau=2.0, surrogate_function=surrogate.MultiLevelSpikeCount(4))
    if work.neuron in ("lif", "plif"):
        values["decay_input"] = True
    if work.neuron == "izhikevich":
        values |= IZHIKEVICH
    if work.neuron == "adex":  # FlexSN makes Triton kernels of a PyTorch step
        if work.dtype != "fp32":
            raise Skip("FlexSN keeps its state in the dtype of x")

        def core(x, v, w):  # it may not capture the surrogate, a module
            return _adex(x, None, v, w, lambda u: surrogate.atan.apply(u, 2.0))

        return Call(_afresh(neuron.FlexSN(core, num_states=2, step_mode="m")))
    multi_step = getattr(functional, f"{work.neuron}_multi_step")

    def make(w):
        def run(x):
            states = [torch.zeros_like(x[0], dtype=torch.float32)] * STEPS[work.neuron][1]
            return multi_step(x, *states, *([] if w is None else [w]), **values)[0]

        return run

    return _call(work, device, make)


def spikingjelly_node(work: Work, device: str, max_t: int) -> Call:
    from spikingjelly.activation_based import neuron, surrogate

    if work.neuron != "lif":
        raise Skip("only its LIFNode")
    return Call(
        _afresh(neuron.LIFNode(2.0, surrogate_function=surrogate.ATan(alpha=2.0), step_mode="m"))
    )


def _afresh(node: Callable) -> Callable:
    def run(x):
        node.reset()  # or the next sequence would go on from this one, graph and all
        return node(x)

    return run


def _stepped(cell: Callable) -> Callable:
    def run(x_seq):
        state, spikes = None, []
        for x in x_seq.unbind(0):
            s, state = cell(x, state)
            spikes.append(s)
        return torch.stack(spikes)

    return run


def snntorch(work: Work, device: str, max_t: int) -> Call:
    """Leaky is h = beta v + x: in units of 2 v, with threshold 2 and alpha 1, LIF with tau 2."""
    import snntorch
    from snntorch import surrogate

    if work.neuron != "lif" or work.dtype != "fp32":
        raise Skip("Leaky is LIF, with its state in the dtype of x")
    atan = surrogate.atan(alpha=1.0)
    leaky = snntorch.Leaky(0.5, 2.0, atan, reset_mechanism="zero", reset_delay=False).to(device)
    return Call(_stepped(lambda x, v: leaky(x, torch.zeros_like(x) if v is None else v)))


def norse(work: Work, device: str, max_t: int) -> Call:
    """LIFBox with dt / tau_mem = 1/2. Norse has no ATan: SuperSpike costs as much."""
    from norse.torch.functional.lif_box import LIFBoxParameters
    from norse.torch.module.lif_box import LIFBoxCell

    if work.neuron != "lif" or work.dtype != "fp32":
        raise Skip("LIFBox is LIF")
    rate, alpha = (torch.tensor(value, device=device) for value in (500.0, 2.0))
    cell = LIFBoxCell(LIFBoxParameters(tau_mem_inv=rate, alpha=alpha), dt=0.001)
    return Call(_stepped(cell), exact=False)


OURS, SJ = "neuronjit", "spikingjelly"
LOOPS = [SJ, "eager", "snntorch", "norse"]  # those that compile nothing for each T
PEERS: dict[str, Callable[[Work, str, int], Call]] = {
    OURS: neuronjit,
    SJ: spikingjelly,
    SJ + " node": spikingjelly_node,
    "eager": eager,
    "torch.compile": compiled,
    "snntorch": snntorch,
    "norse": norse,
}
