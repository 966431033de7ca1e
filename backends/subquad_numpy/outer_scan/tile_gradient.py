"""Tiles of the gradient: one computes the states of a block again, the other carries the gradient by them back.

Both hold a tile of rows and vectors of columns in registers, as `tile.advance_tile` does. `u`, `e` and `grad_u` have
`width` elements for each step, and a row of the state has as many. `states` holds the tile's state before each step.
Sums over columns are added to memory that has `row` elements for each step, one for each row of the state.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir

from subquad_numpy.codegen import Vector, intrinsic, processor, types
from subquad_numpy.codegen.blocks import for_range, variable
from subquad_numpy.outer_scan.tile import NEAR, RESET, Emitter


def _tile_shape() -> tuple[int, int]:
    """Rows and vectors of a tile: the more vectors, the fewer sums over columns."""
    return 4, 4 if processor.has("avx512f") else 1


ROWS, VECTORS = _tile_shape()


class _Step:
    """What one step of a tile does to its cells, held[row, vector], by the decay of the step."""

    def __init__(self, emit: Emitter, held: Any, kind: Any, factors: list[Any], kept: list[Any] | None) -> None:
        self.emit, self.held, self.kind, self.factors, self.kept = emit, held, kind, factors, kept

    def clear(self) -> None:
        """Select 0 at a reset."""
        emit, builder = self.emit, self.emit.builder
        with builder.if_then(emit.is_mode(self.kind, RESET), likely=False):
            for cell in self.held.values():
                builder.store(ir.Constant(emit.wide, None), cell)

    def decay(self, added: Callable[[int, int], Any] | None = None) -> None:
        """Each cell becomes decay · cell + added(row, vector)."""
        emit, builder = self.emit, self.emit.builder

        def change(r: int, v: int, *, near: bool) -> None:
            old = builder.load(self.held[r, v])
            new = emit.product(self.factors[r], old)
            if added is not None:
                new = builder.fadd(new, added(r, v), flags=("contract",))
            if self.kept is not None:
                new = emit.product_sum(self.kept[r], old, new)
            elif near:
                new = builder.fadd(old, new)
            builder.store(new, self.held[r, v])

        if self.kept is not None:
            for r, v in self.held:
                change(r, v, near=False)
            return
        with builder.if_else(emit.is_mode(self.kind, NEAR)) as (is_near, is_plain):
            for near, branch in ((True, is_near), (False, is_plain)):
                with branch:
                    for r, v in self.held:
                        change(r, v, near=near)


def _decays(
    emit: Emitter, by_channel: bool, factor: Any, keep: Any, factor_step: Any, t: Any
) -> tuple[list[Any], list[Any] | None]:
    """(factor of each row, what is kept of each row or None) of a step."""
    if not by_channel:
        return [emit.spread(factor, t)] * ROWS, None
    indices = [emit.at((t, factor_step), r) for r in range(ROWS)]
    return [emit.spread(factor, i) for i in indices], [emit.spread(keep, i) for i in indices]


def _add(emit: Emitter, value: Any, memory: Any, index: Any) -> None:
    """Add a vector to the one at memory[index]."""
    emit.store(emit.builder.fadd(emit.load(memory, index), value), memory, index)


def _add_totals(emit: Emitter, vectors: list[Any], memory: Any, index: Any) -> None:
    """Add the sum over the lanes of each vector, one for each row, to the numbers from memory[index] on."""
    builder, lanes = emit.builder, emit.lanes * len(vectors)

    def halved(x: Any, y: Any) -> Any:
        """The sums of neighbours in x, then in y."""
        both = [
            ir.Constant(ir.VectorType(ir.IntType(32), x.type.count), [2 * i + odd for i in range(x.type.count)])
            for odd in (0, 1)
        ]
        return builder.fadd(*(builder.shuffle_vector(x, y, places) for places in both))

    while len(vectors) > 1:
        vectors = [halved(x, y) for x, y in zip(vectors[::2], vectors[1::2], strict=True)]
        lanes //= 2
    (sums,) = vectors
    while lanes > ROWS:
        lanes //= 2
        places = [
            ir.Constant(ir.VectorType(ir.IntType(32), lanes), [2 * i + odd for i in range(lanes)]) for odd in (0, 1)
        ]
        sums = builder.fadd(*(builder.shuffle_vector(sums, sums, x) for x in places))
    place = builder.bitcast(builder.gep(memory, [index]), sums.type.as_pointer())
    builder.store(builder.fadd(builder.load(place, align=emit.align), sums), place, align=emit.align)


@cache
def states_tile(vectors: int, by_channel: bool) -> Callable[..., Any]:
    """The intrinsic that computes the states of a tile again, and adds S e to `sums`.

        compute(k, row, factor, keep, factor_step, mode, u, e, before, width, steps, state, states, sums)

    k has `row` elements for each step, too, and is padded with zeros to whole tiles. With `before` (1, not 0), a step
    reads the state that it finds.
    """

    @intrinsic
    def compute(
        k: Any, row: Any, factor: Any, keep: Any, factor_step: Any, mode: Any, u: Any, e: Any,
        before: Any, width: Any, steps: Any, state: Any, states: Any, sums: Any,
    ) -> Any:  # fmt: skip
        vector, number = Vector(k.dtype), types.intp

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            k, row, factor, keep, factor_step, mode, u, e, before, width, steps, state, states, sums = args
            emit = Emitter(context, builder, vector)
            cells = [(r, v) for r in range(ROWS) for v in range(vectors)]
            held = {cell: variable(builder, emit.wide) for cell in cells}
            for r, v in cells:
                builder.store(emit.load(state, emit.at((width, r), v * emit.lanes)), held[r, v])
            reads_before = emit.is_mode(before, 1)
            with for_range(builder, steps) as loop:
                t = loop.index
                kind = builder.load(builder.gep(mode, [t]))
                columns = [emit.at((t, width), v * emit.lanes) for v in range(vectors)]
                inputs = [emit.load(u, index) for index in columns]
                keys = [emit.spread(k, emit.at((t, row), r)) for r in range(ROWS)]
                step = _Step(emit, held, kind, *_decays(emit, by_channel, factor, keep, factor_step, t))
                step.clear()
                for r, v in cells:
                    place = emit.at((t, ROWS * vectors * emit.lanes), (r * vectors + v) * emit.lanes)
                    emit.store(builder.load(held[r, v]), states, place)

                def read() -> None:
                    reads = [emit.load(e, index) for index in columns]
                    totals = []
                    for r in range(ROWS):
                        total = ir.Constant(emit.wide, None)
                        for v in range(vectors):
                            total = emit.product_sum(builder.load(held[r, v]), reads[v], total)
                        totals.append(total)
                    _add_totals(emit, totals, sums, emit.at((t, row)))

                with builder.if_then(reads_before):
                    read()
                step.decay(lambda r, v: emit.product(keys[r], inputs[v]))
                with builder.if_then(builder.not_(reads_before)):
                    read()
            return context.get_dummy_value()

        return types.none(
            k, number, factor, keep, number, mode, u, e, number, number, number, state, states, sums
        ), codegen

    return compute


@cache
def gradient_tile(vectors: int, by_channel: bool) -> Callable[..., Any]:
    """The intrinsic that carries the gradient G by the state from the end of a block to its beginning.

        carry(k, q, row, factor, keep, factor_step, mode, u, e, grad_u, before, width, steps, G, states, sums, sums_g)

    It adds Gᵀ k to `grad_u`, G u to `sums`, and the sums of G ∘ S[t−1] to `sums_g`; without `by_channel`, `sums_g` has
    one vector for each step, whose lanes are added up later.
    """

    @intrinsic
    def carry(
        k: Any, q: Any, row: Any, factor: Any, keep: Any, factor_step: Any, mode: Any, u: Any,
        e: Any, grad_u: Any, before: Any, width: Any, steps: Any, G: Any, states: Any, sums: Any, sums_g: Any,
    ) -> Any:  # fmt: skip
        vector, number = Vector(k.dtype), types.intp

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            (k, q, row, factor, keep, factor_step, mode, u, e, grad_u, before, width, steps, G, states, sums,
             sums_g) = args  # fmt: skip
            emit = Emitter(context, builder, vector)
            cells = [(r, v) for r in range(ROWS) for v in range(vectors)]
            held = {cell: variable(builder, emit.wide) for cell in cells}
            places = {(r, v): emit.at((width, r), v * emit.lanes) for r, v in cells}
            for cell in cells:
                builder.store(emit.load(G, places[cell]), held[cell])
            reads_before = emit.is_mode(before, 1)
            with for_range(builder, steps) as loop:
                t = builder.sub(builder.sub(steps, loop.index), emit.number(1))
                kind = builder.load(builder.gep(mode, [t]))
                columns = [emit.at((t, width), v * emit.lanes) for v in range(vectors)]

                def add_reads() -> None:
                    reads = [emit.load(e, index) for index in columns]
                    for r in range(ROWS):
                        query = emit.spread(q, emit.at((t, row), r))
                        for v in range(vectors):
                            new = emit.product_sum(query, reads[v], builder.load(held[r, v]))
                            builder.store(new, held[r, v])

                with builder.if_then(builder.not_(reads_before)):
                    add_reads()
                inputs, by_u = ([emit.load(x, index) for index in columns] for x in (u, grad_u))
                totals = []
                for r in range(ROWS):
                    key, total = emit.spread(k, emit.at((t, row), r)), ir.Constant(emit.wide, None)
                    for v in range(vectors):
                        gradient = builder.load(held[r, v])
                        by_u[v] = emit.product_sum(gradient, key, by_u[v])
                        total = emit.product_sum(gradient, inputs[v], total)
                    totals.append(total)
                _add_totals(emit, totals, sums, emit.at((t, row)))
                for v, index in enumerate(columns):
                    emit.store(by_u[v], grad_u, index)
                step = _Step(emit, held, kind, *_decays(emit, by_channel, factor, keep, factor_step, t))
                step.clear()
                totals = []
                for r in range(ROWS):
                    total = ir.Constant(emit.wide, None) if by_channel or not totals else totals.pop()
                    for v in range(vectors):
                        place = emit.at((t, ROWS * vectors * emit.lanes), (r * vectors + v) * emit.lanes)
                        total = emit.product_sum(builder.load(held[r, v]), emit.load(states, place), total)
                    totals.append(total)
                if by_channel:
                    _add_totals(emit, totals, sums_g, emit.at((t, row)))
                else:
                    _add(emit, totals[0], sums_g, emit.at((t, emit.lanes)))
                step.decay()
                is_read = builder.and_(reads_before, builder.not_(emit.is_mode(kind, RESET)))
                with builder.if_then(is_read):
                    add_reads()
            for cell in cells:
                emit.store(builder.load(held[cell]), G, places[cell])
            return context.get_dummy_value()

        return types.none(
            k, q, number, factor, keep, number, mode, u, e, grad_u, number, number, number, G, states, sums, sums_g
        ), codegen

    return carry
