"""`compare.png`: error against time, one mark for each method and size; a column per library, a row per n.

Approximations and results that are exact but for rounding lie six decades apart: each panel has an axis for either.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

import subquad
from subquad.cli import labels
from subquad.cli.cases import Scan
from subquad.cli.measure import ROUNDING, Measurement

# Okabe and Ito's colours, which the colour-blind can tell apart; black is for exact attention
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "P", "v", "X")
EXACT = "exact"
PANEL = (3.4, 2.7)  # inches
MARGINS = {"left": 0.95, "right": 0.35, "top": 1.4, "bottom": 0.95}  # inches
DPI = 150


class Point(NamedTuple):
    """A row of the comparison that has numbers."""

    time: float  # ms
    error: float
    row: Measurement


def draw(rows: Sequence[Measurement], path: Path, *, title: str, baseline: Mapping[int, float]) -> Path:
    """Draw the rows that have numbers and return `path`.

    `baseline` is the error of answering with the mean of v, for each n.
    """
    points = [Point(x.time * 1e3, max(x.error, 1e-17), x) for x in rows if x.time and x.error is not None]
    backends = list(dict.fromkeys(point.row.backend for point in points))
    lengths = list(dict.fromkeys(point.row.n for point in points))
    methods = list(dict.fromkeys(point.row.method for point in points))
    baseline = {n: error for n, error in baseline.items() if n in lengths}
    colours = colours_of(methods)

    width = max(MARGINS["left"] + PANEL[0] * len(backends) + MARGINS["right"], 7.5)  # room for the title
    height = MARGINS["top"] + PANEL[1] * len(lengths) + MARGINS["bottom"]
    figure = Figure(figsize=(width, height), dpi=DPI)
    grid = figure.add_gridspec(
        len(lengths),
        len(backends),
        left=MARGINS["left"] / width,
        right=1 - MARGINS["right"] / width,
        top=1 - MARGINS["top"] / height,
        bottom=MARGINS["bottom"] / height,
        hspace=0.1,
        wspace=0.06,
    )
    limits = _limits(points, baseline)
    for i, n in enumerate(lengths):
        for j, backend in enumerate(backends):
            here = [point for point in points if (point.row.n, point.row.backend) == (n, backend)]
            panels = _panels(figure, grid[i, j], limits, outer=(j == 0, i == len(lengths) - 1))
            _fill(panels, here, colours, MARKERS[j % len(MARKERS)], baseline.get(n))
            top = next(iter(panels.values()))
            if i == 0:
                top.set_title(backend, fontsize=12, fontweight="bold")
            if j == len(backends) - 1:
                at_right: dict[str, Any] = {"transform": top.transAxes, "va": "center", "rotation": -90}
                top.text(1.03, 0.5, f"n = {n}", fontsize=12, fontweight="bold", **at_right)
    handles = [_legend(method, colours[method]) for method in methods]
    handles += [_legend("as long as exact attention", "black", "--")] if EXACT in methods else []
    handles += [_legend("error of answering the mean of v", "0.4", ":")] if baseline and "above" in limits else []
    figure.text(0.5, 1 - 0.25 / height, title, ha="center", va="center", fontsize=12)
    at_top = {"loc": "upper center", "bbox_to_anchor": (0.5, 1 - 0.38 / height)}
    figure.legend(handles=handles, ncols=-(-len(handles) // (1 if width > 14 else 2)), frameon=False, **at_top)
    figure.supxlabel("median time of a call [ms]", y=0.38 / height, fontsize=12)
    figure.supylabel("relative error of the output", x=0.18 / width, fontsize=12)
    better = "Lower left is better; the shaded side is slower than exact attention. Numbers at the marks: features "
    figure.text(0.5, 0.2 / height, better + "or landmarks.", ha="center", va="center", fontsize=9, color="0.3")
    figure.savefig(path)
    return path


def colours_of(methods: Sequence[str]) -> dict[str, str]:
    """A method keeps its colour whatever stands beside it."""
    others = [method for method in dict.fromkeys([*subquad.METHODS, Scan.method, *methods]) if method != EXACT]
    return {EXACT: "black"} | {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(others)}


def _legend(label: str, colour: str, linestyle: str = "") -> Line2D:
    return Line2D([], [], color=colour, label=label, linestyle=linestyle, marker="" if linestyle else "o", markersize=7)


def _is_rounding(error: float) -> bool:
    return error < ROUNDING


def _limits(points: Sequence[Point], baseline: Mapping[int, float]) -> dict[str, tuple[float, float]]:
    """Ranges that all panels share, so that they can be compared: of time, and of error above and below."""
    errors = {
        "above": [p.error for p in points if not _is_rounding(p.error)],
        "below": [p.error for p in points if _is_rounding(p.error)],
    }
    if errors["above"]:
        errors["above"] += baseline.values()
    times = [point.time for point in points]
    limits = {"time": (min(times) / 2, max(times) * 2)}
    return limits | {name: (min(y) / 1.8, max(y) * 1.8) for name, y in errors.items() if y}


def _panels(figure: Figure, place: Any, limits: dict[str, Any], *, outer: tuple[bool, bool]) -> dict[str, Axes]:
    """Axes "above" for approximations, "below" for what is exact but for rounding; either may be missing."""
    names: list[str] = [name for name in ("above", "below") if name in limits]
    parts = place.subgridspec(len(names), 1, height_ratios=(3, 1)[: len(names)], hspace=0.07)
    panels = {name: figure.add_subplot(parts[i]) for i, name in enumerate(names)}
    first_column, last_row = outer
    for name, axes in panels.items():
        axes.set(xscale="log", yscale="log", xlim=limits["time"], ylim=limits[name])
        axes.grid(visible=True, which="major", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        low, high = limits[name]
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0) if name == "above" and high / low < 100 else (1.0, 3.0))
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}".replace("e-0", "e-")))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        at_bottom = name == names[-1]
        axes.tick_params(labelsize=9, labelleft=first_column, labelbottom=last_row and at_bottom)
        if not at_bottom:
            axes.tick_params(which="both", bottom=False)
    return panels


def _fill(
    panels: dict[str, Axes], points: Sequence[Point], colours: dict[str, str], marker: str, baseline: float | None
) -> None:
    exact = [point.time for point in points if point.row.method == EXACT]
    for name, axes in panels.items():
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        segments: list[labels.Segment] = [((time, bottom), (time, top)) for time in exact]
        for time in exact:
            axes.axvline(time, color="black", linewidth=1, linestyle="--")
            axes.axvspan(time, right, color="0.95", zorder=0)
        if name == "above" and baseline is not None:
            axes.axhline(baseline, color="0.4", linewidth=1.2, linestyle=":")
            segments.append(((left, baseline), (right, baseline)))
        here = [point for point in points if _is_rounding(point.error) == (name == "below")]
        for method in dict.fromkeys(point.row.method for point in here):
            times, errors, _ = zip(*(point for point in here if point.row.method == method), strict=True)
            axes.plot(times, errors, color=colours[method], marker=marker, markersize=7, linewidth=1)
            corners = list(zip(times, errors, strict=True))
            segments += itertools.pairwise(corners)
        marks = [  # with the size of a method, or its name where it has none
            labels.Mark(time, error, row.label.removeprefix(f"{row.method} "), colours[row.method])
            for time, error, row in here
        ]
        labels.place(axes, marks, segments)
