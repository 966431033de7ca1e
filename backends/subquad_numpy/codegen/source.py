"""The text of a function that is translated, and what is known of its names before."""

from __future__ import annotations

import ast
import builtins
import linecache
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple


class Source(NamedTuple):
    """A function's syntax, and the names that are assigned once and used only after that, within the same suite."""

    tree: ast.FunctionDef
    settled: frozenset[str]
    names: dict[str, Any]  # what it closes over, and globals


class _Uses(ast.NodeVisitor):
    """Where names are assigned and read: the suites around the place, and its number in the order of evaluation."""

    def __init__(self, tree: ast.FunctionDef) -> None:
        self.path: tuple[int, ...] = ()
        self.at = 0
        self.stored: dict[str, list[tuple[tuple[int, ...], int]]] = {arg.arg: [((), 0)] for arg in tree.args.args}
        self.read: dict[str, list[tuple[tuple[int, ...], int]]] = {}
        self._suite(tree.body, nested=False)

    def settled(self) -> frozenset[str]:
        def is_settled(name: str) -> bool:
            places = self.stored[name]
            path, at = places[0]
            return len(places) == 1 and all(
                place > at and within[: len(path)] == path for within, place in self.read.get(name, ())
            )

        return frozenset(filter(is_settled, self.stored))

    def _suite(self, statements: Sequence[ast.AST], nested: bool = True) -> None:
        outside = self.path
        if nested:
            self.at += 1
            self.path = (*outside, self.at)
        for statement in statements:
            self.visit(statement)
        self.path = outside

    def visit_Name(self, node: ast.Name) -> None:
        self.at += 1
        uses = self.read if isinstance(node.ctx, ast.Load) else self.stored
        uses.setdefault(node.id, []).append((self.path, self.at))

    def visit_Assign(self, node: ast.Assign) -> None:
        for part in (node.value, *node.targets):
            self.visit(part)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        for _ in range(2):  # assigned again
            self.visit(node.target)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._suite([node.target, *node.body])

    def visit_While(self, node: ast.While) -> None:
        self.visit(node.test)
        self._suite(node.body)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._suite(node.body)
        self._suite(node.orelse)


@cache
def _syntax(path: str) -> dict[tuple[str, int], ast.FunctionDef]:
    left: list[ast.AST] = [ast.parse("".join(linecache.getlines(path)))]
    found = {}
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name, first] = node
        left.extend(part for field in ("body", "orelse") for part in getattr(node, field, ()))
    return found


def has_source(function: Any) -> bool:
    """Whether the text of a function is there to be read."""
    linecache.lazycache(function.__code__.co_filename, function.__globals__)  # for a zip file
    return bool(linecache.getlines(function.__code__.co_filename))


@cache
def _analysed(path: str, name: str, line: int) -> tuple[ast.FunctionDef, frozenset[str]]:
    tree = _syntax(path)[name, line]
    return tree, _Uses(tree).settled()


@cache
def source_of(function: Any) -> Source:
    """The source of a Python function."""
    code = function.__code__
    has_source(function)
    tree, settled = _analysed(code.co_filename, code.co_name, code.co_firstlineno)
    closed = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        closed[name] = cell.cell_contents
    return Source(tree, settled, {**vars(builtins), **function.__globals__, **closed})
