"""The picture of `python -m asv_benchmarks.quality`: for each method what the trained models lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from asv_benchmarks.quality.table import REFERENCE
from subquad.cli.plot import COLOURS, MARKERS

LEAST = 1e-4  # what loses less, or gains, is drawn here, at the tick "≤ 0.0001"
Record = dict[str, Any]


def draw(content: Record) -> Figure:
    """A line for each method and a panel for each text and model; a mark for each length."""
    rows = [row for row in content["rows"] if row["method"] != REFERENCE and "failure" not in row]
    language = [row for row in rows if row["model"] == "smollm2"]
    encoder = [row for row in rows if row["model"] == "minilm"]
    kinds = list(dict.fromkeys(row["text"] for row in language))
    names = ordered(language, encoder)
    count = len(kinds) + bool(encoder)
    figure = Figure(figsize=(3.1 * count + 1.6, 0.22 * len(names) + 1.3), layout="constrained")
    grid = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, kind in zip(grid, kinds, strict=False):
        here = [row for row in language if row["text"] == kind]
        _fill(axes, names, {f"n = {n}": [row for row in here if row["n"] == n] for n in _lengths(language)}, "delta")
        axes.set(title=f"SmolLM2-135M, {kind}", xlabel="ΔNLL, nats per token")
    if encoder:
        lost = [row | {"lost": 1 - row["cosine"]} for row in encoder]
        _fill(grid[-1], names, {"": lost}, "lost")
        between = next(x["between"] for x in content["rows"] if x["model"] == "minilm" and x["method"] == REFERENCE)
        grid[-1].axvline(1 - between, color="0.4", linewidth=1.2, linestyle=":")
        grid[-1].set(title="MiniLM-L6", xlabel="1 − cosine (dotted: of two passages)")
    grid[0].set_yticks(range(len(names)), names)
    grid[0].invert_yaxis()
    if kinds:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def ordered(language: Sequence[Record], encoder: Sequence[Record]) -> list[str]:
    """The names of the methods, the best first: by the largest ΔNLL, then those of the encoder alone by cosine."""
    worst: dict[str, tuple[int, float]] = {}
    for row in language:
        worst[row["method"]] = max(worst.get(row["method"], (0, -1.0)), (0, row["delta"]))
    for row in encoder:
        worst.setdefault(row["method"], (1, 1 - row["cosine"]))
    return sorted(worst, key=worst.__getitem__)


def _fill(axes: Axes, names: Sequence[str], groups: dict[str, list[Record]], key: str) -> None:
    for i, (label, rows) in enumerate(groups.items()):
        places = [names.index(row["method"]) for row in rows]
        style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 5, "linestyle": ""}
        axes.plot([max(row[key], LEAST) for row in rows], places, label=label, alpha=0.85, **style)
    axes.set(xscale="log", xlim=(LEAST / 1.5, None))
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(LogLocator(numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"≤ {x:g}" if x < 1.01 * LEAST else f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)


def _lengths(rows: Sequence[Record]) -> list[int]:
    return sorted({row["n"] for row in rows})
