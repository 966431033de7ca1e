"""Sizes that a graph leaves open: integers that are known only when the graph runs.

A `Size` is a sum of products of named lengths, such as 2 n + 3, with the variable of the graph that will hold it. The
difference of two sizes may be a number, as n + 4 − n is; what is not is compared as an `Open` condition, which holds
for some lengths. In a Python condition it is answered for long sequences, and the answer is noted as a bound: the
exported program serves lengths from the least one at which all its answers hold.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import spox.opset.ai.onnx.v21 as op
from spox import Var

Terms = dict[tuple[str, ...], int]
LONG = 2**40  # a length that is longer than any bound
MAX_LEAST = 2**20  # the longest bound that is looked for


@dataclass
class Trace:
    """The sizes of a graph by the names that its shapes use, and the conditions that were answered."""

    sizes: dict[str, Size] = field(default_factory=dict)
    inputs: set[str] = field(default_factory=set)  # the names of those that inputs have
    answers: list[tuple[Open, bool]] = field(default_factory=list)

    def least(self, name: str) -> int:
        """The least length, at most `MAX_LEAST`, from which on every answer about the length `name` alone holds."""
        least = 1
        for open_, _ in self.answers:
            if open_.names != {name}:
                continue
            low, high = 0, MAX_LEAST  # differences grow or shrink: from where the sign is that of long sequences
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if open_.is_as_for_long({name: middle}) else (middle, high)
            least = max(least, high)
        return least


TRACE: ContextVar[Trace | None] = ContextVar("TRACE", default=None)


@contextmanager
def tracing() -> Any:
    """The context in which functions are recorded into one graph."""
    trace = Trace()
    token = TRACE.set(trace)
    try:
        yield trace
    finally:
        TRACE.reset(token)


def trace() -> Trace:
    """The trace of the graph that is recorded now."""
    now = TRACE.get()
    if now is None:
        msg = "an array of unknown length has no meaning outside of subquad_ndonnx.export"
        raise RuntimeError(msg)
    return now


class Length(NamedTuple):
    """A named length: the variable of shape (1,) that will hold it, and its number for given lengths of inputs."""

    vector: Callable[[], Var]
    at: Callable[[Mapping[str, int]], int]
    of: frozenset[str]  # the lengths of inputs that decide it; empty: none does
    is_rest: bool = False  # whether it is what a division leaves, and does not grow with these


class Open:
    """A comparison of sizes that holds for some lengths only: `difference` compared with 0."""

    def __init__(self, difference: Size, compare: Callable[[Any, int], bool]) -> None:
        self.difference, self.compare = difference, compare

    @property
    def names(self) -> frozenset[str]:
        """The lengths of inputs that decide it."""
        return frozenset().union(*(length.of for length in self.difference.lengths.values()))

    def at(self, lengths: Mapping[str, int]) -> bool:
        """Whether it holds for these lengths."""
        return bool(self.compare(self.difference.at(lengths), 0))

    def is_as_for_long(self, lengths: Mapping[str, int]) -> bool:
        """Whether the difference has the sign that it has for long sequences, or the condition the same answer at 0."""
        far, here = (self.difference.at(x) for x in (dict.fromkeys(self.names, LONG), lengths))
        return (here > 0) == (far > 0) if here else self.compare(here, 0) == self.compare(far, 0)

    def __bool__(self) -> bool:
        grows = {c > 0 for term, c in self.difference.terms.items() if term}  # else it may come back to 0
        known = all(length.of and not length.is_rest for length in self.difference.lengths.values())
        if len(self.names) != 1 or len(grows) != 1 or not known:
            msg = (
                f"the method decides by whether {self.difference} is above, below or equal to 0, and lengths that are "
                f"unknown leave that open; give the lengths in shapes of subquad_ndonnx.export"
            )
            raise NotImplementedError(msg)
        answer = self.at(dict.fromkeys(self.names, LONG))
        trace().answers.append((self, answer))
        return answer


class Size:
    """A size that is known when the graph runs: Σ coefficient · product of lengths."""

    def __init__(self, terms: Terms, lengths: Mapping[str, Length]) -> None:
        self.terms = terms
        self.lengths = {name: x for name, x in lengths.items() if any(name in term for term in terms)}

    @classmethod
    def input(cls, name: str, vector: Callable[[], Var]) -> Size:
        """The length of this name of an input."""
        return cls({(name,): 1}, {name: Length(vector, lambda lengths: lengths[name], frozenset({name}))})

    @classmethod
    def found(cls, name: str, vector: Callable[[], Var]) -> Size:
        """A length that is known when the graph runs, and not before."""
        return cls({(name,): 1}, {name: Length(vector, lambda _: 0, frozenset())})

    def __str__(self) -> str:
        words = ["*".join([*([str(c)] if c != 1 or not term else []), *term]) for term, c in sorted(self.terms.items())]
        return " + ".join(words)

    __repr__ = __str__

    def at(self, lengths: Mapping[str, int]) -> int:
        """The number for these lengths."""
        return sum(c * math.prod(self.lengths[name].at(lengths) for name in term) for term, c in self.terms.items())

    def vector(self) -> Var:
        """The variable of shape (1,), int64."""
        total = None
        shared = frozenset.intersection(*map(frozenset, self.terms)) if len(self.terms) > 1 else ()
        for name in shared:  # such as n of n m + n: one product, with a sum that is often computed anyway
            rest = {tuple((Counter(term) - Counter([name])).elements()): c for term, c in self.terms.items()}
            return op.mul(self.lengths[name].vector(), Size(rest, self.lengths).vector())
        for term, c in sorted(self.terms.items(), key=lambda item: -item[1]):  # what is taken away comes last
            taken = total is not None and c < 0
            factor = -c if taken else c
            value = None if factor == 1 and term else op.const(np.asarray([factor], dtype=np.int64))
            for name in term:
                own = self.lengths[name].vector()
                value = own if value is None else op.mul(value, own)
            total = value if total is None else (op.sub if taken else op.add)(total, value)
        assert total is not None
        return total

    def __hash__(self) -> int:
        return hash(str(self))

    def _with(self, other: Any, combine: Callable[[Terms, Terms], Counter[Any]]) -> Any:
        if isinstance(other, Size):
            terms, lengths = other.terms, other.lengths
        elif isinstance(other, int | np.integer):
            terms, lengths = {(): int(other)}, {}
        else:
            return NotImplemented
        found = {term: c for term, c in combine(self.terms, terms).items() if c}
        if not found.keys() - {()}:
            return found.get((), 0)
        return Size(found, {**lengths, **self.lengths})

    def __add__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: _sum(a, b, 1))

    def __sub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: _sum(a, b, -1))

    def __mul__(self, other: Any) -> Any:
        return self._with(other, _product)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __neg__(self) -> Any:
        return self * -1

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, int) and other > 0 and all(c % other == 0 for c in self.terms.values()):
            return Size({term: c // other for term, c in self.terms.items()}, self.lengths)
        if isinstance(other, Size) and len(other.terms) == 1:
            (divisor, by), *_ = other.terms.items()
            left = {term: Counter(term) - Counter(divisor) for term in self.terms}
            if all(c % by == 0 and Counter(divisor) <= Counter(term) for term, c in self.terms.items()):
                found = {tuple(sorted(left[term].elements())): c // by for term, c in self.terms.items()}
                return Size(found, self.lengths) if found.keys() - {()} else found[()]
        return self._divided(other)

    def __rfloordiv__(self, other: Any) -> Any:
        return Size({(): int(other)}, {})._divided(self)

    def __mod__(self, other: Any) -> Any:
        left = self - (self // other) * other
        return left if isinstance(left, int) else self._divided(other, rest=True)

    def _unknown(self, *_: Any) -> Any:
        msg = f"the method needs the number {self}, which is unknown; give lengths in shapes of subquad_ndonnx.export"
        raise NotImplementedError(msg)

    __index__ = __int__ = __float__ = __truediv__ = __rtruediv__ = __pow__ = _unknown

    def _divided(self, other: Any, *, rest: bool = False) -> Size:
        # ⌊self / other⌋ or what is left, as Python rounds; Div of ONNX rounds towards 0, Mod as Python does
        divisor = other if isinstance(other, Size) else Size({(): int(other)}, {})
        name = f"({self}) {'%' if rest else '//'} ({divisor})"
        above = all(c >= 0 for size in (self, divisor) for c in size.terms.values())

        def vector() -> Var:
            a, b = self.vector(), divisor.vector()
            if rest:
                return op.mod(a, b)
            return op.div(a if above else op.sub(a, op.mod(a, b)), b)

        def at(lengths: Mapping[str, int]) -> int:
            return divmod(self.at(lengths), divisor.at(lengths))[rest]

        parts = [*self.lengths.values(), *divisor.lengths.values()]
        of = frozenset().union(*(part.of for part in parts)) if all(part.of for part in parts) else frozenset()
        return trace().sizes.setdefault(name, Size({(name,): 1}, {name: Length(vector, at, of, rest)}))

    def _compare(self, other: Any, compare: Callable[[Any, int], bool]) -> Any:
        difference = self.__sub__(other)
        if difference is NotImplemented:
            return NotImplemented
        if isinstance(difference, int):
            return compare(difference, 0)
        if all(length.of == {name} for name, length in difference.lengths.items()):  # lengths of inputs alone
            signs = {c > 0 for term, c in difference.terms.items() if term}
            least = sum(difference.terms.values())  # at lengths of 1, the shortest
            far = LONG if signs == {True} else -LONG
            if compare in (operator.eq, operator.ne) and _is_one_row(difference):
                return compare(1, 0)  # a sequence of one row goes the way of all others
            if len(signs) == 1 and least * far >= 0 and compare(least, 0) == compare(far, 0):
                return compare(far, 0)
        return Open(difference, compare)

    def __eq__(self, other: object) -> Any:
        return self._compare(other, operator.eq)

    def __ne__(self, other: object) -> Any:
        return self._compare(other, operator.ne)

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, operator.lt)

    def __le__(self, other: Any) -> Any:
        return self._compare(other, operator.le)

    def __gt__(self, other: Any) -> Any:
        return self._compare(other, operator.gt)

    def __ge__(self, other: Any) -> Any:
        return self._compare(other, operator.ge)


def _is_one_row(difference: Size) -> bool:
    # whether it is a length minus 1, or 1 minus a length
    lengths = [c for term, c in difference.terms.items() if term]
    return len(lengths) == 1 and abs(lengths[0]) == 1 and difference.terms.get((), 0) == -lengths[0]


def _sum(a: Terms, b: Terms, sign: int) -> Counter[Any]:
    total: Counter[Any] = Counter(a)
    for term, c in b.items():
        total[term] += sign * c
    return total


def _product(a: Terms, b: Terms) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for one, c in a.items():
        for other, e in b.items():
            total[tuple(sorted((*one, *other)))] += c * e
    return total


def as_vector(sizes: tuple[Any, ...]) -> Var:
    """A shape as a variable of int64, for operators that take one."""
    if all(isinstance(size, int) for size in sizes):
        return op.const(np.asarray(sizes, dtype=np.int64))
    parts: list[Var] = []
    known: list[int] = []
    for size in (*sizes, None):
        if isinstance(size, int | np.integer):
            known.append(int(size))
            continue
        if known:
            parts.append(op.const(np.asarray(known, dtype=np.int64)))
            known = []
        if size is not None:
            parts.append(size.vector())
    return parts[0] if len(parts) == 1 else op.concat(parts, axis=0)
