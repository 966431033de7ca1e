"""The inputs of one scan as its kernels read them, in place where possible, and the argument of a launch.

Steps are counted in the order of processing: with reverse=True, step 0 is the last row of the arrays. Kernels know
nothing of it: they get a negative stride of time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from subquad.kernels.selective_scan import Inputs
from subquad_cupy.device import SCAN, SERIES, STORAGE, Device, address
from subquad_cupy.selective_scan.plan import Plan, checkpoint_interval

Array = Any

_BYTES = {"float": 4, "double": 8, "fp16": 2, "bf16": 2}


class Operands:
    """The inputs of a scan, cast and copied where kernels cannot read them in place."""

    def __init__(self, device: Device, inputs: Inputs, *, softplus: bool, reverse: bool) -> None:
        self.device, self.softplus, self.reverse = device, softplus, reverse
        self.batch, self.n, self.d = inputs.u.shape
        self.d_state = inputs.A.shape[1]
        maps = {"B": inputs.B, "C": inputs.C}
        self.constant = {name: x.ndim == 2 for name, x in maps.items()}
        self.groups = max([x.shape[2] for x in maps.values() if x.ndim == 4], default=1)
        self.storage = STORAGE[device.dtype(inputs.u)]
        self.accumulator = "double" if self.storage == "double" else "float"
        self.itemsize = _BYTES[self.accumulator]
        self.every = checkpoint_interval(self.d_state, self.itemsize)

        self._u, self._A = self._rowwise(inputs.u), device.contiguous(inputs.A)
        self.rows = {"u": self._u, "delta": self.like_u(inputs.delta), "z": self.like_u(inputs.z)}
        self.rows |= {name: self.like_A(x) if self.constant[name] else self.like_u(x) for name, x in maps.items()}
        self._parameters = {"A": self._A, "D": self.like_A(inputs.D), "bias": self.like_A(inputs.delta_bias)}
        self.initial_state = self.like_A(inputs.initial_state)
        self._resets = None if inputs.resets is None else device.contiguous(inputs.resets)

    def like_u(self, x: Array | None) -> Array | None:
        """`x` in the storage type, that of `u`, with a contiguous last axis."""
        return None if x is None else self._rowwise(self.device.cast(x, self._u))

    def like_A(self, x: Array | None) -> Array | None:
        """`x` in the accumulator's type, that of `A`, contiguous."""
        return None if x is None else self.device.contiguous(self.device.cast(x, self._A))

    def new_rows(self) -> Array:
        """New memory with the shape and type of `u`."""
        return self.device.empty((self.batch, self.n, self.d), self._u)

    def new_sums(self, *shape: int) -> Array:
        """New memory in the accumulator's type."""
        return self.device.empty(shape, self._A)

    def new_state(self) -> Array:
        """New memory for one state of every batch item."""
        return self.new_sums(self.batch, self.d, self.d_state)

    def new_checkpoints(self, steps: int) -> Array:
        """New memory for the states that the backward pass restarts from, over so many steps."""
        return self.new_sums(self.batch, -(-steps // self.every), self.d, self.d_state)

    @property
    def reset(self) -> tuple[bool, ...]:
        """The last flag of the kernels' names: (True,), or () for no resets."""
        return () if self._resets is None else (True,)

    def sizes(self, start: int, stop: int) -> tuple[int, int, int, int]:
        """The sizes that a plan is made for: (batch, steps, d, d_state)."""
        return self.batch, stop - start, self.d, self.d_state

    def written(self, start: int, stop: int) -> slice:
        """The rows of the arrays that hold steps `start` to `stop`."""
        return slice(self.n - stop, self.n - start) if self.reverse else slice(start, stop)

    def arguments(
        self, plan: Plan, start: int, stop: int, rows: dict[str, Array | None], **pointers: Array | None
    ) -> np.ndarray:
        """The argument record of a launch, with `rows` and `pointers` beside those of the inputs."""
        scan = np.zeros(1, dtype=SCAN)
        channels, states = 0, 0  # all addresses and strides combined by "or", for rows of channels and of states
        for name, x in (self.rows | rows).items():
            if x is None:
                continue
            series = self._series(x, start, stop, grouped=name in ("B", "C"))
            scan["rows"][0, SERIES.index(name)] = series
            if name in ("B", "C"):
                states |= address(*series) if x.ndim == 4 else 0
            elif name not in ("dB", "dC"):
                channels |= address(*series)
        alignment = min(16, 4 * _BYTES[self.storage])
        scan["vector"] = channels % alignment == 0 and self.d // self.groups % 4 == 0
        scan["vector_state"] = states % alignment == 0
        for name, array in (self._parameters | pointers).items():
            scan[name] = 0 if array is None else self.device.pointer(array)
        if self._resets is not None:  # a byte each
            first = self.n - 1 - start if self.reverse else start
            scan["resets"] = self.device.pointer(self._resets) + first
            scan["resets_batch"], scan["resets_time"] = self.n, -1 if self.reverse else 1
        scan["softplus"] = self.softplus
        scan["batch"], scan["n"], scan["d"], scan["d_state"] = self.sizes(start, stop)
        scan["groups"], scan["blocks"] = self.groups, plan.blocks
        scan["chunk"], scan["chunks"] = plan.chunk, plan.chunks
        scan["tiles"] = -(-(stop - start) // self.every)
        return scan

    def _series(self, x: Array, start: int, stop: int, *, grouped: bool) -> tuple[int, int, int, int]:
        """(address of step `start`, strides of batch, time and groups) of an array, in bytes.

        An axis of length 1 has stride 0. An array of stop − start rows holds just these steps.
        """
        pointer, strides = self.device.pointer(x), self.device.strides(x)
        if x.ndim == 2 or x.shape[1] not in (self.n, stop - start):
            return pointer, 0, 0, 0  # constant in time
        batch = strides[0] if x.shape[0] > 1 else 0
        group = strides[2] if grouped and x.shape[2] > 1 else 0
        offset = start if x.shape[1] == self.n else 0
        if self.reverse:
            return pointer + (x.shape[1] - 1 - offset) * strides[1], batch, -strides[1], group
        return pointer + offset * strides[1], batch, strides[1], group

    def _rowwise(self, x: Array) -> Array:
        """`x`, or a copy if rows of `x` are not contiguous, or too far apart for 32 bits."""
        strides = self.device.strides(x)
        itemsize = _BYTES[STORAGE[self.device.dtype(x)]]
        near = x.shape[1] == 1 or abs(strides[1]) < 2**31
        return x if near and (x.shape[-1] == 1 or strides[-1] == itemsize) else self.device.contiguous(x)
