"""Steps of scans: where the inputs and outputs of a registered scan have their axis of time, and how to take some."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np

import subquad.scans  # noqa: F401  which registers them
from subquad.registry import SCANS, ScanRow

Arrays = dict[str, Any]


@functools.cache
def drawn(name: str, n: int) -> tuple[Arrays, dict[str, Any]]:
    """The example inputs of a scan, (arrays, options)."""
    return SCANS[name].draw(np.random.default_rng(3), n)


def with_time(row: ScanRow) -> bool:
    """Whether a scan takes documents, padding and positions."""
    return {"segments", "mask", "states_at"} <= set(inspect.signature(row.function).parameters)


@functools.cache
def time_axes(name: str) -> dict[str, int]:
    """The axis along which an input has a number for each step, counted from the end; of those that have one."""
    one, two = (drawn(name, n)[0] for n in (1, 2))
    return {
        key: axis - x.ndim for key, x in one.items() for axis in range(x.ndim) if x.shape[axis] != two[key].shape[axis]
    }


@functools.cache
def out_axis(name: str) -> int:
    """The axis of time of the output, counted from the end."""
    one, two = (SCANS[name].call(*drawn(name, n)).shape for n in (1, 2))
    return next(axis for axis in range(len(one)) if one[axis] != two[axis]) - len(one)


def cut(name: str, arrays: Arrays, steps: Any) -> Arrays:
    """Some steps, a slice or a mask, of all inputs."""
    axes = time_axes(name)
    return {key: x[(..., steps, *[slice(None)] * (-axes[key] - 1))] if key in axes else x for key, x in arrays.items()}


def of_steps(name: str, out: Any, steps: Any) -> Any:
    """Some steps of an output."""
    return out[(..., steps, *[slice(None)] * (-out_axis(name) - 1))]
