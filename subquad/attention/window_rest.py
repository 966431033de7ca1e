"""What a window does not visit, as centroids of clusters of keys, and the blocks of keys that windows read.

Keys are clustered in chunks of consecutive ones. In causal calls no chunk is longer than the window, so that a row
visits all keys of its own chunk, and centroids sum up keys of earlier chunks alone.
"""

from __future__ import annotations

from subquad.attention.call import AttentionCall
from subquad.attention.rest import SIZE, Parts, centroids
from subquad.attention.restrictions import sight_of
from subquad.backend import Array
from subquad.core.beside import place_of

LONGEST = 256  # keys of a chunk, at most


def check_left(left: int, rest_size: int | None) -> None:
    """ValueError if a causal window has no room for a chunk of one cluster."""
    size = rest_size or SIZE
    if left + 1 < size:
        msg = (
            f"left={left} beside rest in a causal call: a chunk of at most left + 1 keys holds no cluster of {size}; "
            f"pass left={size - 1} or more, or rest_size={left + 1} or less"
        )
        raise ValueError(msg)


def over_rest(
    call: AttentionCall, left: int, right: int, key_mask: Array | None, rest_size: int | None, implementation: str
) -> Parts | None:
    """(out, lse) over the centroids of the keys that `key_mask` shows outside of a row's window; None for no keys."""
    xp, n, n_kv, holds = call.xp, call.q.shape[-2], call.k.shape[-2], call.arrangement.backend.holds
    size = rest_size or SIZE
    longest = max(min(LONGEST, left + 1) if call.causal else LONGEST, size)
    chunk = size << (longest // size).bit_length() - 1
    if n == 0 or holds(n_kv <= (chunk if call.causal else 0)):
        return None
    found = centroids(xp, call.k, call.v, key_mask, chunk, size, implementation)
    place, start, stop = sight_of(call, left=left, right=right)
    return found.attend(
        call.q, blocks_of_windows(call, left, right, chunk), scale=call.scale, size=chunk,
        implementation=implementation, place=place if call.causal else None, start=start, stop=stop,
    )  # fmt: skip


def count_of_blocks(call: AttentionCall, left: int, right: int, size: int) -> int:
    """How many blocks of `size` keys the windows of `size` rows in a row can touch."""
    ahead = call.k.shape[-2] - call.q.shape[-2]
    # blocks of rows begin at places that are equal modulo the size of a block
    offset = (ahead - left) % size if isinstance(ahead, int) else size - 1
    return (offset + left + right + size - 1) // size + 1


def blocks_of_windows(call: AttentionCall, left: int, right: int, size: int) -> Array:
    """The blocks of `size` keys that the windows of each block of `size` rows touch, (q_blocks, r), −1 for none."""
    xp, n, n_kv = call.xp, call.q.shape[-2], call.k.shape[-2]
    where = place_of(call.q)
    first = (xp.arange(-(-n // size), dtype=xp.int32, device=where) * size + (n_kv - n - left)) // size
    count = count_of_blocks(call, left, right, size)
    blocks = first[:, None] + xp.arange(count, dtype=xp.int32, device=where)
    return xp.where((blocks >= 0) & (blocks < -(-n_kv // size)), blocks, -1)
