"""States: a dict of arrays that sums up a chunk of a sequence, in a size that does not depend on the chunk's length.

A state can be pickled, and JAX and PyTorch treat it as a pytree. `merge(left, right)` is associative up to rounding;
None stands for no chunk and is the identity of `merge`.

    kind of state   fields                                                                   merged by
    attention       shift (..., m or 1, 1), numerator (..., m, d_v), denominator (..., m, 1)  merge_by_shift
    scan            state, decay: both of the shape of the scan's state                       merge_by_decay
    delta rule      state (..., d, d_v), transition (..., d, d)                               merge_by_transition
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
    """The arrays that a state consists of, and how two states merge.

    Attributes
    ----------
    fields : mapping
        Name of each array → its axes after the batch, such as ``{"numerator": ("m", "d_v")}``. An axis is a name,
        whose size is free but equal wherever the name occurs, or a number, the size that is required.
    merge : callable or None
        ``merge(xp, left, right)`` gives the state of two states that fit. None: states do not merge, and only a step
        continues from one.
    grows : frozenset of str
        Axes that become longer with the sequence, so that two states need not agree on them.
    """

    fields: Mapping[str, tuple[str | int, ...]]
    merge: Callable[[ModuleType, State, State], State] | None
    grows: frozenset[str] = frozenset()

    def check(self, name: str, state: Any) -> dict[str, Array]:
        """The arrays of a state by the names that errors use, such as "state['shift']".

        Raises TypeError if `state` is no mapping or holds None, ValueError if its fields are not those of the spec.
        """
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
        """Raise ValueError unless the last axes of each array have these sizes; an axis without a size is free."""
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
        """Axis name → size, read from the arrays of `state`."""
        return {
            axis: int(size)
            for key, axes in self.fields.items()
            for axis, size in zip(axes, state[key].shape[-len(axes) :], strict=True)
            if isinstance(axis, str) and axis not in self.grows
        }


def merge_by_shift(xp: ModuleType, left: State, right: State) -> State:
    """The state of both chunks, for sums that are stored divided by exp(shift).

    With s = max(s_left, s_right), every sum is S = S_left exp(s_left − s) + S_right exp(s_right − s). The shift is
    (..., m or 1, 1); the sums have m rows. A shift of −∞ means no key yet and adds nothing.
    """
    shift = xp.maximum(left["shift"], right["shift"])
    # −∞ − (−∞) is NaN: with neither side holding a key the reference is 0, and both factors are exp(−∞) = 0
    finite = xp.where(shift == -math.inf, 0.0, shift)
    one, other = xp.exp(left["shift"] - finite), xp.exp(right["shift"] - finite)
    sums = {name: left[name] * one + right[name] * other for name in left if name != "shift"}
    return {"shift": shift} | sums


def merge_by_decay(xp: ModuleType, left: State, right: State) -> State:
    """The state after `left`, then `right`: h = decay_right h_left + h_right, decay = decay_left decay_right."""
    return {
        "state": decayed(xp, right["decay"], left["state"]) + right["state"],
        "decay": compounded(xp, left["decay"], right["decay"]),
    }


def merge_by_transition(xp: ModuleType, left: State, right: State) -> State:
    """The state after `left`, then `right`: S = T_right S_left + S_right, T = T_right T_left."""
    return {
        "state": right["transition"] @ left["state"] + right["state"],
        "transition": right["transition"] @ left["transition"],
    }


def decayed(xp: ModuleType, decay: Array, state: Array) -> Array:
    """decay · state, and 0 where the state is 0, even if the decay, a product over many steps, has overflowed."""
    return xp.where(xp.isinf(decay) & (state == 0), 0.0, decay) * state


def compounded(xp: ModuleType, one: Array, other: Array) -> Array:
    """The product of two decays, and 0 where one is 0, even if the other has overflowed."""
    return decayed(xp, one, xp.where(xp.isinf(other) & (one == 0), 0.0, other))
