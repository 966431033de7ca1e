"""Nyström attention of an item by one task: means of segments, three attentions, a pseudo-inverse and a product.

    out = softmax(s q k̃ᵀ) A⁺ (softmax(s q̃ kᵀ) v),    A = softmax(s q̃ k̃ᵀ) I

Attentions and inverse are the compiled kernels `block_attention` and `iterative_pinv`, called by their addresses on
scratch memory, with a copy of records that are made beforehand.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import pointer
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.segments import add_means
from subquad_numpy.codegen.stored import stored_as
from subquad_numpy.landmark_attention.values import WORDS, attend_by, up_to_line, values_of_landmarks
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.segment_means.kernel import make_finite

# attend, invert: addresses of the kernels; among, of_keys, of_queries: those of the records of attentions of landmarks
# to landmarks, of landmarks to keys, and of queries to landmarks, without rows, values and output
LANDMARK_RECORD = fields(
    dict.fromkeys(
        ("n", "n_kv", "m", "d", "d_v", "q_row", "k_row", "stored", "iterations", "attend", "invert", "among", "of_keys",
         "of_queries")
    ),
    {"q": 2, "k": 2, "v": 2, "eye": 2, "out": 2},
)  # fmt: skip


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
        wide, square, tall = (up_to_line(m * d * size), up_to_line(m * m * size), up_to_line(m * d_v * size))
        buffer = np.empty((2 * (wide + square + tall) + up_to_line(1)) // size, kind)
        q_land = up_to_line(buffer.ctypes.data)
        k_land = q_land + wide
        a = k_land + wide
        at_landmarks = a + 2 * square
        values = at_landmarks + tall
        words, edge = np.empty(WORDS, np.int64), np.empty(lanes, kind)
        among, of_keys, of_queries = pointer(f.among, word), pointer(f.of_keys, word), pointer(f.of_queries, word)
        q_means, k_means = pointer(q_land, zero), pointer(k_land, zero)
        for item in range(first, last):
            f = records[item]
            clear(q_means, m * d)
            clear(k_means, m * d)
            add_means(pointer(f.q, zero), stored_as(f.stored, 0), f.q_row, n, d, m, 0, n, q_means, lanes, edge)
            add_means(pointer(f.k, zero), stored_as(f.stored, 1), f.k_row, n_kv, d, m, 0, n_kv, k_means, lanes, edge)
            make_finite(q_means, m * d)
            done = attend_by(f.attend, of_keys, q_land, f.k, f.v, at_landmarks, words)
            done += values_of_landmarks(
                f,
                m,
                d_v,
                among,
                q_land,
                k_land,
                a,
                pointer(at_landmarks, zero),
                pointer(values, zero),
                words,
                lanes,
                size,
            )
            done += attend_by(f.attend, of_queries, f.q, k_land, values, f.out, words)
            if done != 4 * DONE:
                return 0
        return DONE

    return attend
