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

from llvmlite import binding, ir
from numba.core import cgutils

from subquad_numpy.codegen import FUSE, Vector, intrinsic, types

PLAIN, NEAR, RESET = 0, 1, 2  # modes of a step: decay = factor; decay = 1 + factor; the state starts from 0


def _tile_shape() -> tuple[int, int]:
    """Rows and vectors of a tile: it must fit in registers, beside what a step reads."""
    wide = binding.get_host_cpu_features().get("avx512f", False)
    return (8, 2) if wide else (4, 1)  # 16 of 32 registers of AVX-512; 8 of 16 of AVX2, where a vector takes two


TILE_ROWS, PANEL_VECTORS = _tile_shape()


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
        typingctx: Any, k: Any, k_step: Any, q: Any, q_step: Any, factor: Any, keep: Any, factor_step: Any, mode: Any,
        u: Any, out: Any, width: Any, steps: Any, state: Any,
    ) -> Any:  # fmt: skip
        vector = Vector(k.dtype)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            k, k_step, q, q_step, factor, keep, factor_step, mode, u, out, width, steps, state = args
            wide = context.get_value_type(vector)
            align = vector.element.bitwidth // 8

            def number(value: int) -> Any:
                return ir.Constant(cgutils.intp_t, value)

            def place(memory: Any, index: Any) -> Any:
                return builder.bitcast(builder.gep(memory, [index]), wide.as_pointer())

            undefined, lanes = ir.Constant(wide, ir.Undefined), ir.VectorType(ir.IntType(32), vector.lanes)

            def spread(memory: Any, index: Any) -> Any:
                one = builder.load(builder.gep(memory, [index]))
                one = builder.insert_element(undefined, one, ir.Constant(ir.IntType(32), 0))
                return builder.shuffle_vector(one, undefined, ir.Constant(lanes, None))

            def product_sum(x: Any, y: Any, z: Any) -> Any:
                return builder.fadd(builder.fmul(x, y, flags=FUSE), z, flags=FUSE)

            cells = [(r, v) for r in range(rows) for v in range(vectors)]
            held = {cell: cgutils.alloca_once(builder, wide) for cell in cells}
            places = {
                (r, v): place(state, builder.add(builder.mul(width, number(r)), number(v * vector.lanes)))
                for r, v in cells
            }
            for cell in cells:
                builder.store(builder.load(places[cell], align=align), held[cell])
            with cgutils.for_range(builder, steps) as loop:
                t = loop.index
                kind = builder.load(builder.gep(mode, [t]))
                with builder.if_then(builder.icmp_signed("==", kind, ir.Constant(kind.type, RESET)), likely=False):
                    for cell in cells:
                        builder.store(ir.Constant(wide, None), held[cell])
                at = builder.mul(t, width)
                columns = [builder.add(at, number(v * vector.lanes)) for v in range(vectors)]
                inputs = [builder.load(place(u, index), align=align) for index in columns]
                sums = [builder.load(place(out, index), align=align) for index in columns] if reads else []
                k_at, q_at = builder.mul(t, k_step), builder.mul(t, q_step)
                keys = [spread(k, builder.add(k_at, number(r))) for r in range(rows)]

                def read() -> None:
                    for r in range(rows):
                        query = spread(q, builder.add(q_at, number(r)))
                        for v in range(vectors):
                            sums[v] = product_sum(query, builder.load(held[r, v]), sums[v])

                def update(factors: list[Any], kept: list[Any] | None) -> None:
                    for r, v in cells:
                        old = builder.load(held[r, v])
                        new = product_sum(factors[r], old, builder.fmul(keys[r], inputs[v], flags=FUSE))
                        if kept is not None:
                            new = product_sum(kept[r], old, new)
                        builder.store(new, held[r, v])

                if before and reads:
                    read()
                if by_channel:
                    row = builder.mul(t, factor_step)
                    indices = [builder.add(row, number(r)) for r in range(rows)]
                    update([spread(factor, i) for i in indices], [spread(keep, i) for i in indices])
                else:
                    factors = [spread(factor, t)] * rows
                    near = builder.icmp_signed("==", kind, ir.Constant(kind.type, NEAR))
                    with builder.if_else(near) as (is_near, is_plain):
                        with is_near:
                            for r, v in cells:
                                old = builder.load(held[r, v])
                                added = builder.fmul(keys[r], inputs[v], flags=FUSE)
                                added = product_sum(factors[r], old, added)
                                builder.store(builder.fadd(old, added), held[r, v])
                        with is_plain:
                            update(factors, None)
                if reads and not before:
                    read()
                for value, index in zip(sums, columns, strict=False):
                    builder.store(value, place(out, index), align=align)
            for cell in cells:
                builder.store(builder.load(held[cell]), places[cell], align=align)
            return context.get_dummy_value()

        number = types.intp
        return types.none(k, number, q, number, factor, keep, number, mode, u, out, number, number, state), codegen

    return advance
