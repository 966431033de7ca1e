"""Pieces of kernels as functions of Python: addresses in, nothing out."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

_numbers = itertools.count()


def piece(function: Callable[..., Any]) -> Callable[..., int]:
    """A function of int64s in the language of kernels as one of Python, compiled and not kept on disk."""
    from subquad_numpy.codegen import types
    from subquad_numpy.codegen.compile import compiled_address

    count = function.__code__.co_argcount
    address = compiled_address(function, f"piece {next(_numbers)}", [types.int64] * count, keeps=False)
    return ctypes.CFUNCTYPE(*[ctypes.c_int64] * (count + 1))(address)
