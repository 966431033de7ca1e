"""Nyström attention of an item by one task: means of segments, three attentions, a pseudo-inverse and a product.

    out = softmax(s q k̃ᵀ) A⁺ (softmax(s q̃ kᵀ) v),    A = softmax(s q̃ k̃ᵀ) I

Attentions and inverse are the compiled kernels `block_attention` and `iterative_pinv`, called by their addresses on
scratch memory, with a copy of records that are made beforehand. Rows of NaN in A stay: softmax(s q̃ kᵀ) has them too.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.block_attention.forward import FORWARD_RECORD
from subquad_numpy.codegen import inline, load, pointer, store, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.stored import load_stored, number_at, stored_as
from subquad_numpy.iterative_pinv.kernel import PINV_RECORD
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.runtime.native_tasks import call

# attend, invert: addresses of the kernels; among, of_keys, of_queries: those of the records of attentions of landmarks
# to landmarks, of landmarks to keys, and of queries to landmarks, without rows, values and output
LANDMARK_RECORD = fields(
    dict.fromkeys(
        ("n", "n_kv", "m", "d", "d_v", "q_row", "k_row", "stored", "iterations", "attend", "invert", "among", "of_keys",
         "of_queries")
    ),
    {"q": 2, "k": 2, "v": 2, "eye": 2, "out": 2},
)  # fmt: skip
_PLACES = {name: place for place, name in enumerate(FORWARD_RECORD)}
WORDS, TILES, Q, K, V, OUT = len(_PLACES), *(_PLACES[name] for name in ("tiles", "q", "k", "v", "out"))
WORDS_OF_INVERSE = len(PINV_RECORD)
LINE = 64  # bytes of a cache line, from which on each matrix begins


@inline
def _write_means(x: Any, stored: int, row: int, n: int, d: int, m: int, means: Any, lanes: int) -> None:
    """The means (m, d) of the segments of n rows. Rows have their weight before they are added: no sum overflows."""
    length, longer, first = n // m, n % m, 0
    for i in range(m):
        count = length + 1 if i < longer else length
        weight = 1.0 / count
        for c in range(0, d // lanes * lanes, lanes):
            found = zeros(means)
            for r in range(first, first + count):
                found = found + load_stored(x, stored, r * row + c) * weight
            store(means, i * d + c, found)
        for c in range(d // lanes * lanes, d):
            means[i * d + c] = 0
            for r in range(first, first + count):
                means[i * d + c] += number_at(x, stored, r * row + c) * weight
        first += count


@inline
def _make_finite(x: Any, size: int) -> None:
    """Write 0 over numbers that are not finite."""
    for i in range(size):
        if x[i] - x[i] != 0:
            x[i] = 0


@inline
def _write_product(a: Any, b: Any, m: int, d: int, product: Any, lanes: int) -> None:
    """The product (m, d) of a (m, m) and b (m, d)."""
    for i in range(m):
        for c in range(0, d // lanes * lanes, lanes):
            found = zeros(b)
            for j in range(m):
                found = found + load(b, j * d + c) * a[i * m + j]
            store(product, i * d + c, found)
        for c in range(d // lanes * lanes, d):
            product[i * d + c] = 0
            for j in range(m):
                product[i * d + c] += a[i * m + j] * b[j * d + c]


@inline
def _attend(kernel: int, template: Any, q: int, k: int, v: int, out: int, words: Any) -> int:
    """Run the kernel on the arrays at these addresses, with the other numbers of the template."""
    for i in range(WORDS):
        words[i] = template[i]
    words[Q], words[K], words[V], words[OUT] = q, k, v, out
    return call(kernel, 0, words[TILES], words.ctypes.data)


@cache
def landmark_attention_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the output of queries; a task is one item."""
    lanes, kind, zero = element(dtype)
    size = dtype.itemsize
    word = np.int64(0)

    @compiled(f"landmark attention {dtype}", LANDMARK_RECORD)
    def attend(first: int, last: int, records: Any) -> int:
        f = records[0]
        n, n_kv, m, d, d_v = f.n, f.n_kv, f.m, f.d, f.d_v
        wide = -(-m * d * size // LINE) * LINE  # bytes of the matrices (m, d), (m, m) and (m, d_v)
        square, tall = -(-m * m * size // LINE) * LINE, -(-m * d_v * size // LINE) * LINE
        buffer = np.empty((2 * (wide + square + tall) + LINE) // size, kind)
        q_land = -(-buffer.ctypes.data // LINE) * LINE
        k_land = q_land + wide
        a = k_land + wide
        inverse = a + square
        at_landmarks = inverse + square
        values = at_landmarks + tall
        words, of_inverse = np.empty(WORDS, np.int64), np.empty(WORDS_OF_INVERSE, np.int64)
        of_inverse[0], of_inverse[1], of_inverse[2], of_inverse[3] = m, f.iterations, a, inverse
        among, of_keys, of_queries = pointer(f.among, word), pointer(f.of_keys, word), pointer(f.of_queries, word)
        for item in range(first, last):
            f = records[item]
            _write_means(pointer(f.q, zero), stored_as(f.stored, 0), f.q_row, n, d, m, pointer(q_land, zero), lanes)
            _make_finite(pointer(q_land, zero), m * d)
            _write_means(pointer(f.k, zero), stored_as(f.stored, 1), f.k_row, n_kv, d, m, pointer(k_land, zero), lanes)
            done = _attend(f.attend, among, q_land, k_land, f.eye, a, words)
            done += call(f.invert, 0, 1, of_inverse.ctypes.data)
            done += _attend(f.attend, of_keys, q_land, f.k, f.v, at_landmarks, words)
            _write_product(pointer(inverse, zero), pointer(at_landmarks, zero), m, d_v, pointer(values, zero), lanes)
            done += _attend(f.attend, of_queries, f.q, k_land, values, f.out, words)
            if done != 4 * DONE:
                return 0
        return DONE

    return attend
