"""`.. results:: NAME` shows asv_benchmarks/results/NAME.json: tables, a picture, and what was measured where."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import quality_picture
import throughput_picture
from docutils import nodes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from sphinx.util.docutils import SphinxDirective

from asv_benchmarks.papers.memory import LEAST_BYTES
from asv_benchmarks.quality.table import failures
from asv_benchmarks.quality.table import tables as tables_of_models
from subquad.cli.digits import three_digits
from subquad.cli.plot import COLOURS, MARKERS

RESULTS = Path(__file__).parents[2] / "asv_benchmarks" / "results"
LEAST = LEAST_BYTES / 1e6  # megabytes
ERRORS = {"error_ours": "error: ours", "error_theirs": "theirs", "error_mean": "mean of v"}
Record = dict[str, Any]


class Results(SphinxDirective):
    """Everything that one file of measurements says."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = RESULTS / f"{self.arguments[0]}.json"
        self.env.note_dependency(str(path))
        content = json.loads(path.read_text(encoding="utf-8"))
        tables, figure = views(content)
        text, svg = "\n\n".join(tables(content)), io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": "subquad", "font.size": 9}):
            figure(content).savefig(svg, format="svg", metadata={"Date": None}, bbox_inches="tight")
        source = f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"
        image = nodes.raw("", f'<img alt="{content["title"]}" src="{source}">', format="html")
        return [*self.parse_text_to_nodes(text), image, *self.parse_text_to_nodes(provenance(content))]


def views(content: Record) -> tuple[Callable[[Record], list[str]], Callable[[Record], Figure]]:
    """The functions that make the tables and the picture of a file, by what its rows are."""
    if "step" in content["rows"][0]:
        return (
            lambda content: [table(*found) for found in throughput_picture.tables(content)]
        ), throughput_picture.draw
    if "model" in content["rows"][0]:
        return models, quality_picture.draw
    return (peers, draw_peers) if "peer" in content["rows"][0] else (paper, draw_paper)


class Measure(NamedTuple):
    """What a table of a paper shows: a value of each row, what less of it is, and the least that can be told."""

    name: str
    better: str
    value: Callable[[Record], float]
    least: float = 0.0

    def table(self, content: Record, group: str) -> dict[str, dict[int, float]]:
        """{name: {n: value}} of a group of rows."""
        rows = [row for row in content["rows"] if row["group"] == group]
        return {x["name"]: {row["n"]: self.value(row) for row in rows if row["name"] == x["name"]} for x in rows}

    def ratio(self, x: float, base: float) -> str:
        """How many times less than the base, or the bound that is left of it where one of them is not known."""
        if max(x, base) < self.least:
            return "–"
        sign = "> " if x < self.least else "< " if base < self.least else ""
        return f"{sign}{three_digits(max(base, self.least) / max(x, self.least))}×"

    def cell(self, x: float | None, base: float | None) -> str:
        """The value and, in brackets, how many times less than the base it is."""
        if x is None:
            return "–"
        told = three_digits(x) if x >= self.least else f"< {self.least:g}"
        return told if base is None else f"{told} ({self.ratio(x, base)})"


def measures(content: Record) -> list[Measure]:
    """Time, and memory where it was measured."""
    found = [Measure("Milliseconds", "faster", lambda row: row["ms"]["median"])]
    if content["instance_bytes"]:
        memory = "Megabytes beyond inputs and output"
        found.append(Measure(memory, "smaller", lambda row: row["extra_bytes"] / 1e6, LEAST))
    return found


def peers(content: Record) -> list[str]:
    """Ours beside each peer."""
    errors = [key for key in ERRORS if any(key in row for row in content["rows"])]
    rows = [["peer", "theirs, ms", "ours, ms", "theirs / ours", *(ERRORS[key] for key in errors)]]
    for row in content["rows"]:
        ratio = "{} ({} to {})".format(*(three_digits(row["ratio"][key]) for key in ("median", "least", "most")))
        found = [f"{row[key]:.3g}" if key in row else "–" for key in errors]
        rows.append([row["peer"], three_digits(row["theirs_ms"]), three_digits(row["ours_ms"]), ratio, *found])
    return [table(content["title"], rows)]


def paper(content: Record) -> list[str]:
    """Each measure per length; then how many times less than each baseline at one length."""
    first, n, lengths = content["baselines"][0], content["summary"], sorted({row["n"] for row in content["rows"]})
    parts = [f"{content['title']}. After {content['source']}."]
    for measure in measures(content):
        for group in dict.fromkeys(row["group"] for row in content["rows"]):
            found, rows = measure.table(content, group), [["n", *map(str, lengths)]]
            rows += [
                [name, *(measure.cell(x.get(n), found[first].get(n)) for n in lengths)] for name, x in found.items()
            ]
            title = f"{', '.join(filter(None, (measure.name, group)))} (in brackets: how many times {measure.better} "
            parts.append(table(f"{title}than “{first}”)", rows))
    here = {row["name"]: row for row in content["rows"] if row["n"] == n}
    if here:
        own = n * content["instance_bytes"] / 1e6
        whole = Measure("With q, k, v, out", "smaller", lambda row: row["extra_bytes"] / 1e6 + own, LEAST + own)
        pairs = [(measure, base) for measure in (*measures(content), whole) for base in content["baselines"]]
        rows = [["", *(f"{measure.name}: {base}" for measure, base in pairs)]]
        for name, row in here.items():
            rows.append(
                [name, *(measure.ratio(measure.value(row), measure.value(here[base])) for measure, base in pairs)]
            )
        parts.append(table(f"n = {n}: how many times less", rows))
    if content.get("crossover"):
        parts.append(f"The scan is faster than attention from n = {content['crossover']:.0f} on.")
    return [*parts, *content["notes"]]


def models(content: Record) -> list[str]:
    """What trained models lose by each method, and which texts they read."""
    lines = [
        f"{x['kind'].capitalize()}: {', '.join(f'``{y}``' for y in x['from'])}, SHA-256 {x['sha256']}…."
        for x in content["texts"]
    ]
    failed = failures(content["rows"])
    return [*(table(*found) for found in tables_of_models(content["rows"])), *failed, " ".join(lines)]


def table(title: str, rows: Iterable[Sequence[str]]) -> str:
    """A list-table whose first row is its header."""
    lines = [f".. list-table:: {title}", "   :header-rows: 1", "   :class: wide", ""]
    for cells in rows:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}".rstrip() for i, cell in enumerate(cells)]
    return "\n".join(lines)


def provenance(content: Record) -> str:
    """Machine, versions, and the command that measures again."""
    where = "{processor}, {cores} cores, {memory_gib} GiB, {system}".format(**content["machine"])
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    when = " at commit ".join(filter(None, (content["date"], content.get("commit"))))
    again = f"Again: ``{content['command']}``."
    return f"Measured {when} on {where}, with {content['threads']} threads: {versions}. {again}"


def draw_peers(content: Record) -> Figure:
    """The ratio to each peer, with least and most."""
    names, ratios = [row["peer"] for row in content["rows"]], [row["ratio"] for row in content["rows"]]
    spread = [[x["median"] - x["least"] for x in ratios], [x["most"] - x["median"] for x in ratios]]
    figure = Figure(figsize=(7.5, 0.35 * len(names) + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.errorbar([x["median"] for x in ratios], names, xerr=spread, fmt="o", color=COLOURS[0], ecolor="0.5", capsize=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="their time / our time (median, least and most of interleaved pairs)")
    axes.invert_yaxis()
    show_plain_numbers(axes)
    return figure


def draw_paper(content: Record) -> Figure:
    """A panel for each measure and group of rows, both axes logarithmic: the slope is the exponent."""
    groups = dict.fromkeys(row["group"] for row in content["rows"])
    panels = [(measure, group) for measure in measures(content) for group in groups]
    figure = Figure(figsize=(4.6 * max(len(panels), 1.3), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (measure, group) in zip(grid, panels, strict=True):
        for i, (name, cells) in enumerate(measure.table(content, group).items()):
            style = {"color": (*COLOURS[:6], "black")[i % 7], "marker": MARKERS[i % 7], "markersize": 4, "label": name}
            values = [max(x, measure.least) for x in cells.values()]
            axes.plot(list(cells), values, linewidth=2.4 if "subquad" in name else 1.2, **style)
        axes.set(xscale="log", yscale="log", xlabel="n", ylabel=", ".join(filter(None, (measure.name, group))))
        show_plain_numbers(axes)
        lengths = sorted({row["n"] for row in content["rows"]})
        axes.set_xticks(lengths, [str(n) if n < 1024 else f"{n // 1024}k" for n in lengths])
    if content.get("crossover"):
        grid[0].axvline(content["crossover"], color="0.6", linestyle=":", zorder=0)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def show_plain_numbers(axes: Axes) -> None:
    """1, 2, 5, 10, … in place of powers, on logarithmic axes."""
    axes.grid(alpha=0.3)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.set_minor_locator(NullLocator())


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("results", Results)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
