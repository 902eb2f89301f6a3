"""Golden renders: a dozen kernels as text, so that a change shows what it does to rendered code.

What the kernels of a target have in common, its names above all, is a file of its own. After a
change that is meant: `make golden`, and look at the difference before committing it.
"""

from __future__ import annotations

import difflib
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

import neuronjit as nj

GOLDEN = Path(__file__).parent / "golden"
SUFFIX = {"cuda": ".cu", "cpu": ".cpp"}
ALIF = nj.NeuronModel(
    "alif",
    """
    h = v * beta + x
    theta = v_threshold + beta_a * a
    a = a * rho + s
    """,
    state=dict(v=0.0, a=0.0),
    params=dict(beta=0.9, beta_a=0.3, rho=0.8),
)
OWN_RESET = nj.NeuronModel(
    "own_reset",
    """
    i = i * alpha + x
    h = v * beta + i
    a = a * rho + s
    v = h - s * (theta + sigmoid(a))
    """,
    state=dict(v=0.0, i=0.0, a=0.0),
    params=dict(alpha=0.8, beta=0.9, rho=0.95),
)
SMALL, MANY, LONG = (dict(neurons=n, steps=t) for n, t in ((1000, 4), (2**24, 4), (2**14, 64)))
forward, backward = dict(direction="forward"), dict(direction="backward")
KERNELS: dict[str, dict[str, Any]] = {  # file name: what is asked of `neuronjit.render`
    "if_forward.cu": dict(model="if", **forward, **SMALL),
    "lif_forward_long.cu": dict(model="lif", **forward, **LONG),
    "lif_backward.cu": dict(model="lif", **backward, **SMALL),
    "lif_backward_half_wide.cu": dict(model="lif", **backward, **MANY, dtype="float16"),
    "plif_backward_soft_detached.cu": dict(
        model="plif", **backward, **LONG, reset="soft", detach_reset=True, surrogate="Sigmoid",
        learned=("reciprocal_tau",),
    ),
    "izhikevich_backward_double.cu": dict(model="izhikevich", **backward, **SMALL, dtype="float64"),
    "eif_backward_per_neuron.cu": dict(
        model="eif", **backward, **SMALL, per_neuron=("tau",), learned=("tau", "delta_T")
    ),
    "alif_forward_smooth.cu": dict(
        model=ALIF, **forward, **SMALL, surrogate=nj.surrogates.ATan(spiking=False)
    ),
    "lif_forward.cpp": dict(model="lif", **forward, **SMALL),
    "qif_backward_learned.cpp": dict(
        model="qif", **backward, **LONG, reset="soft", surrogate="Erf", learned=("v_c", "a0")
    ),
    "alif_backward_bfloat16.cpp": dict(
        model=ALIF, **backward, **SMALL, dtype="bfloat16", surrogate="PiecewiseLeakyReLU"
    ),
    "own_reset_backward.cpp": dict(model=OWN_RESET, **backward, **SMALL),
}  # fmt: skip


@cache
def rendered() -> dict[str, str]:
    """Each golden file's text as it is rendered now: of each target its head, then its kernels."""
    texts = {}
    for target, suffix in SUFFIX.items():
        whole = {
            name: nj.render(target=target, **asked).splitlines(keepends=True)
            for name, asked in KERNELS.items()
            if name.endswith(suffix)
        }
        rows = takewhile(lambda lines: len(set(lines)) == 1, zip(*whole.values(), strict=False))
        common = [line for line, *_ in rows]
        blank = max((i for i, line in enumerate(common) if not line.strip()), default=-1)
        head = common[: blank + 1]  # whole paragraphs: a kernel's own first lines stay with it
        texts[f"head{suffix}"] = "".join(head)
        texts |= {name: "".join(lines[len(head) :]) for name, lines in whole.items()}
    return texts


@pytest.mark.parametrize("name", ["head.cu", "head.cpp", *KERNELS])
def test_rendered_as_before(name: str) -> None:
    path = GOLDEN / name
    before = path.read_text(encoding="ascii") if path.exists() else ""
    now = rendered()[name]
    changes = difflib.unified_diff(
        before.splitlines(), now.splitlines(), f"tests/golden/{name}", "rendered now", lineterm=""
    )
    shown = "\n".join(list(changes)[:60])
    assert before == now, f"other text. If it is meant: make golden, and commit it.\n{shown}"


def test_no_other_golden_file() -> None:
    left = {path.name for path in GOLDEN.iterdir()} - {"head.cu", "head.cpp", *KERNELS}
    assert not left, f"no test renders {sorted(left)}: make golden removes them"


def write() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.iterdir():
        path.unlink()
    for name, text in rendered().items():
        (GOLDEN / name).write_text(text, encoding="ascii")


if __name__ == "__main__":
    write()
