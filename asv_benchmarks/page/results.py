"""asv's results as flat records, read by asv itself."""

from __future__ import annotations

import itertools
import math
from ast import literal_eval
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asv.benchmarks import Benchmarks
from asv.config import Config
from asv.results import iter_results


@dataclass(frozen=True)
class Record:
    """One number."""

    benchmark: str
    unit: str
    machine: str
    commit: str
    date: int  # of the commit, milliseconds since 1970
    environment: str
    params: dict[str, Any]
    value: float


@dataclass(frozen=True)
class Machine:
    """What asv noted about a machine."""

    name: str
    about: str
    environments: tuple[str, ...]


def read(folder: Path) -> tuple[list[Record], list[Machine]]:
    """All numbers of the present versions of the benchmarks, in the order of the commits; failed and n/a left out."""
    config = Config()
    config.results_dir = str(folder)
    benchmarks = Benchmarks.load(config)
    records: list[Record] = []
    machines: dict[str, Machine] = {}
    for result in iter_results(str(folder)):
        about = result.params
        machine = machines.get(about["machine"])
        environments = sorted({result.env_name, *(machine.environments if machine else ())})
        text = ", ".join(about[key] for key in ("cpu", "arch", "os") if about.get(key))
        memory = f", {int(about['ram']) / 2**30:.0f} GiB" if about.get("ram", "").isdecimal() else ""
        text += f", {about.get('num_cpu', '?')} cores{memory}"
        machines[about["machine"]] = Machine(about["machine"], text, tuple(environments))
        for name in sorted(result.get_result_keys(benchmarks)):  # a set: its order changes from run to run
            names = benchmarks[name].get("param_names", [])
            for params, value in _values(result, name):
                place = (about["machine"], result.commit_hash, result.date, result.env_name)
                unit = benchmarks[name].get("unit", "")
                records.append(Record(name, unit, *place, dict(zip(names, params, strict=False)), value))
    records.sort(key=lambda record: record.date)
    return records, list(machines.values())


def _values(result: Any, name: str) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Parameters and value of each combination that has one."""
    params = result.get_result_params(name)
    values = result.get_result_value(name, params)
    for combination, value in zip(itertools.product(*params), values, strict=True):
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield tuple(map(_parse, combination)), float(value)


def _parse(text: str) -> Any:
    """asv keeps parameters as their repr."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text
