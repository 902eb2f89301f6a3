"""Calls of the seed's six functions, and the same from the oracle."""

from __future__ import annotations

from typing import Any

import oracle
import torch
from support import assert_near, assert_same_bits, inputs, leaf, library_surrogate, starts
from torch import Tensor

import neuronjit as nj

# arguments in the seed's order; x_seq, the states, detach_reset and the surrogate excepted
NUMBERS: dict[str, dict[str, Any]] = {
    "if": {"v_threshold": 0.9, "v_reset": 0.1},
    "lif": {"decay_input": True, "tau": 1.8, "v_threshold": 0.9, "v_reset": 0.1},
    "plif": {"reciprocal_tau": None, "decay_input": False, "v_threshold": 0.9, "v_reset": 0.1},
    "qif": {
        "tau": 1.8, "v_threshold": 0.9, "v_reset": -0.2, "v_rest": 0.05, "v_c": 0.7, "a0": 0.9,
    },
    "izhikevich": {
        "tau": 1.8, "v_threshold": 0.9, "v_reset": 0.15, "v_rest": -0.05, "a": 0.3, "b": 0.2,
        "tau_w": 1.9, "v_c": 0.7, "a0": 0.9,
    },
    "eif": {
        "tau": 1.8, "v_threshold": 0.9, "v_reset": -0.2, "v_rest": 0.05, "theta_rh": 0.7,
        "delta_T": 0.8,
    },
}  # fmt: skip
NEURONS = list(NUMBERS)


def call(
    neuron: str,
    x: Tensor,
    state: dict[str, Tensor],
    reset: str,
    detach: bool,
    surrogate: Any,
    **changed: Any,
) -> dict[str, Tensor]:
    """The seed's function, every argument by position; its returns by name."""
    numbers = {**NUMBERS[neuron], **changed}
    if reset == "soft":
        numbers["v_reset"] = None
    function = getattr(nj, f"multistep_{neuron}_ptt")
    returned = function(x, *state.values(), *numbers.values(), detach, surrogate)
    third = {"plif": ["reciprocal_tau"], "izhikevich": ["w"], "eif": ["h"]}.get(neuron, [])
    assert isinstance(returned, tuple) and len(returned) == 2 + len(third)
    return dict(zip(["s", "v", *third], returned, strict=True))


def expect(
    neuron: str, x: Tensor, state: dict[str, Tensor], reset: str, detach: bool,
    surrogate: oracle.Surrogate, **changed: Any,
) -> dict[str, Tensor]:  # fmt: skip
    numbers = {**NUMBERS[neuron], **changed}
    model = neuron.upper()
    if not numbers.pop("decay_input", True):
        model += "_NO_DECAY"
    if reset == "soft":
        del numbers["v_reset"]
    out = oracle.run(
        model, x, state, surrogate=surrogate, reset=reset, detach_reset=detach, **numbers
    )
    want = {"s": out.spikes, **{name: out.record[name] for name in state}}
    if neuron == "eif":
        want["v"] = torch.cat([state["v"].to(x.dtype)[None], out.record["v"]])
        want["h"] = out.record["h"]
    if neuron == "plif":
        want["reciprocal_tau"] = numbers["reciprocal_tau"]
    return want


def compare(
    neuron: str, device: str, dtype: torch.dtype = torch.float32, *, reset: str = "hard",
    detach: bool = False, surrogate: oracle.Surrogate | None = None, given: Any = None,
    requires: tuple[str, ...] = ("x", "v", "w", "reciprocal_tau"), arriving: tuple[str, ...] = (),
    **changed: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """One call against the oracle, forward and backward; gradients arrive at `arriving` or all."""
    surrogate = surrogate or oracle.Surrogate("Sigmoid")
    tensors = {"x": inputs((7, 4, 5), dtype), **starts(neuron.upper(), (4, 5))}
    if neuron == "plif":
        tensors["reciprocal_tau"] = torch.tensor(0.4)
    results, grads = [], []
    for run, where, s in (
        (call, device, given or library_surrogate(surrogate)),
        (expect, "cpu", surrogate),
    ):
        leaves = {k: leaf(t, where).requires_grad_(k in requires) for k, t in tensors.items()}
        options = {k: v for k, v in leaves.items() if k == "reciprocal_tau"} | changed
        state = {k: v for k, v in leaves.items() if k in ("v", "w")}
        outputs = run(neuron, leaves["x"], state, reset, detach, s, **options)
        results.append(outputs)
        generator = torch.Generator().manual_seed(5)
        loss = torch.zeros((), dtype=torch.float64)
        for key, value in outputs.items():
            weights = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if not arriving or key in arriving:
                loss = loss + (value.cpu().double() * weights.to(dtype).double()).sum()
        loss.backward()
        grads.append({k: leaves[k].grad for k in leaves if k in requires})
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-10}.get(dtype, 1.6e-2)
    for key, value in results[1].items():
        if neuron == "eif":
            assert_near(results[0][key], value, tolerance, key)
        else:
            assert_same_bits(results[0][key], value, key)
    for key, value in grads[1].items():
        assert_near(grads[0][key], value, tolerance, f"gradient of {key}", floor=1.0)
    return results[0]
