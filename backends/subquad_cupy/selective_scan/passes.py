"""The passes of the scan over a stretch of time: scratch memory and the order of launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from subquad_cupy.selective_scan.operands import Operands
from subquad_cupy.selective_scan.plan import MIN_CHUNK, THREADS, Plan, plan_backward, plan_forward

Array = Any

# Maximum scratch for the states that the backward pass restarts from. A sequence that needs more is walked in windows,
# at the price of one more forward pass, so that memory is bounded at any length.
CHECKPOINT_BYTES = 2**30


def window(operands: Operands) -> int:
    """The number of steps whose checkpoints fit in `CHECKPOINT_BYTES`, a multiple of `MIN_CHUNK`."""
    per_tile = max(operands.batch * operands.d * operands.d_state, 1) * operands.itemsize
    return max(CHECKPOINT_BYTES // per_tile * operands.every // MIN_CHUNK, 1) * MIN_CHUNK


def windows(operands: Operands, checkpoints: Array | None) -> Iterator[tuple[int, int, Array]]:
    """Iterate over (start, stop, checkpoints) of stretches of time from the end; one stretch if its checkpoints fit."""
    if 0 in (operands.batch, operands.n, operands.d):
        return
    if checkpoints is not None:
        yield 0, operands.n, checkpoints
        return
    length = window(operands)
    starts = range(0, operands.n, length)
    entering = [operands.initial_state]
    for start in starts[:-1]:
        entering.append(operands.new_state())
        forward(operands, start, start + length, first=entering[-2], last=entering[-1])
    for start, first in zip(reversed(starts), reversed(entering), strict=True):
        stop = min(start + length, operands.n)
        checkpoints = operands.new_checkpoints(stop - start)
        forward(operands, start, stop, first=first, checkpoints=checkpoints)
        yield start, stop, checkpoints


def forward(
    operands: Operands,
    start: int,
    stop: int,
    *,
    first: Array | None,
    last: Array | None = None,
    y: Array | None = None,
    checkpoints: Array | None = None,
) -> None:
    """Run steps `start` to `stop` from state `first`.

    Writes the last state to `last`, y to `y` (batch, n, d) and states to `checkpoints`, except where these are None.
    """
    plan = plan_forward(*operands.sizes(start, stop), itemsize=operands.itemsize, **_machine(operands))
    scan = operands.arguments(plan, start, stop, {"y": y}, first=first, last=last, checkpoints=checkpoints)
    constant_B, constant_C = operands.constant.values()
    flags = constant_B, constant_C or y is None, y is not None, *operands.reset  # without y, C is not read
    _run(operands, plan, plan.kernel("scan_forward", operands.storage, *flags), scan, enters=constant_B, adjoint=False)


def backward(
    operands: Operands,
    start: int,
    stop: int,
    adjoint: Array | None,
    checkpoints: Array,
    rows: dict[str, Array],
) -> tuple[Array, dict[str, Array]]:
    """Compute the gradients of steps `start` to `stop` from `adjoint`, the gradient by the state after them.

    Writes the rows of these steps into ``rows["du"]``, ``"ddelta"``, ``"dz"``, ``"dB"`` and ``"dC"``. Returns the
    gradient by the state before the steps, and by name these steps' terms of the gradients that are sums over time.
    """
    batch, steps, d, d_state = operands.sizes(start, stop)
    constant_B, constant_C = operands.constant.values()
    sizes = {"itemsize": operands.itemsize, "constant": constant_B or constant_C}
    plan = plan_backward(batch, steps, d, d_state, **sizes, **_machine(operands))
    per_chunk = (batch, plan.chunks, d)
    totals = {"dA": operands.new_sums(*per_chunk, d_state)}
    totals |= {name: operands.new_sums(*per_chunk) for name in ("dD", "dbias")}
    parts = {}
    for name, constant in operands.constant.items():
        shape = (*per_chunk, d_state) if constant else (batch, steps, plan.blocks, d_state)
        parts[f"d{name}"] = operands.new_sums(*shape)
    before = operands.new_state()
    channels = {name: rows[name] for name in ("dy", "du", "ddelta", "dz")}
    pointers = {"first": adjoint, "last": before, "checkpoints": checkpoints, **totals}
    scan = operands.arguments(plan, start, stop, channels | parts, **pointers)
    kernel = plan.kernel("scan_backward", operands.storage, constant_B, constant_C, *operands.reset)
    _run(operands, plan, kernel, scan, enters=constant_C, adjoint=True)

    for name, constant in operands.constant.items():
        part = parts[f"d{name}"]
        if constant:
            totals[f"d{name}"] = part
        else:
            blocks = part.reshape(batch, steps, operands.groups, -1, d_state)
            rows[f"d{name}"][:, operands.written(start, stop)] = blocks.sum(3)
    return before, {name: total.sum((0, 1)) for name, total in totals.items()}


def _machine(operands: Operands) -> dict[str, int]:
    return {"groups": operands.groups, "multiprocessors": operands.device.multiprocessors}


def _run(operands: Operands, plan: Plan, kernel: str, scan: np.ndarray, *, enters: bool, adjoint: bool) -> None:
    """Launch a kernel; where time is split into chunks, first find the state that enters each chunk.

    `enters` says whether the map that drives the state is constant: B, or for the adjoint C.
    """
    scratch: tuple[Array, ...] = ()
    if plan.chunks > 1:
        batch, d, d_state = operands.batch, operands.d, operands.d_state
        scratch = operands.new_sums(batch, plan.chunks, d, d_state), operands.new_sums(batch, plan.chunks, d)
        scan["carry"], scan["sums"] = (operands.device.pointer(x) for x in scratch)
        tail = plan.kernel("scan_tail", operands.storage, enters, adjoint, *operands.reset)
        operands.device.launch(tail, plan.grid, scan)
        blocks = -(-batch * d * d_state // THREADS)
        flags = ", ".join(str(flag).lower() for flag in (adjoint, *operands.reset))
        operands.device.launch(f"scan_carry<{operands.accumulator}, {flags}>", blocks, scan)
    operands.device.launch(kernel, plan.grid, scan)
    del scratch  # not earlier: the allocator could hand out freed memory before the kernels are launched
