"""The passes of the scan over a stretch of time: kernel arguments, scratch memory and the order of launches.

Time here is the order of processing: with reverse=True, step 0 is the arrays' last. The kernels do not know;
they get a negative stride.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._launch import SCAN, SERIES, STORAGE, Device, address
from ._plan import MIN_CHUNK, THREADS, Plan, checkpoint_interval, plan_backward, plan_forward

Array = Any

# Scratch for the states that the backward pass restarts from. Beyond it the sequence is walked in windows, at
# the price of one more forward pass: memory is bounded at any length.
CHECKPOINT_BYTES = 2**30

_BYTES = {"float": 4, "double": 8, "fp16": 2, "bf16": 2}


class Passes:
    """The inputs of one call in the form that the kernels read, and what can be run on them."""

    def __init__(
        self,
        device: Device,
        u: Array,
        delta: Array,
        A: Array,
        B: Array,
        C: Array,
        D: Array | None,
        z: Array | None,
        delta_bias: Array | None,
        initial_state: Array | None,
        *,
        softplus: bool,
        reverse: bool,
    ) -> None:
        self.device, self.softplus, self.reverse = device, softplus, reverse
        self.batch, self.n, self.d = u.shape
        self.d_state = A.shape[1]
        self.groups = max([x.shape[2] for x in (B, C) if x.ndim == 4], default=1)
        self.storage = STORAGE[device.dtype(u)]
        self.accumulator = "double" if self.storage == "double" else "float"
        self.every = checkpoint_interval(self.d_state, _BYTES[self.accumulator])

        self.u, self.A = self._rowwise(u), device.contiguous(A)
        self.delta, self.z = (x if x is None else self.like_u(x) for x in (delta, z))
        self.constant_B, self.constant_C = B.ndim == 2, C.ndim == 2
        self.B, self.C = (self.like_A(x) if x.ndim == 2 else self.like_u(x) for x in (B, C))
        self.D, self.bias, self.initial_state = (
            x if x is None else self.like_A(x) for x in (D, delta_bias, initial_state)
        )

    @property
    def window(self) -> int:
        """Steps whose checkpoints fit in `CHECKPOINT_BYTES`."""
        per_tile = max(self.batch * self.d * self.d_state, 1) * _BYTES[self.accumulator]
        return max(CHECKPOINT_BYTES // per_tile * self.every // MIN_CHUNK, 1) * MIN_CHUNK

    def like_u(self, x: Array) -> Array:
        """`x` in the storage type, its last axis contiguous."""
        return self._rowwise(self.device.cast(x, self.u))

    def like_A(self, x: Array) -> Array:
        """`x` in the accumulator's type, contiguous."""
        return self.device.contiguous(self.device.cast(x, self.A))

    def new_state(self) -> Array:
        """Memory for one state."""
        return self.device.empty((self.batch, self.d, self.d_state), self.A)

    def new_checkpoints(self, steps: int) -> Array:
        """Memory for the states that `backward` restarts from."""
        return self.device.empty((self.batch, -(-steps // self.every), self.d, self.d_state), self.A)

    def forward(
        self,
        start: int,
        stop: int,
        first: Array | None,
        last: Array | None,
        y: Array | None,
        checkpoints: Array | None,
    ) -> None:
        """Steps `start` to `stop`, from state `first` to `last`; y is (batch, n, d) and may be None."""
        plan = plan_forward(*self._sizes(start, stop), itemsize=_BYTES[self.accumulator], **self._machine())
        rows = {"u": self.u, "delta": self.delta, "z": self.z, "B": self.B, "C": self.C, "y": y}
        scan = self._arguments(plan, start, stop, rows, first=first, last=last, checkpoints=checkpoints)
        scratch = self._enter_chunks(plan, scan, self.constant_B, adjoint=False)
        self._launch(plan.kernel("scan_forward", self.storage, self.constant_B, self.constant_C), plan.grid, scan)
        del scratch  # until here: memory freed earlier could be handed out again

    def backward(
        self, start: int, stop: int, adjoint: Array | None, checkpoints: Array, rows: dict[str, Array | None]
    ) -> tuple[Array, dict[str, Array]]:
        """Gradients of steps `start` to `stop` from the `adjoint` of the state after them.

        Writes the steps' part of ``rows["du"]``, ``"ddelta"``, ``"dz"``, ``"dB"`` and ``"dC"``; returns the
        adjoint of the state before them and the parts of the gradients that are sums over time.
        """
        steps = stop - start
        plan = plan_backward(*self._sizes(start, stop), **self._machine())
        per_chunk = (self.batch, plan.chunks, self.d)
        totals = {
            "dA": self.device.empty((*per_chunk, self.d_state), self.A),
            "dD": self.device.empty(per_chunk, self.A),
            "dbias": self.device.empty(per_chunk, self.A),
        }
        parts = {}
        for name, constant in (("dB", self.constant_B), ("dC", self.constant_C)):
            shape = (*per_chunk, self.d_state) if constant else (self.batch, steps, plan.blocks, self.d_state)
            parts[name] = self.device.empty(shape, self.A)
        inputs = {"u": self.u, "delta": self.delta, "z": self.z, "B": self.B, "C": self.C}
        outputs = {name: rows[name] for name in ("dy", "du", "ddelta", "dz")}
        before = self.new_state()
        scan = self._arguments(
            plan,
            start,
            stop,
            inputs | outputs | parts,
            first=adjoint,
            last=before,
            checkpoints=checkpoints,
            **totals,
        )
        scratch = self._enter_chunks(plan, scan, self.constant_C, adjoint=True)
        self._launch(plan.kernel("scan_backward", self.storage, self.constant_B, self.constant_C), plan.grid, scan)
        del scratch

        written = slice(self.n - stop, self.n - start) if self.reverse else slice(start, stop)
        for name, constant in (("dB", self.constant_B), ("dC", self.constant_C)):
            if constant:
                totals[name] = parts[name]
            else:
                blocks = parts[name].reshape(self.batch, steps, self.groups, -1, self.d_state)
                rows[name][:, written] = blocks.sum(3)  # type: ignore[index]
        return before, {name: total.sum((0, 1)) for name, total in totals.items()}

    def _enter_chunks(self, plan: Plan, scan: np.ndarray, constant: bool, *, adjoint: bool) -> tuple[Array, ...]:
        """Where the sequence is split, find what enters each chunk."""
        if plan.chunks == 1:
            return ()
        carry = self.device.empty((self.batch, plan.chunks, self.d, self.d_state), self.A)
        sums = self.device.empty((self.batch, plan.chunks, self.d), self.A)
        scan["carry"], scan["sums"] = self.device.pointer(carry), self.device.pointer(sums)
        self._launch(plan.kernel("scan_tail", self.storage, constant, adjoint), plan.grid, scan)
        blocks = -(-self.batch * self.d * self.d_state // THREADS)
        self._launch(f"scan_carry<{self.accumulator}, {str(adjoint).lower()}>", blocks, scan)
        return carry, sums

    def _launch(self, kernel: str, blocks: int, scan: np.ndarray) -> None:
        self.device.launch(kernel, blocks, scan)

    def _sizes(self, start: int, stop: int) -> tuple[int, int, int, int]:
        return self.batch, stop - start, self.d, self.d_state

    def _machine(self) -> dict[str, int]:
        return {"groups": self.groups, "multiprocessors": self.device.multiprocessors}

    def _arguments(
        self, plan: Plan, start: int, stop: int, rows: dict[str, Array | None], **arrays: Array | None
    ) -> np.ndarray:
        """One `Scan` of selective_scan.cu."""
        scan = np.zeros(1, dtype=SCAN)
        channels, states = 0, 0  # bits of every address and stride: low zeros are alignment
        for name, x in rows.items():
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
        for name, array in {"A": self.A, "D": self.D, "bias": self.bias, **arrays}.items():
            scan[name] = 0 if array is None else self.device.pointer(array)
        scan["softplus"] = self.softplus
        scan["batch"], scan["n"], scan["d"], scan["d_state"] = self._sizes(start, stop)
        scan["groups"], scan["blocks"] = self.groups, plan.blocks
        scan["chunk"], scan["chunks"] = plan.chunk, plan.chunks
        scan["tiles"] = -(-(stop - start) // self.every)
        return scan

    def _series(self, x: Array, start: int, stop: int, *, grouped: bool) -> tuple[int, int, int, int]:
        """Address of step `start`, and the strides of batch, time and groups, in bytes.

        An axis of length 1 is broadcast. An array of the stretch's own length begins at `start`.
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
        """`x`, copied only if its rows are not contiguous or too far apart for 32 bits."""
        strides = self.device.strides(x)
        itemsize = _BYTES[STORAGE[self.device.dtype(x)]]
        near = x.shape[1] == 1 or abs(strides[1]) < 2**31
        return x if near and (x.shape[-1] == 1 or strides[-1] == itemsize) else self.device.contiguous(x)
