"""Explicit vectors, and the language that kernels are written in: a small part of Python, compiled by LLVM.

LLVM's own vectoriser guards every loop over arrays with checks for overlap, and gives up on short loops. Vectors that
are values avoid both, and a state can stay in a register. LLVM maps a vector of 64 bytes to the registers of the
machine: one of AVX-512, two of AVX2, four of NEON or SSE.

Vectors exist inside compiled code only.
"""

from subquad_numpy.codegen import types
from subquad_numpy.codegen.pointers import (
    add_up,
    aligned,
    copy,
    cut,
    halved,
    load,
    pointer,
    prefetch,
    prefetch_far,
    room,
    shifted,
    spread,
    store,
    zeros,
)
from subquad_numpy.codegen.vector_ops import (
    absolute,
    add_where_zero,
    at_least,
    at_most,
    bits_where_zero,
    fma,
    largest,
    lowest_bit,
    masked,
    positive_part,
    product,
    replace_where_zero,
    rint,
    scale_by_power,
    signs,
    total,
    where_negative,
    where_signed,
)
from subquad_numpy.codegen.vector_type import (
    BYTES,
    FUSE,
    Vector,
    apart,
    inline,
    intrinsic,
    lanes_of,
    merged,
    split,
)

__all__ = [
    "BYTES", "FUSE", "Vector", "absolute", "add_up", "add_where_zero", "aligned", "apart", "at_least", "at_most",
    "bits_where_zero", "copy", "cut", "fma", "halved", "inline", "intrinsic", "lanes_of", "largest",
    "load", "lowest_bit", "masked", "merged", "pointer", "positive_part", "prefetch", "prefetch_far", "product",
    "replace_where_zero", "rint", "room", "scale_by_power", "shifted", "signs", "split", "spread", "store", "total",
    "types", "where_negative", "where_signed", "zeros",
]  # fmt: skip
