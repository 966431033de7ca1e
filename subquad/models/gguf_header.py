"""The header of a GGUF file: its metadata, and names, shapes, types and places of its tensors.

    "GGUF", version, counts of tensors and entries,  entries (key, type, value),  tensors (name, axes, type, place)

It is read here, not by the package gguf, because lengths in a file that is not trusted are to be held against the size
of the file before anything is made of that length; an array is one read, too, not one object for each of its items.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
MOST_AXES = 4


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file is: the name and shape (the last axis contiguous), number of its type, first byte."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class Header:
    """The metadata of a file by key, and its tensors."""

    entries: dict[str, Any]
    places: tuple[Place, ...]


class _Cursor:
    """A place in a file, which moves on with each read and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            msg = (
                f"{self.path} is no whole GGUF file: {what} should have {count} bytes from byte {self.at} on, and the "
                f"file has {len(self.data)}"
            )
            raise ValueError(msg)
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str, what: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def text(self, what: str) -> str:
        raw = self.take(self.number("<u8", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw.decode("utf-8", "replace")  # some vocabularies hold halves of characters

    def value(self, kind: int, what: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == STRING:
            return self.text(what)
        if kind != ARRAY:
            msg = f"{self.path} is no GGUF file: {what} has the unknown type {kind}"
            raise ValueError(msg)
        inner, count = self.number("<u4", what), self.number("<u8", what)
        if inner in SCALARS:
            dtype = np.dtype(SCALARS[inner])
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if inner != STRING:
            msg = f"{self.path}: {what} is an array of the type {inner}, expected numbers or strings"
            raise ValueError(msg)
        return [self.text(what) for _ in range(count)]  # each takes bytes of the file, so that a false count ends there


def read_header(path: Path) -> Header:
    """The header of a file; ValueError, which says where, unless it is whole."""
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            msg = f"{path} is empty, expected a GGUF file"
            raise ValueError(msg) from None
        with data:
            return _header(_Cursor(data, path))


def _header(cursor: _Cursor) -> Header:
    path = cursor.path
    if cursor.take(4, "the first word") != MAGIC:
        msg = f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}"
        raise ValueError(msg)
    version = cursor.number("<u4", "the version")
    if version not in VERSIONS:
        big = struct.unpack(">I", struct.pack("<I", version))[0] in VERSIONS
        why = "in the other byte order" if big else f"of version {version}"
        msg = f"{path} is a GGUF file {why}, expected version {' or '.join(map(str, VERSIONS))}, little-endian"
        raise ValueError(msg)
    tensors, pairs = cursor.number("<u8", "the counts"), cursor.number("<u8", "the counts")
    entries: dict[str, Any] = {}
    for _ in range(pairs):
        key = cursor.text("a key of the metadata")
        if key in entries:
            msg = f"{path} has the key {key!r} twice"
            raise ValueError(msg)
        entries[key] = cursor.value(cursor.number("<u4", f"the type of {key!r}"), f"the value of {key!r}")
    found = []
    for _ in range(tensors):
        name = cursor.text("the name of a tensor")
        what = f"the description of the tensor {name!r}"
        axes = cursor.number("<u4", what)
        if not 1 <= axes <= MOST_AXES:
            msg = f"{path}: the tensor {name!r} has {axes} axes, expected 1 … {MOST_AXES}"
            raise ValueError(msg)
        shape = tuple(cursor.number("<u8", what) for _ in range(axes))[::-1]
        found.append(Place(name, shape, cursor.number("<u4", what), cursor.number("<u8", what)))
    alignment = entries.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        msg = f"{path}: general.alignment is {alignment!r}, expected a power of two"
        raise ValueError(msg)
    names = [place.name for place in found]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        msg = f"{path} has the tensor {twice!r} twice"
        raise ValueError(msg)
    begin = -(-cursor.at // alignment) * alignment
    return Header(entries, tuple(Place(x.name, x.shape, x.kind, begin + x.start) for x in found))
