"""The one door of scans: checks of libraries, dtypes and shapes, the arrays as a kernel takes them, and the way back.

A `Form` holds everything that follows from the shapes and dtypes of a call: the dtype and shape in which each array
goes to the kernel, and in which each output comes back. Forms are found once for each signature and remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from subquad.backend import Array, Backend
from subquad.core.checks import check_arrays, check_floating, check_given
from subquad.core.dtypes import is_dtype
from subquad.core.kernel import Kernel, signature_of
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.scans.timeline import Timeline, step_timeline

MAX_KEPT = 1024  # forms remembered; a full table is cleared
FORMS: dict[Any, Form] = {}


def reshaped(xp: ModuleType, x: Any, shape: tuple[int, ...]) -> Array:
    """`x` in another shape; of NumPy by its own method, as the way through the backend costs a microsecond more."""
    return x.reshape(shape) if x.__class__ is np.ndarray else backend_of(xp).reshaped(xp, x, shape)


class Target(NamedTuple):
    """Dtype and shape that an array is brought to: cast to `dtype`, broadcast to `wide`, reshaped to `shape`.

    None for `wide` or `shape` leaves out that step.
    """

    dtype: Any
    wide: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def fits(self, x: Array) -> bool:
        """Whether `x` is so already."""
        return x.dtype == self.dtype and self.wide is None and (self.shape is None or x.shape == self.shape)

    def place(self, xp: ModuleType, x: Array) -> Array:
        """`x`, cast, broadcast and reshaped."""
        if x.dtype != self.dtype:
            x = xp.astype(x, self.dtype)
        if self.wide is not None:
            x = xp.broadcast_to(x, self.wide)
        return x if self.shape is None or x.shape == self.shape else reshaped(xp, x, self.shape)


@dataclass(frozen=True, eq=False)
class Form:
    """The target of each array of a call, None for an array that is not given, and of each output.

    `moves` lists the targets that arrays have yet to be brought to, each with the number of its array: all of them,
    until `settle` has seen arrays of the form. Of those, `shapes` lists the targets that change a shape alone.
    """

    xp: ModuleType
    targets: tuple[Target | None, ...]
    outputs: tuple[Target, ...]
    backend: Backend = field(init=False)
    moves: tuple[tuple[int, Target], ...] = field(init=False)
    shapes: tuple[tuple[int, tuple[int, ...]], ...] = field(init=False, default=())
    is_settled: bool = field(init=False, default=False)
    has_methods: bool = field(init=False, default=False)  # whether arrays reshape themselves
    one_step: Timeline = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", backend_of(self.xp))
        moves = tuple((i, target) for i, target in enumerate(self.targets) if target is not None)
        object.__setattr__(self, "moves", moves)
        object.__setattr__(self, "one_step", Timeline(self.xp, 1, reverse=False))

    def settle(self, arrays: Sequence[Array | None]) -> None:
        """Leave the moves that change something: `arrays` stand for all arrays that will come in this form."""
        moves: list[tuple[int, Target]] = []
        shapes: list[tuple[int, tuple[int, ...]]] = []
        for i, to in self.moves:
            x = arrays[i]
            if x is None or to.fits(x):
                continue
            if x.dtype == to.dtype and to.wide is None and to.shape is not None and hasattr(x, "reshape"):
                shapes.append((i, to.shape))
            else:
                moves.append((i, to))
        object.__setattr__(self, "moves", tuple(moves))
        object.__setattr__(self, "shapes", tuple(shapes))
        object.__setattr__(self, "is_settled", True)
        object.__setattr__(self, "has_methods", hasattr(arrays[0], "reshape"))

    def enter(self, arrays: Sequence[Array | None]) -> list[Array | None]:
        """The arrays in the dtypes and shapes that the kernel takes."""
        given: list[Any] = list(arrays)
        for i, shape in self.shapes:
            given[i] = given[i].reshape(shape)
        for i, target in self.moves:
            x = given[i]
            if x is not None:
                given[i] = target.place(self.xp, x)
        return given

    def run(self, kernel: Kernel, arrays: Sequence[Array | None], implementation: str, **keywords: Any) -> Any:
        """The outputs of a kernel, computed in the context of the library.

        What the arrays are must follow from the form and the keywords: then a remembered form decides the call.
        """
        if self.is_settled:
            return kernel.call_in(self, self.backend.computing, arrays, implementation, keywords)
        with self.backend.computing(arrays[0]):
            return kernel(*arrays, implementation=implementation, **keywords)

    def computing(self, like: Array) -> AbstractContextManager[Any]:
        """The context in which the scan computes."""
        return self.backend.computing(like)

    def step_time(self, name: str, like: Array, mask: Array | None, *, axes: int = 1) -> Timeline:
        """The timeline of one step, whose mask has the batch axes of the output alone: all but the last `axes`."""
        if mask is None:
            return self.one_step
        return step_timeline(name, like, self.shape_of(0)[:-axes], mask, xp=self.xp)

    def shape_of(self, index: int) -> tuple[int, ...]:
        """The shape of output number `index` as the caller gets it."""
        shape = self.outputs[index].shape
        assert shape is not None
        return shape

    def leave(self, index: int, x: Array) -> Array:
        """Output number `index` of the kernel in the dtype and shape that the caller gets."""
        to = self.outputs[index]
        if self.has_methods and x.dtype == to.dtype and to.wide is None and to.shape is not None:
            return x if x.shape == to.shape else x.reshape(to.shape)
        return to.place(self.xp, x)


def form_of(kind: str, arrays: Sequence[Array | None], find: Callable[[], Form]) -> Form:
    """The form of a call of the function `kind`; `find()` checks and makes it, unless the signature is known."""
    signature = signature_of(arrays)
    if signature is None:
        return find()
    form = FORMS.get((kind, signature))
    if form is None:
        form = find()
        form.settle(arrays)
        if len(FORMS) >= MAX_KEPT:
            FORMS.clear()
        FORMS[kind, signature] = form
    return form


def flat_target(x: Array | None, dtype: Any, batch: tuple[int, ...], tail: tuple[int, ...]) -> Target | None:
    """The target (product of `batch`, *tail) of an array (..., *tail), broadcast to `batch` first; None for None."""
    if x is None:
        return None
    count = 1
    for size in batch:
        count *= size
    own = tuple(x.shape[: x.ndim - len(tail)])
    wide = None if own == batch else (*batch, *tail)
    return Target(dtype, wide, (count, *tail))


class Shapes(NamedTuple):
    """The sizes of checked inputs of a selective scan; `forms`: axes of B and C after the batch (`map_rank`)."""

    xp: ModuleType
    batch: tuple[int, ...]
    d: int
    d_state: int
    forms: dict[str, int]


def check_inputs(arrays: dict[str, Any], *, time: int) -> Shapes:
    """The sizes of the inputs, given by name; TypeError or ValueError unless the inputs fit.

    `time` is the number of time axes: 1 in a scan, 0 in one step.
    """
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


def check_limits(value: Any) -> tuple[float, float] | None:
    """The limits of step sizes as two floats; TypeError for no pair of numbers, ValueError if low > high or NaN."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(_is_real, value)):
        msg = f"delta_limits is {value!r}, expected two numbers (low, high), such as (0.001, 0.1)"
        raise TypeError(msg)
    low, high = map(float, value)
    if not low <= high:
        msg = f"delta_limits is ({low}, {high}), expected low ≤ high"
        raise ValueError(msg)
    return low, high


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float | np.floating | np.integer) and not isinstance(value, bool)


def map_rank(name: str, x: Array, u: Array, steps: tuple[int, ...], rows: tuple[int, ...], d_state: int) -> int:
    """The number of axes of B or C after the batch; ValueError if the shape fits no form, or more than one.

        0                a constant map (d, d_state)
        len(steps) + 1   one map for each step, (..., n, d_state)
        len(steps) + 2   one for each step and group, (..., n, groups, d_state)

    `steps` is (n,) in a scan and () in one step; `rows` is the common shape of the other inputs before the channels.
    """
    got, d, rank = tuple(x.shape), u.shape[-1], len(steps) + 1
    if got[-1:] == (d_state,):
        if x.ndim == 2 and u.ndim >= 2:
            last = rows[-1:]  # length of the axis that the first axis of x might stand for
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
    """Raise ValueError if the groups of a map could also be a batch axis that other inputs have and u lacks."""
    own = tuple(x.shape[:-1])
    if len(own) <= len(rows) and own == rows[-len(own) :] and own != (1,) * len(own):
        msg = (
            f"{name} of shape {tuple(x.shape)} could have {own[-1]} groups, or the batch axes {list(rows)} of other "
            f"inputs, which u {tuple(u.shape)} lacks; give u as many axes, of length 1 where it is the same for all "
            f"(and {name} one more, before the groups, if it has groups)"
        )
        raise ValueError(msg)


def is_constant(name: str, x: Array, rows: tuple[int, ...], d: int, axis: str) -> bool:
    """Whether a map (d, d_state) beside a two-axis u is constant; ValueError if it may be one map for each row."""
    if rows == (d,) and d > 1:
        msg = (
            f"{name} of shape {tuple(x.shape)} could be (d, d_state) or ({axis}, d_state), since {axis} = d = {d}; "
            f"add a batch axis of length 1 to all inputs but A, D and delta_bias (and to {name} if it is not constant)"
        )
        raise ValueError(msg)
    return rows != (d,)
