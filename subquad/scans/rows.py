"""Inputs of scans whose state is a matrix, (..., d, d_v): checks of their shapes, and the shapes that kernels take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from subquad.backend import Array
from subquad.scans.call import Target, flat_target

Tails = Mapping[str, tuple[int, ...]]  # the axes of each array after the batch, by its name


def check_first(arrays: Mapping[str, Any], time: int) -> tuple[tuple[int, ...], int, int]:
    """((n,) or (), d, d_v) of arrays with k and v; `time` is the number of time axes, 1 in a scan, 0 in one step.

    ValueError unless k and v have these axes, and k a channel.
    """
    for name, width in (("k", "d"), ("v", "d_v")):
        shape = tuple(arrays[name].shape)
        if len(shape) <= time:
            expected = f"(..., n, {width}) with at least two axes" if time else f"(..., {width})"
            msg = f"{name} has shape {shape}, expected {expected}"
            raise ValueError(msg)
    k = tuple(arrays["k"].shape)
    if k[-1] == 0:
        msg = f"k has shape {k}, expected at least one channel (last axis)"
        raise ValueError(msg)
    return k[-1 - time : -1], k[-1], arrays["v"].shape[-1]


def check_tails(arrays: Mapping[str, Any], tails: Tails, why: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The batch axes of the arrays that are not None, by name; ValueError unless each array ends in its tail.

    `why` says what the axes of an array are.
    """
    batches = {}
    for name, tail in tails.items():
        if arrays[name] is None:
            continue
        got = tuple(arrays[name].shape)
        own = len(got) - len(tail)
        if own < 0 or got[own:] != tail:
            expected, k = ", ".join(map(str, ("...", *tail))), tuple(arrays["k"].shape)
            msg = f"{name} has shape {got}, expected ({expected}): {why[name]}, and k has {k}"
            raise ValueError(msg)
        batches[name] = got[:own]
    return batches


def row_target(x: Array | None, dtype: Any, batch: tuple[int, ...], tail: tuple[int, ...], time: int) -> Target | None:
    """The target (product of `batch`, n, 1 head, width) of rows (..., n, width), or of numbers (..., n) without width.

    In one step n is 1.
    """
    target = flat_target(x, dtype, batch, tail)
    n = tail[0] if time else 1
    return target if target is None else target._replace(shape=(math.prod(batch), n, 1, *tail[time:]))


def state_target(x: Array | None, dtype: Any, batch: tuple[int, ...], tail: tuple[int, ...]) -> Target | None:
    """The target (product of `batch`, 1 head, *tail) of a state."""
    target = flat_target(x, dtype, batch, tail)
    return target if target is None else target._replace(shape=(math.prod(batch), 1, *tail))
