"""The one door of recurrences: libraries, dtypes, shapes, the forms of maps; and the way back.

What the shapes and dtypes of a call decide is a `Form`: how each array gets its place before a kernel, and how outputs
come back. It is found once for each signature and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from subquad.backend import Array
from subquad.core.checks import check_arrays, check_floating, check_given
from subquad.core.dtypes import is_dtype
from subquad.core.kernel import signature_of
from subquad.core.shapes import broadcast_batch

MAX_KEPT = 1024
_forms: dict[Any, Form] = {}


class Target(NamedTuple):
    """The place of an array before a kernel: its dtype, then broadcast to `wide`, then the shape; None: as it is."""

    dtype: Any
    wide: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def place(self, xp: ModuleType, x: Array) -> Array:
        """`x` in its place."""
        if x.dtype != self.dtype:
            x = xp.astype(x, self.dtype)
        if self.wide is not None:
            x = xp.broadcast_to(x, self.wide)
        return x if self.shape is None or x.shape == self.shape else xp.reshape(x, self.shape)


@dataclass(frozen=True)
class Form:
    """How the arrays of a call get their places, and the outputs their dtypes and shapes."""

    xp: ModuleType
    targets: tuple[Target | None, ...]
    outputs: tuple[Target, ...]

    def enter(self, arrays: Sequence[Array | None]) -> list[Array | None]:
        """The arrays as a kernel takes them."""
        xp = self.xp
        return [
            None if x is None or target is None else target.place(xp, x)
            for x, target in zip(arrays, self.targets, strict=True)
        ]

    def leave(self, index: int, x: Array) -> Array:
        """An output as the caller gets it."""
        return self.outputs[index].place(self.xp, x)


def form_of(kind: str, arrays: Sequence[Array | None], find: Callable[[], Form]) -> Form:
    """The form of a call of this kind, found by `find` unless it is known; errors are raised there."""
    signature = signature_of(arrays)
    if signature is None:
        return find()
    form = _forms.get((kind, signature))
    if form is None:
        form = find()
        if len(_forms) >= MAX_KEPT:
            _forms.clear()
        _forms[kind, signature] = form
    return form


def flat_target(x: Array | None, dtype: Any, batch: tuple[int, ...], tail: tuple[int, ...]) -> Target | None:
    """The target (product of `batch`, tail) of an array (..., tail), broadcast where it must be."""
    if x is None:
        return None
    count = 1
    for size in batch:
        count *= size
    own = tuple(x.shape[: x.ndim - len(tail)])
    wide = None if own == batch else (*batch, *tail)
    return Target(dtype, wide, (count, *tail))


class Shapes(NamedTuple):
    """What the inputs of a selective scan say that fit; `forms`: axes of B and C after the batch, see `map_rank`."""

    xp: ModuleType
    batch: tuple[int, ...]
    d: int
    d_state: int
    forms: dict[str, int]


def check_inputs(arrays: dict[str, Any], *, time: int) -> Shapes:
    """Raise unless the inputs, by name, fit. `time` is the number of axes of time: 1 in a scan, 0 in one step."""
    check_given(**{name: arrays[name] for name in ("u", "delta", "A", "B", "C")})
    xp = check_arrays(**arrays)
    state = "initial_state" if time else "state"
    check_floating(xp, **{name: arrays[name] for name in ("u", "delta", "D", "z", "delta_bias")})
    check_floating(xp, complex_too=True, **{name: arrays[name] for name in ("A", "B", "C", state)})
    u, A = arrays["u"], arrays["A"]
    if u.ndim <= time:
        expected = "(..., n, d) with at least two axes" if time else "(..., d)"
        msg = f"u has shape {tuple(u.shape)}, expected {expected}"
        raise ValueError(msg)
    d, steps = u.shape[-1], tuple(u.shape[-1 - time : -1])
    if A.ndim != 2 or A.shape[0] != d or A.shape[1] == 0:
        msg = f"A has shape {tuple(A.shape)}, expected ({d}, d_state): one row per channel of u {tuple(u.shape)}"
        raise ValueError(msg)
    d_state = A.shape[1]
    tails = {"u": (*steps, d), "delta": (*steps, d), "z": (*steps, d), state: (d, d_state)}
    for name, tail in tails.items():
        x = arrays[name]
        if x is not None and tuple(x.shape[-len(tail) :]) != tail:
            msg = f"{name} has shape {tuple(x.shape)}, expected (..., {', '.join(map(str, tail))})"
            raise ValueError(msg)
    for name in ("D", "delta_bias"):
        x = arrays[name]
        if x is not None and tuple(x.shape) != (d,):
            msg = f"{name} has shape {tuple(x.shape)}, expected ({d},): one number per channel"
            raise ValueError(msg)
    if not is_dtype(xp, A.dtype, "complex floating"):
        for name in ("B", "C", state):
            x = arrays[name]
            if x is not None and is_dtype(xp, x.dtype, "complex floating"):
                msg = f"{name} is complex ({x.dtype}) but A is real; make A complex too, or take the real part"
                raise TypeError(msg)
    batches = {name: arrays[name].shape[: -len(tail)] for name, tail in tails.items() if arrays[name] is not None}
    rows = (*broadcast_batch(**batches), *steps)
    forms = {name: map_rank(name, arrays[name], u, steps, rows, d_state) for name in ("B", "C")}
    batches |= {name: arrays[name].shape[:-rank] for name, rank in forms.items() if rank}
    return Shapes(xp, broadcast_batch(**batches), d, d_state, forms)


def map_rank(name: str, x: Array, u: Array, steps: tuple[int, ...], rows: tuple[int, ...], d_state: int) -> int:
    """Axes of B or C after the batch: 0 constant, those of time and state for one map per step, one more for groups.

    `rows` is what the other inputs have in common before the channels: the batch, and the steps.
    """
    got, d, rank = tuple(x.shape), u.shape[-1], len(steps) + 1
    if got[-1:] == (d_state,):
        if x.ndim == 2 and u.ndim >= 2:
            last = rows[-1:]  # of the first of two axes beside a two-axis u
            if got[0] == d and (u.ndim > 2 or is_constant(name, x, last, d, "n" if steps else "batch")):
                return 0
            if u.ndim == 2 and (got[:1] == last or (not steps and 1 in (got[0], *last))):
                return rank
        elif x.ndim == u.ndim and got[-rank:-1] == steps:
            return rank
        elif x.ndim == u.ndim + 1 and got[-rank - 1 : -2] == steps and got[-2] and d % got[-2] == 0:
            check_groups(name, x, u, rows)
            return rank + 1
    each = "".join(f"{n}, " for n in steps)
    msg = (
        f"{name} has shape {got}, expected (..., {each}{d_state}), (..., {each}groups, {d_state}) or ({d}, {d_state}) "
        f"for u with {u.ndim} axes; groups must divide d = {d}"
    )
    raise ValueError(msg)


def check_groups(name: str, x: Array, u: Array, rows: tuple[int, ...]) -> None:
    """Raise where the groups of a map could as well be rows, in a batch axis that u lacks and other inputs have."""
    own = tuple(x.shape[:-1])
    if len(own) <= len(rows) and own == rows[-len(own) :] and own != (1,) * len(own):
        msg = (
            f"{name} of shape {tuple(x.shape)} could have {own[-1]} groups, or the batch axes {list(rows)} of other "
            f"inputs, which u {tuple(u.shape)} lacks; give u as many axes, of length 1 where it is the same for all "
            f"(and {name} one more, before the groups, if it has groups)"
        )
        raise ValueError(msg)


def is_constant(name: str, x: Array, rows: tuple[int, ...], d: int, axis: str) -> bool:
    """Is a map (d, d_state) beside a two-axis u constant? Where both readings fit, the caller must say."""
    if rows == (d,) and d > 1:
        msg = (
            f"{name} of shape {tuple(x.shape)} could be (d, d_state) or ({axis}, d_state), since {axis} = d = {d}; "
            f"add a batch axis of length 1 to all inputs but A, D and delta_bias (and to {name} if it is not constant)"
        )
        raise ValueError(msg)
    return rows != (d,)
