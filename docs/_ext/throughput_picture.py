"""Tables and picture of `python -m asv_benchmarks.throughput`: tokens per second, and memory beyond the weights."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from subquad.cli.digits import three_digits
from subquad.cli.plot import COLOURS, MARKERS

Record = dict[str, Any]


def tokens_per_second(row: Record) -> float:
    return float(row["batch"] / row["step"]["median"])


def tables(content: Record) -> list[tuple[str, list[list[str]]]]:
    """(title, rows) of the only table: a line for each model and batch."""
    rows = [["model", "sequences", "prompt, s", "ms a step", "tokens/s", "MB, prompt", "MB, generation"]]
    for row in content["rows"]:
        numbers = (
            row["prompt"]["median"], 1e3 * row["step"]["median"], tokens_per_second(row), row["prompt_bytes"] / 1e6,
            row["step_bytes"] / 1e6,
        )  # fmt: skip
        rows.append([row["name"], str(row["batch"]), *map(three_digits, numbers)])
    return [(f"{content['title']}; memory is beyond the weights", rows)]


def draw(content: Record) -> Figure:
    """Lines over the number of sequences, or bars where there are few numbers of sequences."""
    return _lines(content) if len({row["batch"] for row in content["rows"]}) > 2 else _bars(content)


def _lines(content: Record) -> Figure:
    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(dict.fromkeys(row["name"] for row in content["rows"])):
        rows = [row for row in content["rows"] if row["name"] == name]
        style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4, "label": name}
        batches = [row["batch"] for row in rows]
        left.plot(batches, [tokens_per_second(row) for row in rows], **style)
        right.plot(batches, [row["step_bytes"] / 1e6 for row in rows], **style)
    for axes, label in ((left, "tokens per second"), (right, "megabytes beyond the weights")):
        axes.set(xscale="log", yscale="log", xlabel="sequences", ylabel=label)
        _plain(axes, sorted({row["batch"] for row in content["rows"]}))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _plain(axes: Axes, batches: list[int]) -> None:
    axes.grid(alpha=0.3)
    axes.set_xticks(batches, list(map(str, batches)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _bars(content: Record) -> Figure:
    names = list(dict.fromkeys(row["name"] for row in content["rows"]))
    figure = Figure(figsize=(9.2, 0.42 * len(names) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    prompts = {row["name"]: content["n"] / row["prompt"]["median"] for row in content["rows"]}
    left.barh(names, [prompts[name] for name in names], color=COLOURS[0])
    for i, batch in enumerate(sorted({row["batch"] for row in content["rows"]})):
        rows = [row for row in content["rows"] if row["batch"] == batch]
        places = [names.index(row["name"]) + 0.4 * i - 0.2 for row in rows]
        style: dict[str, Any] = {"height": 0.38, "color": COLOURS[i], "label": f"{batch} at once"}
        right.barh(places, [tokens_per_second(row) for row in rows], **style)
    left.invert_yaxis()
    left.set(xlabel="tokens per second of the prompt")
    right.set(xlabel="tokens per second of generation")
    right.legend(frameon=False)
    return figure
