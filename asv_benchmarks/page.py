"""`python -m asv_benchmarks.page --out DIR`: asv's results as one file, `index.html`, that needs no network."""

from __future__ import annotations

import argparse
import base64
import html
import io
import itertools
import math
from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from asv.benchmarks import Benchmarks
from asv.config import Config
from asv.results import iter_results
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from asv_benchmarks import harness
from subquad.cli.plot import MARKERS, colour_of

HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>subquad: benchmarks</title><style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem; }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; } img { width: 23rem; max-width: 100%; }
td:last-child { text-align: right; } td, th { text-align: left; padding-right: 1rem; }
</style>"""
INTRODUCTION = (
    "<p>Lower is better in every figure. A panel stands for an array library; dashed lines are causal. What is not "
    "measured has no line: no gradients, too long, library absent. Times are medians.</p>"
)
UNITS = {"seconds": EngFormatter("s", places=2), "bytes": EngFormatter("B", places=2)}


class Record(NamedTuple):
    """One number; the date is that of the commit, in milliseconds since 1970."""

    date: int
    commit: str
    machine: str
    benchmark: str
    unit: str
    params: dict[str, Any]
    value: float

    @property
    def line(self) -> str:
        """The name of a line in a panel: all parameters except library and length."""
        rest = {name: x for name, x in self.params.items() if name not in ("backend", "n")}
        return " ".join(name if x is True else str(x) for name, x in rest.items() if x is not False)


def read(folder: Path) -> list[Record]:
    """All numbers of the current versions of the benchmarks, by age of the commit; failed and n/a are left out."""
    config, records = Config(), []
    config.results_dir = str(folder)
    benchmarks = Benchmarks.load(config)
    for result in iter_results(str(folder)):
        about = result.params
        machine = ", ".join(str(about[key]) for key in ("machine", "cpu", "arch", "os") if about.get(key))
        for name in sorted(result.get_result_keys(benchmarks)):  # a set: its order changes from run to run
            names, params = benchmarks[name].get("param_names", []), result.get_result_params(name)
            place = result.date, result.commit_hash, machine, name, benchmarks[name].get("unit", "")
            values = result.get_result_value(name, params)
            for texts, value in zip(itertools.product(*params), values, strict=True):
                if isinstance(value, int | float) and math.isfinite(value):
                    given = dict(zip(names, map(literal_eval, texts), strict=False))
                    records.append(Record(*place, given, float(value)))
    return sorted(records, key=lambda record: record.date)


def figures(records: Sequence[Record]) -> Iterator[tuple[str, list[tuple[str, str]], list[Record]]]:
    """(title, panels, numbers) of each figure: growth with n, if there are lengths, and history."""
    places = {commit: i for i, commit in enumerate(dict.fromkeys(record.commit for record in records))}
    for name in sorted({record.benchmark for record in records}):
        here = [record for record in records if record.benchmark == name]
        newest = [record for record in here if record.commit == here[-1].commit]
        lengths = sorted({record.params["n"] for record in here if "n" in record.params})
        if len({record.params.get("n") for record in newest}) > 1:
            panels = list(drawn(newest, lambda record: record.params["n"], {"xscale": "log", "xlabel": "n"}))
            yield f"{name}, by length", panels, newest
        at = f", n = {lengths[0]}" if lengths else ""  # the shortest: every line reaches it
        kept = [record for record in here if record.params.get("n") in (None, *lengths[:1])]
        named = list(places)[:: -(-len(places) // 5)]  # five along the axis
        ticks = {"xticks": [places[x] for x in named], "xticklabels": [x[:7] for x in named], "xlabel": "commit"}
        yield f"{name}, by commit{at}", list(drawn(kept, lambda record: places[record.commit], ticks)), kept


def drawn(records: Sequence[Record], x: Callable[[Record], float], axis: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(library, picture) of each panel, with one scale for all."""
    values, lines = [record.value for record in records], sorted({record.line for record in records})
    for backend in dict.fromkeys(record.params.get("backend", "") for record in records):
        figure = Figure(figsize=(4.0, 3.6), layout="constrained")
        axes, here = figure.add_subplot(), [record for record in records if record.params.get("backend", "") == backend]
        for line in dict.fromkeys(record.line for record in here):
            points = [(x(record), record.value) for record in here if record.line == line]
            style = {"color": colour_of(line.partition(" ")[0]), "linestyle": "--" if "causal" in line else "-"}
            axes.plot(*zip(*points, strict=True), label=line, marker=MARKERS[lines.index(line) % len(MARKERS)], **style)
        is_log = max(values) > 8 * min(values) > 0
        limits = (min(values) / 1.5, max(values) * 1.5) if is_log else (min(0, *values), 1.1 * max(values) or 1)
        axes.set(yscale="log" if is_log else "linear", ylim=limits, ylabel=here[0].unit, **axis)
        axes.yaxis.set_major_formatter(UNITS.get(here[0].unit, axes.yaxis.get_major_formatter()))
        axes.grid(visible=True, color="0.9")
        if any(lines):
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        out = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": "subquad"}):
            figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        yield backend, "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def build(records: Sequence[Record]) -> str:
    """The page as HTML: a section for each machine, a figure for each group, and its numbers folded away."""
    parts = ["<h1>subquad: benchmarks</h1>", INTRODUCTION]
    for machine in dict.fromkeys(record.machine for record in records):
        here = [record for record in records if record.machine == machine]
        commits = dict.fromkeys(record.commit for record in here)
        subjects = (html.escape(f"{x[:8]} {harness.git('show', '-s', '--format=%s', x)}") for x in commits)
        parts.append(f"<h2>{html.escape(machine)}</h2><ul><li>{'<li>'.join(subjects)}</ul>")
        for title, panels, numbers in figures(here):
            images = "".join(
                f'<div>{name}<br><img alt="{title}, {name}" src="{image}"></div>' for name, image in panels
            )
            rows = [["commit", *numbers[0].params, numbers[0].unit]]
            rows += [[x.commit[:8], *map(str, x.params.values()), f"{x.value:.4g}"] for x in numbers]
            cells = "".join(f"<tr><td>{'<td>'.join(map(html.escape, row))}" for row in rows)
            parts.append(f'<figure><h3>{title}</h3><div class="panels">{images}</div>')
            parts.append(f"<details><summary>The numbers</summary><table>{cells}</table></details></figure>")
    return "\n".join([HEAD, *parts]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.page", description=__doc__)
    results = Path(__file__).with_name(".asv") / "results"
    parser.add_argument("--results", type=Path, default=results, help="folder of asv's results (default: asv's own)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for index.html")
    args = parser.parse_args()
    records = read(args.results) if (args.results / "benchmarks.json").exists() else []
    if not records:
        parser.error(f"{args.results} holds no numbers; `asv run` with --set-commit-hash keeps some")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "index.html").write_text(build(records), encoding="utf-8")
    print(f"{args.out / 'index.html'}: {len(records)} numbers")


if __name__ == "__main__":
    main()
