"""One panel for each array library, as an SVG image inside the page: history over commits, or growth with length."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from asv_benchmarks.page.results import Record
from subquad.cli.plot import colours_of

SIZE = (4.0, 3.2)  # inches; a panel is as wide as a phone
MARKERS = ("X", "o", "s", "^", "D", "v", "P")  # the first is for exact attention
SYMBOLS = {"seconds": "s", "bytes": "B"}
COMMITS_NAMED = 5  # along the axis


@dataclass(frozen=True)
class Panel:
    """An image and what it shows, in words."""

    title: str
    image: str


@dataclass(frozen=True)
class Commit:
    """One place along the axis of a history."""

    hash: str
    date: int


def history(records: Sequence[Record], commits: Sequence[Commit]) -> list[Panel]:
    """The value at the greatest length, commit by commit."""
    places = {commit.hash: i for i, commit in enumerate(commits)}

    def arrange(axes: Axes) -> None:
        named = range(0, len(commits), -(-len(commits) // COMMITS_NAMED))
        axes.set_xticks(list(named), [commits[i].hash[:7] for i in named])
        axes.set_xlim(-0.5, max(len(commits) - 0.5, 0.5))
        axes.set_xlabel("commit, oldest first")

    return _panels(records, lambda record: places[record.commit], arrange)


def growth(records: Sequence[Record]) -> list[Panel]:
    """The value against n, both logarithmic."""
    lengths = sorted({record.params["n"] for record in records})

    def arrange(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
        axes.set_xlabel("n, tokens")

    return _panels(records, lambda record: record.params["n"], arrange)


def line_of(record: Record) -> tuple[Any, ...]:
    """What tells the lines of a panel apart: every parameter but the library and the length."""
    return tuple(value for name, value in record.params.items() if name not in ("backend", "n"))


def name_of(record: Record) -> str:
    """The line's name in the legend."""
    words = {name: value for name, value in record.params.items() if name not in ("backend", "n")}
    causal = words.pop("causal", False)
    return " ".join([*map(str, words.values()), *(["causal"] if causal else [])])


def _panels(records: Sequence[Record], x: Callable[[Record], float], arrange: Callable[[Axes], None]) -> list[Panel]:
    """A panel for each library, all on the same axes."""
    values = [record.value for record in records]
    panels = []
    for backend in dict.fromkeys(record.params.get("backend", "") for record in records):
        here = [record for record in records if record.params.get("backend", "") == backend]
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        for line in sorted({line_of(record) for record in here}, key=str):
            points = [record for record in here if line_of(record) == line]
            colour, marker = _look(points[0])
            dashes = "--" if points[0].params.get("causal") else "-"
            style = {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 5, "linewidth": 1.3}
            hollow = {"markerfacecolor": "white"} if dashes == "--" else {}
            axes.plot(
                [x(point) for point in points],
                [point.value for point in points],
                label=name_of(points[0]),
                **style,
                **hollow,
            )
        arrange(axes)
        _scale(axes, values, here[0].unit)
        axes.grid(visible=True, color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if any(line_of(record) for record in here):
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        panels.append(Panel(backend, _svg(figure)))
    return panels


def _scale(axes: Axes, values: Sequence[float], unit: str) -> None:
    least, most = min(values), max(values)
    logarithmic = least >= 0 and most > 8 * least
    if logarithmic and least == 0:  # no extra memory at all is a value worth showing
        smallest = min((value for value in values if value > 0), default=1.0)
        axes.set_yscale("symlog", linthresh=smallest)
        axes.set_ylim(-0.3 * smallest, most * 2)
    elif logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(least / 1.5, most * 1.5)
    else:
        axes.set_ylim(0, most * 1.1 or 1)
    if unit in SYMBOLS:
        axes.yaxis.set_major_formatter(EngFormatter(SYMBOLS[unit]))
    elif logarithmic:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if logarithmic and least > 0:
        subs = (1.0,) if most > 1e3 * least else (1.0, 2.0, 5.0) if most < 50 * least else (1.0, 3.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if unit not in SYMBOLS:
        axes.set_ylabel(unit)


def _look(record: Record) -> tuple[str, str]:
    """A method keeps its colour and mark in every panel."""
    name = next((str(value) for value in line_of(record) if isinstance(value, str)), "selective_scan")
    colours = colours_of([name])
    return colours[name], MARKERS[list(colours).index(name) % len(MARKERS)]


def _svg(figure: Figure) -> str:
    """A data URI: an image of its own, so that the names inside it meet no others, with the letters drawn."""
    out = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "subquad"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
