"""A kernel whose module is cut in two parts, which two threads compile, is the kernel of one module."""

from __future__ import annotations

import re
from threading import Thread
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llvmlite")
from pieces import piece

from subquad_numpy.codegen import apart, inline, machine, merged, parts, pointer, split, types
from subquad_numpy.codegen.translate import translated

WORD = np.int64(0)


@merged
def twice(x: int) -> int:
    return 2 * x


@inline
def item(memory: Any, i: int) -> Any:
    return memory[i]


@apart
def weighted(memory: Any, count: int, weight: int, power: int) -> int:
    """Σ weight · x, `power` times over, of the first numbers."""
    total = 0
    for i in range(count):
        total += twice(item(memory, i)) * weight
    for _ in range(power):
        total = twice(total)
    return total


@split
def marked(memory: Any, count: int) -> int:
    """A function that calls one of the other part, or of its own."""
    return weighted(memory, count, 5, 3) + twice(count)


def kernel(address: int, count: int) -> int:
    memory = pointer(address, WORD)
    found = weighted(memory, count, 3, 3)
    if count > 2:
        found += marked(memory, count - 1)
    memory[0] = found
    return twice(found)


def expected(x: list[int]) -> int:
    first = 8 * 2 * 3 * sum(x)
    return 2 * (first + 8 * 2 * 5 * sum(x[:-1]) + 2 * (len(x) - 1))


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that LLVM compiles, of modules that are cut wherever they can be."""
    noted, compile_ = list[str](), machine.compiled_text
    monkeypatch.setattr(parts, "LEAST", 1)
    monkeypatch.setattr(machine, "compiled_text", lambda text: noted.append(text) or compile_(text))
    return noted


def check() -> None:
    x = np.arange(1, 8)
    assert piece(kernel)(x.ctypes.data, len(x)) == expected(list(range(1, 8)))
    assert 2 * x[0] == expected(list(range(1, 8)))


def test_two_parts_are_one_kernel(texts: list[str]) -> None:
    check()
    assert len(texts) == 2
    assert all('define internal {i64} @"twice.' in text for text in texts)  # LLVM merges it into the callers
    assert sum(text.count("define external") for text in texts) == 1  # `weighted`, which both parts call
    assert sum(text.count("declare external") for text in texts) == 1


def test_a_small_module_is_one_part(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LEAST", 10_000)
    check()
    assert len(texts) == 1


def test_where_no_thread_starts_the_caller_compiles_all(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    module = translated(kernel, "kernel", [types.int64] * 2)
    monkeypatch.setattr(Thread, "start", start)
    assert len(machine.object_of(module)) > 1000
    assert len(texts) == 2


@pytest.mark.parametrize("place", [0, 1])
def test_what_llvm_says_of_either_part_is_told(place: int, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cut = machine.texts_of

    def damaged(module: Any) -> list[str]:
        found = cut(module)
        return [f"{text}\nno language" if i == place else text for i, text in enumerate(found)]

    monkeypatch.setattr(machine, "texts_of", damaged)
    with pytest.raises(RuntimeError, match="LLVM IR parsing error"):
        machine.object_of(translated(kernel, "kernel", [types.int64] * 2))


def test_a_function_of_the_other_part_has_the_constants_of_all_its_calls(texts: list[str]) -> None:
    """`power` is 3 in both calls and stands in the loop; `weight` differs and comes with the call."""
    check()
    (text,) = (text for text in texts if 'define external {i64} @"weighted.' in text)
    head, _, body = text.partition('define external {i64} @"weighted.')[2].partition("\n{")
    names = re.findall(r'i64\*? (%"[^"]+")', head)
    assert [name in body.partition("\n}")[0] for name in names] == [True, True, True, False]


def test_names_of_two_kernels_differ_where_their_code_does(texts: list[str]) -> None:
    """One process loads all kernels, and a call of another part goes by its name."""

    def other(address: int, count: int) -> int:
        return kernel_of_others(pointer(address, WORD), count) + 1

    check()
    x = np.arange(1, 8)
    assert piece(other)(x.ctypes.data, len(x)) == 8 * 2 * 7 * 28 + 1
    one, two = (set(re.findall(r'define external [^@]*@"([^"]+)"', "".join(some))) for some in (texts[:2], texts[2:]))
    assert one
    assert two
    assert not one & two


@split
def kernel_of_others(memory: Any, count: int) -> int:
    return weighted(memory, count, 7, 3)
