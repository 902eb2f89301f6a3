"""Plots: what is drawn are the numbers that the equations give."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import neuronjit as nj

matplotlib = pytest.importorskip("matplotlib", reason="pip install 'neuronjit[plot]'")
CURRENT = [0.0, 1.5, 1.5, 2.5, -1.0, 0.2, 3.0, 1.7]


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


def drawn(ax: Any) -> dict[str, Any]:
    """The y of each line, by its label."""
    return {line.get_label(): torch.as_tensor(line.get_ydata()) for line in ax.lines}


def spike_times(ax: Any) -> list[float]:
    (ticks,) = ax.collections
    assert ticks.get_label() == "spikes"
    return [segment[0][0] for segment in ticks.get_segments()]


def test_a_surrogate() -> None:
    ax = nj.plot(nj.surrogates.ATan(3.0), u=(-1.0, 1.0))
    u = torch.as_tensor(ax.lines[0].get_xdata())
    assert (u[0], u[-1]) == (-1.0, 1.0) and len(u) > 100
    found = drawn(ax)
    wanted = {
        "derivative": 1.5 / (1 + (math.pi / 2 * 3.0 * u) ** 2),
        "primitive": torch.atan(math.pi / 2 * 3.0 * u) / math.pi + 0.5,
    }
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values)
    assert "ATan(alpha=3" in ax.get_title()
    ax.figure.savefig("/dev/null", format="png")


def test_surrogates_without_a_primitive_and_without_a_u() -> None:
    assert drawn(nj.plot("superspike")).keys() == {"derivative"}
    flat = drawn(nj.plot("StraightThrough"))["derivative"]
    assert (flat == 1).all() and len(flat) > 100


@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_a_neuron(reset: str) -> None:
    ax = nj.plot("lif", CURRENT, tau=1.25, reset=reset, v_threshold=0.9, state={"v": 0.5})
    v, hs, vs, fired = 0.5, [], [], []
    for t, x in enumerate(CURRENT):
        h = v + (x - v) / 1.25
        s = h >= 0.9
        v = h - 0.9 * s if reset == "soft" else h * (1 - s)
        hs.append(h)
        vs.append(v)
        fired += [t] if s else []
    found = drawn(ax)
    torch.testing.assert_close(found["v"], torch.tensor(vs))
    torch.testing.assert_close(found["h, before the reset"], torch.tensor(hs))
    torch.testing.assert_close(found["threshold"], torch.full((8,), 0.9))
    assert spike_times(ax) == fired and 2 < len(fired) < 7
    assert list(ax.lines[0].get_xdata()) == list(range(8))
    ax.figure.savefig("/dev/null", format="png")


def test_a_threshold_of_its_own_and_axes_of_ones_own() -> None:
    from matplotlib import pyplot

    model = nj.NeuronModel(
        "alif", "theta = v_threshold + a\nh = v + x\na = a + s", state=dict(v=0.0, a=0.0)
    )
    axes = pyplot.subplots(2)[1]
    assert nj.plot(model, torch.tensor([1, 1, 1, 1, 1, 1]), ax=axes[1]) is axes[1]
    assert drawn(axes[1])["threshold"].tolist() == [1, 2, 2, 3, 3, 3]
    assert spike_times(axes[1]) == [0, 2, 5]
    assert not axes[0].lines
    assert nj.plot("sigmoid", ax=axes[0]) is axes[0] and len(axes[0].lines) == 2
    assert len(pyplot.get_fignums()) == 1


def test_what_is_no_spike_is_a_line() -> None:
    text = "h = v + x\ns = fire(h, theta) - fire(-h, theta)"
    ternary = nj.NeuronModel("ternary", text, state=dict(v=0.0))
    ax = nj.plot(ternary, [1.5, -2.0, 0.5], reset="soft")
    assert drawn(ax)["out.spikes"].tolist() == [1, -1, 0] and not ax.collections


def test_what_cannot_be_drawn() -> None:
    for error, words, arguments, options in (
        (nj.SpecError, r"plot\(model, current=", (nj.neurons.LIF,), {}),
        (nj.SpecError, "has no current", (nj.surrogates.ATan, CURRENT), {}),
        (nj.SpecError, r"\['reset'\] are of neurons", (nj.surrogates.ATan,), {"reset": "soft"}),
        (nj.SpecError, r"must be \[T\].*\[2, 2\]", ("lif", [[1.0, 2.0], [0.0, 1.0]]), {}),
        (nj.InputTypeError, "current must be numbers", ("lif", "abc"), {}),
        (nj.SpecError, "unknown neuron 'lfi'", ("lfi", CURRENT), {}),
        (nj.SpecError, "unknown surrogate 'atn'", ("atn",), {}),
        (nj.SpecError, "unknown parameter 'taw'", ("lif", CURRENT), {"taw": 2.0}),
    ):
        with pytest.raises(error, match=words):
            nj.plot(*arguments, **options)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(nj.BackendError, match=r"pip install 'neuronjit\[plot\]'"):
        nj.plot("atan")
