"""The tables of a run, for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]


REFERENCE = "exact (PyTorch)"  # name of the rows that the others are compared with


class Table(NamedTuple):
    """A title, and rows of text of which the first is the header."""

    title: str
    rows: list[list[str]]


def tables(rows: Sequence[Record]) -> list[Table]:
    """A table for each text of the language model, and one for the encoder."""
    language = [row for row in rows if row["model"] == "smollm2"]
    found = [_language(kind, [x for x in language if x["text"] == kind]) for kind in _each(language, "text")]
    encoder = [row for row in rows if row["model"] == "minilm"]
    return [*found, _encoder(encoder)] if encoder else found


def failures(rows: Sequence[Record]) -> list[str]:
    """A line for each row that failed."""
    return [f"{x['method']}, {x['model']}, {x['text']}, n = {x['n']}: {x['failure']}" for x in rows if "failure" in x]


def _language(kind: str, rows: Sequence[Record]) -> Table:
    """For each length ΔNLL, the mean size of a token's change, and the share of keys."""
    lengths = _each(rows, "n")
    exact = ", ".join(f"{x['perplexity']:.3f} at {x['n']}" for x in rows if x["method"] == REFERENCE)
    header = ["method", *(f"{name}, n = {n}" for n in lengths for name in ("ΔNLL", "mean abs.", "keys"))]
    body = []
    for method in _each(rows, "method"):
        here = {row["n"]: row for row in rows if row["method"] == method}
        body.append([method, *(cell for n in lengths for cell in _language_cells(here.get(n)))])
    return Table(f"SmolLM2-135M, {kind}; perplexity with exact attention {exact}", [header, *body])


def _language_cells(row: Record | None) -> list[str]:
    if row is None or "failure" in row:
        return ["–" if row is None else "failed", "", ""]
    if row["method"] == REFERENCE:
        return ["0", "0", percent(1.0)]
    return [signed(row["delta"]), f"{row['size']:.3f}", percent(row["share"])]


def _encoder(rows: Sequence[Record]) -> Table:
    header = ["method", "cosine", "least cosine", "nearest found", "head error, median", "largest", "keys"]
    body = []
    for row in rows:
        cells = ["failed", *[""] * 5] if "failure" in row else _encoder_cells(row)
        body.append([row["method"], *cells])
    between = next(row["between"] for row in rows if row["method"] == REFERENCE)
    title = f"MiniLM-L6, passages of {rows[0]['n']} tokens; the cosine of two passages is {between:.3f} on average"
    return Table(title, [header, *body])


def _encoder_cells(row: Record) -> list[str]:
    cosines = [f"{row[name]:.3f}" for name in ("cosine", "least_cosine")]
    errors = [f"{row[name]:.3f}" if name in row else "0" for name in ("error", "largest_error")]
    return [*cosines, percent(row["overlap"]), *errors, percent(row["share"])]


def signed(x: float) -> str:
    """A difference with its sign: four decimals below 0.1, else three figures or so."""
    return f"{x:+.4f}" if abs(x) < 0.1 else f"{x:+.2f}"


def percent(x: float | None) -> str:
    """A share as a percentage, "–" for none."""
    return "–" if x is None else f"{100 * x:.0f} %"


def _each(rows: Sequence[Record], name: str) -> list[Any]:
    """The values of a key, each once, in the order in which they come."""
    return list(dict.fromkeys(row[name] for row in rows))
