"""Numbers as they are stored: loads that widen half precision to float32, and stores that round it once.

A kernel of float32 has pointers to float32, and with each one a number that says what is stored there: `AS_COMPUTED`,
`FLOAT16` or `BFLOAT16`. Pointers count elements of what is stored. One compiled kernel thus reads and writes arrays of
any of these dtypes. In kernels of other dtypes everything is stored as it is computed, and nothing is asked.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import types
from subquad_numpy.codegen.blocks import variable
from subquad_numpy.codegen.halves import HALF_BITS, WIDENS_HALF, like, rounded, widened
from subquad_numpy.codegen.pointers import load, prefetch, shifted, store
from subquad_numpy.codegen.vector_type import Vector, apart, inline, intrinsic
from subquad_numpy.runtime.stored import AS_COMPUTED, BFLOAT16, FLOAT16, STORED_BITS

Rows = tuple[Any, int]  # (pointer to the first row, distance between two rows)
StoredRows = tuple[Any, int, int]  # (pointer to the first row, distance in elements as stored, how they are stored)


def _by_kind(builder: Any, stored: Any, emit: Callable[[int], None]) -> None:
    """The code that `emit` writes for each kind of storage, where `stored` says which one it is, a constant of one.

    No call has float16 where the machine does not convert it, and LLVM's code for it would be a call to nowhere.
    """
    if isinstance(stored, ir.Constant):
        emit(BFLOAT16 if stored.constant == FLOAT16 and not WIDENS_HALF else stored.constant)
        return

    def is_kind(kind: int) -> Any:
        return builder.icmp_signed("==", stored, ir.Constant(stored.type, kind))

    with builder.if_else(is_kind(AS_COMPUTED), likely=True) as (as_computed, half):
        with as_computed:
            emit(AS_COMPUTED)
        with half:
            if WIDENS_HALF:
                with builder.if_else(is_kind(BFLOAT16)) as (brain, other):
                    with brain:
                        emit(BFLOAT16)
                    with other:
                        emit(FLOAT16)
            else:
                emit(BFLOAT16)


def _place(builder: Any, memory: Any, index: Any, kind: int, lanes: int) -> tuple[Any, int]:
    """(the address of the element or vector at memory[index], its alignment), as stored."""
    element = memory.type.pointee if kind == AS_COMPUTED else ir.IntType(HALF_BITS)
    start = builder.bitcast(memory, element.as_pointer())
    size = {"float": 4, "double": 8}.get(str(element), 2)
    return builder.bitcast(builder.gep(start, [index]), like(element, lanes).as_pointer()), size


def _load(lanes_of: Callable[[Any], int]) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        memory, stored, index = args
        target, lanes = context.get_value_type(sig.return_type), lanes_of(sig.args[0].dtype)

        def value(kind: int) -> Any:
            address, align = _place(builder, memory, index, kind, lanes)
            found = builder.load(address, align=align)
            return found if kind == AS_COMPUTED else widened(builder, found, kind, lanes)

        if sig.args[0].dtype != types.float32:
            return value(AS_COMPUTED)
        made = variable(builder, target)

        def keep(kind: int) -> None:
            builder.store(value(kind), made)

        _by_kind(builder, stored, keep)
        return builder.load(made)

    return codegen


def _store(lanes_of: Callable[[Any], int]) -> Callable[..., Any]:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        memory, stored, index, value = args
        lanes = lanes_of(sig.args[0].dtype)

        def write(kind: int) -> None:
            address, align = _place(builder, memory, index, kind, lanes)
            builder.store(value if kind == AS_COMPUTED else rounded(builder, value, kind, lanes), address, align=align)

        if sig.args[0].dtype != types.float32:
            write(AS_COMPUTED)
        else:
            _by_kind(builder, stored, write)
        return context.get_dummy_value()

    return codegen


def _lanes(element: Any) -> int:
    return Vector(element).lanes


@intrinsic
def load_stored(memory: Any, stored: Any, index: Any) -> Any:
    """The vector at memory[index], memory[index + 1], …"""
    return Vector(memory.dtype)(memory, types.int64, types.intp), _load(_lanes)


@intrinsic
def shifted_stored(memory: Any, stored: Any, index: Any) -> Any:
    """The pointer to memory[index]."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        memory, stored, index = args
        if sig.args[0].dtype != types.float32:
            return builder.gep(memory, [index])
        start, half = (builder.bitcast(memory, ir.IntType(bits).as_pointer()) for bits in (8, HALF_BITS))
        as_computed = builder.icmp_signed("==", stored, ir.Constant(stored.type, AS_COMPUTED))
        places = (builder.bitcast(builder.gep(memory, [index]), start.type), builder.gep(half, [index]))
        found = builder.select(as_computed, places[0], builder.bitcast(places[1], start.type))
        return builder.bitcast(found, memory.type)

    return memory(memory, types.int64, types.intp), codegen


@intrinsic
def number_at(memory: Any, stored: Any, index: Any) -> Any:
    """The number memory[index]."""
    return memory.dtype(memory, types.int64, types.intp), _load(lambda _: 1)


@intrinsic
def store_stored(memory: Any, stored: Any, index: Any, value: Any) -> Any:
    """Write a vector to memory[index], memory[index + 1], …"""
    return types.none(memory, types.int64, types.intp, Vector(memory.dtype)), _store(_lanes)


@intrinsic
def put_number(memory: Any, stored: Any, index: Any, value: Any) -> Any:
    """Write a number to memory[index]."""
    return types.none(memory, types.int64, types.intp, memory.dtype), _store(lambda _: 1)


@inline
def stored_as(word: int, place: int) -> int:
    """How the array number `place` is stored, of those that `runtime.stored.stored_word` was given."""
    return (word >> (STORED_BITS * place)) & (2**STORED_BITS - 1)


@inline
def prefetch_stored(memory: Any, stored: int, index: int) -> None:
    """Ask for the cache line of memory[index]; the address may lie outside of the array."""
    prefetch(memory, index if stored == AS_COMPUTED else index // 2)


@inline
def asked_rows(memory: Any, stored: int, index: int, step: int) -> Rows:
    """Rows as `prefetch` counts: in numbers as they are computed."""
    if stored == AS_COMPUTED:
        return shifted(memory, index), step
    return shifted(memory, index // 2), step // 2


@apart
def widen_rows(
    memory: Any, stored: int, index: int, step: int, rows: int, width: int, lanes: int, target: Any, pitch: int
) -> None:
    """Copy `rows` rows of `width` numbers from `index`, `step` apart, to `target`, `pitch` apart."""
    for r in range(rows):
        at, to = index + r * step, r * pitch
        whole = width // lanes * lanes
        for c in range(0, whole, lanes):
            store(target, to + c, load_stored(memory, stored, at + c))
        for c in range(max(whole, 0), width):
            target[to + c] = number_at(memory, stored, at + c)


@apart
def round_row(memory: Any, stored: int, index: int, width: int, lanes: int, source: Any) -> None:
    """Write `width` numbers of `source` to `index`."""
    whole = width // lanes * lanes
    for c in range(0, whole, lanes):
        store_stored(memory, stored, index + c, load(source, c))
    for c in range(max(whole, 0), width):
        put_number(memory, stored, index + c, source[c])


@inline
def row_of(memory: Any, stored: int, index: int, width: int, lanes: int, scratch: Any) -> Any:
    """The pointer to `width` numbers from `index`: where they are, or widened in `scratch`."""
    if stored == AS_COMPUTED:
        return shifted(memory, index)
    widen_rows(memory, stored, index, 0, 1, width, lanes, scratch, 0)
    return scratch


@inline
def rows_of(
    memory: Any, stored: int, index: int, step: int, rows: int, width: int, lanes: int, scratch: Any
) -> tuple[Any, int]:
    """(pointer, step) of rows of `width` numbers from `index`, `step` apart: where they are, or widened in `scratch`.

    `scratch` has room for rows · width numbers.
    """
    if stored == AS_COMPUTED:
        return shifted(memory, index), step
    widen_rows(memory, stored, index, step, rows, width, lanes, scratch, width)
    return scratch, width


@apart
def pad_rows(
    memory: Any, stored: int, index: int, step: int, rows: int, width: int, lanes: int, target: Any, pitch: int
) -> None:
    """`widen_rows`, and zeros from `width` to `pitch`."""
    widen_rows(memory, stored, index, step, rows, width, lanes, target, pitch)
    for r in range(rows):
        for c in range(max(width, 0), pitch):
            target[r * pitch + c] = 0


@inline
def padded_rows_of(
    memory: Any, stored: int, index: int, step: int, rows: int, width: int, pitch: int, lanes: int, scratch: Any
) -> StoredRows:
    """Rows that may be read up to `pitch`: where they are if they have as many numbers, else widened in `scratch`.

    `scratch` has room for rows · pitch numbers.
    """
    if width >= pitch:
        return shifted_stored(memory, stored, index), step, stored
    pad_rows(memory, stored, index, step, rows, width, lanes, scratch, pitch)
    return scratch, pitch, AS_COMPUTED


@inline
def load_stored_part(memory: Any, stored: int, index: int, count: int, lanes: int, edge: Any) -> Any:
    """The vector at `index`; lanes from `count` on are 0, and their memory is not touched."""
    if count < lanes:
        widen_rows(memory, stored, index, 0, 1, count, lanes, edge, 0)
        for lane in range(max(count, 0), lanes):
            edge[lane] = 0
        return load(edge, 0)
    return load_stored(memory, stored, index)


@inline
def store_stored_part(memory: Any, stored: int, index: int, value: Any, count: int, lanes: int, edge: Any) -> None:
    """Write the first `count` lanes of `value` to `index`."""
    if count < lanes:
        store(edge, 0, value)
        round_row(memory, stored, index, count, lanes, edge)
    else:
        store_stored(memory, stored, index, value)
