"""Translation of a kernel, a Python function, to LLVM's language.

Kernels are written in a small part of Python, with the meaning that Numba gives it: integers, floats, pointers,
vectors, tuples; loops over ranges; conditions; calls of intrinsics, and of functions marked by `inline`, `merged` or
`apart`. What a kernel closes over is constant. A condition on constants is decided here, and only the branch that it
takes is translated. Each call of an inline function is translated anew, since constants differ; this takes a tenth of a
second for a large kernel. Numba itself takes three times as long to be imported as a kernel of ours to be compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import processor, types
from subquad_numpy.codegen.blocks import function_of
from subquad_numpy.codegen.source import source_of
from subquad_numpy.codegen.statements import Scope
from subquad_numpy.codegen.values import (
    BIT,
    BYTE,
    CONTEXT,
    WORD,
    Constant,
    Value,
    cast,
    form,
    leaves,
    machine_type,
    rebuilt,
)  # fmt: skip

ABI_ALIGNMENT = 16  # bytes, of the stack where a function is called
MOST_ON_STACK = 1 << 12  # bytes of an array of constant size that lies on the stack


class Translation:
    """The module of one kernel. Types that a variable turns out to need are found by translating once more."""

    def __init__(self, retyped: dict[Any, Any]) -> None:
        self.module = ir.Module("kernel")
        self.retyped, self.wider = retyped, dict[Any, Any]()
        self.functions: dict[Any, tuple[ir.Function, Any]] = {}
        self.scopes = 0

    def function(self, callee: Any, args: Sequence[Any], merges: bool) -> tuple[ir.Function, Any]:
        """The function of LLVM for arguments of these types and constants, and the form of its result."""
        key = (callee, *map(form, args))
        if key not in self.functions:
            kinds = [part.type for arg in args for part in leaves(arg)]
            name = f"{callee.__name__}.{len(self.functions)}"
            made = ir.Function(self.module, ir.FunctionType(ir.VoidType(), list(map(machine_type, kinds))), name)
            made.linkage = "internal"
            made.attributes.add("nounwind")
            made.attributes.add("alwaysinline" if merges else "noinline")
            made.attributes.alignstack = 0 if merges else _of_stack()
            body = Body(self, made)
            given = iter(map(Value, kinds, made.args))
            result = body.run(callee, [rebuilt(arg, given) for arg in args])
            parts = list(leaves(result))
            if parts:
                whole = CONTEXT.make_tuple(body.builder, None, [part.ir for part in parts])
                body.builder.ret(whole)
                made.ftype = ir.FunctionType(whole.type, made.ftype.args)
                made.type, made.return_value = made.ftype.as_pointer(), ir.values.ReturnValue(made, whole.type)
            else:
                body.builder.ret_void()
            self.functions[key] = made, result
        return self.functions[key]


def _of_stack() -> int:
    """The boundary in bytes on which the stack of a function is to lie, or 0: that of its callers will do.

    A register that is kept there then lies in one cache line: LLVM itself leaves it on a boundary of 16 bytes, and each
    second one of AVX2 in two lines, by chance of the process. A scan that keeps a few so took twice its time.
    """
    size = processor.register_bytes()
    return size if size > ABI_ALIGNMENT else 0


def translated(function: Any, name: str, kinds: Sequence[Any]) -> ir.Module:
    """The module of a kernel: a C function of arguments of these types, which returns an int64, 0 without memory."""
    retyped: dict[Any, Any] = {}
    while True:
        translation = Translation(retyped)
        kind = ir.FunctionType(WORD, [machine_type(kind) for kind in kinds])
        made = ir.Function(translation.module, kind, name)
        made.attributes.add("nounwind")
        made.attributes.alignstack = _of_stack()
        body = Body(translation, made, fails=True)
        result = body.run(function, [Value(kind, arg) for kind, arg in zip(kinds, made.args, strict=True)])
        body.free()
        body.builder.ret(cast(body.builder, result, types.int64))
        body.finish()
        if not translation.wider:
            return translation.module
        retyped |= translation.wider


class Body:
    """A function of LLVM while it is written."""

    def __init__(self, translation: Translation, function: ir.Function, fails: bool = False) -> None:
        self.translation, self.function = translation, function
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        self.buffers: list[Any] = []
        self.failure = function.append_basic_block("no_memory") if fails else None

    def run(self, callee: Any, args: Sequence[Any]) -> Any:
        """Translate the call of a Python function in place; returns its result."""
        return Scope(self, source_of(callee), args).run()

    def variable(self, kind: Any) -> Any:
        """The address of a new variable."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(kind)

    def array(self, count: Any, element: Any, clears: bool) -> Value:
        """A new array of memory, freed at the end of the kernel."""
        builder, kind, size = self.builder, machine_type(element), element.bitwidth // 8
        if isinstance(count, Constant) and count.value * size <= MOST_ON_STACK:
            with builder.goto_entry_block():
                made = builder.alloca(kind, int(count.value), name="array")
                made.align = 64
            if clears:
                address = builder.bitcast(made, BYTE.as_pointer())
                kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), BYTE, WORD, BIT])
                fill = function_of(builder.module, kind, "llvm.memset.p0.i64")
                builder.call(fill, [address, BYTE(0), WORD(int(count.value) * size), BIT(0)])
            return Value(types.Array(element), made)
        if self.failure is None:
            msg = "only a kernel itself makes arrays, not a function that it calls"
            raise TypeError(msg)
        text = BYTE.as_pointer()
        slot = self.variable(text)
        with builder.goto_entry_block():
            builder.store(ir.Constant(text, None), slot)
        allocate = function_of(builder.module, ir.FunctionType(text, [WORD, WORD]), "calloc")
        if not clears:
            allocate = function_of(builder.module, ir.FunctionType(text, [WORD]), "malloc")
        builder.call(self._free(), [builder.load(slot)])
        bytes_of = builder.mul(cast(builder, count, types.int64), WORD(size))
        bytes_of = builder.add(bytes_of, WORD(1))
        made = builder.call(allocate, [WORD(1), bytes_of] if clears else [bytes_of])
        builder.store(made, slot)
        self.buffers.append(slot)
        there = builder.append_basic_block("there")
        builder.cbranch(builder.icmp_unsigned("==", made, ir.Constant(text, None)), self.failure, there)
        builder.position_at_end(there)
        return Value(types.Array(element), builder.bitcast(made, kind.as_pointer()))

    def _free(self) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer()])
        return function_of(self.builder.module, kind, "free")

    def free(self) -> None:
        """Free all arrays."""
        for slot in self.buffers:
            self.builder.call(self._free(), [self.builder.load(slot)])

    def finish(self) -> None:
        """Write what is done without memory."""
        self.builder.position_at_end(self.failure)
        self.free()
        self.builder.ret(WORD(0))
