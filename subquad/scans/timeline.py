"""The door of time, one for all scans: documents packed into one sequence, padded steps, states on the way.

    segments     the state starts anew before a step whose number differs from that of the step before it
    mask         a padded step leaves the state as it is and gives 0
    states_at    the states after these numbers of steps, beside the output

A kernel knows of documents alone, as `resets`: the steps before which its state starts from 0. A padded step is made of
selected inputs with which the recurrence does nothing, and its output is selected too. States on the way are the last
states of pieces, from position to position: the very calls that a user would make. All selection is by `where`, so no
value of a padded step or of another document, NaN included, reaches a result or a gradient.

Inside, an array has the layout of kernels, (batch, n, ...), and positions count steps in the order of processing: with
`reverse`, from the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from subquad.backend import Array
from subquad.core.checks import check_arrays, check_count
from subquad.core.dtypes import is_dtype
from subquad.core.gather import gather
from subquad.core.shapes import broadcast_batch, check_mask_axes, flatten_batch

State = Any  # an array, or a tuple of arrays
Rows = Sequence[Array | None]  # arrays (batch, n, ...), or None


@dataclass(frozen=True)
class every:
    """The positions k, 2k, 3k, … up to the length of the sequence, for ``states_at=every(k)``.

    Attributes
    ----------
    steps : int
        The number of steps k from one state to the next, at least 1.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> one = np.ones((7, 1))
    >>> _, states = subquad.linear_scan(one, one, states_at=subquad.every(3))
    >>> states[:, 0]
    array([3., 6.])
    """

    steps: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_count("every", self.steps))


class Timeline(NamedTuple):
    """How a scan of n steps goes through time: from which end, over which padded steps, from which states anew.

    Attributes
    ----------
    xp : module
        Array namespace.
    n : int
        Number of steps.
    reverse : bool
        Whether time runs from the end.
    mask : array or None
        True for a step that counts, False for a padded one, (batch or 1, n); None: all count.
    resets : array or None
        Whether the state starts from 0 before a step, (batch, n); None: it never does.
    positions : tuple of int or None
        The numbers of steps after which the state is asked for; None: at no position.
    """

    xp: ModuleType
    n: int
    reverse: bool
    mask: Array | None = None
    resets: Array | None = None
    positions: tuple[int, ...] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all steps count, in one document, and no state on the way is asked for."""
        return self.mask is None and self.resets is None and self.positions is None

    def filled(self, x: Any, value: float = 0.0, *, axis: int = 1) -> Any:
        """`x` with `value` at padded steps, None for None; `axis` is that of time, negative for arrays not folded."""
        if self.mask is None or x is None:
            return x
        after = -1 - axis if axis < 0 else x.ndim - 1 - axis
        return self.xp.where(self.mask[(..., *[None] * after)], x, value)

    def restarted(self, x: Array, value: float) -> Array:
        """`x` (..., *axes of a state), with `value` where the state starts anew at any step; for unfolded arrays."""
        if self.resets is None:
            return x
        anew = self.xp.any(self.resets, axis=-1)
        after = x.ndim - anew.ndim
        return self.xp.where(anew[(..., *[None] * after)], value, x)

    def run(
        self, scan: Callable[[Rows, State, Array | None], tuple[Array, State]], rows: Rows, state: State
    ) -> tuple[Array, State, list[State] | None]:
        """(output with 0 at padded steps, last state, states at the positions), from `state` on.

        `scan(rows, state, resets)` returns (output, last state) of some consecutive steps.
        """
        if self.positions is None:
            out, state = scan(rows, state, self.resets)
            return self.filled(out), state, None
        outs, found = [], {}
        for start, stop in itertools.pairwise([0, *sorted({*self.positions, self.n})]):
            steps = slice(self.n - stop, self.n - start) if self.reverse else slice(start, stop)
            *piece, resets = (None if x is None else x[:, steps, ...] for x in (*rows, self.resets))
            out, state = scan(piece, state, resets)
            outs.append(out)
            found[stop] = state
        out = outs[0] if len(outs) == 1 else self.xp.concat(outs[::-1] if self.reverse else outs, axis=1)
        return self.filled(out), state, [found[p] for p in self.positions]

    def results(self, out: Array, state: State, states: list[State] | None, *, return_state: bool) -> Any:
        """What the caller gets: the output, then the last state if asked for, then the states at positions, stacked."""
        given = [out, state] if return_state else [out]
        if states is not None:
            given.append(stack_states(self.xp, states, state))
        return given[0] if len(given) == 1 else tuple(given)


def stack_states(xp: ModuleType, states: list[State], like: State) -> State:
    """The states in one array, the first axis that of positions, or one for each part; none of them is as `like`."""
    if isinstance(like, tuple):
        return tuple(stack_states(xp, [state[i] for state in states], part) for i, part in enumerate(like))
    return xp.stack(states) if states else xp.stack([like])[:0, ...]


def timeline(
    name: str, like: Array, batch: tuple[int, ...], n: int, *, segments: Array | None = None, mask: Array | None = None,
    states_at: Any = None, reverse: bool = False, xp: ModuleType | None = None, fold: bool = True,
) -> Timeline:  # fmt: skip
    """The timeline of a scan over n steps with this batch shape, after checks of the arguments.

    `like` is an array of the call, checked already, and `name` the name of its argument. Unless `fold`, the batch axes
    of the mask and of the resets stay as they are, instead of the single one of kernels.
    """
    if segments is None and mask is None:
        space = xp or check_arrays(**{name: like})
        return Timeline(space, n, reverse, positions=check_positions(states_at, n))
    xp = check_arrays(**{name: like}, segments=segments, mask=mask)
    for key, x, kind, expected in (("segments", segments, "integral", "integers"), ("mask", mask, "bool", "bool")):
        if x is not None:
            if not is_dtype(xp, x.dtype, kind):
                msg = f"{key} has dtype {x.dtype}, expected {expected}"
                raise TypeError(msg)
            _check_shape(key, x, name, batch, n)
    resets = None if segments is None else find_resets(xp, segments, mask, reverse=reverse)
    if fold:
        resets = None if resets is None else flatten_batch(xp, resets, batch, 1)
        if mask is not None:
            shared = all(size == 1 for size in mask.shape[:-1])
            mask = xp.reshape(mask, (1, n)) if shared else flatten_batch(xp, mask, batch, 1)
    return Timeline(xp, n, reverse, mask, resets, check_positions(states_at, n))


def step_timeline(name: str, like: Array, batch: tuple[int, ...], mask: Array | None, *, xp: ModuleType) -> Timeline:
    """The timeline of one step, whose mask has the batch axes alone."""
    if mask is None:
        return Timeline(xp, 1, reverse=False)
    check_arrays(**{name: like}, mask=mask)
    return timeline(name, like, batch, 1, mask=mask[..., None], xp=xp)


def find_resets(xp: ModuleType, segments: Array, mask: Array | None, *, reverse: bool) -> Array:
    """Whether the number of a step differs from that of the step processed before it, (..., n).

    No step before the first has a number: the state before a call belongs to its first document. Numbers of padded
    steps do not count.
    """
    if reverse:
        segments, mask = (None if x is None else xp.flip(x, axis=-1) for x in (segments, mask))
    if mask is not None:
        # the steps that count move to the front, in order
        segments, mask = xp.broadcast_arrays(segments, mask)
        order = xp.argsort(xp.astype(~mask, xp.int8), axis=-1, stable=True)
        segments = gather(xp, segments, order)
    first = xp.zeros_like(segments[..., :1], dtype=xp.bool)
    resets = xp.concat([first, segments[..., 1:] != segments[..., :-1]], axis=-1)
    if mask is not None:
        resets = gather(xp, resets, xp.argsort(order, axis=-1)) & mask  # and back to their places
    return xp.flip(resets, axis=-1) if reverse else resets


def check_positions(states_at: Any, n: int) -> tuple[int, ...] | None:
    """The positions as integers in 0 … n; TypeError or ValueError for anything but those, `every` or None."""
    if states_at is None:
        return None
    if isinstance(states_at, every):
        return tuple(range(states_at.steps, n + 1, states_at.steps))
    if isinstance(states_at, np.ndarray) and states_at.ndim == 1:
        states_at = states_at.tolist()
    if not isinstance(states_at, list | tuple | range):
        hint = ""
        if isinstance(states_at, int | np.integer):
            hint = f"; ({states_at},) is one position, subquad.every({states_at}) all multiples of it"
        msg = (
            f"states_at is {states_at!r} of type {type(states_at).__name__}, expected positions in 0 … n as a tuple or "
            f"list of Python integers, or subquad.every(k){hint}"
        )
        raise TypeError(msg)
    return tuple(check_count(f"states_at[{i}]", p, least=0, most=n) for i, p in enumerate(states_at))


def _check_shape(key: str, x: Array, name: str, batch: tuple[int, ...], n: int) -> None:
    if x.ndim == 0 or x.shape[-1] != n:
        msg = f"{key} has shape {tuple(x.shape)}, expected (..., {n}): one for each step of {name}"
        raise ValueError(msg)
    check_mask_axes(key, x, batch)
    if broadcast_batch(**{"the other arrays": batch, key: tuple(x.shape[:-1])}) != batch:
        msg = (
            f"{key} has shape {tuple(x.shape)}, which does not broadcast to {(*batch, n)}, the batch shape of the "
            f"other arrays and n; give the other arrays its batch axes"
        )
        raise ValueError(msg)
