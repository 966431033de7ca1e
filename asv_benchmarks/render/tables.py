"""Tables as reStructuredText, with machine, versions, date and the command that repeats them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from asv_benchmarks import record
from asv_benchmarks.papers.memory import LEAST_BYTES

Record = dict[str, Any]
NONE = "–"


def read(results: Path = record.RESULTS) -> dict[str, Record]:
    """Every measurement of this kind in the folder."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    return {name: content for name, content in found.items() if content.get("format") == record.FORMAT}


def text(name: str, content: Record) -> str:
    """The page of one measurement."""
    head = f".. Generated from asv_benchmarks/results/{name}.json by python -m asv_benchmarks.render: do not edit."
    parts = _peers(content) if "peer" in content["rows"][0] else _paper(content)
    picture = f".. image:: /benchmarks/{name}.svg\n   :alt: {content['title']}\n   :width: 100%"
    return "\n\n".join([head, *parts, picture, _provenance(content)]) + "\n"


def description(content: Record) -> str:
    """What a picture says of its origin."""
    digest = hashlib.sha256(record.text(content).encode()).hexdigest()
    return f"Drawn by python -m asv_benchmarks.render from JSON with the sha256 {digest}"


def _peers(content: Record) -> list[str]:
    columns = ["peer", "theirs, ms", "ours, ms", "theirs / ours", "error: ours", "theirs", "mean of v"]
    has_mean = any("error_mean" in row for row in content["rows"])
    rows = []
    for row in content["rows"]:
        ratio = "{median:.2f} ({least:.2f} to {most:.2f})".format(**row["ratio"])
        errors = [f"{row[key]:.3g}" if key in row else NONE for key in ("error_ours", "error_theirs", "error_mean")]
        rows.append([row["peer"], number(row["theirs_ms"]), number(row["ours_ms"]), ratio, *errors])
    width = len(columns) - (not has_mean)
    return [_table(content["title"], columns[:width], [row[:width] for row in rows])]


def _paper(content: Record) -> list[str]:
    """Time, and memory where there is one, per length; then ratios to each baseline at one length."""
    first, lengths = content["baselines"][0], sorted({row["n"] for row in content["rows"]})
    units = [("Milliseconds", "faster", lambda row: row["ms"]["median"], 0.0)]
    if content["instance_bytes"]:
        units.append(("Megabytes beyond inputs and output", "smaller", megabytes, LEAST_BYTES / 1e6))
    parts = []
    for unit, better, value, least in units:
        for group in dict.fromkeys(row["group"] for row in content["rows"]):
            found = pivot([row for row in content["rows"] if row["group"] == group], value)
            rows = [
                [name, *(_with_ratio(cells.get(n), found[first].get(n), least) for n in lengths)]
                for name, cells in found.items()
            ]
            about = ", ".join(filter(None, (unit, group)))
            title = f"{about} (in brackets: how many times {better} than “{first}”)"
            parts.append(_table(title, ["n", *map(str, lengths)], rows))
    if content["summary"] in lengths:
        parts.append(_summary(content))
    if content.get("crossover"):
        parts.append(f"The scan is faster than attention from n = {content['crossover']:.0f} on.")
    return [f"{content['title']}. After {content['source']}.", *parts, *content["notes"]]


def _summary(content: Record) -> str:
    """How many times faster and smaller than each baseline; smaller also with inputs and output counted in."""
    n = content["summary"]
    here = {row["name"]: row for row in content["rows"] if row["n"] == n}
    own = n * content["instance_bytes"]
    measures = [
        ("time", lambda row: row["ms"]["median"], 0.0),
        ("extra memory", lambda row: row["extra_bytes"], LEAST_BYTES),
        ("memory with q, k, v, out", lambda row: row["extra_bytes"] + own, LEAST_BYTES + own),
    ]
    rows = [
        [
            name,
            *(
                _ratio(value(row), value(here[base]), least, "{:.1f}".format)
                for _, value, least in measures
                for base in content["baselines"]
            ),
        ]
        for name, row in here.items()
    ]
    columns = [f"{measure}: {base}" for measure, *_ in measures for base in content["baselines"]]
    return _table(f"n = {n}: how many times less", ["", *columns], rows)


def pivot(rows: Iterable[Record], value: Any) -> dict[str, dict[int, float]]:
    """{name: {n: value}}."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["name"], {})[row["n"]] = value(row)
    return found


def megabytes(row: Record) -> float:
    """Beyond inputs and output; see `bounded`."""
    return row["extra_bytes"] / 1e6


def number(x: float) -> str:
    """Three digits, without an exponent."""
    return f"{x:.{0 if x >= 100 else 1 if x >= 10 else 2}f}"


def bounded(x: float, least: float) -> str:
    """Of what is smaller than `least`, no more than that is known."""
    return number(x) if x >= least else f"< {least:g}"


def _with_ratio(x: float | None, base: float | None, least: float) -> str:
    if x is None:
        return NONE
    return bounded(x, least) if base is None else f"{bounded(x, least)} ({_ratio(x, base, least, number)})"


def _ratio(x: float, base: float, least: float, digits: Callable[[float], str]) -> str:
    """base / x, or the bound that is left of it where one of them is smaller than `least`."""
    if x < least and base < least:
        return NONE
    sign = "> " if x < least else "< " if base < least else ""
    return f"{sign}{digits(max(base, least) / max(x, least))}×"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f".. list-table:: {title}", "   :header-rows: 1", "   :class: wide", ""]
    for cells in [columns, *rows]:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}".rstrip() for i, cell in enumerate(cells)]
    return "\n".join(lines)


def _provenance(content: Record) -> str:
    machine = content["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}"
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return (
        f"Measured {content['date']} on {where}, with {content['threads']} threads: {versions}. "
        f"Again: ``{content['command']}``."
    )
