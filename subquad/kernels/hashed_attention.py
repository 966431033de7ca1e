"""Softmax attention of rows that meet keys in rounds of sorted chunks: output and log-sum-exp.

In each round, rows and keys have an order and are cut into chunks of `size`. Chunk c of the rows meets the key chunk
⌊c · chunks of keys / chunks of rows⌋ and the one before. The sums of a row run over the keys that it meets in some
round, each once.
"""

from __future__ import annotations

from types import ModuleType

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.dtypes import common_dtype, compute_dtype
from subquad.core.gather import gather, gather_rows
from subquad.core.kernel import kernel
from subquad.kernels.block_attention import batch_of, block_attention, join


def outputs(
    q: Array, k: Array, v: Array, start: Array, stop: Array, avoid: Array | None, order_q: Array, order_k: Array,
    chunk_q: Array, chunk_k: Array, /, *, scale: float, size: int, key_mask: Array | None = None,
) -> tuple[Like, ...]:  # fmt: skip
    """Shape and dtype of the outputs of `hashed_attention`."""
    matrices: dict[str, Array | None] = {"q": q, "k": k, "v": v, "order_q": order_q, "order_k": order_k}
    batch = batch_of(matrices, {"start": start, "stop": stop, "avoid": avoid}, key_mask)
    xp, n = namespace_of(q), q.shape[-2]
    return (
        Like((*batch, n, v.shape[-1]), common_dtype(xp, q, k, v)),
        Like((*batch, n), compute_dtype(xp, q, k, v)),
    )


@kernel(outputs=outputs, options={"key_mask": None}, reads_half=True)
def hashed_attention(
    q: Array, k: Array, v: Array, start: Array, stop: Array, avoid: Array | None, order_q: Array, order_k: Array,
    chunk_q: Array, chunk_k: Array, /, *, scale: float, size: int, key_mask: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Softmax attention (..., n, d_v) over the keys that rows meet, and its log-sum-exp (..., n).

    `order_q` (..., rounds, n) and `order_k` (..., rounds, n_kv) are permutations, int32, and `chunk_q` (..., n, c) and
    `chunk_k` (..., n_kv, c) have the chunk of each row in all rounds but the last, as of `hashed_order`. `start`,
    `stop` and `avoid` (..., n) restrict the places of keys as in `block_attention`, where key j is at place j. q, k and
    v may have half precision in place of float32; the output has it if all have the same.
    """
    xp, rounds = namespace_of(q), order_q.shape[-2]
    found = None
    own = key_chunks(xp, q.shape[-2], k.shape[-2], size, q)
    met_q = key_chunks_met(xp, chunk_q, own, k.shape[-2], size)
    blocks = xp.stack([own - 1, own], axis=-1)
    for r in range(rounds):
        rows, keys = order_q[..., r, :], order_k[..., r, :]
        seen = [None if x is None else gather(xp, x, rows) for x in (start, stop, avoid)]
        before_q, before_k = (
            gather_rows(xp, met[..., :r], order) if r else None for met, order in ((met_q, rows), (chunk_k, keys))
        )
        out, lse = block_attention(
            gather_rows(xp, q, rows), gather_rows(xp, k, keys), gather_rows(xp, v, keys), seen[0], seen[1], blocks,
            keys, seen[2], before_q, before_k, None, None, scale=scale, size=size,
            key_mask=None if key_mask is None else gather(xp, key_mask, keys), implementation="generic",
        )  # fmt: skip
        back = xp.astype(xp.argsort(rows, axis=-1), xp.int32)
        part = gather_rows(xp, out, back), gather(xp, lse, back)
        found = part if found is None else join(xp, found, part)
    assert found is not None
    return found


def key_chunks(xp: ModuleType, n: int, n_kv: int, size: int, like: Array) -> Array:
    """The key chunk that each chunk of n rows meets, int32, and whose predecessor it meets too."""
    chunks = -(-n // size)
    return (xp.arange(chunks, dtype=xp.int32, device=place_of(like)) * -(-n_kv // size)) // chunks


def key_chunks_met(xp: ModuleType, chunk_q: Array, own: Array, n_kv: int, size: int) -> Array:
    """The key chunks `own[chunk_q]` that rows of these chunks meet, and whose predecessors they meet too."""
    if own.shape[0] == -(-n_kv // size):  # as many chunks of rows as of keys: each meets that of its number
        return chunk_q
    return xp.reshape(xp.take(own, xp.reshape(chunk_q, (-1,))), chunk_q.shape)
