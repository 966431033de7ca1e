"""Functions of the kernels' language: what the translation makes of them, beside Python."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llvmlite")

from llvmlite import ir
from pieces import piece

from subquad_numpy.codegen import apart, cut, inline, merged, notice, pointer, types
from subquad_numpy.codegen import halves as half_precision
from subquad_numpy.codegen.compile import uncollected
from subquad_numpy.codegen.translate import translated
from subquad_numpy.runtime.stored import BFLOAT16

ZERO, DOUBLE, SINGLE = np.int64(0), np.float64(0), np.float32(0)


def divided(a: int, b: int) -> int:
    return 1000 * (a // b) + a % b


def looped(n: int, step: int) -> int:
    total = 0
    for i in range(n):
        if i % 3 == 1:
            continue
        for j in range(n, 0, step):
            if j * i > 40:
                break
            total += i * j
    while total > 1000:
        total -= 7 if total % 2 else 13
    return total


def decided(a: int, b: int) -> int:
    small = (a < 3 and b > a) or b == 10
    between = 0 < a <= b < 9
    found, other = (1, 2) if small else (3, 4)
    if between and not small:
        found += 10
    elif a in (5, 6):
        return -1
    return found * 100 + other * (a if a != 0 else 50)


def mixed(a: int, b: int) -> int:
    memory = np.empty(a, np.float32)
    for i in range(a):
        memory[i] = i / 3
    total = 0  # becomes a float
    for i in range(a):
        total = total + memory[i] * 2
    return int(total * 1e6) + int(math.sqrt(float(b)) * 1e6) + max(a, b, 3) - min(a, -b) + abs(b - a)


@inline
def first_above(memory: Any, count: int, bound: float) -> int:
    for i in range(count):
        if memory[i] > bound:
            return i
    return count


@apart
def halves(a: int) -> tuple[int, float]:
    return a // 2, a / 2


@merged
def scaled(x: Any, factor: int) -> Any:
    return x * factor


def calling(a: int, b: int) -> int:
    memory = np.zeros(8, np.int64)
    for i in range(8):
        memory[i] = scaled(i, b)
    whole, half = halves(a)
    bits = pointer(memory.ctypes.data, ZERO)
    return first_above(memory, 8, half) * 100 + whole + bits[3]


@pytest.mark.parametrize("function", [divided, looped, decided, mixed])
def test_machine_code_does_what_python_does(function: Callable[..., Any]) -> None:
    run, cases = piece(function), [(a, b) for a in (1, 2, 5, 6, 9) for b in (-7, -3, 1, 2, 4, 10)]
    if function is looped:
        cases = [(a, b) for a, b in cases if b < 0]
    if function is mixed:
        cases = [(a, b) for a, b in cases if b > 0]
    for a, b in cases:
        assert abs(run(a, b) - function(a, b)) <= (1 if function is mixed else 0), (a, b)


def test_functions_inline_and_apart_return_from_anywhere() -> None:
    run = piece(calling)
    for a, b in ((3, 1), (10, 2), (100, 1)):
        numbers = [i * b for i in range(8)]
        first = next((i for i, x in enumerate(numbers) if x > a / 2), 8)
        assert run(a, b) == first * 100 + a // 2 + numbers[3]


def test_without_memory_a_kernel_returns_0() -> None:
    def wants(a: int, b: int) -> int:
        buffer = np.empty(a, np.int64)
        buffer[b] = 7
        return buffer[b * b]  # so that LLVM needs the memory

    run = piece(wants)
    assert (run(8, 1), run(1 << 56, 1)) == (7, 0)


def test_llvm_does_not_see_how_parts_of_a_buffer_lie() -> None:
    """It would try to make every address of a loop from the sizes of all parts before: most of the time to compile."""

    def parted(size: int) -> int:
        one, two, three = cut(np.empty(4 * size, SINGLE.dtype), (size, size, size))
        one[0], two[0], three[0] = 1, 2, 3
        return int(one[0] + two[0] + three[0])

    assert str(translated(parted, "parted", [types.int64])).count('"=r,0"') == 3


def test_garbage_is_collected_again_after_a_translation() -> None:
    with uncollected():
        assert not gc.isenabled()
    with pytest.raises(TypeError), uncollected():
        len(None)  # type: ignore[arg-type]
    assert gc.isenabled()


def test_what_is_not_in_the_language_is_told_with_its_line() -> None:
    def wrong(a: int) -> int:
        return sorted(a)  # type: ignore[call-overload,no-any-return]

    with pytest.raises(TypeError, match="cannot call") as caught:
        translated(wrong, "wrong", [types.int64])
    assert "in wrong, line" in caught.value.__notes__[0]


def test_long_compilation_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(notice, "PATIENCE", 0.05)
    monkeypatch.setitem(notice.spent, "seconds", 0.0)
    caplog.set_level(logging.INFO, "subquad")
    for seconds in (0.0, 0.2, 0.2):
        with notice.patience():
            time.sleep(seconds)
    assert [record.message for record in caplog.records] == [notice.TEXT]


@pytest.mark.parametrize(("version", "has"), [(15, False), (16, True), (22, True)])
def test_rounding_to_bfloat16_asks_llvm_for_what_it_knows(version: int, has: bool, monkeypatch: Any) -> None:
    """LLVM of before 16 has another type for the instruction, and ends the process where it meets this one."""
    monkeypatch.setattr(half_precision.binding, "llvm_version_info", (version, 0, 0))
    monkeypatch.setattr(half_precision.processor, "has", lambda feature: True)
    module = ir.Module()
    wide = ir.VectorType(ir.FloatType(), half_precision.WIDE)
    function = ir.Function(
        module, ir.FunctionType(ir.VectorType(ir.IntType(16), half_precision.WIDE), [wide]), "rounded"
    )
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(half_precision.rounded(builder, function.args[0], BFLOAT16, half_precision.WIDE))
    assert ("cvtneps2bf16" in str(module)) == has
