"""Statements of a kernel: assignments, conditions and loops."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from subquad_numpy.codegen import types
from subquad_numpy.codegen.expressions import NOTHING, OPERATIONS, Expressions
from subquad_numpy.codegen.source import Source
from subquad_numpy.codegen.values import (
    BIT,
    WORD,
    Constant,
    Together,
    Value,
    are_alike,
    cast,
    is_number,
    machine_type,
    parts_of,
    type_of,
    unified,
)  # fmt: skip


class Slots(NamedTuple):
    """A variable: one slot of memory, or those of the parts of a tuple, or a constant."""

    kind: Any
    place: Any


class Scope(Expressions):
    """The call of a Python function, which is translated into the body around it."""

    def __init__(self, body: Any, source: Source, args: Sequence[Any]) -> None:
        self.body, self.builder, self.source = body, body.builder, source
        body.translation.scopes += 1
        self.number = body.translation.scopes
        self.variables: dict[str, Any] = {}
        self.returns: list[tuple[Any, Any]] = []
        self.exit: Any = None
        self.loops: list[tuple[Any, Any]] = []
        for parameter, arg in zip(source.tree.args.args, args, strict=True):
            self.assign(parameter.arg, arg)

    def run(self) -> Any:
        """Translate the statements; the result of the call."""
        *before, last = self.source.tree.body
        self.suite(before)
        if isinstance(last, ast.Return) and not self.returns and not self.builder.block.is_terminated:
            with self._told(last):
                return NOTHING if last.value is None else self.expression(last.value)
        if not self.builder.block.is_terminated:
            self.suite([last])
        if not self.returns:
            return NOTHING
        if not self.builder.block.is_terminated:
            self._return(NOTHING)
        self.builder.position_at_end(self.exit)
        return self.merged(self.returns)

    def _return(self, value: Any) -> None:
        if self.exit is None:
            self.exit = self.builder.append_basic_block("exit")
        self.returns.append((self.builder.block, value))
        self.builder.branch(self.exit)

    @contextmanager
    def _told(self, statement: ast.stmt) -> Iterator[None]:
        """Add the statement to what is told of an error in it."""
        try:
            yield
        except Exception as error:
            line = ast.unparse(statement).splitlines()[0]
            error.add_note(f"in {self.source.tree.name}, line {statement.lineno}: {line}")
            raise

    def suite(self, statements: Sequence[ast.stmt]) -> None:
        """Translate statements up to the first that leaves the suite."""
        for statement in statements:
            if self.builder.block.is_terminated:
                return
            with self._told(statement):
                getattr(self, f"do_{type(statement).__name__}")(statement)

    # variables

    def assign(self, name: str, value: Any) -> None:
        """Give a variable a value."""
        if name in self.source.settled or (
            isinstance(value, Constant) and not is_number(value) and not isinstance(value.value, tuple)
        ):
            self.variables[name] = value
        else:
            self.variables[name] = self._store(self.variables.get(name), value, (self.number, name))

    def _store(self, slot: Any, value: Any, key: Any) -> Any:
        if isinstance(value, Together) or (isinstance(value, Constant) and isinstance(value.value, tuple)):
            parts = parts_of(value)
            before = slot.place if isinstance(slot, Slots) and isinstance(slot.kind, Together) else [None] * len(parts)
            places = [
                self._store(old, part, (*key, i)) for i, (old, part) in enumerate(zip(before, parts, strict=True))
            ]
            return Slots(Together(value.kind if isinstance(value, Together) else tuple, ()), places)
        if isinstance(value, Constant) and not is_number(value):
            return value
        kind = type_of(value)
        if isinstance(value, Constant) and isinstance(value.value, int) and not isinstance(value.value, bool):
            kind = types.int64
        if not isinstance(slot, Slots) or not are_alike(slot.kind, kind):  # or a new variable of the same name
            kind = self.body.translation.retyped.get(key, kind)
            slot = Slots(kind, self.body.variable(machine_type(kind)))
        whole = unified(slot.kind, kind)
        if whole != slot.kind:
            self.body.translation.wider[key] = whole
        self.builder.store(cast(self.builder, value, slot.kind), slot.place)
        return slot

    def _read(self, slot: Any) -> Any:
        if not isinstance(slot, Slots):
            return slot
        if isinstance(slot.kind, Together):
            return Together(slot.kind.kind, tuple(map(self._read, slot.place)))
        return Value(slot.kind, self.builder.load(slot.place))

    def put(self, target: ast.AST, value: Any) -> None:
        """Assign a value to a name, an item of memory, or several of these."""
        if isinstance(target, ast.Name):
            self.assign(target.id, value)
        elif isinstance(target, ast.Tuple):
            for part, own in zip(target.elts, parts_of(value), strict=True):
                self.put(part, own)
        elif isinstance(target, ast.Subscript):
            memory, index = self.expression(target.value), self.expression(target.slice)
            place = self._place(memory, index)
            self.builder.store(cast(self.builder, value, memory.type.dtype), place)
        else:
            msg = f"kernels cannot assign to {ast.unparse(target)}"
            raise TypeError(msg)

    # statements

    def do_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.expression(node.value)

    def do_Assign(self, node: ast.Assign) -> None:
        value = self.expression(node.value)
        for target in node.targets:
            self.put(target, value)

    def do_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.put(node.target, self.expression(node.value))

    def do_AugAssign(self, node: ast.AugAssign) -> None:
        operation = OPERATIONS[type(node.op)]
        if isinstance(node.target, ast.Subscript):
            memory, index = self.expression(node.target.value), self.expression(node.target.slice)
            place = self._place(memory, index)
            before = Value(memory.type.dtype, self.builder.load(place))
            value = self.operated(operation, before, self.expression(node.value))
            self.builder.store(cast(self.builder, value, memory.type.dtype), place)
        else:
            assert isinstance(node.target, ast.Name)
            before = self._name(node.target.id)
            self.assign(node.target.id, self.operated(operation, before, self.expression(node.value)))

    def do_Pass(self, node: ast.Pass) -> None:
        pass

    def do_Return(self, node: ast.Return) -> None:
        self._return(NOTHING if node.value is None else self.expression(node.value))

    def do_Break(self, node: ast.Break) -> None:
        self.builder.branch(self.loops[-1][1])

    def do_Continue(self, node: ast.Continue) -> None:
        self.builder.branch(self.loops[-1][0])

    def do_If(self, node: ast.If) -> None:
        test = self.condition(node.test)
        if isinstance(test, bool):
            self.suite(node.body if test else node.orelse)
            return
        builder = self.builder
        yes, after = builder.append_basic_block("if"), builder.append_basic_block("endif")
        no = builder.append_basic_block("else") if node.orelse else after
        builder.cbranch(test, yes, no)
        goes_on = not node.orelse
        for block, statements in ((yes, node.body), (no, node.orelse)):
            if statements:
                builder.position_at_end(block)
                self.suite(statements)
                if not builder.block.is_terminated:
                    builder.branch(after)
                    goes_on = True
        builder.position_at_end(after)
        if not goes_on:
            builder.unreachable()

    def do_While(self, node: ast.While) -> None:
        builder = self.builder
        head, body, after = (builder.append_basic_block(f"while.{name}") for name in ("head", "body", "end"))
        builder.branch(head)
        builder.position_at_end(head)
        test = self.condition(node.test)
        builder.cbranch(BIT(int(test)) if isinstance(test, bool) else test, body, after)
        self._loop_body(body, head, after, node.body)
        builder.position_at_end(after)

    def _loop_body(self, body: Any, next_turn: Any, after: Any, statements: Sequence[ast.stmt]) -> None:
        self.builder.position_at_end(body)
        self.loops.append((next_turn, after))
        self.suite(statements)
        self.loops.pop()
        if not self.builder.block.is_terminated:
            self.builder.branch(next_turn)

    def do_For(self, node: ast.For) -> None:
        assert isinstance(node.iter, ast.Call)
        if self.expression(node.iter.func) != Constant(range):
            msg = "kernels have loops over ranges only"
            raise TypeError(msg)
        args = self._arguments(node.iter)
        start, stop = (Constant(0), args[0]) if len(args) == 1 else args[:2]
        step = args[2] if len(args) == 3 else Constant(1)
        builder = self.builder
        begin, end, by = (cast(builder, x, types.int64) for x in (start, stop, step))
        head, body, turn, after = (builder.append_basic_block(f"for.{x}") for x in ("head", "body", "turn", "end"))
        entry = builder.block
        builder.branch(head)
        builder.position_at_end(head)
        index = builder.phi(WORD)
        index.add_incoming(begin, entry)
        if isinstance(step, Constant):
            goes_on = builder.icmp_signed("<" if step.value > 0 else ">", index, end)
        else:
            rises = builder.icmp_signed(">", by, WORD(0))
            goes_on = builder.select(rises, builder.icmp_signed("<", index, end), builder.icmp_signed(">", index, end))
        builder.cbranch(goes_on, body, after)
        builder.position_at_end(turn)
        index.add_incoming(builder.add(index, by, flags=("nsw",)), turn)
        builder.branch(head)
        builder.position_at_end(body)
        self.put(node.target, Value(types.int64, index))
        self._loop_body(body, turn, after, node.body)
        builder.position_at_end(after)
