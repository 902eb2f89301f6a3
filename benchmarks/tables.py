"""Tables and plots from the rows of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import OURS

Row = dict[str, Any]
TITLES = {
    "kernels": "Kernels: least bytes a second (forward moves 2 sequences, backward 3)",
    "chain": "Host time of a layer in a chain of 20 (LIF, N = 4096, T = 4)",
    "memory": "Bytes an element (T x N) kept for backward, beside x and the spikes",
    "calls": "Whole calls, wall clock",
    "onm": "Open Neuromorphic benchmark: Linear(N, N) + LIF, batch 10, T = 500",
    "scaling": "How the cost of forward + backward grows",
    "first-call": "First call in a fresh process, seconds after torch and the device are up",
}
WORK = ("neuron", "dtype", "T", "N", "mode", "threads")


@dataclass(frozen=True)
class Goal:
    """Something to hold on every work that was measured for it."""

    text: str
    values: list[float]
    asked: float
    at_most: bool = False


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(base: Path, found: Any, text: str) -> None:
    """Results as BASE.json, their page as BASE.md and on the screen."""
    base.parent.mkdir(parents=True, exist_ok=True)
    base.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    base.with_suffix(".md").write_text(text)
    print(text)


def goal_table(goals: list[Goal]) -> str:
    """The worst value decides."""
    lines = []
    for goal in goals:
        values = sorted(goal.values, reverse=goal.at_most)
        met, ends = "not measured", ["", ""]
        if values:
            reached = values[0] <= goal.asked if goal.at_most else values[0] >= goal.asked
            met, ends = "yes" if reached else "NO", [f"{values[0]:.2f}", f"{values[-1]:.2f}"]
        asked = f"{'at most' if goal.at_most else 'at least'} {goal.asked:g}"
        lines.append([goal.text, asked, *ends, met])
    return markdown(["goal", "asked", "worst", "best", "met"], lines)


def page(machine: Row, goals: list[Goal], rows: list[Row], notes: list[str]) -> str:
    parts = [
        f"# Benchmarks: {machine['device']}",
        ", ".join(f"{k} {v}" for k, v in machine.items()),
    ]
    parts += ["## Goals", goal_table(goals)]
    for section, title in TITLES.items():
        if chosen := [row for row in rows if row["section"] == section]:
            flat = section in ("kernels", "first-call")
            parts += [f"## {title}", (_list if flat else _pivot)(chosen)]
    return "\n\n".join([*parts, "## Notes", "\n".join(f"- {n}" for n in notes) or "None."]) + "\n"


def _list(rows: list[Row]) -> str:
    """A line a row."""
    hidden = ("section", "turn", "us_min", "us_max")
    keys = [k for k in dict.fromkeys(k for row in rows for k in row) if k not in hidden]
    return markdown(keys, [[_number(row.get(key, "")) for key in keys] for row in rows])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pivot(rows: list[Row]) -> str:
    """A line a work, a column a peer: microseconds, and how many times ours; or bytes."""
    keys = [key for key in WORK if key in rows[0]]
    columns = list(dict.fromkeys(row["peer"] for row in rows))
    lines: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        line = (row["turn"], *(str(row[key]) for key in keys))  # no ratio across turns
        lines.setdefault(line, {})[row["peer"]] = row
    cells = [
        [*key, *(_cell(found.get(c), found.get(OURS)) for c in columns)]
        for (_, *key), found in lines.items()
    ]
    return markdown([*keys, *columns], cells)


def _cell(row: Row | None, ours: Row | None) -> str:
    if row is None or "bytes" in row:
        return f"{row['bytes']:.3f}" if row else ""
    if not row.get("equal", True):
        return f"{row['us']:.1f} (other answer)"
    compared = ours and row is not ours and ours.get("equal", True)
    return f"{row['us']:.1f}" + (f" ({row['us'] / ours['us']:.1f}x)" if compared else "")


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Left: peers' times over ours. Middle and right: cost along N and along T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(20, 7))
    threads = max((row.get("threads", 0) for row in rows), default=0)
    rows = [row for row in rows if row.get("threads", threads) == threads]  # all at work
    _ratios(axes[0], [r for r in rows if r["section"] == "calls" and r["mode"] == "train"])
    sweep = [row for row in rows if row["section"] == "scaling"]
    _growth(axes[1], sweep, along="N", fixed="T")
    _growth(axes[2], sweep, along="T", fixed="N")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _ratios(axis: Any, rows: list[Row]) -> None:
    rows = [row for row in rows if row["equal"]]
    ours = {row["turn"]: row["us"] for row in rows if row["peer"] == OURS}
    points: dict[str, list[tuple[float, str]]] = {}
    for row in (row for row in rows if row["turn"] in ours):
        name = f"{row['neuron']} {row['dtype']} T={row['T']} N={row['N']}"
        points.setdefault(row["peer"], []).append((row["us"] / ours[row["turn"]], name))
    for peer, places in points.items():
        axis.plot(*zip(*places, strict=True), "o", label=peer)
    axis.set(xscale="log", title="forward + backward: time over neuronjit's")
    axis.grid(alpha=0.3)
    axis.legend()


def _growth(axis: Any, rows: list[Row], along: str, fixed: str) -> None:
    """One of the two sweeps: the rows where `fixed` has the value that most have."""
    values = [row[fixed] for row in rows]
    most = max(values, key=values.count, default=0)
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = sorted((r[along], r["us"]) for r in rows if r["peer"] == peer and r[fixed] == most)
        axis.plot(*zip(*points, strict=True), marker="o", label=peer)
    axis.set(xscale="log", yscale="log", xlabel=along, ylabel="us")
    axis.set(title=f"forward + backward, {fixed} = {most}")
    axis.legend()
