"""A tile of the state in registers, which takes in and gives out a block of time.

    S[r, :] = decay S[r, :] + k[r] u,      out += Σ_r q[r] S[r, :]

Rows of the state (channels of the keys) are independent of one another but for the sum over rows, and so are columns
(channels of the values). A tile of some rows and vectors of columns therefore stays in registers for all steps of a
block, and each number of q and k is spread once for all of its vectors: a step costs one product and two fused
multiply-adds for each vector of the state, and no load or store of the state.

A decay comes as a factor and a mode. Near 1 the factor is the decay less 1, and the state is kept and added: rounding
the decay itself would make one and the same error at every step.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import FUSE, Vector, intrinsic, processor, types
from subquad_numpy.codegen.blocks import WORD, for_range, variable

PLAIN, NEAR, RESET = 0, 1, 2  # modes of a step: decay = factor; decay = 1 + factor; the state starts from 0


def _tile_shape() -> tuple[int, int]:
    """Rows and vectors of a tile: it must fit in registers, beside what a step reads."""
    wide = processor.has("avx512f")
    return (8, 2) if wide else (4, 1)  # 16 of 32 registers of AVX-512; 8 of 16 of AVX2, where a vector takes two


TILE_ROWS, PANEL_VECTORS = _tile_shape()


class Emitter:
    """The instructions that tiles are made of, for vectors of one type."""

    def __init__(self, context: Any, builder: Any, vector: Any) -> None:
        self.builder, self.lanes = builder, vector.lanes
        self.wide, self.align = context.get_value_type(vector), vector.element.bitwidth // 8
        self.undefined = ir.Constant(self.wide, ir.Undefined)
        self.first_lane = ir.Constant(ir.VectorType(ir.IntType(32), vector.lanes), None)

    def number(self, value: int) -> Any:
        """An index."""
        return ir.Constant(WORD, value)

    def at(self, *terms: Any) -> Any:
        """The sum of indices; a pair is a product."""
        found = self.number(0)
        for term in terms:
            one, other = term if isinstance(term, tuple) else (term, 1)
            one, other = (self.number(x) if isinstance(x, int) else x for x in (one, other))
            found = self.builder.add(found, self.builder.mul(one, other))
        return found

    def place(self, memory: Any, index: Any) -> Any:
        """The address of the vector at memory[index]."""
        return self.builder.bitcast(self.builder.gep(memory, [index]), self.wide.as_pointer())

    def load(self, memory: Any, index: Any) -> Any:
        """The vector at memory[index]."""
        return self.builder.load(self.place(memory, index), align=self.align)

    def store(self, value: Any, memory: Any, index: Any) -> None:
        """Write a vector to memory[index]."""
        self.builder.store(value, self.place(memory, index), align=self.align)

    def spread(self, memory: Any, index: Any) -> Any:
        """memory[index] in every lane."""
        one = self.builder.load(self.builder.gep(memory, [index]))
        one = self.builder.insert_element(self.undefined, one, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(one, self.undefined, self.first_lane)

    def product(self, x: Any, y: Any) -> Any:
        """x y."""
        return self.builder.fmul(x, y, flags=FUSE)

    def product_sum(self, x: Any, y: Any, z: Any) -> Any:
        """x y + z."""
        return self.builder.fadd(self.product(x, y), z, flags=FUSE)

    def is_mode(self, kind: Any, mode: int) -> Any:
        """Whether the mode of a step is this one."""
        return self.builder.icmp_signed("==", kind, ir.Constant(kind.type, mode))


@cache
def advance_tile(
    rows: int, vectors: int, by_channel: bool, before: bool = False, reads: bool = True
) -> Callable[..., Any]:
    """The intrinsic that takes a tile through `steps` steps.

        advance(k, k_step, q, q_step, factor, keep, factor_step, mode, u, out, width, steps, state)

    k and q are at the tile's first row, `k_step` and `q_step` elements from one step to the next. factor[t], or with
    `by_channel` factor[t · factor_step + r] and keep[…], which is 1 near a decay of 1 and else 0. u and out have
    `width` elements for each step, and so has each row of the state. With `before`, a step reads the state that it
    finds; without `reads`, q and out are of no use.
    """

    @intrinsic
    def advance(
        k: Any, k_step: Any, q: Any, q_step: Any, factor: Any, keep: Any, factor_step: Any, mode: Any,
        u: Any, out: Any, width: Any, steps: Any, state: Any,
    ) -> Any:  # fmt: skip
        vector = Vector(k.dtype)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            k, k_step, q, q_step, factor, keep, factor_step, mode, u, out, width, steps, state = args
            emit = Emitter(context, builder, vector)
            cells = [(r, v) for r in range(rows) for v in range(vectors)]
            held = {cell: variable(builder, emit.wide) for cell in cells}
            places = {(r, v): emit.at((width, r), v * vector.lanes) for r, v in cells}
            for cell in cells:
                builder.store(emit.load(state, places[cell]), held[cell])
            with for_range(builder, steps) as loop:
                t = loop.index
                kind = builder.load(builder.gep(mode, [t]))
                with builder.if_then(emit.is_mode(kind, RESET), likely=False):
                    for cell in cells:
                        builder.store(ir.Constant(emit.wide, None), held[cell])
                columns = [emit.at((t, width), v * vector.lanes) for v in range(vectors)]
                inputs = [emit.load(u, index) for index in columns]
                sums = [emit.load(out, index) for index in columns] if reads else []
                keys = [emit.spread(k, emit.at((t, k_step), r)) for r in range(rows)]

                def read() -> None:
                    for r in range(rows):
                        query = emit.spread(q, emit.at((t, q_step), r))
                        for v in range(vectors):
                            sums[v] = emit.product_sum(query, builder.load(held[r, v]), sums[v])

                def update(factors: list[Any], kept: list[Any] | None, *, near: bool = False) -> None:
                    for r, v in cells:
                        old = builder.load(held[r, v])
                        new = emit.product_sum(factors[r], old, emit.product(keys[r], inputs[v]))
                        if kept is not None:
                            new = emit.product_sum(kept[r], old, new)
                        elif near:
                            new = builder.fadd(old, new)
                        builder.store(new, held[r, v])

                if before and reads:
                    read()
                if by_channel:
                    indices = [emit.at((t, factor_step), r) for r in range(rows)]
                    update([emit.spread(factor, i) for i in indices], [emit.spread(keep, i) for i in indices])
                else:
                    factors = [emit.spread(factor, t)] * rows
                    with builder.if_else(emit.is_mode(kind, NEAR)) as (is_near, is_plain):
                        with is_near:
                            update(factors, None, near=True)
                        with is_plain:
                            update(factors, None)
                if reads and not before:
                    read()
                for value, index in zip(sums, columns, strict=False):
                    emit.store(value, out, index)
            for cell in cells:
                emit.store(builder.load(held[cell]), state, places[cell])
            return context.get_dummy_value()

        number = types.intp
        return types.none(k, number, q, number, factor, keep, number, mode, u, out, number, number, state), codegen

    return advance
