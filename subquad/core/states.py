"""States: what a chunk of a sequence leaves behind, as a dict of small arrays; how two of them merge.

A state is picklable and a pytree. `merge(left, right)` is associative, and None, no chunk at all, is its identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from subquad.backend import Array
from subquad.core.checks import check_given

State = dict[str, Array]


@dataclass(frozen=True)
class StateSpec:
    """The arrays of a state, and how two states become one.

    Attributes
    ----------
    fields : mapping
        Name → names of the axes after the batch, such as ``{"numerator": ("m", "d_v")}``; a number stands for itself.
    merge : callable or None
        ``merge(xp, left, right)`` of two states that fit; None where only a step goes on from a state.
    """

    fields: Mapping[str, tuple[str | int, ...]]
    merge: Callable[[ModuleType, State, State], State] | None

    def check(self, name: str, state: Any) -> dict[str, Array]:
        """The arrays of a state by the names that errors give them; TypeError or ValueError for what is no state."""
        if not isinstance(state, Mapping):
            msg = f"{name} is a {type(state).__name__}, expected the dict that summarize, merge or step returned"
            raise TypeError(msg)
        if set(state) != set(self.fields):
            got, expected = (", ".join(sorted(map(repr, names))) for names in (state, self.fields))
            msg = f"{name} holds {got}, expected {expected}: a state belongs to the method that made it"
            raise ValueError(msg)
        arrays = {f"{name}[{key!r}]": x for key, x in state.items()}
        check_given(**arrays)
        return arrays

    def check_sizes(self, name: str, state: Mapping[str, Array], **sizes: int) -> None:
        """ValueError unless the last axes of each array have these sizes; an axis whose size is not given is free."""
        for key, axes in self.fields.items():
            want = [axis if isinstance(axis, int) else sizes.get(axis, axis) for axis in axes]
            got = tuple(state[key].shape[-len(want) :])
            if len(got) < len(want) or any(isinstance(w, int) and w != g for w, g in zip(want, got, strict=True)):
                msg = (
                    f"{name}[{key!r}] ends in {got}, expected ({', '.join(map(str, want))}): "
                    f"a state goes on with the options and the width of values that it began with"
                )
                raise ValueError(msg)

    def sizes_of(self, state: Mapping[str, Array]) -> dict[str, int]:
        """The sizes of the named axes, as this state has them."""
        return {
            axis: int(size)
            for key, axes in self.fields.items()
            for axis, size in zip(axes, state[key].shape[-len(axes) :], strict=True)
            if isinstance(axis, str)
        }


def merge_by_shift(xp: ModuleType, left: State, right: State) -> State:
    """Sums over exp(shift), of both sides: shift (..., m, 1) and numerators and denominators with m rows."""
    shift = xp.maximum(left["shift"], right["shift"])
    finite = xp.where(shift == -math.inf, 0.0, shift)
    one, other = xp.exp(left["shift"] - finite), xp.exp(right["shift"] - finite)
    sums = {name: left[name] * one + right[name] * other for name in left if name != "shift"}
    return {"shift": shift} | sums


def merge_by_decay(xp: ModuleType, left: State, right: State) -> State:
    """The state after `right`, which begins where `left` ended: decay_right h_left + h_right."""
    return {
        "state": right["decay"] * left["state"] + right["state"],
        "decay": left["decay"] * right["decay"],
    }
