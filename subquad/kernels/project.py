"""The product of rows with a matrix of weights, which may be stored in half precision, in plain Array API."""

from __future__ import annotations

from collections.abc import Iterator

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of
from subquad.core.dtypes import cast, compute_dtype
from subquad.core.kernel import kernel

BLOCK_ELEMENTS = 2**19  # of weights that are converted together: 2 MB of float32 stay in a core's cache
MOST_BLOCKS = 16  # a compiler unrolls the loop over blocks


def outputs(x: Array, W: Array, bias: Array | None, /) -> tuple[Like, ...]:
    """Shape and dtype of the output of `project`."""
    return (Like((x.shape[0], W.shape[0]), compute_dtype(namespace_of(x), x)),)


@kernel(outputs=outputs)
def project(x: Array, W: Array, bias: Array | None, /) -> Array:
    """y = x Wᵀ + bias, in the dtype of x (float32 if that is half precision), whatever the dtype of W is.

        x       (rows, inputs)
        W       (outputs, inputs), real and floating
        bias    (outputs,)

    Weights of another dtype than that of x are converted block by block: no converted copy of all of W is made.
    """
    xp = namespace_of(x)
    dtype = compute_dtype(xp, x)
    x, bias = cast(xp, x, dtype), cast(xp, bias, dtype)
    if W.dtype == dtype:
        y = x @ xp.matrix_transpose(W)
    else:
        parts = [x @ xp.matrix_transpose(cast(xp, W[start:stop, :], dtype)) for start, stop in weight_blocks(W)]
        y = parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)
    return y if bias is None else y + bias


def weight_blocks(W: Array) -> Iterator[tuple[int, int]]:
    """First row, and the row after the last one, of each block of rows of W that is converted at once."""
    rows, width = W.shape
    step = max(1, BLOCK_ELEMENTS // max(width, 1), -(-rows // MOST_BLOCKS))
    return ((start, min(start + step, rows)) for start in range(0, max(rows, 1), step))
