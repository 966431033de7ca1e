"""Loads and stores of vectors, and pointers.

`memory` is a flat array or a pointer; `index` counts elements, and no bound is checked.
"""

from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import types
from subquad_numpy.codegen.blocks import WORD, ask_for_line, function_of, hidden
from subquad_numpy.codegen.vector_type import BYTES, Vector, intrinsic, spread_scalar


def _address(context: Any, builder: Any, memory_type: Any, memory: Any, index: Any) -> Any:
    # the address of memory[index]
    if isinstance(memory_type, types.Array):
        memory = context.make_array(memory_type)(context, builder, memory).data
    return builder.gep(memory, [index])


@intrinsic
def load(memory: Any, index: Any) -> Any:
    """The vector at memory[index], memory[index + 1], …"""
    vector = Vector(memory.dtype, memory.parts)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], *args)
        address = builder.bitcast(address, context.get_value_type(vector).as_pointer())
        return builder.load(address, align=vector.element.bitwidth // 8)

    return vector(memory, types.intp), codegen


@intrinsic
def store(memory: Any, index: Any, value: Vector) -> Any:
    """Write a vector to memory[index], memory[index + 1], …"""
    if not isinstance(value, Vector) or value.element != memory.dtype:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], *args[:2])
        address = builder.bitcast(address, context.get_value_type(value).as_pointer())
        builder.store(args[2], address, align=value.element.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(memory, types.intp, value), codegen


@intrinsic
def spread(memory: Any, index: Any) -> Any:
    """A vector with memory[index] in every lane."""
    vector = Vector(memory.dtype, memory.parts)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        scalar = builder.load(_address(context, builder, sig.args[0], *args))
        return spread_scalar(context, builder, vector.element, vector, scalar)

    return vector(memory, types.intp), codegen


@intrinsic
def zeros(memory: Any) -> Any:
    """A vector of zeros, of the element type of `memory`."""
    vector = Vector(memory.dtype, memory.parts)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(vector), None)

    return vector(memory), codegen


@intrinsic
def pointer(address: Any, like: Any) -> Any:
    """The integer `address` as a pointer to elements of the type of the scalar `like`."""
    target = types.CPointer(like)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(target))

    return target(types.uintp, like), codegen


@intrinsic
def shifted(memory: Any, count: Any) -> Any:
    """The pointer `count` elements behind `memory`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return memory(memory, types.intp), codegen


@intrinsic
def halved(memory: Any) -> Any:
    """The same pointer, from which vectors are loaded that are half as long: of AVX2, they take one register."""
    return types.CPointer(memory.dtype, 2 * memory.parts)(memory), lambda context, builder, sig, args: args[0]


@intrinsic
def aligned(buffer: Any) -> Any:
    """A pointer to the first element of `buffer` that lies on a boundary of `BYTES`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _aligned(context, builder, sig.args[0], args[0])

    return types.CPointer(buffer.dtype)(buffer), codegen


def _aligned(context: Any, builder: Any, kind: Any, buffer: Any) -> Any:
    # the data pointer of an array, rounded up to a boundary of `BYTES`
    data = context.make_array(kind)(context, builder, buffer).data
    address = builder.ptrtoint(data, WORD)
    gap = builder.and_(builder.neg(address), ir.Constant(WORD, BYTES - 1))
    return builder.inttoptr(builder.add(address, gap), data.type)


def _whole(context: Any, builder: Any, kind: Any, sizes: Any) -> list[Any]:
    """Each size rounded up to 16 elements: the next part then starts on a 64-byte boundary, for float32 too."""
    step = BYTES // 4
    words = [
        context.cast(builder, builder.extract_value(sizes, i), size, types.intp) for i, size in enumerate(kind.types)
    ]
    mask = ir.Constant(WORD, -step)
    return [builder.and_(builder.add(word, ir.Constant(WORD, step - 1)), mask) for word in words]


@intrinsic
def room(sizes: Any) -> Any:
    """The number of elements of a buffer that `cut` can cut into parts of these sizes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        count = ir.Constant(WORD, BYTES // 4)  # what aligning the first part may cost
        for size in _whole(context, builder, sizes, args[0]):
            count = builder.add(count, size)
        return count

    return types.intp(sizes), codegen


@intrinsic
def cut(buffer: Any, sizes: Any) -> Any:
    """Pointers to parts of `buffer` of these sizes, each on a boundary of `BYTES`."""
    parts = types.Tuple([types.CPointer(buffer.dtype)] * len(sizes))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        places = [_aligned(context, builder, sig.args[0], args[0])]
        for size in _whole(context, builder, sizes, args[1]):
            places.append(builder.gep(places[-1], [size]))
        return context.make_tuple(builder, parts, [hidden(builder, place) for place in places[:-1]])

    return parts(buffer, sizes), codegen


@intrinsic
def copy(source: Any, size: Any, target: Any) -> Any:
    """Copy `size` numbers from `source` to `target`, which do not overlap."""
    if source != target:
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte, word, bit = ir.IntType(8).as_pointer(), ir.IntType(64), ir.IntType(1)
        kind = ir.FunctionType(ir.VoidType(), [byte, byte, word, bit])
        function = function_of(builder.module, kind, "llvm.memcpy.p0.p0.i64")
        length = builder.mul(args[1], ir.Constant(word, source.dtype.bitwidth // 8))
        ends = [builder.bitcast(x, byte) for x in (args[2], args[0])]
        builder.call(function, [*ends, length, ir.Constant(bit, 0)])
        return context.get_dummy_value()

    return types.none(source, types.int64, target), codegen


@intrinsic
def add_up(sums: Any, index: Any, x: Vector) -> Any:
    """Add a vector to sums[index], sums[index + 1], …, which may have more digits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.VectorType(context.get_value_type(sums.dtype), x.lanes)
        address = builder.bitcast(_address(context, builder, sig.args[0], *args[:2]), wide.as_pointer())
        term = args[2] if sums.dtype == x.element else builder.fpext(args[2], wide)
        align = x.element.bitwidth // 8
        builder.store(builder.fadd(builder.load(address, align=align), term), address, align=align)
        return context.get_dummy_value()

    return types.none(sums, types.intp, x), codegen


def _prefetch(memory: Any, level: int) -> tuple[Any, Any]:
    # signature and code of a request for a cache line

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        ask_for_line(builder, _address(context, builder, sig.args[0], *args), level)
        return context.get_dummy_value()

    return types.none(memory, types.intp), codegen


@intrinsic
def prefetch(memory: Any, index: Any) -> Any:
    """Ask for the cache line of memory[index]; the address may lie outside of the array."""
    return _prefetch(memory, 1)


@intrinsic
def prefetch_far(memory: Any, index: Any) -> Any:
    """`prefetch` into the second-level cache, where the first one is full of what is used before that line."""
    return _prefetch(memory, 2)
