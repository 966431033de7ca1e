"""What the kernels of block attention share: argument records, and the logits of a tile, rows × keys.

Everything lies transposed, with one row of queries in each lane: logits and weights are (keys, rows), sums of values
(d_v, rows). So keys and values are read where they are, number by number, as the left factor of a product; the maximum
and the sum of a softmax run over vectors, without a step across lanes; and what a row sees is compared in vectors too.
Rows come in panels, as many as a tile of a product has lanes, and a panel's matrix is contiguous.
"""

from typing import Any, NamedTuple

from subquad_numpy.codegen import absolute, inline, load, pointer, shifted, store, total, where_negative, zeros
from subquad_numpy.codegen.matmul import (
    HAS_HALVES,
    TILE_ROWS,
    Panels,
    multiply,
    multiply_half,
    multiply_vector,
    pack_up_to,
    padded,
    rows_at,
    turned,
)
from subquad_numpy.codegen.stored import rows_of, widen_rows
from subquad_numpy.runtime.arguments import Fields
from subquad_numpy.runtime.stored import AS_COMPUTED

ROWS, KEYS = 64, 128  # rows and keys of a tile at most: the logits of a panel of rows take 8 kB of float32
MANY_ROWS = 2 * ROWS  # rows of a tile of the forward pass where many tiles remain
REACHES = 8  # numbers of each vector of rows that `load_reach` fills
INFINITY = float("inf")

# Sizes: rows, keys, numbers of a row and of a value; rows of a listed block, rows of a tile, and blocks listed for each
# block (0: no list); columns of `met` that count; tiles of rows of an item; the number of items, if the last tiles of
# all are the first tasks, else 0. Strides in elements from row to row. `stored`: how q, k, v and the output are stored,
# and to the gradient the one by the output.
SIZES: Fields = dict.fromkeys(
    (
        "n", "n_kv", "d", "d_v", "size", "rows", "listed", "rounds", "tiles", "items", "q_row", "k_row", "v_row",
        "met_row", "stored",
    )
)  # fmt: skip
ARRAYS: Fields = {
    "numbers": 1, "q": 2, "k": 2, "v": 2, "start": 1, "stop": 1, "blocks": 2, "place": 1, "avoid": 1, "met_q": 2,
    "met_k": 2, "mask": 1, "order_q": 1, "order_k": 1,
}  # fmt: skip
"""Addresses; 0 where an array is not given. `numbers` holds the scale.

With `order_q`, row i of a block is row order_q[i] of the arrays; with `order_k`, key j is key order_k[j].
"""


class Limits(NamedTuple):
    """What the rows of a tile see, one number for each lane: rows beyond the last see no key."""

    before: Any  # −start
    stop: Any
    avoid: Any
    met: Any  # (rounds, rows)


@inline
def at(order: Any, has_order: bool, i: int) -> int:
    """The number of row i in the arrays."""
    return order[i] if has_order else i


@inline
def task_rows(task: int, n: int, size: int, rows: int, listed: int) -> tuple[int, int, int]:
    """(block, first row, number of rows) of a tile of at most `rows`; the number is 0 for a tile that does not exist.

    Such are parts of a last block.
    """
    if listed == 0:
        return 0, task * rows, min(rows, n - task * rows)
    parts = -(-size // rows)
    block, part = task // parts, task % parts
    first = block * size + part * rows
    return block, first, max(min(min(rows, size - part * rows), n - first), 0)


@inline
def load_limits(f: Any, first: int, count: int, width: int, word: Any, limits: Any) -> tuple[int, int, int, int]:
    """Fill the limits of a tile's rows.

    Returns (least start, largest stop) of rows that see a key, and (largest start, least stop) of all rows.
    """
    start, stop = pointer(f.start, word), pointer(f.stop, word)
    avoid, met, order = pointer(f.avoid, word), pointer(f.met_q, word), pointer(f.order_q, word)
    low, high, inner_low, inner_high = f.n_kv, 0, 0, f.n_kv
    for c in range(width):
        row = at(order, f.order_q != 0, first + c) if c < count else 0
        begin, end = (start[row], stop[row]) if c < count else (0, 0)
        limits.before[c], limits.stop[c] = -begin, end
        limits.avoid[c] = avoid[row] if f.avoid != 0 and c < count else -1
        for r in range(f.rounds):
            limits.met[r * width + c] = met[row * f.met_row + r] if c < count else -1
        if c < count:
            inner_low, inner_high = max(inner_low, begin), min(inner_high, end)
            if end > begin:
                low, high = min(low, begin), max(high, end)
    return max(low, 0), min(high, f.n_kv), inner_low, inner_high


@inline
def pack_rows(
    x: Any, stored: int, row: int, order: Any, has_order: bool, first: int, count: int, d: int, width: int,
    scale: Any, packed: Any, lanes: int, scratch: Any,
) -> None:  # fmt: skip
    """Copy rows, times `scale`, into panels of `width` columns, the last of which may have fewer than the others.

    Lanes beyond the last row are 0. `scratch` has room for the rows.
    """
    if has_order:
        for c in range(count):
            widen_rows(x, stored, order[first + c] * row, 0, 1, d, lanes, shifted(scratch, c * d), 0)
        source, step = scratch, d
    else:
        source, step = rows_of(x, stored, first * row, row, count, d, lanes, scratch)
    pack_up_to(turned(rows_at(source, step)), d, count, width, scale, lanes, Panels(packed, d))


@inline
def whole_tile(
    x: Any, stored: int, row: int, order: Any, has_order: bool, first: int, count: int, width: int, n: int,
    across: bool, lanes: int, scratch: Any,
) -> Any:  # fmt: skip
    """Rows first … first + count − 1 as the left factor of a product, which reads whole tiles of rows.

    `across`: the product runs over the rows, and reads numbers of a row up to a whole tile. The rows are copied into
    `scratch`, with zeros, where the product would read beyond the end of the array, where they have an order, and where
    they have half precision.
    """
    beyond = padded(width, TILE_ROWS) - width  # numbers that a product across the rows reads behind a row
    fits = (n - first - count) * row >= beyond if across else first + padded(count, TILE_ROWS) <= n
    if fits and not has_order and stored == AS_COMPUTED:
        return rows_at(shifted(x, first * row), row)
    stride = padded(width, TILE_ROWS)
    if has_order:
        for t in range(count):
            widen_rows(x, stored, order[first + t] * row, 0, 1, width, lanes, shifted(scratch, t * stride), 0)
    else:
        widen_rows(x, stored, first * row, row, count, width, lanes, scratch, stride)
    for t in range(padded(count, TILE_ROWS)):
        for p in range(width if t < count else 0, stride):
            scratch[t * stride + p] = 0
    return rows_at(scratch, stride)


@inline
def visible_keys(f: Any, first: int, count: int, byte: Any) -> int:
    """How many of the keys first … first + count − 1 the mask shows; keys in an order are not looked at."""
    shown = count
    if f.mask != 0 and f.order_k == 0:
        mask = pointer(f.mask, byte)
        for t in range(first, first + count):
            shown -= 1 if mask[t] == 0 else 0
    return shown


@inline
def load_reach(limits: Any, n_kv: int, used: int, lanes: int, reach: Any) -> None:
    """Fill, for each vector of `used` rows, with what `load_limits` returns for a tile; rows beyond the last count.

    Then follow the least start and the largest stop of the rows of each half.
    """
    for i in range(0, used, lanes):
        own = shifted(reach, i // lanes * REACHES)
        inner_low, inner_high = 0, n_kv
        for half in range(2):
            low, high = n_kv, 0
            for c in range(i + half * lanes // 2, i + (half + 1) * lanes // 2):
                begin, end = int(-limits.before[c]), int(limits.stop[c])
                inner_low, inner_high = max(inner_low, begin), min(inner_high, end)
                if end > begin:
                    low, high = min(low, begin), max(high, end)
            own[4 + 2 * half], own[5 + 2 * half] = low, high
        own[0], own[1] = min(int(own[4]), int(own[6])), max(int(own[5]), int(own[7]))
        own[2], own[3] = inner_low, inner_high


@inline
def seen_keys(f: Any, reach: Any, i: int, lanes: int, first: int, many: int) -> tuple[int, int]:
    """(first, end) of the keys 0 … many − 1 of a tile from `first` on that a vector of rows may see; end is 0 of none.

    All, if keys have places or an order.
    """
    own = shifted(reach, i // lanes * REACHES)
    low, high = max(int(own[0]) - first, 0), min(int(own[1]) - first, many)
    if f.place != 0 or f.order_k != 0:
        low, high = 0, many
    return low, high if low < high else 0


@inline
def seen_part(
    f: Any, reach: Any, begin: int, count: int, lanes: int, first: int, many: int
) -> tuple[int, int, int, int]:
    """(first column, columns, first key, keys) of what the rows of a panel see of a tile; no columns if nothing.

    Vectors at the ends of the panel and keys at the ends of the tile that no row sees are left out. The first key is
    the first one of a tile of a product.
    """
    left, right, low, high = begin + count, begin, many, 0
    for i in range(begin, begin + count, lanes):
        near, far = seen_keys(f, reach, i, lanes, first, many)
        if far > 0:
            left, right, low, high = min(left, i), i + lanes, min(low, near), max(high, far)
    low = low // TILE_ROWS * TILE_ROWS
    return left, max(right - left, 0), low, max(high - low, 0)


@inline
def seeing_half(f: Any, reach: Any, i: int, lanes: int, first: int, many: int) -> int:
    """The first column of the half of a vector whose rows alone may see keys first … first + many − 1; else −1.

    −1 also where half of a vector saves nothing.
    """
    own = shifted(reach, i // lanes * REACHES)
    one, other = own[4] < first + many and own[5] > first, own[6] < first + many and own[7] > first
    if not HAS_HALVES or f.place != 0 or f.order_k != 0 or one == other:
        return -1
    return 0 if one else lanes // 2


@inline
def multiply_seen(
    a: Any, rows: int, b: Any, step: int, depth: int, columns: int, half: int, lanes: int, nothing: Any, c: Any
) -> None:  # fmt: skip
    """C = A B for a panel B of `step` columns, or for one vector of two, or for the half of a vector from `half` on.

    C has `columns` columns; those of the other half are left as they are, or hold their products too.
    """
    if half >= 0:
        multiply_half(a, rows, b, step, depth, half, rows_at(nothing, 0), rows_at(c, columns))
    elif columns == step:
        multiply(a, rows, Panels(b, depth), depth, columns, lanes, rows_at(nothing, 0), rows_at(c, columns))
    else:
        multiply_vector(a, rows, b, step, depth, rows_at(nothing, 0), rows_at(c, columns))


@inline
def seen_by_all(reach: Any, i: int, lanes: int, first: int, many: int) -> int:
    """How many of the keys first … first + many − 1, from the first on, each row of a vector has in its interval."""
    own = shifted(reach, i // lanes * REACHES)
    return max(min(int(own[3]) - first, many), 0) if own[2] <= first else 0


@inline
def hide(
    f: Any, first: int, count: int, begin: int, width: int, limits: Any, word: Any, byte: Any, column: int,
    x: Any, panel: int,
) -> None:  # fmt: skip
    """Set the logits of pairs that a row does not see to −∞, for one vector of rows at `column` of x (keys, panel)."""
    place, mask, met = pointer(f.place, word), pointer(f.mask, byte), pointer(f.met_k, word)
    order = pointer(f.order_k, word)
    before, stop, avoid = load(limits.before, begin), load(limits.stop, begin), load(limits.avoid, begin)
    hidden = zeros(x) - INFINITY
    for t in range(count):
        j = at(order, f.order_k != 0, first + t)
        cell = t * panel + column
        if f.mask != 0 and mask[j] == 0:
            store(x, cell, hidden)
            continue
        here = float(place[j]) if f.place != 0 else float(j)
        logit = where_negative(before + here, hidden, load(x, cell))
        logit = where_negative(stop * -1.0 + here, logit, hidden)
        if f.avoid != 0:
            logit = where_negative(absolute(avoid - here) - 0.5, hidden, logit)
        for r in range(f.rounds):
            chunk = load(limits.met, r * width + begin) - float(met[j * f.met_row + r])
            logit = where_negative(absolute(chunk - 0.5) - 0.75, hidden, logit)
        store(x, cell, logit)


@inline
def is_finite(rows: Any, first: int, count: int, d: int, lanes: int) -> bool:
    """Whether no number of these rows of a matrix with adjacent columns is infinite or NaN."""
    whole, last = d // lanes * lanes, first + count - 1
    one, other, third, fourth = zeros(rows.data), zeros(rows.data), zeros(rows.data), zeros(rows.data)
    rest = rows.data[first * rows.row] * 0
    for t in range(first, first + count, 4):  # a sum waits for the one before: four side by side
        for p in range(0, whole, lanes):
            one = one + load(rows.data, t * rows.row + p) * 0.0
            other = other + load(rows.data, min(t + 1, last) * rows.row + p) * 0.0
            third = third + load(rows.data, min(t + 2, last) * rows.row + p) * 0.0
            fourth = fourth + load(rows.data, min(t + 3, last) * rows.row + p) * 0.0
    for t in range(first, first + count):
        for p in range(whole, d):
            rest += rows.data[t * rows.row + p] * 0
    return total(one + other + (third + fourth)) + rest == 0
