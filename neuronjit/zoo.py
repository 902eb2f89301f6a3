"""The built-in models beside the seed's, which `neuronjit.neurons` has too: one entry each.

Read when one of them is asked for, because 40 blocks of equations take a while to parse. Where an
entry names a peer's class, its equations are that class's, in the same order of operations
(tests/test_zoo.py compares them); docs/neurons.md is the list to read. A model that assigns v has
its own reset, others take the call's.
"""

from __future__ import annotations

from .models.model import NeuronModel

# --- leaky integrators and their variants ---------------------------------------------------------

LI = NeuronModel(
    "li",
    """
    h = v + (x - (v - v_leak)) / tau
    v = h
    y = v
    """,
    state=dict(v=0.0),
    params=dict(tau=2.0, v_leak=0.0),
    positive=["tau"],
    about="Leaky integrator, a readout: what comes out is v, and nothing is reset. NIR's LI;"
    " SpikingJelly's NonSpikingLIFNode.",
)
KLIF = NeuronModel(
    "klif",
    "h = relu(k * (v + (x - (v - v_reset)) / tau))",
    state=dict(v=0.0),
    params=dict(tau=2.0, k=1.0),
    positive=["tau"],
    about="LIF with a learnable slope k and a ReLU before it fires. Jiang and Zhang 2023,"
    " arXiv:2302.09238; SpikingJelly's KLIFNode.",
)
GATED_LIF = NeuronModel(
    "gated_lif",
    """
    current = x * (1 - beta * (1 - conduct))
    decay = 1 - alpha * (1 - tau)
    h = decay * v - (1 - alpha) * linear_decay + current
    h = h - decay * v * gamma * last - (1 - gamma) * v_subreset * last
    last = s
    v = h
    """,
    state=dict(v=0.0, last=0.0),
    params=dict(
        alpha=0.5, beta=0.5, gamma=0.5, tau=0.25, linear_decay=0.0625, v_subreset=0.5,
        conduct=0.5, v_threshold=0.5,
    ),
    about="GLIF: gates alpha, beta, gamma in (0, 1) mix two leaks, two integrations and two resets;"
    " the reset comes with the next step. Yao et al. 2022, arXiv:2210.13768; SpikingJelly's"
    " GatedLIFNode, whose parameters are these before a sigmoid.",
)  # fmt: skip
CLIF = NeuronModel(
    "clif",
    """
    h = v - v / tau + x
    m = m * sigmoid(h / tau) + s
    v = h - s * (theta + sigmoid(m))
    """,
    state=dict(v=0.0, m=0.0),
    params=dict(tau=2.0),
    positive=["tau"],
    about="Complementary LIF: m remembers recent spikes and deepens the soft reset. Huang et al."
    " 2024, arXiv:2402.04663; SpikingJelly's ComplementaryLIFNode.",
)
ILIF = NeuronModel(
    "ilif",
    """
    h = v - v / tau + x
    s = round(clamp(h / theta, 0, levels))
    v = h - s * theta
    """,
    state=dict(v=0.0),
    params=dict(tau=4 / 3, levels=4.0),
    positive=["tau", "levels"],
    about="Integer spikes from 0 to `levels`, straight through; no surrogate is used. Luo et al."
    " 2024, arXiv:2407.20708; SpikingJelly's ILIFNode.",
)
TERNARY_LIF = NeuronModel(
    "ternary_lif",
    """
    h = v + (x - (v - v_reset)) / tau
    up = fire(h, theta)
    down = fire(-h, theta)
    s = up - down
    v = h * (1 - (up + down)) + v_reset * (up + down)
    """,
    state=dict(v=0.0),
    params=dict(tau=2.0),
    positive=["tau"],
    about="Spikes -1, 0 and 1, hard reset, which `detach_reset` does not reach. Guo et al. 2024,"
    " arXiv:2312.06372; SpikingJelly's TernaryLIFNode.",
)
TERNARY_LIF_SOFT = NeuronModel(
    "ternary_lif_soft",
    """
    h = v + (x - v) / tau
    s = fire(h, theta) - fire(-h, theta)
    v = h - s * theta
    """,
    state=dict(v=0.0),
    params=dict(tau=2.0),
    positive=["tau"],
    about="Spikes -1, 0 and 1, soft reset. SpikingJelly's TernaryLIFNode(v_reset=None).",
)
LIAF = NeuronModel(
    "liaf",
    """
    h = v + (x - (v - v_reset)) / tau
    y = relu(h - theta)
    """,
    state=dict(v=0.0),
    params=dict(tau=2.0),
    positive=["tau"],
    about="Leaky integrate and analog fire: spikes reset v, relu(h - theta) comes out. Wu et al."
    " 2021, arXiv:2011.06176; SpikingJelly's LIAFNode(torch.relu, threshold_related=True).",
)
LIF_REFRACTORY = NeuronModel(
    "lif_refractory",
    """
    h = where(rho > 0, v, v + (x - (v - v_reset)) / tau)
    s = where(rho > 0, 0, fire(h, theta))
    rho = where(s > 0, period, relu(rho - 1))
    """,
    state=dict(v=0.0, rho=0.0),
    params=dict(tau=2.0, period=2.0),
    positive=["tau"],
    about="LIF with an absolute refractory period: for `period` steps after a spike, v stands still"
    " and nothing fires. Gerstner et al. 2014, Neuronal Dynamics, section 1.3.",
)
TC_LIF = NeuronModel(
    "tc_lif",
    """
    d = d + beta_1 * v + x
    h = v + beta_2 * d
    d = d - gamma * s
    v = h - s * theta
    """,
    state=dict(v=0.0, d=0.0),
    params=dict(beta_1=-0.5, beta_2=0.5, gamma=0.5),
    about="Two compartments, a dendrite d and a soma v. Zhang et al. 2024, arXiv:2308.13250; its"
    " layers learn -sigmoid(c_1) and sigmoid(c_2).",
)
SLIDING_PSN = NeuronModel(
    "sliding_psn",
    """
    h = w_3 * x_3 + w_2 * x_2 + w_1 * x_1 + w_0 * x
    x_3 = x_2
    x_2 = x_1
    x_1 = x
    v = h
    """,
    state=dict(v=0.0, x_1=0.0, x_2=0.0, x_3=0.0),
    params=dict(w_0=1.0, w_1=0.5, w_2=0.25, w_3=0.125),
    about="Sliding parallel spiking neuron of order 4: a weighted sum of the last four inputs,"
    " without a reset. Fang et al. 2023, arXiv:2304.12760; SpikingJelly's SlidingPSN(k=4), whose"
    " bias is -v_threshold.",
)

# --- adaptation -----------------------------------------------------------------------------------

ALIF = NeuronModel(
    "alif",
    """
    theta = v_threshold + beta * b
    h = alpha * v + (1 - alpha) * x
    b = rho * b + (1 - rho) * s
    v = h - s * theta
    """,
    state=dict(v=0.0, b=0.0),
    params=dict(alpha=0.95, rho=0.995, beta=1.8),
    about="LIF with an adaptive threshold, soft reset: the LSNN's neuron. Bellec et al. 2018,"
    " arXiv:1803.09574.",
)
ADLIF = NeuronModel(
    "adlif",
    """
    h = alpha * v + (1 - alpha) * (x - w)
    w = beta * w + a * h + b * s
    v = h - s * theta
    """,
    state=dict(v=0.0, w=0.0),
    params=dict(alpha=0.9, beta=0.98, a=0.5, b=1.0),
    about="LIF with an adaptation current w, soft reset. Bittar and Garner 2022, Frontiers in"
    " Neuroscience 16:865897; its w[t] is the w that is kept after step t - 1.",
)
DH_LIF = NeuronModel(
    "dh_lif",
    """
    d = alpha * d + (1 - alpha) * x
    d2 = alpha2 * d2 + (1 - alpha2) * x2
    h = beta * v + (1 - beta) * (d + d2)
    v = h - s * theta
    """,
    state=dict(v=0.0, d=0.0, d2=0.0),
    params=dict(alpha=0.5, alpha2=0.9, beta=0.8),
    inputs=("x", "x2"),
    about="LIF with two dendritic branches, each with an input (x, x2) and a memory, soft"
    " reset. Zheng et al. 2024, Nature Communications 15:277.",
)
ADEX = NeuronModel(
    "adex",
    """
    h = v + (x - (v - v_rest) + delta_T * exp((v - theta_rh) / delta_T) - w) / tau
    w = w + (a * (h - v_rest) - w) / tau_w + b * s
    """,
    state=dict(v=0.0, w=0.0),
    params=dict(tau=2.0, v_rest=0.0, delta_T=1.0, theta_rh=0.8, a=0.1, b=0.1, tau_w=2.0),
    positive=["tau", "delta_T", "tau_w"],
    about="Adaptive exponential integrate and fire. Brette and Gerstner 2005, J. Neurophysiol."
    " 94:3637; w follows the new h, as in IZHIKEVICH.",
)
IZHIKEVICH_2003 = NeuronModel(
    "izhikevich_2003",
    """
    h = v + dt * (0.04 * v * v + 5 * v + 140 - u + x)
    u = u + dt * a * (b * v - u) + d * s
    v = h * (1 - s) + c * s
    """,
    state=dict(v=-65.0, u=-13.0),
    params=dict(a=0.02, b=0.2, c=-65.0, d=8.0, dt=0.25, v_threshold=30.0),
    about="Izhikevich's simple model with its four numbers, in mV and steps of dt ms. Izhikevich"
    " 2003, IEEE Trans. Neural Networks 14:1569; Norse's Izhikevich, which fires above 30 only.",
)

# --- resonators -----------------------------------------------------------------------------------

RAF = NeuronModel(
    "raf",
    """
    q = exp(b * dt) * (u * cos(omega * dt) - v * sin(omega * dt)) + x
    h = exp(b * dt) * (u * sin(omega * dt) + v * cos(omega * dt))
    u = q
    """,
    state=dict(v=0.0, u=0.0),
    params=dict(b=-0.2, omega=1.0, dt=1.0),
    about="Resonate and fire: (u, v) turns by omega dt and shrinks by exp(b dt). Izhikevich 2001,"
    " Neural Networks 14:883; SpikingJelly's RAFNode.",
)
BRF = NeuronModel(
    "brf",
    """
    theta = v_threshold + q
    b = (sqrt(1 - dt * omega * (dt * omega)) - 1) / dt - b_offset - q
    h = v + b * v * dt - omega * w * dt + x * dt
    w = w + omega * v * dt + b * w * dt
    v = h
    q = gamma * q + s
    """,
    state=dict(v=0.0, w=0.0, q=0.0),
    params=dict(omega=10.0, b_offset=1.0, gamma=0.9, dt=0.01),
    positive=["dt"],
    about="Balanced resonate and fire: q raises threshold and damping after a spike, and nothing is"
    " reset; dt omega must be below 1. Higuchi et al. 2024, arXiv:2402.14603.",
)

# --- snnTorch's: the reset comes in the next step, without a gradient; equality does not fire -----

LEAKY = NeuronModel(
    "leaky",
    """
    r = where(v > v_threshold, 1, 0)
    h = beta * v + x - r * v_threshold
    v = h
    """,
    state=dict(v=0.0),
    params=dict(beta=0.9),
    strict=True,
    about="snnTorch's Leaky: after a spike, the next step subtracts the threshold.",
)
LEAKY_ZERO = NeuronModel(
    "leaky_zero",
    """
    r = where(v > v_threshold, 1, 0)
    h = beta * ((1 - r) * v) + x
    v = h
    """,
    state=dict(v=0.0),
    params=dict(beta=0.9),
    strict=True,
    about='snnTorch\'s Leaky(reset_mechanism="zero"): after a spike, the next step starts from 0.',
)
LEAKY_NO_RESET = NeuronModel(
    "leaky_no_reset",
    """
    h = beta * v + x
    v = h
    """,
    state=dict(v=0.0),
    params=dict(beta=0.9),
    strict=True,
    about='snnTorch\'s Leaky(reset_mechanism="none").',
)
LEAKY_AT_ONCE = NeuronModel(
    "leaky_at_once",
    """
    r = where(v > v_threshold, 1, 0)
    h = beta * v + x - r * v_threshold
    v = h - (s - r) * v_threshold
    """,
    state=dict(v=0.0),
    params=dict(beta=0.9),
    strict=True,
    about="snnTorch's Leaky(reset_delay=False): the step that fires subtracts the threshold.",
)
LEAKY_ZERO_AT_ONCE = NeuronModel(
    "leaky_zero_at_once",
    """
    r = where(v > v_threshold, 1, 0)
    h = beta * ((1 - r) * v) + x
    v = h - (s - r) * h
    """,
    state=dict(v=0.0),
    params=dict(beta=0.9),
    strict=True,
    about='snnTorch\'s Leaky(reset_mechanism="zero", reset_delay=False).',
)
SYNAPTIC = NeuronModel(
    "synaptic",
    """
    r = where(v > v_threshold, 1, 0)
    syn = alpha * syn + x
    h = beta * v + syn - r * v_threshold
    v = h
    """,
    state=dict(v=0.0, syn=0.0),
    params=dict(alpha=0.9, beta=0.8),
    strict=True,
    about="A current that decays, then a leaky membrane: snnTorch's Synaptic, which resets as its"
    " Leaky does.",
)
ALPHA = NeuronModel(
    "alpha",
    """
    r = where(v > v_threshold, 1, 0)
    syn_exc = alpha * syn_exc + x
    syn_inh = beta * syn_inh - x
    h = (log(alpha) / (log(beta) - log(alpha)) + 1) * (syn_exc + syn_inh)
    h = h - h * r
    syn_exc = syn_exc - syn_exc * r
    syn_inh = syn_inh - syn_inh * r
    v = h
    """,
    state=dict(v=0.0, syn_exc=0.0, syn_inh=0.0),
    params=dict(alpha=0.9, beta=0.8),
    positive=["alpha", "beta"],
    strict=True,
    about="An input becomes a difference of two exponentials; alpha must be above beta, both below"
    " 1. snnTorch's Alpha, reset to zero as its default is.",
)
LAPICQUE = NeuronModel(
    "lapicque",
    """
    r = where(v > v_threshold, 1, 0)
    h = x * R * (1 / (R * C)) * dt + (1 - dt / (R * C)) * v - r * v_threshold
    v = h
    """,
    state=dict(v=0.0),
    params=dict(R=5.0, C=1.0, dt=1.0),
    positive=["R", "C", "dt"],
    strict=True,
    about="A resistor R and a capacitor C. Lapicque 1907; snnTorch's Lapicque, whose dt is called"
    " time_step.",
)

# --- a synaptic current, as other libraries have it -----------------------------------------------

CUBA_LIF = NeuronModel(
    "cuba_lif",
    """
    c = c * c_decay + x
    h = v * v_decay + c
    """,
    state=dict(v=0.0, c=0.0),
    params=dict(c_decay=0.5, v_decay=0.75, v_threshold=0.5),
    about="Current-based LIF: a current that decays, then a leaky membrane. SpikingJelly's"
    " CUBALIFNode.",
)
NIR_CUBA_LIF = NeuronModel(
    "nir_cuba_lif",
    """
    i = i + dt / tau_syn * (w_in * x - i)
    h = v + dt / tau_mem * (v_leak - v + r * i)
    """,
    state=dict(v=0.0, i=0.0),
    params=dict(tau_syn=0.005, tau_mem=0.01, r=1.0, v_leak=0.0, w_in=1.0, dt=0.001),
    positive=["tau_syn", "tau_mem", "dt"],
    strict=True,
    about="NIR's CubaLIF in steps of dt seconds (forward Euler, the current first). Pedersen et al."
    " 2024, arXiv:2311.14641.",
)
NIR_CUBA_LI = NeuronModel(
    "nir_cuba_li",
    """
    i = i + dt / tau_syn * (w_in * x - i)
    h = v + dt / tau_mem * (v_leak - v + r * i)
    v = h
    y = v
    """,
    state=dict(v=0.0, i=0.0),
    params=dict(tau_syn=0.005, tau_mem=0.01, r=1.0, v_leak=0.0, w_in=1.0, dt=0.001),
    positive=["tau_syn", "tau_mem", "dt"],
    about="NIR's CubaLI, a readout, in steps of dt seconds (forward Euler, the current first)."
    " Pedersen et al. 2024, arXiv:2311.14641.",
)
NIR_IF = NeuronModel(
    "nir_if",
    "h = v + dt * r * x",
    state=dict(v=0.0),
    params=dict(r=1000.0, dt=0.001),
    positive=["dt"],
    strict=True,
    about="NIR's IF in steps of dt seconds (forward Euler). Pedersen et al. 2024,"
    " arXiv:2311.14641.",
)
NIR_LI = NeuronModel(
    "nir_li",
    """
    h = v + dt / tau * (v_leak - v + r * x)
    v = h
    y = v
    """,
    state=dict(v=0.0),
    params=dict(tau=0.01, r=1.0, v_leak=0.0, dt=0.001),
    positive=["tau", "dt"],
    about="NIR's LI, a readout, in steps of dt seconds (forward Euler). Pedersen et al. 2024,"
    " arXiv:2311.14641.",
)
NIR_LIF = NeuronModel(
    "nir_lif",
    "h = v + dt / tau * (v_leak - v + r * x)",
    state=dict(v=0.0),
    params=dict(tau=0.01, r=1.0, v_leak=0.0, dt=0.001),
    positive=["tau", "dt"],
    strict=True,
    about="NIR's LIF in steps of dt seconds (forward Euler); v_leak and v_reset are two. Pedersen"
    " et al. 2024, arXiv:2311.14641.",
)
NIR_THRESHOLD = NeuronModel(
    "nir_threshold",
    """
    h = x
    v = h
    """,
    state=dict(v=0.0),
    strict=True,
    about="NIR's Threshold: fires where x is above it, and remembers nothing. Pedersen et al. 2024,"
    " arXiv:2311.14641.",
)
NORSE_LIF = NeuronModel(
    "norse_lif",
    """
    j = i + x
    h = v + dt * tau_mem_inv * (v_leak - v + j)
    i = j - dt * tau_syn_inv * j
    """,
    state=dict(v=0.0, i=0.0),
    params=dict(tau_syn_inv=200.0, tau_mem_inv=100.0, v_leak=0.0, dt=0.001),
    strict=True,
    about="Current-based LIF: Norse's LIF (lif_feed_forward_step).",
)
NORSE_LIF_BOX = NeuronModel(
    "norse_lif_box",
    "h = v + dt * tau_mem_inv * (x + v_leak - v)",
    state=dict(v=0.0),
    params=dict(tau_mem_inv=100.0, v_leak=0.0, dt=0.001),
    strict=True,
    about="LIF without a synaptic current: Norse's LIFBox.",
)
NORSE_LIF_EX = NeuronModel(
    "norse_lif_ex",
    """
    j = i + x
    rise = delta_T * exp((v - v_threshold) / delta_T)
    h = v + dt * tau_mem_inv * (v_leak - v + rise + j)
    i = j - dt * tau_syn_inv * j
    """,
    state=dict(v=0.0, i=0.0),
    params=dict(delta_T=0.5, tau_syn_inv=200.0, tau_mem_inv=100.0, v_leak=0.0, dt=0.001),
    positive=["delta_T"],
    strict=True,
    about="Exponential LIF with a synaptic current: Norse's LIFEx.",
)
NORSE_LIF_ADEX = NeuronModel(
    "norse_lif_adex",
    """
    j = i + x
    rise = delta_T * exp((v - v_threshold) / delta_T)
    h = v + dt * tau_mem_inv * (v_leak - v + rise + j - a)
    i = j - dt * tau_syn_inv * j
    a = a + dt * tau_ada_inv * (adaptation_current * (v - v_leak) - a)
    a = a + s * adaptation_spike
    """,
    state=dict(v=0.0, i=0.0, a=0.0),
    params=dict(
        adaptation_current=4.0, adaptation_spike=0.02, delta_T=0.5, tau_ada_inv=2.0,
        tau_syn_inv=200.0, tau_mem_inv=100.0, v_leak=0.0, dt=0.001,
    ),
    positive=["delta_T"],
    strict=True,
    about="AdEx with a synaptic current, the adaptation from the old v: Norse's LIFAdEx.",
)  # fmt: skip
NORSE_LIF_REFRAC = NeuronModel(
    "norse_lif_refrac",
    """
    j = i + x
    h = v + dt * tau_mem_inv * (v_leak - v + j)
    i = j - dt * tau_syn_inv * j
    held = fire(rho, 0)
    z = fire(h, theta)
    s = (1 - held) * z
    v = (1 - held) * ((1 - z) * h + z * v_reset) + held * v
    rho = (1 - s) * relu(rho - held) + s * rho_reset
    """,
    state=dict(v=0.0, i=0.0, rho=0.0),
    params=dict(tau_syn_inv=200.0, tau_mem_inv=100.0, v_leak=0.0, rho_reset=5.0, dt=0.001),
    strict=True,
    about="LIF that holds v while a counter rho runs down, through which surrogate gradients pass;"
    " `detach_reset` does not reach its reset. Norse's LIFRefrac (lif_refrac_feed_forward_step).",
)
NORSE_IAF = NeuronModel(
    "norse_iaf",
    "h = v + x",
    state=dict(v=0.0),
    strict=True,
    about="IF that fires above the threshold only: Norse's IAF.",
)
SINABS_LIF = NeuronModel(
    "sinabs_lif",
    """
    h = alpha_mem * v + (1 - alpha_mem) * x
    f = fire(h, theta)
    s = detach(minimum(floor(relu(h / theta)), max_spikes) - f) + f
    v = h - s * theta
    """,
    state=dict(v=0.0),
    params=dict(alpha_mem=0.95, max_spikes=1e6),
    about="LIF with several spikes a step, one for each threshold in h, and the slope of one."
    " sinabs' LIF with MultiSpike, or MaxSpike(n) with max_spikes=n; alpha_mem is"
    " exp(-1 / tau_mem).",
)
SINABS_ALIF = NeuronModel(
    "sinabs_alif",
    """
    h = alpha_mem * v + (1 - alpha_mem) * x
    theta = v_threshold + adapt_scale * b
    f = fire(h, detach(theta))
    s = detach(minimum(floor(relu(h / theta)), max_spikes) - f) + f
    v = h - s * theta
    b = alpha_adapt * b + (1 - alpha_adapt) * s
    """,
    state=dict(v=0.0, b=0.0),
    params=dict(alpha_mem=0.95, alpha_adapt=0.99, adapt_scale=1.8, max_spikes=1e6),
    about="SINABS_LIF with an adaptive threshold, to which spikes send no gradient. sinabs' ALIF"
    " with MultiSpike; its default, SingleSpike, is max_spikes=1.",
)
