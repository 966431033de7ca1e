"""Compilation of the kernels: one specialisation at a time, on first use, kept on disk."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from subquad import backend
from subquad_numpy.codegen import machine, types
from subquad_numpy.codegen.notice import patience
from subquad_numpy.codegen.translate import translated
from subquad_numpy.codegen.values import Record
from subquad_numpy.codegen.vector_type import lanes_of

DONE = 1  # what a kernel returns; one that finds no memory for its scratch returns 0
compile_seconds: dict[str, float] = {}
"""Seconds until each kernel was callable in this process, compiled or read from the disk, by name."""
CODEGEN = Path(__file__).parent
LIBRARY = Path(backend.__file__).parent


@cache
def fingerprint(path: Path) -> str:
    """Hash of the sources that a kernel in this file is made of: `codegen`, the file, and what it imports of ours.

    A file imports by lines that begin with ``from subquad``; of this library itself, whose formulas and numbers are no
    code of kernels, only the file is read, not what that imports. The hash is empty where there are no sources to read,
    as in a zip file; then nothing is kept on disk.
    """
    found, left = dict[Path, bytes](), {*CODEGEN.glob("*.py"), path}
    try:
        while left:
            path = left.pop()
            found[path], imported = read_source(path)
            left |= imported - found.keys()
    except OSError:
        return ""
    return sha256(b"".join(found[path] for path in sorted(found))).hexdigest()[:16]


@cache
def read_source(path: Path) -> tuple[bytes, frozenset[Path]]:
    """The hash of a source, and the files of the modules of this library and its backends that it imports."""
    source, imported = path.read_bytes(), set[Path]()
    if LIBRARY not in path.parents:
        for home, names in re.findall(rb"^from (subquad[\w.]*) import (\([^)]*\)|.*)", source, re.MULTILINE):
            for name in re.findall(rb"\w+", names):
                module = sys.modules.get(f"{home.decode()}.{name.decode()}") or sys.modules.get(home.decode())
                if module is not None:
                    imported.add(Path(str(module.__file__)))
    return sha256(source).digest(), frozenset(imported)


class Kernel:
    """A compiled kernel as a C function, which threads of other libraries can call by its address."""

    def __init__(self, address: int) -> None:
        self.address = address
        self._call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(address)

    def __call__(self, first: int, last: int, records: int) -> None:
        """Run tasks first to last − 1, without the interpreter lock; `records` is the address of the records."""
        if self._call(first, last, records) != DONE:
            msg = "a compiled kernel found no memory for its scratch"
            raise MemoryError(msg)


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage: it would take a third of a translation, whose objects all live until its end."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def compiled_address(function: Callable[..., Any], name: str, kinds: Sequence[Any], *, keeps: bool = True) -> int:
    """The address of a function of arguments of these types, compiled or, if it `keeps` its code there, from the disk.

    What the function closes over, but for functions, is part of what it is found by, beside its name and its sources.
    """
    path, base = Path(function.__code__.co_filename), re.sub(r"\W+", "_", name)
    symbol, stamp = f"subquad_{base}", fingerprint(path)
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    closed = [repr(x) for x in cells if isinstance(x, (bool, int, float, str, tuple, np.generic, np.dtype))]

    def make() -> bytes:
        with patience(), uncollected():
            return machine.object_of(translated(function, symbol, kinds))

    start = time.perf_counter()
    if keeps and stamp:
        found = machine.loaded(machine.kept(path.parent, base, stamp, f"{kinds} {closed}", make), symbol)
    else:
        found = machine.loaded(make(), symbol)
    compile_seconds[name] = time.perf_counter() - start
    return found


def element(dtype: Any) -> tuple[int, Any, Any]:
    """(elements of a vector, their type, the number 0) of a dtype, which every kernel factory starts from."""
    dtype = np.dtype(dtype)
    return lanes_of(dtype), types.from_dtype(dtype), dtype.type(0)


def compiled(name: str, fields: Iterable[str]) -> Callable[[Callable[[int, int, Any], int]], Kernel]:
    """A decorator that compiles a kernel, and notes the time under `name`.

    The kernel is a function (first, last, records) that runs tasks first to last − 1 and returns `DONE`. An argument
    record consists of `fields` of int64, numbers and addresses; the kernel decides how many records it reads.
    """
    kinds = (types.int64, types.int64, types.CPointer(Record(tuple(fields))))
    return lambda function: Kernel(compiled_address(function, name, kinds))
