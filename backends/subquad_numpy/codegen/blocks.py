"""Pieces of LLVM's language that code generators share: variables, loops, functions of a module, parts of a tuple."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from llvmlite import ir

WORD = ir.IntType(64)


def variable(builder: Any, kind: Any) -> Any:
    """The address of a new variable, which LLVM keeps in a register if it can."""
    with builder.goto_entry_block():
        return builder.alloca(kind)


def variable_of(builder: Any, value: Any) -> Any:
    """The address of a new variable that holds a value."""
    made = variable(builder, value.type)
    builder.store(value, made)
    return made


def hidden(builder: Any, address: Any) -> Any:
    """The same address, of which LLVM does not see how it is made: it then looks for no better way to make it.

    In a loop over many addresses that search is long: a quarter of a second for a tile of 16 rows that is transposed.
    """
    return builder.asm(ir.FunctionType(address.type, [address.type]), "", "=r,0", [address], side_effect=False)


@cache
def lanes_of_vectors(lanes: tuple[int, ...]) -> Any:
    """The constant by which a shuffle chooses lanes; its text is long, and made once."""
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


def ask_for_line(builder: Any, address: Any, level: int = 1) -> None:
    """Ask for the cache line of an address, to be read from the cache of this level."""
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    function = function_of(builder.module, kind, "llvm.prefetch.p0")
    reads, keep, data = 0, 4 - level, 1
    hints = [ir.Constant(word, hint) for hint in (reads, keep, data)]
    builder.call(function, [builder.bitcast(address, byte), *hints])


def function_of(module: Any, kind: Any, name: str) -> Any:
    """A function of another module, or of LLVM, by its name."""
    return module.globals[name] if name in module.globals else ir.Function(module, kind, name)


def parts_of(builder: Any, whole: Any) -> list[Any]:
    """The parts of a tuple that is one value of LLVM."""
    return [builder.extract_value(whole, i) for i in range(len(whole.type.elements))]


class Loop(NamedTuple):
    """A loop that is being written: the number of the turn, from 0 on."""

    index: Any


@contextmanager
def for_range(builder: Any, count: Any) -> Iterator[Loop]:
    """A loop of `count` turns, of whose turn the code that follows in the context is."""
    head, body, after = (builder.append_basic_block(f"range.{name}") for name in ("head", "body", "end"))
    before = builder.block
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(count.type)
    index.add_incoming(ir.Constant(count.type, 0), before)
    builder.cbranch(builder.icmp_signed("<", index, count), body, after)
    builder.position_at_end(body)
    yield Loop(index)
    index.add_incoming(builder.add(index, ir.Constant(count.type, 1), flags=("nsw",)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)
