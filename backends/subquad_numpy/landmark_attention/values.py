"""The values of landmark keys in Nyström attention, by one task for each item.

    values = A⁺ (B v),    A = softmax(s q̃ k̃ᵀ) I

B v comes as outputs over chunks of keys, which join by their log-sum-exp. Rows of NaN in A stay: those of B v have them
too.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.block_attention.forward import FORWARD_RECORD
from subquad_numpy.block_attention.join import join
from subquad_numpy.codegen import inline, load, pointer, store, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.iterative_pinv.kernel import PINV_RECORD
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.runtime.native_tasks import call

# attend, invert: addresses of the kernels; among: that of the record of the attention of landmarks to landmarks, but
# without their addresses; part_step, level_step: numbers from a chunk to the next one
VALUES_RECORD = fields(
    dict.fromkeys(
        ("m", "d", "d_v", "iterations", "attend", "invert", "among", "chunks", "part_step", "level_step")
    ),
    {"q": 2, "k": 2, "eye": 2, "parts": 2, "levels": 1, "values": 2},
)  # fmt: skip
_PLACES = {name: place for place, name in enumerate(FORWARD_RECORD)}
WORDS, TILES, Q, K, V, OUT = len(_PLACES), *(_PLACES[name] for name in ("tiles", "q", "k", "v", "out"))
WORDS_OF_INVERSE = len(PINV_RECORD)
LINE = 64  # bytes of a cache line, from which on each matrix begins
TOGETHER = 4  # vectors of a row of a product that are computed at once


@inline
def up_to_line(size: int) -> int:
    """The bytes of whole cache lines."""
    return -(-size // LINE) * LINE


@inline
def attend_by(kernel: int, template: Any, q: int, k: int, v: int, out: int, words: Any) -> int:
    """Run the kernel on the arrays at these addresses, with the other numbers of the template."""
    for i in range(WORDS):
        words[i] = template[i]
    words[Q], words[K], words[V], words[OUT] = q, k, v, out
    return call(kernel, 0, words[TILES], words.ctypes.data)


@inline
def _write_product(a: Any, b: Any, m: int, d: int, product: Any, lanes: int) -> None:
    """The product (m, d) of a (m, m) and b (m, d)."""
    for i in range(m):
        together = 0
        for c in range(0, d - TOGETHER * lanes + 1, TOGETHER * lanes):
            together, out = c + TOGETHER * lanes, i * d + c
            one, two, three, four = zeros(b), zeros(b), zeros(b), zeros(b)
            for j in range(m):
                at, factor = j * d + c, a[i * m + j]
                one = one + load(b, at) * factor
                two = two + load(b, at + lanes) * factor
                three = three + load(b, at + 2 * lanes) * factor
                four = four + load(b, at + 3 * lanes) * factor
            store(product, out, one)
            store(product, out + lanes, two)
            store(product, out + 2 * lanes, three)
            store(product, out + 3 * lanes, four)
        for c in range(together, d // lanes * lanes, lanes):
            found = zeros(b)
            for j in range(m):
                found = found + load(b, j * d + c) * a[i * m + j]
            store(product, i * d + c, found)
        for c in range(d // lanes * lanes, d):
            product[i * d + c] = 0
            for j in range(m):
                product[i * d + c] += a[i * m + j] * b[j * d + c]


@inline
def values_of_landmarks(
    f: Any, m: int, d_v: int, among: Any, q_land: int, k_land: int, a: int, at_landmarks: Any, values: Any, words: Any,
    lanes: int, size: int,
) -> int:  # fmt: skip
    """Write A⁺ (B v); A, of numbers of `size` bytes, is left at the address `a`, its inverse in the lines behind it."""
    of_inverse = np.empty(WORDS_OF_INVERSE, np.int64)
    inverse = a + up_to_line(m * m * size)
    of_inverse[0], of_inverse[1], of_inverse[2], of_inverse[3] = m, f.iterations, a, inverse
    done = attend_by(f.attend, among, q_land, k_land, f.eye, a, words)
    done += call(f.invert, 0, 1, of_inverse.ctypes.data)
    _write_product(pointer(inverse, values[0]), at_landmarks, m, d_v, values, lanes)
    return done


@cache
def values_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the values of landmark keys; a task is one item."""
    lanes, kind, zero = element(dtype)
    size, word = dtype.itemsize, np.int64(0)

    @compiled(f"values of landmarks {dtype}", VALUES_RECORD)
    def find(first: int, last: int, records: Any) -> int:
        f = records[0]
        m, d_v = f.m, f.d_v
        buffer = np.empty((2 * up_to_line(m * m * size) + up_to_line(m * d_v * size) + LINE) // size, kind)
        a = up_to_line(buffer.ctypes.data)
        whole, words = pointer(a + 2 * up_to_line(m * m * size), zero), np.empty(WORDS, np.int64)
        among = pointer(f.among, word)
        for item in range(first, last):
            f = records[item]
            parts, levels = pointer(f.parts, zero), pointer(f.levels, zero)
            at_landmarks = parts
            if f.chunks > 1:
                join(parts, f.part_step, levels, f.level_step, f.chunks, m, d_v, zero, whole, False, levels)
                at_landmarks = whole
            done = values_of_landmarks(
                f, m, d_v, among, f.q, f.k, a, at_landmarks, pointer(f.values, zero), words, lanes, size
            )
            if done != 2 * DONE:
                return 0
        return DONE

    return find
