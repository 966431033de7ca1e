"""`compare.png`: error against time, with a column for each library, and one mark for each method and size.

Approximations and results that are exact up to rounding lie six decades apart, so each n has two rows: one for each.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from subquad import registry
from subquad.cli.measure import ROUNDING, Measurement

# Okabe and Ito's colours, which the colour-blind can tell apart, then four of Tol's; black is for exact attention
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#882255", "#332288", "#999933", "#7A4A1E"),
)
MARKERS = ("o", "s", "^", "D", "P", "v", "X")
Fill = Literal["full", "none"]
EXACT = "exact"
HEIGHTS = {"approximations": 2.8, "rounding": 0.9}  # height of a panel in inches
WIDTH, MARGINS = 4.0, (1.3, 1.9)  # inches: width of a panel; margins beside and above all panels
# where a label may stand beside its mark, the best place first; points from centre to centre
PLACES = ((0, 10), (0, -10), (12, 0), (-12, 0), (10, 9), (-10, 9), (10, -9), (-10, -9), (0, 19), (0, -19))
MARK, LETTER = (3.5, 3.5), (2.7, 4.5)  # half of a mark's width and height, and of a letter's, in points
NOTE = (
    "median time of a call [ms]\nLower left is better; the shaded side is slower than exact attention. "
    "Numbers at the marks: how large the method is."
)


class Point(NamedTuple):
    """A row of the comparison for which there are numbers."""

    time: float  # ms
    error: float
    row: Measurement

    @property
    def panel(self) -> str:
        """Name of the panel of the point: "rounding" or "approximations"."""
        return "rounding" if self.error < ROUNDING else "approximations"


def draw(rows: Sequence[Measurement], path: Path, *, title: str, baseline: Mapping[int, float]) -> Path:
    """Draw the rows that have numbers, write the picture to `path` and return `path`.

    `baseline` maps n to the error of the mean of v as an answer.
    """
    points = [Point(x.time * 1e3, max(x.error, 1e-17), x) for x in rows if x.time and x.error is not None]
    columns = list(dict.fromkeys(point.row.backend for point in points))
    methods = list(dict.fromkeys(point.row.method for point in points))
    limits = _limits(points, baseline)
    places = list(
        itertools.product(dict.fromkeys(point.row.n for point in points), (x for x in HEIGHTS if x in limits))
    )
    heights = [HEIGHTS[panel] for _, panel in places]

    size = (max(WIDTH * len(columns) + MARGINS[0], 7.5), sum(heights) + MARGINS[1])  # room for the title
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(
        len(places), len(columns), squeeze=False, sharex=True, sharey="row", gridspec_kw={"height_ratios": heights}
    )
    for (n, panel), line in zip(places, grid, strict=True):
        for j, (axes, backend) in enumerate(zip(line, columns, strict=True)):
            here = [point for point in points if (point.row.n, point.row.backend) == (n, backend)]
            axes.set(xscale="log", yscale="log", xlim=limits["time"], ylim=limits[panel])
            _label_axes(axes)
            _fill(axes, here, panel, MARKERS[j % len(MARKERS)], baseline.get(n))
        if panel == places[0][1]:
            line[-1].annotate(f"n = {n}", (1.03, 0.5), xycoords="axes fraction", va="center", rotation=-90, fontsize=12)
    for axes, backend in zip(grid[0], columns, strict=True):
        axes.set_title(backend, fontsize=12, fontweight="bold")
    handles = [_legend(method, colour_of(method), fill=fill_of(method)) for method in methods]
    handles += [_legend("as long as exact attention", "black", "--")] if EXACT in methods else []
    handles += [_legend("error of answering the mean of v", "0.4", ":")] if "approximations" in limits else []
    at_top = {"loc": "outside upper center", "title": title, "title_fontsize": 12, "frameon": False}
    figure.legend(handles=handles, ncols=max(1, int(size[0] // 2.2)), **at_top)
    figure.supxlabel(NOTE, fontsize=10)
    figure.supylabel("relative error of the output", fontsize=12)
    figure.savefig(path)
    return path


def colour_of(method: str) -> str:
    """The colour of a method, which does not depend on the other methods in the picture."""
    others = [name for name in [*registry.METHODS, *registry.SCANS, method] if name != EXACT]
    return "black" if method == EXACT else COLOURS[others.index(method) % len(COLOURS)]


def fill_of(method: str) -> Fill:
    """How the marks of a method are filled: those of scans, which share the colours of attention, are hollow."""
    return "none" if method in registry.SCANS else "full"


def _legend(label: str, colour: str, linestyle: str = "", *, fill: Fill = "full") -> Line2D:
    marker = "" if linestyle else "o"
    return Line2D([], [], color=colour, label=label, linestyle=linestyle, marker=marker, markersize=7, fillstyle=fill)


def _limits(points: Sequence[Point], baseline: Mapping[int, float]) -> dict[str, tuple[float, float]]:
    """Axis ranges that all panels of a kind share: "time", and the errors of each kind of panel that has points."""
    errors = {panel: [point.error for point in points if point.panel == panel] for panel in HEIGHTS}
    if errors["approximations"]:
        errors["approximations"] += baseline.values()
    times = [point.time for point in points]
    limits = {"time": (min(times) / 2, max(times) * 2)}
    return limits | {panel: (min(found) / 1.8, max(found) * 1.8) for panel, found in errors.items() if found}


def _label_axes(axes: Axes) -> None:
    """Label both axes with plain numbers in place of powers of ten."""
    low, high = axes.get_ylim()
    axes.grid(visible=True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if 1 < high / low < 100 else (1.0, 3.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}".replace("e-0", "e-")))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=9)


def _fill(axes: Axes, points: Sequence[Point], panel: str, marker: str, baseline: float | None) -> None:
    for point in points:
        if point.row.method == EXACT:
            axes.axvline(point.time, color="black", linewidth=1, linestyle="--")
            axes.axvspan(point.time, axes.get_xlim()[1], color="0.95", zorder=0)
    if panel == "approximations" and baseline is not None:
        axes.axhline(baseline, color="0.4", linewidth=1.2, linestyle=":")
    here = [point for point in points if point.panel == panel]
    for method in dict.fromkeys(point.row.method for point in here):
        style: dict[str, Any] = {"color": colour_of(method), "marker": marker, "markersize": 7, "linewidth": 1}
        style["fillstyle"] = fill_of(method)
        axes.plot(*zip(*((x.time, x.error) for x in here if x.row.method == method), strict=True), **style)
    # the mark is labelled with the size; the legend has the name
    texts = [row.label.removeprefix(row.method).strip() for _, _, row in here]
    for (time, error, row), text, place in zip(here, texts, _places(axes, here, texts, panel), strict=True):
        beside: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 8.5}
        axes.annotate(text, (time, error), xytext=place, color=colour_of(row.method), **beside)


def _places(axes: Axes, points: Sequence[Point], texts: Sequence[str], panel: str) -> list[tuple[int, int]]:
    """The place of each label beside its mark at which it covers the fewest marks and earlier labels."""

    def share(x: float, limits: tuple[float, float]) -> float:
        return math.log(x / limits[0]) / math.log(limits[1] / limits[0])

    def covered(x: float, y: float, wide: float, high: float) -> int:
        is_within = wide <= x <= size[0] - wide and high <= y <= size[1]
        return sum(abs(x - a) < wide + w and abs(y - b) < high + h for a, b, w, h in taken) + 5 * (not is_within)

    size = 72 * 0.9 * WIDTH, 72 * 0.9 * HEIGHTS[panel]  # of the axes, about, in points
    marks = [
        (size[0] * share(point.time, axes.get_xlim()), size[1] * share(point.error, axes.get_ylim()))
        for point in points
    ]
    taken = [(x, y, *MARK) for x, y in marks]
    found = []
    for (x, y), text in zip(marks, texts, strict=True):
        half = LETTER[0] * len(text), LETTER[1]
        crossings = [covered(x + across, y + up, *half) for across, up in PLACES]
        across, up = PLACES[crossings.index(min(crossings))]
        found.append((across, up))
        if text:
            taken.append((x + across, y + up, *half))
    return found
