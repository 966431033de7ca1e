"""Quantities, numbers with a unit: a call is made of the numbers, and the unit goes around it.

A package of units has three functions, as `Units`: what unit an array has, its numbers in a unit, and numbers with a
unit. What units a call may have, and which its result has, is written here, once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from subquad.backend import Backend


@dataclass(frozen=True)
class Units:
    """What a package of units says.

    Attributes
    ----------
    package : str
        Name of the package.
    kind : type
        The class of quantities.
    one : unit
        The unit of plain numbers.
    advice : str
        An expression for the numbers of a quantity x in a unit that the user chooses.
    of : callable
        ``of(x)`` is the unit of a quantity.
    numbers : callable
        ``numbers(x, unit)`` are the numbers of a quantity in a unit; an exception if it has another dimension.
    quantity : callable
        ``quantity(numbers, unit)`` are numbers with a unit.
    """

    package: str
    kind: type
    one: Any
    advice: str
    of: Callable[[Any], Any]
    numbers: Callable[[Any, Any], Any]
    quantity: Callable[[Any, Any], Any]


class Quantities(Backend):
    """The backend of a package of units."""

    def __init__(self, units: Units) -> None:
        self.units, self.library = units, units.package  # type: ignore[misc]

    def namespace(self, array: Any) -> ModuleType:
        return sys.modules[f"subquad_{self.library}"] if self._has_unit(array) else super().namespace(array)

    def refuses(self, array: Any) -> str:
        unit = str(self.units.of(array)) or "1"
        return (
            f"a quantity of {self.library} in {unit}; of all functions, attention and linear_scan carry units: pass "
            f"numbers in a unit that you choose, {self.units.advice}"
        )

    def whole_call(
        self, name: str, function: Callable[..., Any], arrays: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Any:
        rule = {"attention": self._attention, "linear_scan": self._linear_scan}.get(name)
        if rule is None or not any(map(self._has_unit, (*arrays.values(), *options.values()))):
            return NotImplemented
        return rule(function, dict(arrays), dict(options))

    def _attention(self, method: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
        q, k, v = (arrays[name] for name in ("q", "k", "v"))
        unit, why = self._unit(q), "logits q·k must have no unit, as their exponential is taken"
        if not method.of_logits:
            unit, why = self.units.one, f"{type(method).__name__} computes functions of q and of k apart"
        rows = self._numbers("q", q, unit, why), self._numbers("k", k, unit**-1, why), self._own_numbers(v)
        given = self._without_unit(options, "it is one of logits, or not of numbers that have units")
        out = method(*rows, **given)
        if options.get("return_lse"):
            return self._as(v, out[0]), out[1]
        return self._as(v, out)

    def _linear_scan(self, scan: Any, arrays: dict[str, Any], options: dict[str, Any]) -> Any:
        a, b = arrays["a"], arrays["b"]
        a = self._numbers("a", a, self.units.one, "it is multiplied into h at each step, whose unit would change")
        unit = self._unit(b)
        try:
            2 * self.units.quantity(1.0, unit)
        except Exception as error:
            msg = f"b is in {unit}, of which {self.library} forms no multiples, as a scan does: {error}"
            raise TypeError(msg) from error
        state = self._numbers("initial_state", options.pop("initial_state", None), unit, "h has the unit of b")
        given = self._without_unit(options, "it has none")
        found = scan(a, self._own_numbers(b), initial_state=state, **given)
        return tuple(self._as(b, x) for x in found) if isinstance(found, tuple) else self._as(b, found)

    def _has_unit(self, x: Any) -> bool:
        return isinstance(x, self.units.kind)

    def _unit(self, x: Any) -> Any:
        return self.units.of(x) if self._has_unit(x) else self.units.one

    def _own_numbers(self, x: Any) -> Any:
        return self.units.numbers(x, self.units.of(x)) if self._has_unit(x) else x

    def _as(self, like: Any, numbers: Any) -> Any:
        """Numbers with the unit that an argument has, if it has one."""
        return self.units.quantity(numbers, self.units.of(like)) if self._has_unit(like) else numbers

    def _without_unit(self, options: Mapping[str, Any], why: str) -> dict[str, Any]:
        return {name: self._numbers(name, x, self.units.one, why) for name, x in options.items()}

    def _numbers(self, name: str, x: Any, unit: Any, why: str) -> Any:
        """The numbers of an argument in a unit; TypeError if it has another dimension."""
        is_plain = unit == self.units.one
        if x is None or (is_plain and not self._has_unit(x)):
            return x
        try:
            return self.units.numbers(x if self._has_unit(x) else self.units.quantity(x, self.units.one), unit)
        except Exception as error:
            own = self._unit(x) if self._has_unit(x) else "no unit"
            wanted = "a number without a unit" if is_plain else f"a unit of the dimension of {unit}"
            msg = f"{name} is in {own}, expected {wanted}: {why}"
            raise TypeError(msg) from error
