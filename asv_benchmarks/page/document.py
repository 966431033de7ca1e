"""The page: a section for each machine, a figure for each group, the numbers behind it folded away."""

from __future__ import annotations

import datetime
import html
import importlib.metadata
import platform
import re
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.ticker import EngFormatter

from asv_benchmarks.page.figures import SYMBOLS, Commit, Panel, growth, history, name_of
from asv_benchmarks.page.results import Machine, Record

LIBRARIES = ("subquad", "numpy", "torch", "jax", "cupy-cuda12x", "cupy-cuda13x", "numba", "asv")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; max-width: 75rem;
  padding: 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { border-top: 1px solid #ccc; padding-top: 1rem; margin-top: 2.5rem; }
h3 { margin: 0 0 .3rem; } figure { margin: 2rem 0; } figcaption { max-width: 45rem; margin-bottom: .5rem; }
.panels { display: flex; flex-wrap: wrap; gap: 1rem; } .panels div { flex: 0 1 23rem; min-width: 0; }
.panels b { display: block; } img { width: 100%; height: auto; } details { overflow-x: auto; margin-top: .5rem; }
table { border-collapse: collapse; font-size: .9rem; } th, td { text-align: left; padding: .15rem .8rem .15rem 0; }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; } code { overflow-wrap: anywhere; }
"""
INTRODUCTION = (
    "<p>Lower is better in every figure. A panel stands for an array library and a colour for a method; dashed lines "
    "and hollow marks are causal. What is not measured has no line: no causal form, no gradients, too long, library "
    "absent.</p>"
)
MEASURES = {
    "time_forward": ("time of a call", "From idle device to finished result; median."),
    "time_forward_backward": ("time forward and backward", "A call and its gradients; median."),
    "track_extra_memory": ("extra memory of a call", "The most held at one moment, beyond inputs and output."),
    "track_extra_memory_backward": (
        "extra memory forward and backward",
        "The most held at one moment, beyond inputs and gradients.",
    ),
    "track_exponent": ("exponent of time in n", "Slope of log time against log n: 1 is linear, 2 is quadratic."),
    "track_error": ("error on real activations", "Relative to exact attention in float64; 0 is exact."),
    "track_floor_ratio": ("multiple of the floor", "1 is as fast as the method's products and exponentials alone."),
    "track_compile_time": ("compile time", "The first call in a process, with nothing compiled on disk."),
    "time_overhead": ("overhead of a call", "Four tokens: there is next to nothing to compute; median."),
    "time_step": ("one step of decoding", "One token through the selective scan; median."),
    "timeraw_subquad": ("import subquad", "In a fresh interpreter, NumPy included; median."),
    "timeraw_numpy": ("import numpy", "What NumPy takes of it; median."),
}


class Group(NamedTuple):
    """What becomes one figure."""

    key: str
    heading: str
    caption: str
    panels: list[Panel]
    records: list[Record]


def build(records: Sequence[Record], machines: Sequence[Machine], subjects: dict[str, str]) -> str:
    """The whole page; `subjects` are the first lines of the commits' messages."""
    now = datetime.datetime.now(datetime.UTC)
    versions = f"Python {platform.python_version()}" + "".join(
        f", {name} {importlib.metadata.version(name)}" for name in LIBRARIES if _is_installed(name)
    )
    made = f"<p>Made on {now:%d %B %Y, %H:%M} UTC. Installed then: {html.escape(versions)}.</p>"
    parts = ["<h1>subquad: benchmarks</h1>", made, INTRODUCTION]
    for machine in machines:
        here = [record for record in records if record.machine == machine.name]
        if here:
            parts += _section(machine, here, subjects)
    return _page("".join(parts))


def groups(records: Sequence[Record]) -> list[Group]:
    """For each benchmark growth with n at the newest commit, where there are lengths, and history."""
    commits = list(dict.fromkeys(Commit(record.commit, record.date) for record in records))
    found = []
    for name in sorted({record.benchmark for record in records}):
        here = [record for record in records if record.benchmark == name]
        newest = [record for record in here if record.commit == here[-1].commit]
        heading, caption = _words(name)
        lengths = {record.params.get("n") for record in here}
        if len({record.params.get("n") for record in newest}) > 1:
            text = f"{caption} Both axes are logarithmic. Commit <code>{here[-1].commit[:8]}</code>."
            found.append(Group(f"{name}-n", f"{heading}, by length", text, growth(newest), newest))
        if None not in lengths:
            longest = _longest(here)
            here = [record for record in here if record.params["n"] == longest]
            caption += f" At n = {longest:,}."
        found.append(Group(f"{name}-commits", f"{heading}, by commit", caption, history(here, commits), here))
    return found


def _longest(records: Sequence[Record]) -> int:
    """The greatest length that every line reaches, or the greatest of all."""
    reach: dict[tuple[str, str], set[int]] = {}
    for record in records:
        reach.setdefault((record.params.get("backend", ""), name_of(record)), set()).add(record.params["n"])
    return max(set.intersection(*reach.values()) or set.union(*reach.values()))


def _section(machine: Machine, records: Sequence[Record], subjects: dict[str, str]) -> list[str]:
    commits = list(dict.fromkeys((record.date, record.commit) for record in records))
    parts = [f"<h2>{html.escape(machine.name)}</h2><p>{html.escape(machine.about)}. ", "Environments of asv: "]
    parts += [html.escape(", ".join(machine.environments)), f". {len(commits)} commits:</p><ul>"]
    for date, commit in commits:
        day = datetime.datetime.fromtimestamp(date / 1e3, datetime.UTC)
        parts.append(f"<li><code>{commit[:8]}</code> {day:%Y-%m-%d} {html.escape(subjects.get(commit, ''))}</li>")
    return [*parts, "</ul>", *map(_figure, groups(records))]


def _figure(group: Group) -> str:
    panels = "".join(
        f'<div><b>{html.escape(panel.title)}</b><img alt="{html.escape(f"{group.heading}, {panel.title}")}" '
        f'src="{panel.image}"></div>'
        for panel in group.panels
    )
    return (
        f'<figure id="{html.escape(group.key)}"><h3>{html.escape(group.heading)}</h3>'
        f'<figcaption>{group.caption}</figcaption><div class="panels">{panels}</div>'
        f"<details><summary>The numbers</summary>{_table(group.records)}</details></figure>"
    )


def _table(records: Sequence[Record]) -> str:
    names = list(records[0].params)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["commit", *names, records[0].unit])
    rows = (
        [record.commit[:8], *(str(record.params[name]) for name in names), _number(record.value, record.unit)]
        for record in records
    )
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float, unit: str) -> str:
    return EngFormatter(SYMBOLS[unit], places=2)(value) if unit in SYMBOLS else f"{value:.4g}"


def _words(benchmark: str) -> tuple[str, str]:
    """Heading and caption; a benchmark we know nothing of goes by its name."""
    *_, owner, measure = benchmark.split(".")
    subject = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", owner).capitalize()
    what, caption = MEASURES.get(measure, (measure.replace("_", " "), ""))
    return f"{subject}: {what}", caption


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _page(body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>subquad: benchmarks</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )
