"""States of scans that merge: what a chunk of a sequence does to any state before it.

h_after = decay ∘ h_before + state
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from subquad.backend import Array
from subquad.core.checks import check_arrays, check_floating
from subquad.core.shapes import broadcast_batch
from subquad.core.states import State, StateSpec, merge_by_decay
from subquad.registry import scan_row

SPEC = StateSpec({"state": (), "decay": ()}, merge_by_decay)  # of every scan; the axes are the scan's own


def summarize_scan(scan: str | Callable[..., Any], /, *arrays: Array | None, **options: Any) -> State:
    """What a chunk of a sequence leaves behind: the state after it, and how it fades the state before it.

        h_after = decay ∘ h_before + state

    Parameters
    ----------
    scan : str or callable
        A scan or its name, such as "linear_scan" or `subquad.selective_scan`.
    *arrays
        The arrays that the scan takes by position.
    **options
        Its other arguments, but for `return_state`. With `initial_state`, the chunk is what begins there.

    Returns
    -------
    dict of array
        {"state", "decay"}, both of the shape of the scan's state.

    Raises
    ------
    TypeError, ValueError
        For a scan that is not registered, and as the scan raises for its arguments.

    See Also
    --------
    merge_scan : The state of two chunks together.

    Notes
    -----
    decay is exp(A Σ Δ[t]) for `selective_scan` and Π a[t] for `linear_scan`; a scan that runs from the end has the
    later chunk first. Chunks may be summarised anywhere and in any order.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> a, b = np.full((4, 1), 0.5), np.ones((4, 1))
    >>> left = subquad.summarize_scan("linear_scan", a[:3], b[:3])
    >>> right = subquad.summarize_scan("linear_scan", a[3:], b[3:])
    >>> h = subquad.linear_scan(a, b)
    >>> bool(subquad.merge_scan(left, right)["state"][0] == h[-1, 0])
    True
    """
    row = scan_row(scan)
    if "return_state" in options:
        msg = "summarize_scan returns the state alone; leave return_state out"
        raise TypeError(msg)
    _, state = row.function(*arrays, **options, return_state=True)
    named = dict(zip(row.positional, arrays, strict=False)) | options
    decay = row.decay(named, options)
    xp = check_arrays(state=state)
    if decay.dtype != state.dtype:
        decay = xp.astype(decay, state.dtype)
    if tuple(decay.shape) != tuple(state.shape):
        decay = xp.broadcast_to(decay, state.shape)
    return {"state": state, "decay": decay}


def merge_scan(left: State | None, right: State | None, /) -> State | None:
    """The state of two chunks together, of which `left` comes first in the order of the scan.

        state = decay_right ∘ state_left + state_right,    decay = decay_left ∘ decay_right

    Parameters
    ----------
    left, right : dict of array, or None
        As `summarize_scan` gives them; None is no chunk at all.

    Returns
    -------
    dict of array, or None
        {"state", "decay"}; None if both are None.

    Raises
    ------
    TypeError, ValueError
        For what is no such state, and for arrays of two libraries, devices or shapes that do not fit.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> whole = subquad.merge_scan(None, {"state": np.ones(2), "decay": np.zeros(2)})
    >>> whole["state"]
    array([1., 1.])
    """
    given = {name: x for name, x in (("left", left), ("right", right)) if x is not None}
    arrays: dict[str, Array] = {}
    for name, state in given.items():
        arrays |= SPEC.check(name, state)
    if not arrays:
        return None
    xp = check_arrays(**arrays)
    check_floating(xp, complex_too=True, **arrays)
    broadcast_batch(**{name: tuple(x.shape) for name, x in arrays.items()})
    if left is None or right is None:
        return dict(_named(right if left is None else left))
    return merge_by_decay(xp, dict(left), dict(right))


def _named(state: Mapping[str, Array] | None) -> Mapping[str, Array]:
    assert state is not None
    return state
