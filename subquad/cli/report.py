"""`compare.json`: the rows, with the facts needed to judge and to repeat them."""

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import subquad
from subquad.cli.inputs import Inputs
from subquad.cli.libraries import Target
from subquad.cli.measure import Measurement

UNITS = {
    "n": "tokens",
    "error": "‖out - reference‖ / ‖reference‖ (Frobenius); the reference is the definition in float64",
    "time": "seconds; median of `times`, after warming up, synchronised, compiled where the library compiles",
    "times": "seconds",
    "extra_memory": "bytes at the worst moment of a call, beyond inputs and output",
}


def build(
    rows: Sequence[Measurement],
    inputs: Inputs,
    targets: Sequence[Target],
    *,
    settings: dict[str, Any],
    complete: bool,
    baseline: dict[int, float],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The content of `compare.json` as a dict."""
    return {
        "format": "subquad compare 1",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "complete": complete,  # False: interrupted
        "machine": {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()},
        "threads": {name: os.environ[name] for name in os.environ if name.endswith("_NUM_THREADS")},
        "versions": versions() | {target.library: target.version for target in targets},
        "inputs": {
            "source": inputs.source,
            "shapes": {name: list(getattr(inputs, name).shape) for name in ("q", "k", "v")},
            "dtype": "float32",
            **settings,
        },
        "notes": list(notes),
        "error_of_mean_of_v": [{"n": n, "error": error} for n, error in baseline.items()],
        "units": UNITS,
        "results": [dataclasses.asdict(row) for row in rows],
    }


def write(report: dict[str, Any], path: Path) -> Path:
    """Write the report as strict JSON, without NaN, and return `path`; values that JSON does not know become text."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def title(report: dict[str, Any]) -> str:
    """A title of one line: data, heads, width, dtype, causality."""
    inputs = report["inputs"]
    heads = "×".join(str(size) for size in inputs["shapes"]["q"][:-2]) or "1"
    seen = "causal" if inputs["causal"] else "not causal"
    return f"{inputs['source']}: {heads} heads, d = {inputs['shapes']['q'][-1]}, float32, {seen}"


def versions() -> dict[str, str]:
    """The versions of the package, of Python and of NumPy."""
    return {"subquad": subquad.__version__, "python": platform.python_version(), "numpy": np.__version__}


def processor() -> str:
    """The model name of the processor if the system tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
