"""States of scans, which merge: the effect of a chunk of a sequence on any state before the chunk.

h_after = decay ∘ h_before + state
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from subquad.backend import Array
from subquad.core.checks import check_arrays, check_floating
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.core.states import State, StateSpec, merge_by_decay
from subquad.registry import scan_row

SPEC = StateSpec({"state": (), "decay": ()}, merge_by_decay)  # fields of every scan's state; axes differ by scan


def summarize_scan(scan: str | Callable[..., Any], /, *arrays: Array | None, **options: Any) -> State:
    """Sum up a chunk of a sequence: the state after the chunk, and its decay of any state before it.

        h_after = decay ∘ h_before + state

    Parameters
    ----------
    scan : str or callable
        A scan or its name, such as "linear_scan" or `subquad.selective_scan`.
    *arrays
        Arrays that the scan takes by position.
    **options
        Other arguments of the scan, except `return_state`. An `initial_state` is included in the state returned,
        so pass it to the first chunk alone.

    Returns
    -------
    dict of array
        "state" and "decay", both of the shape and dtype of the scan's state, (..., d) or (..., d, d_state).

    Raises
    ------
    TypeError
        If `return_state` is given, and as the scan raises for its arguments.
    ValueError
        If `scan` is not registered or its states do not merge, and as the scan raises for its arguments.

    See Also
    --------
    merge_scan : Merge the states of two chunks.

    Notes
    -----
    The decay is Π a[t] for `linear_scan` and exp(A Σ Δ[t]) for `selective_scan`. Chunks may be summed up in any order,
    and on several machines. The scan runs over the chunk a second time to give outputs, once the state before it is
    known.

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
    if row.decay is None:
        msg = f"the states of {row.name} do not merge; give the state of one chunk to the next one as initial_state"
        raise ValueError(msg)
    if "return_state" in options:
        msg = "summarize_scan returns the state alone; leave return_state out"
        raise TypeError(msg)
    _, state = row.function(*arrays, **options, return_state=True)
    named = dict(zip(row.positional, arrays, strict=False)) | options
    xp = check_arrays(state=state)
    with backend_of(xp).computing(state):
        decay = row.decay(named, options)
    if decay.dtype != state.dtype:
        decay = xp.astype(decay, state.dtype)
    if tuple(decay.shape) != tuple(state.shape):
        decay = xp.broadcast_to(decay, state.shape)
    return {"state": state, "decay": decay}


def merge_scan(left: State | None, right: State | None, /) -> State | None:
    """Merge the states of two adjacent chunks, of which the scan passes `left` first.

        state = decay_right ∘ state_left + state_right,    decay = decay_left ∘ decay_right

    Parameters
    ----------
    left, right : dict of array, or None
        States that `summarize_scan` returned; None stands for no chunk. With ``reverse=True`` the later chunk is
        `left`.

    Returns
    -------
    dict of array, or None
        "state" and "decay" of both chunks together, associative up to rounding; None if both are None.

    Raises
    ------
    TypeError, ValueError
        If an argument is not such a state, or if libraries, devices or shapes of the arrays do not fit.

    See Also
    --------
    summarize_scan : Make the state of a chunk.

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
    with backend_of(xp).computing(left["state"]):
        return merge_by_decay(xp, dict(left), dict(right))


def _named(state: Mapping[str, Array] | None) -> Mapping[str, Array]:
    assert state is not None
    return state
