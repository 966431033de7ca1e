"""Kernels on arrays in chunks, lazy or larger than memory: a few tasks for each chunk, for any library that runs some.

A backend is a `ChunkedBackend` that says how blocks are run (`blocks.Blocks`), and lists what `overrides` makes of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from subquad.backend import Accepts, Array, Backend, Call, Override
from subquad.chunks.blocks import Blocks, with_new_axes
from subquad.chunks.features import feature_attend, feature_step, feature_summarize
from subquad.chunks.scans import linear_scan, selective_scan

REAL = ("float32", "float64")
ALL = (*REAL, "complex64", "complex128")


class ChunkedBackend(Backend):
    """The base of backends of lazy arrays in chunks."""

    _blocks: ClassVar[Blocks]

    def is_concrete(self, *arrays: Array | None) -> bool:
        """False: to read a value is to compute the graph."""
        return all(x is None for x in arrays)

    def reshaped(self, xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
        """New axes of length 1 join the task that makes the chunk; a reshape is one of its own."""
        longer = with_new_axes(self._blocks, x, shape)
        return super().reshaped(xp, x, shape) if longer is None else longer


def overrides(blocks: Blocks) -> tuple[Override, ...]:
    """The overrides of the kernels that are computed chunk by chunk."""
    return (
        Override("feature_summarize", "chunks", partial(feature_summarize, blocks), _accepts("key_mask")),
        Override("feature_attend", "chunks", partial(feature_attend, blocks), _accepts()),
        Override("feature_step", "chunks", partial(feature_step, blocks), _accepts("key_mask")),
        Override("selective_scan", "chunks", partial(selective_scan, blocks), _accepts(dtypes=ALL, one_dtype=False)),
        Override("linear_scan", "chunks", partial(linear_scan, blocks), _accepts(dtypes=ALL)),
    )


def _accepts(*options: str, dtypes: tuple[str, ...] = REAL, one_dtype: bool = True) -> Accepts:
    # the calls that are computed chunk by chunk: those with entries, of dtypes that are not widened
    return Accepts(dtypes=dtypes, one_dtype=one_dtype, devices=(), options=frozenset(options), also=_is_empty)


def _is_empty(call: Call) -> str | None:
    # a reason to decline: an array without entries has no chunks to compute
    return "an array has no entries" if any(x is not None and 0 in x.shape for x in call.arrays) else None
