"""A module of LLVM cut in two texts, which two threads compile at once.

A kernel is a function, and what it calls are functions of their own (`split`, `apart`). LLVM compiles each on its own
anyway.
"""

from __future__ import annotations

import copy
from functools import cache
from hashlib import sha256
from typing import Any, NamedTuple

from llvmlite import ir

LEAST = 500  # of the weight of a part: what takes LLVM less time is over before a thread is worth its while
OF_BLOCK = 20  # a block weighs as much as so many instructions: most passes look for loops


class _Function(NamedTuple):
    """A function of a module, and its calls of others of that module."""

    made: Any
    calls: list[Any]

    def is_merged(self) -> bool:
        """Whether LLVM merges it into its callers."""
        return "alwaysinline" in self.made.attributes


def texts_of(module: Any) -> list[str]:
    """The text of a module, whose first function is the kernel, or those of its two parts."""
    functions = {x: _Function(x, _calls(x)) for x in module.functions if x.blocks}
    parts = _cut(functions)
    if len(parts) == 1:
        return [str(module)]
    crossing = {
        call.callee for part in parts for one in part for call in functions[one].calls if call.callee not in part
    }
    for function in crossing:
        function.linkage = "external"
        _settle(function, [call for one in functions.values() for call in one.calls if call.callee is function])
    head = f'target triple = "{module.triple}"\ntarget datalayout = "{module.data_layout}"'
    others = [str(x) for x in module.globals.values() if x not in functions]
    text, tail = {x: str(x) for x in functions}, module._get_metadata_lines()
    made = []
    for part in parts:
        own = [text[x] if x in part else _declared(x) for x in functions if x in part or x in crossing]
        made.append("\n".join([head, *others, *own, *tail]))
    # a name that the text decides, since a process has many kernels in one place
    mark = sha256("".join(made).encode()).hexdigest()[:16]
    for function in crossing:
        made = [one.replace(f'@"{function.name}"', f'@"{function.name}.{mark}"') for one in made]
    return made


def _calls(function: Any) -> list[Any]:
    instructions = (x for block in function.blocks for x in block.instructions)
    return [x for x in instructions if isinstance(x, ir.CallInstr) and getattr(x.callee, "blocks", None)]


def _cut(functions: dict[Any, _Function]) -> list[set[Any]]:
    """The functions of each part, with those that LLVM merges into them."""

    @cache
    def whole(function: Any) -> tuple[frozenset[Any], int]:
        # a function and what LLVM merges into it, and their weight
        found, weight = {function}, sum(len(block.instructions) + OF_BLOCK for block in function.blocks)
        for call in functions[function].calls:
            if functions[call.callee].is_merged():
                below, more = whole(call.callee)
                found |= below
                weight += more
        return frozenset(found), weight

    kernel, *others = (x for x, known in functions.items() if not known.is_merged())
    parts, weights = [set(whole(kernel)[0]), set[Any]()], [whole(kernel)[1], 0]
    for function in sorted(others, key=lambda x: whole(x)[1], reverse=True):
        lighter = weights.index(min(weights))
        parts[lighter] |= whole(function)[0]
        weights[lighter] += whole(function)[1]
    return parts if min(weights) >= LEAST else [set(functions)]


def _settle(function: Any, calls: list[Any]) -> None:
    """Let a function have the constants that all calls give it: LLVM would see that within one module."""
    for place, arg in enumerate(function.args):
        given = [call.args[place] for call in calls]
        if all(isinstance(x, ir.Constant) for x in given) and len(set(map(str, given))) == 1:
            for block in function.blocks:
                for instruction in block.instructions:
                    if isinstance(instruction, ir.PhiInstr) or any(x is arg for x in instruction.operands):
                        instruction.replace_usage(arg, given[0])


def _declared(function: Any) -> str:
    """The declaration of a function of the other part."""
    head = copy.copy(function)
    head.blocks = []
    return str(head)
