"""Expressions of a kernel: names, operations, conditions, memory and calls."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from subquad_numpy.codegen import types
from subquad_numpy.codegen.arithmetic import absolute_of, call_llvm, compare, extreme, negative, operate
from subquad_numpy.codegen.blocks import for_range
from subquad_numpy.codegen.source import source_of
from subquad_numpy.codegen.types import from_dtype
from subquad_numpy.codegen.values import (
    BIT,
    CONTEXT,
    WORD,
    Constant,
    Record,
    Together,
    Value,
    cast,
    form,
    leaves,
    machine_type,
    parts_of,
    rebuilt,
    run_time,
    truth,
    type_of,
    unified,
)  # fmt: skip
from subquad_numpy.codegen.vector_type import Marked

OPERATIONS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.LShift: operator.lshift, ast.RShift: operator.rshift,
}  # fmt: skip
UNARY: dict[type, Any] = {ast.USub: operator.neg, ast.Invert: operator.invert, ast.UAdd: operator.pos}
SIGNS: dict[type, str] = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
COMPARISONS: dict[str, Any] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
OF_LLVM: dict[Any, str] = {math.log: "log", math.exp: "exp", math.sqrt: "sqrt"}
NOTHING = Constant(None)


class Expressions:
    """What a scope needs to translate expressions; `statements.Scope` is the rest."""

    body: Any
    builder: Any
    source: Any
    variables: dict[str, Any]

    def _read(self, slot: Any) -> Any:
        raise NotImplementedError

    def merged(self, ways: Sequence[tuple[Any, Any]]) -> Any:
        """The value that comes from one of several blocks to this one."""
        values = [value for _, value in ways]
        first = values[0]
        if len(ways) == 1:
            return first
        if any(isinstance(value, Together) for value in values):
            parts = [[(block, part) for part in parts_of(value)] for block, value in ways]
            kind = next(value.kind for value in values if isinstance(value, Together))
            return Together(kind, tuple(self.merged(part) for part in zip(*parts, strict=True)))
        if all(isinstance(value, Constant) and form(value) == form(first) for value in values):
            return first
        kind = type_of(first)
        for value in values[1:]:
            kind = unified(kind, type_of(value))
        phi = self.builder.phi(machine_type(kind))
        for block, value in ways:
            with self.builder.goto_block(block):
                phi.add_incoming(cast(self.builder, value, kind), block)
        return Value(kind, phi)

    def _place(self, memory: Any, index: Any) -> Any:
        return self.builder.gep(memory.ir, [cast(self.builder, index, types.int64)])

    def expression(self, node: ast.AST) -> Any:
        """The value of an expression."""
        return getattr(self, f"of_{type(node).__name__}")(node)

    def condition(self, node: ast.AST) -> Any:
        """The truth of an expression: True or False if it is known, else a bit."""
        value = self.expression(node)
        if isinstance(value, Constant):
            return bool(value.value)
        return truth(self.builder, value)

    def _name(self, name: str) -> Any:
        if name in self.variables:
            return self._read(self.variables[name])
        try:
            return Constant(self.source.names[name])
        except KeyError:
            msg = f"{name} has no value here"
            raise NameError(msg) from None

    def of_Name(self, node: ast.Name) -> Any:
        return self._name(node.id)

    def of_Constant(self, node: ast.Constant) -> Any:
        return Constant(node.value)

    def of_Tuple(self, node: ast.Tuple) -> Any:
        return Together(tuple, tuple(self._items(node.elts)))

    def _items(self, nodes: Sequence[ast.AST]) -> list[Any]:
        found: list[Any] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                found.extend(parts_of(self.expression(node.value)))
            else:
                found.append(self.expression(node))
        return found

    def operated(self, operation: Any, left: Any, right: Any) -> Any:
        """A binary operation."""
        if isinstance(left, Constant) and isinstance(right, Constant):
            return Constant(operation(*_alike(left.value, right.value)))
        if isinstance(left, Together) or isinstance(right, Together):
            return Together(tuple, parts_of(left) + parts_of(right))
        return operate(self.builder, operation, left, right)

    def of_BinOp(self, node: ast.BinOp) -> Any:
        return self.operated(OPERATIONS[type(node.op)], self.expression(node.left), self.expression(node.right))

    def of_UnaryOp(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            test = self.condition(node.operand)
            return Constant(not test) if isinstance(test, bool) else Value(types.boolean, self.builder.not_(test))
        value = self.expression(node.operand)
        if isinstance(value, Constant):
            return Constant(UNARY[type(node.op)](value.value))
        if isinstance(node.op, ast.Invert):
            return Value(types.int64, self.builder.not_(cast(self.builder, value, types.int64)))
        return negative(self.builder, value)

    def of_Compare(self, node: ast.Compare) -> Any:
        left, known, bits = self.expression(node.left), True, []
        for sign, other in zip(node.ops, node.comparators, strict=True):
            right = self.expression(other)
            found = self._compared(sign, left, right)
            if isinstance(found, Constant):
                known = known and bool(found.value)
            else:
                bits.append(found.ir)
            left = right
        if not known or not bits:
            return Constant(known)
        whole = bits[0]
        for bit in bits[1:]:
            whole = self.builder.and_(whole, bit)
        return Value(types.boolean, whole)

    def _compared(self, sign: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(sign, (ast.Is, ast.IsNot)):
            same = isinstance(left, Constant) and isinstance(right, Constant) and left.value is right.value
            return Constant(same == isinstance(sign, ast.Is))
        if isinstance(sign, (ast.In, ast.NotIn)):
            found: Any = Constant(False)
            for part in parts_of(right):
                one = self._compared(ast.Eq(), left, part)
                if isinstance(found, Constant) and isinstance(one, Constant):
                    found = Constant(found.value or one.value)
                else:
                    found = Value(types.boolean, self.builder.or_(truth(self.builder, found), truth(self.builder, one)))
            return found
        symbol = SIGNS[type(sign)]
        if isinstance(left, Constant) and isinstance(right, Constant):
            return Constant(bool(COMPARISONS[symbol](left.value, right.value)))
        if any(isinstance(x, Constant) and x.value is None for x in (left, right)):
            return Constant(symbol == "!=")
        return Value(types.boolean, compare(self.builder, symbol, left, right))

    def of_BoolOp(self, node: ast.BoolOp) -> Any:
        is_and = isinstance(node.op, ast.And)
        ways: list[tuple[Any, Any]] = []
        after: Any = None
        for i, part in enumerate(node.values):
            test = self.condition(part)
            if isinstance(test, bool):
                if test != is_and:  # decides, whatever comes behind
                    if not ways:
                        return Constant(test)
                    ways.append((self.builder.block, Value(types.boolean, BIT(int(test)))))
                    self.builder.branch(after)
                    break
                if i < len(node.values) - 1 or not ways:
                    if i == len(node.values) - 1:
                        return Constant(test)
                    continue
                ways.append((self.builder.block, Value(types.boolean, BIT(int(test)))))
                self.builder.branch(after)
                break
            if after is None:
                if i == len(node.values) - 1:
                    return Value(types.boolean, test)
                after = self.builder.append_basic_block("known")
            if i == len(node.values) - 1:
                ways.append((self.builder.block, Value(types.boolean, test)))
                self.builder.branch(after)
                break
            more = self.builder.append_basic_block("more")
            ways.append((self.builder.block, Value(types.boolean, BIT(int(not is_and)))))
            self.builder.cbranch(test, *((more, after) if is_and else (after, more)))
            self.builder.position_at_end(more)
        if after is None:
            return Constant(is_and)
        self.builder.position_at_end(after)
        return self.merged(ways)

    def of_IfExp(self, node: ast.IfExp) -> Any:
        test = self.condition(node.test)
        if isinstance(test, bool):
            return self.expression(node.body if test else node.orelse)
        builder = self.builder
        yes, no, after = (builder.append_basic_block(name) for name in ("yes", "no", "chosen"))
        builder.cbranch(test, yes, no)
        ways = []
        for block, part in ((yes, node.body), (no, node.orelse)):
            builder.position_at_end(block)
            value = self.expression(part)
            ways.append((builder.block, value))
            builder.branch(after)
        builder.position_at_end(after)
        return self.merged(ways)

    def of_Attribute(self, node: ast.Attribute) -> Any:
        owner, name = self.expression(node.value), node.attr
        if isinstance(owner, Constant):
            return Constant(getattr(owner.value, name))
        if isinstance(owner, Together):
            return owner.parts[owner.kind._fields.index(name)]
        if isinstance(owner.type, Record):
            place = self.builder.gep(owner.ir, [WORD(owner.type.fields.index(name))])
            return Value(types.int64, self.builder.load(place))
        is_memory = isinstance(owner.type, (types.Array, types.CPointer))
        if is_memory and name == "ctypes":
            return owner
        if is_memory and name == "data":
            return Value(types.int64, self.builder.ptrtoint(owner.ir, WORD))
        if isinstance(owner.type, (types.Integer, types.Float)) and name in ("real", "imag"):
            return owner if name == "real" else Constant(0)
        if isinstance(owner.type, types.Complex) and name in ("real", "imag"):
            return Value(owner.type.underlying_float, self.builder.extract_value(owner.ir, int(name == "imag")))
        msg = f"a value of type {owner.type} has no {name} in kernels"
        raise TypeError(msg)

    def of_Subscript(self, node: ast.Subscript) -> Any:
        owner = self.expression(node.value)
        if isinstance(node.slice, ast.Slice) and isinstance(owner, Value):  # memory from there on
            start = Constant(0) if node.slice.lower is None else self.expression(node.slice.lower)
            return Value(owner.type, self._place(owner, start))
        if isinstance(node.slice, ast.Slice):
            bounds = [None if x is None else self.expression(x).value for x in (node.slice.lower, node.slice.upper)]
            return Together(tuple, parts_of(owner)[slice(*bounds)])
        index = self.expression(node.slice)
        if not isinstance(owner, Value):
            parts = owner.value if isinstance(owner, Constant) else owner.parts
            found = parts[index.value]
            return Constant(found) if isinstance(owner, Constant) else found
        kind = owner.type.dtype
        if isinstance(kind, Record):
            at = self.builder.mul(cast(self.builder, index, types.int64), WORD(len(kind.fields)))
            return Value(kind, self.builder.gep(owner.ir, [at]))
        return Value(kind, self.builder.load(self._place(owner, index)))

    def _arguments(self, node: ast.Call) -> list[Any]:
        return self._items(node.args)

    def of_Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "conjugate":
            value = self.expression(node.func.value)
            real, imag = (self.builder.extract_value(value.ir, i) for i in (0, 1))
            return Value(value.type, CONTEXT.make_tuple(self.builder, None, [real, self.builder.fneg(imag)]))
        callee, args = self.expression(node.func), self._arguments(node)
        if not isinstance(callee, Constant):
            msg = f"{ast.unparse(node.func)} is no function that is known here"
            raise TypeError(msg)
        return self.called(callee.value, args, {k.arg: self.expression(k.value) for k in node.keywords})

    def called(self, callee: Any, args: list[Any], named: dict[Any, Any]) -> Any:
        """The result of a call."""
        if isinstance(callee, Marked):
            function = callee.function
            if callee.mark == "intrinsic":
                return self._intrinsic(function, args)
            parameters = [arg.arg for arg in source_of(function).tree.args.args]
            defaults = dict(zip(reversed(parameters), reversed(function.__defaults__ or ()), strict=False))
            for name in parameters[len(args) :]:
                args.append(named[name] if name in named else Constant(defaults[name]))
            if callee.mark == "inline":
                return self.body.run(function, args)
            return self._linked(function, args, callee.mark)
        if callee in (np.empty, np.zeros, np.full):
            element = args[-1].value
            element = element if isinstance(element, types.Type) else from_dtype(np.dtype(element))
            made = self.body.array(args[0], element, callee is np.zeros)
            if callee is np.full:
                number = cast(self.builder, args[1], element)
                with for_range(self.builder, cast(self.builder, args[0], types.int64)) as loop:
                    self.builder.store(number, self.builder.gep(made.ir, [loop.index]))
            return made
        if isinstance(callee, type) and issubclass(callee, tuple) and hasattr(callee, "_fields"):
            return Together(callee, (*args, *(named[name] for name in callee._fields[len(args) :])))
        if callee is len:
            return Constant(len(parts_of(args[0])))
        if all(isinstance(arg, Constant) for arg in args):
            return Constant(callee(*(arg.value for arg in args)))
        return self._builtin(callee, args)

    def _builtin(self, callee: Any, args: list[Any]) -> Any:
        builder = self.builder
        if callee in (min, max):
            return extreme(builder, ">" if callee is max else "<", args)
        if callee is abs:
            return absolute_of(builder, args[0])
        kind = type_of(args[0])
        if callee is float:
            return (
                args[0]
                if isinstance(kind, types.Float)
                else Value(types.float64, cast(builder, args[0], types.float64))
            )
        if callee is int:
            return (
                args[0] if isinstance(kind, types.Integer) else Value(types.int64, cast(builder, args[0], types.int64))
            )
        if callee is bool:
            return Value(types.boolean, truth(builder, args[0]))
        if callee in OF_LLVM:
            kind = kind if isinstance(kind, types.Float) else types.float64
            return call_llvm(builder, OF_LLVM[callee], kind, Value(kind, cast(builder, args[0], kind)))
        if isinstance(callee, type) and issubclass(callee, np.generic):
            kind = from_dtype(np.dtype(callee))
            return Value(kind, cast(builder, args[0], kind))
        msg = f"kernels cannot call {callee}"
        raise TypeError(msg)

    def _intrinsic(self, callee: Any, args: list[Any]) -> Any:
        found = callee(*map(type_of, args))
        if found is None:
            msg = f"{callee.__name__} takes no {', '.join(str(type_of(arg)) for arg in args)}"
            raise TypeError(msg)
        signature, generate = found
        given = [cast(self.builder, arg, kind) for arg, kind in zip(args, signature.args, strict=True)]
        made = generate(CONTEXT, self.builder, signature, given)
        kind = signature.return_type
        if kind is types.none:
            return NOTHING
        if isinstance(kind, types.Tuple):
            return Together(
                tuple, tuple(Value(part, self.builder.extract_value(made, i)) for i, part in enumerate(kind))
            )
        return Value(kind, made)

    def _linked(self, function: Any, args: list[Any], mark: str) -> Any:
        if mark == "apart":  # one function for all numbers
            args = [run_time(self.builder, arg) for arg in args]
        made, form = self.body.translation.function(function, args, mark == "merged")
        result = self.builder.call(made, [leaf.ir for arg in args for leaf in leaves(arg)])
        kinds = [leaf.type for leaf in leaves(form)]
        return rebuilt(form, iter([Value(kind, self.builder.extract_value(result, i)) for i, kind in enumerate(kinds)]))


def _alike(a: Any, b: Any) -> tuple[Any, Any]:
    """Two constants as NumPy mixes them: a float32 meets another number as a float64."""
    if type(a) is not type(b):
        return tuple(x.item() if isinstance(x, np.generic) else x for x in (a, b))
    return a, b
