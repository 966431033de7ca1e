"""Half precision in LLVM: its 16 bits to float32 and back, in vectors or number by number."""

from typing import Any

from llvmlite import binding, ir

from subquad_numpy.codegen import processor
from subquad_numpy.codegen.blocks import function_of, lanes_of_vectors, variable
from subquad_numpy.runtime.stored import FLOAT16

HALF_BITS, LAST_BITS, QUIET = 16, 0x7FFF, 0x40  # of bfloat16: its width, what a float32 has beyond it, a bit of a NaN
WIDE, SUBNORMAL = 16, 0x20  # lanes of the vectors that an instruction rounds to bfloat16; a class of numbers


def _widens_half() -> bool:
    """Whether this machine converts float16 by an instruction; LLVM would else call a function that may not exist."""
    is_x86 = "x86" in binding.get_process_triple() or "i686" in binding.get_process_triple()
    return not is_x86 or processor.has("f16c") or processor.has("avx512f")


WIDENS_HALF = _widens_half()  # asked once, and by no compiler that traces a call: it cannot ask the machine


def like(kind: Any, lanes: int) -> Any:
    """The type of a vector of so many lanes; of one number, where it is one."""
    return ir.VectorType(kind, lanes) if lanes > 1 else kind


def filled(kind: Any, lanes: int, number: int) -> Any:
    return ir.Constant(like(kind, lanes), [number] * lanes if lanes > 1 else number)


def widened(builder: Any, value: Any, stored: int, lanes: int) -> Any:
    """Integers of 16 bits, the numbers of an array of half precision, as numbers of float32, exactly."""
    word = ir.IntType(32)
    if stored == FLOAT16:
        return builder.fpext(builder.bitcast(value, like(ir.HalfType(), lanes)), like(ir.FloatType(), lanes))
    bits = builder.shl(builder.zext(value, like(word, lanes)), filled(word, lanes, HALF_BITS))
    return builder.bitcast(bits, like(ir.FloatType(), lanes))


class _BFloat(ir.Type):
    """bfloat16 of LLVM, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def rounded(builder: Any, value: Any, stored: int, lanes: int) -> Any:
    """Numbers of float32 as the 16 bits of the nearest ones of half precision, ties to even."""
    short = like(ir.IntType(HALF_BITS), lanes)
    if stored == FLOAT16:
        return builder.bitcast(builder.fptrunc(value, like(ir.HalfType(), lanes)), short)
    # (LLVM of before 16 knows the instruction by another type, and ends the process)
    if lanes != WIDE or not processor.has("avx512bf16") or binding.llvm_version_info[0] < 16:
        return _rounded_bits(builder, value, lanes)
    # an instruction rounds to bfloat16, but takes subnormal numbers of float32 for 0
    narrow, flags = ir.VectorType(_BFloat(), lanes), ir.VectorType(ir.IntType(1), lanes)
    declare = builder.module.declare_intrinsic
    rounds = declare("llvm.x86.avx512bf16.cvtneps2bf16.512", (), ir.FunctionType(narrow, [value.type]))
    classes = declare("llvm.x86.avx512.fpclass.ps.512", (), ir.FunctionType(flags, [value.type, ir.IntType(32)]))
    is_subnormal = builder.call(classes, [value, ir.Constant(ir.IntType(32), SUBNORMAL)])
    some = builder.icmp_unsigned("!=", builder.bitcast(is_subnormal, ir.IntType(lanes)), ir.IntType(lanes)(0))
    found = variable(builder, short)
    builder.store(builder.bitcast(builder.call(rounds, [value]), short), found)
    with builder.if_then(some, likely=False):
        builder.store(_rounded_bits(builder, value, lanes), found)
    return builder.load(found)


def _rounded_bits(builder: Any, value: Any, lanes: int) -> Any:
    """Numbers of float32 as bfloat16, by their bits."""
    word, short = ir.IntType(32), like(ir.IntType(HALF_BITS), lanes)

    def each(number: int) -> Any:
        return filled(word, lanes, number)

    bits = builder.bitcast(value, like(word, lanes))
    upper = builder.lshr(bits, each(HALF_BITS))
    is_nan = builder.fcmp_unordered("uno", value, value)
    if lanes == WIDE and processor.has("avx2") and not processor.has("avx512f"):
        return builder.trunc(_rounded_by_table(builder, bits, upper, is_nan), short)
    odd = builder.and_(upper, each(1))
    nearest = builder.lshr(builder.add(bits, builder.add(odd, each(LAST_BITS))), each(HALF_BITS))
    found = builder.select(is_nan, builder.or_(upper, each(QUIET)), nearest)
    return builder.trunc(found, short)


def _rounded_by_table(builder: Any, bits: Any, upper: Any, is_nan: Any) -> Any:
    """The upper bits after rounding, in six operations of AVX2 for a register of eight numbers.

    A shuffle looks up what is added, `LAST_BITS` and one more where the last bit that stays is odd: it reads the lowest
    two bits of its places. A NaN gets all bits set, as PyTorch has it too.
    """
    word, wide, half = ir.IntType(32), bits.type, WIDE // 2
    numbers, places = ir.VectorType(ir.FloatType(), half), ir.VectorType(word, half)
    look_up = function_of(builder.module, ir.FunctionType(numbers, [numbers, places]), "llvm.x86.avx.vpermilvar.ps.256")
    table = builder.bitcast(ir.Constant(places, [LAST_BITS, LAST_BITS + 1] * (half // 2)), numbers)
    parts = [
        builder.call(
            look_up, [table, builder.shuffle_vector(upper, upper, lanes_of_vectors(tuple(range(at, at + half))))]
        )
        for at in (0, half)
    ]
    added = builder.bitcast(builder.shuffle_vector(*parts, lanes_of_vectors(tuple(range(WIDE)))), wide)
    found = builder.or_(builder.add(bits, added), builder.sext(is_nan, wide))
    return builder.lshr(found, filled(word, WIDE, HALF_BITS))
