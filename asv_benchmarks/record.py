"""What a measurement leaves behind: its rows as JSON, with machine, versions, date and the command that repeats it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import subquad
from subquad.cli.report import processor

RESULTS = Path(__file__).parent / "results"
FORMAT = "subquad table 1"


def use_threads(count: int | None) -> int:
    """Give every library the same number of threads; to be called before any of them is imported.

    XLA and Numba take as many threads as the process has cores, so the cores are what is limited.
    """
    if not hasattr(os, "sched_getaffinity"):  # not Linux: the libraries' own defaults
        return count or os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if count is not None and count < len(cores):
        os.sched_setaffinity(0, cores[:count])
    return min(count or len(cores), len(cores))


def write(
    path: Path,
    *,
    module: str,
    arguments: Iterable[str],
    title: str,
    packages: Iterable[str],
    threads: int,
    **content: Any,
) -> Path:
    """Write `content`, what produced it and where."""
    record = {
        "format": FORMAT,
        "command": " ".join(["python -m", module, *arguments]),
        "title": title,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "threads": threads,
        "versions": versions(packages),
        **content,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(record), encoding="utf-8")
    sys.stderr.write(f"wrote {path}\n")
    return path


def text(content: dict[str, Any]) -> str:
    """The file of a measurement."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system: nothing that names one computer."""
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        system = platform.system()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "system": f"{system}, {platform.machine()}",
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions of subquad, Python and `packages`."""
    own = {"subquad": subquad.__version__, "python": platform.python_version()}
    return own | {name: metadata.version(name) for name in packages}
