"""The types of values in kernels: numbers, pointers, arrays of memory, tuples. Two of one name are equal.

A type that is called with types is the signature of an intrinsic that returns it: ``float32(intp, intp)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np


class Signature(NamedTuple):
    """What an intrinsic returns and takes."""

    return_type: Any
    args: tuple[Any, ...]


class Type:
    """A type by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> Signature:
        return Signature(self, args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Type) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name


class Number(Type):
    """A number of so many bits."""

    def __init__(self, name: str, bitwidth: int) -> None:
        super().__init__(name)
        self.bitwidth = bitwidth


class Integer(Number):
    """An integer."""

    def __init__(self, name: str, bitwidth: int, *, signed: bool) -> None:
        super().__init__(name, bitwidth)
        self.signed = signed


class Float(Number):
    """A floating-point number."""


class Complex(Number):
    """A complex number of two floating-point numbers."""

    def __init__(self, name: str, underlying_float: Float) -> None:
        super().__init__(name, 2 * underlying_float.bitwidth)
        self.underlying_float = underlying_float


class Boolean(Type):
    """A truth value."""


class CPointer(Type):
    """The address of elements of a type, which are loaded by vectors, or by such a part of vectors."""

    def __init__(self, dtype: Any, parts: int = 1) -> None:
        super().__init__(f"{dtype}*" if parts == 1 else f"{dtype}*/{parts}")
        self.dtype, self.parts = dtype, parts


class Array(Type):
    """Memory of elements of a type that a kernel itself has made."""

    parts = 1

    def __init__(self, dtype: Any) -> None:
        super().__init__(f"array({dtype})")
        self.dtype = dtype


class Tuple(Type):
    """Values of several types; `dtype` is that of all of them, if they have one."""

    def __init__(self, types: Sequence[Any]) -> None:
        self.types, self.count = tuple(types), len(types)
        self.dtype = self.types[0] if self.types and all(kind == self.types[0] for kind in self.types) else None
        super().__init__(f"({', '.join(map(str, self.types))})")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.types)

    def __len__(self) -> int:
        return self.count


float32, float64 = Float("float32", 32), Float("float64", 64)
complex64, complex128 = Complex("complex64", float32), Complex("complex128", float64)
boolean, none = Boolean("bool"), Type("none")
int8, int16, int32, int64 = (Integer(f"int{bits}", bits, signed=True) for bits in (8, 16, 32, 64))
uint8, uint16, uint32, uint64 = (Integer(f"uint{bits}", bits, signed=False) for bits in (8, 16, 32, 64))
intp, uintp = int64, uint64
_INTEGERS = int8, int16, int32, int64, uint8, uint16, uint32, uint64
NUMBERS: dict[str, Type] = {x.name: x for x in (float32, float64, complex64, complex128, boolean, *_INTEGERS)}


def from_dtype(dtype: Any) -> Any:
    """The type of the numbers of a NumPy dtype."""
    return NUMBERS[np.dtype(dtype).name]
