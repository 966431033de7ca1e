"""Output to the terminal: a progress bar while measuring, then one table for each n."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from subquad.cli.digits import three_digits
from subquad.cli.measure import ROUNDING, Measurement

LABEL_WIDTH, NUMBER_WIDTH = 18, 8
DISAGREE = 0.01  # relative difference between the errors of two libraries from which on a remark is printed


class Progress:
    """A progress bar that is redrawn between measurements only, since a drawing thread would disturb the times."""

    def __init__(self, bar: Bar, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=total)

    def now(self, what: str) -> None:
        """Show what is being measured now."""
        self._bar.update(self._task, description=what, refresh=True)

    def advance(self) -> None:
        """Count one more measurement as done."""
        self._bar.update(self._task, advance=1, refresh=True)


@contextmanager
def progress(total: int) -> Iterator[Progress]:
    """Show a progress bar on stderr, and remove it at the end."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        yield Progress(bar, total)


def show(
    rows: Sequence[Measurement],
    *,
    title: str,
    notes: Sequence[str],
    written: Sequence[Path],
    complete: bool,
    baseline: Mapping[int, float],
) -> None:
    """Print the tables, remarks, and the names of the files written."""
    console = Console()
    backends = list(dict.fromkeys(row.backend for row in rows))
    at_once = max(1, (console.width - LABEL_WIDTH - NUMBER_WIDTH - 2) // (2 * NUMBER_WIDTH + 1))
    console.print(Text(title, style="bold"))
    for n in dict.fromkeys(row.n for row in rows):
        for start in range(0, len(backends), at_once):
            console.print(_table([row for row in rows if row.n == n], backends[start : start + at_once], n, baseline))
    legend = "error: relative, against the float64 definition (exact attention; the recurrence of a scan)"
    console.print(Text(f"{legend}. ms: median time of a call. MB: peak memory beyond inputs and output.", style="dim"))
    for remark in [*notes, *_disagreements(rows), *_failures(rows)]:
        console.print(Text(remark))
    if not complete:
        console.print(Text("interrupted: the tables hold what had finished", style="bold"))
    for path in written:
        console.print(Text(f"written: {path}"), soft_wrap=True)


def _table(rows: Sequence[Measurement], backends: Sequence[str], n: int, baseline: Mapping[int, float]) -> Table:
    table = Table(title=f"n = {n}", title_justify="left", box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("\nmethod", min_width=LABEL_WIDTH - 1, no_wrap=True)
    table.add_column("\nerror", justify="right", min_width=NUMBER_WIDTH - 1, no_wrap=True)
    for backend in backends:
        first, _, second = backend.rpartition(" ") if " " in backend else (backend, "", "")
        table.add_column(f"{first}\nms", justify="right", min_width=NUMBER_WIDTH, no_wrap=True)
        table.add_column(f"{second}\nMB", justify="right", min_width=NUMBER_WIDTH - 1, no_wrap=True)
    for name in dict.fromkeys(row.label for row in rows):
        of_name = [row for row in rows if row.label == name]
        here = {row.backend: row for row in of_name}
        cells = [name, _error([row.error for row in of_name])]
        for backend in backends:
            row = here.get(backend)
            cells += ["", ""] if row is None else ["failed", ""] if row.failure else [_ms(row), _mb(row)]
        table.add_row(*cells)
    if n in baseline:
        table.add_row("(mean of v)", _error([baseline[n]]), style="dim")
    return table


def _error(errors: Sequence[float | None]) -> str:
    """The largest error of the libraries as text; equal seeds give equal errors on all libraries, up to rounding."""
    known = [error for error in errors if error is not None]
    if not known:
        return "-"
    worst = max(known)
    return f"{worst:.3f}" if 1e-3 <= worst < 1e3 else f"{worst:.0e}"


def _ms(row: Measurement) -> str:
    return "" if row.time is None else three_digits(row.time * 1e3)


def _mb(row: Measurement) -> str:
    return "?" if row.extra_memory is None else three_digits(row.extra_memory / 1e6)


def _disagreements(rows: Sequence[Measurement]) -> list[str]:
    """Remarks on methods whose error differs between libraries by more than rounding."""
    remarks = []
    for key in dict.fromkeys((row.n, row.label) for row in rows):
        errors = {row.backend: row.error for row in rows if (row.n, row.label) == key and row.error is not None}
        if not errors:
            continue
        least, most = min(errors.values()), max(errors.values())
        if most > ROUNDING and not math.isclose(least, most, rel_tol=DISAGREE):
            each = ", ".join(f"{backend} {error:.3g}" for backend, error in errors.items())
            remarks.append(f"{key[1]}, n = {key[0]}: the error depends on the library: {each}")
    return remarks


def _failures(rows: Sequence[Measurement]) -> list[str]:
    """One line for each failure, with the first n at which it happened."""
    found: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row.failure:
            found.setdefault((row.label, row.backend, row.failure), row.n)
    return [f"{name} failed on {where}, n = {n}: {why}" for (name, where, why), n in found.items()]
