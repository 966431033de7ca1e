"""Pictures of the tables: time and memory against length, or how many times faster than each peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from asv_benchmarks.papers.memory import LEAST_BYTES
from asv_benchmarks.render.tables import Record, description, megabytes, pivot
from subquad.cli.plot import COLOURS, MARKERS

SAME_BYTES = {"svg.hashsalt": "subquad", "font.size": 9}  # the same numbers give the same file


def draw(content: Record, path: Path) -> Path:
    """Draw one measurement into an SVG file."""
    with mpl.rc_context(SAME_BYTES):
        figure = _peers(content) if "peer" in content["rows"][0] else _paper(content)
        figure.savefig(path, metadata={"Date": None, "Description": description(content)}, bbox_inches="tight")
    return path


def _paper(content: Record) -> Figure:
    panels: list[tuple[str, list[Record], Any]] = [
        (", ".join(filter(None, ("ms", group))), [r for r in content["rows"] if r["group"] == group], _milliseconds)
        for group in dict.fromkeys(row["group"] for row in content["rows"])
    ]
    if content["instance_bytes"]:
        least = LEAST_BYTES / 1e6
        label = f"MB beyond inputs and output ({least:g}: or less)"
        panels.append((label, content["rows"], lambda row: max(least, megabytes(row))))
    figure = Figure(figsize=(4.6 * max(len(panels), 1.3), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, rows, value) in zip(grid, panels, strict=True):
        _lines(axes, label, pivot(rows, value))
    if content.get("crossover"):
        grid[0].axvline(content["crossover"], color="0.6", linestyle=":", zorder=0)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _milliseconds(row: Record) -> float:
    return row["ms"]["median"]


def _lines(axes: Axes, label: str, found: dict[str, dict[int, float]]) -> None:
    """Both axes logarithmic: the slope is the exponent. Ours is drawn bold."""
    lengths = sorted({n for cells in found.values() for n in cells})
    for i, (name, cells) in enumerate(found.items()):
        style = {"color": (*COLOURS, "black")[i % 7], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        axes.plot(list(cells), list(cells.values()), label=name, linewidth=2.4 if "subquad" in name else 1.2, **style)
    axes.set(xscale="log", yscale="log", xlabel="n", ylabel=label)
    _plain(axes.yaxis)
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(n) if n < 1024 else f"{n // 1024}k" for n in lengths])
    axes.grid(alpha=0.3)


def _peers(content: Record) -> Figure:
    rows = content["rows"][::-1]
    ratios = [row["ratio"] for row in rows]
    middle = [ratio["median"] for ratio in ratios]
    spread = [[x["median"] - x["least"] for x in ratios], [x["most"] - x["median"] for x in ratios]]
    figure = Figure(figsize=(7.5, 0.35 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    names = [row["peer"] for row in rows]
    axes.errorbar(middle, names, xerr=spread, fmt="o", color=COLOURS[0], ecolor="0.5", capsize=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="their time / our time (median, least and most of interleaved pairs)")
    _plain(axes.xaxis)
    axes.grid(alpha=0.3)
    return figure


def _plain(axis: Axis) -> None:
    """1, 2, 5, 10, … in place of powers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(NullLocator())
