"""States of scans, which merge: the effect of a chunk of a sequence on any state before the chunk.

h_after = decay ∘ h_before + state, or transition h_before + state for scans whose steps mix the channels of a state
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from subquad.backend import Array
from subquad.core.checks import check_arrays, check_floating
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.core.states import State, StateSpec, merge_by_decay, merge_by_transition
from subquad.registry import scan_row

# fields of every scan's state, by the name of the factor; axes differ by scan
SPECS = {
    "decay": StateSpec({"state": (), "decay": ()}, merge_by_decay),
    "transition": StateSpec({"state": (), "transition": ()}, merge_by_transition),
}


def summarize_scan(scan: str | Callable[..., Any], /, *arrays: Array | None, **options: Any) -> State:
    """Sum up a chunk of a sequence: the state after the chunk, and what it multiplies any state before it by.

        h_after = decay ∘ h_before + state,    or    S_after = transition S_before + state    for `delta_rule`

    Parameters
    ----------
    scan : str or callable
        A scan or its name, such as "linear_scan" or `subquad.selective_scan`.
    *arrays
        Arrays that the scan takes by position.
    **options
        Other arguments of the scan, except `return_state` and `states_at`. An `initial_state` is included in the state
        returned, so pass it to the first chunk alone.

    Returns
    -------
    dict of array
        "state" and "decay", both of the shape and dtype of the scan's state, (..., d) or (..., d, d_state). For
        `delta_rule`, "state" (..., d, d_v) and "transition" (..., d, d).

    Raises
    ------
    TypeError
        If `return_state` or `states_at` is given, and as the scan raises for its arguments.
    ValueError
        If `scan` is not registered or its states do not merge, and as the scan raises for its arguments.

    See Also
    --------
    merge_scan : Merge the states of two chunks.

    Notes
    -----
    The decay is Π a[t] for `linear_scan` and exp(A Σ Δ[t]) for `selective_scan`. The transition of `delta_rule` is the
    product of its steps' matrices, which takes a scan with d values in place of d_v. Steps that are padded (`mask`) do
    not count, and the factor is 0 where a document begins within the chunk (`segments`). Chunks may be summed up in any
    order, and on several machines. The scan runs over the chunk a second time to give outputs, once the state before it
    is known.

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
    for name in ("return_state", "states_at"):
        if name in options:
            msg = f"summarize_scan returns the state alone; leave {name} out"
            raise TypeError(msg)
    if row.decay is None:
        msg = f"the states of {row.name} do not merge; give the state of one chunk to the next one as initial_state"
        raise ValueError(msg)
    _, state = row.function(*arrays, **options, return_state=True)
    named = dict(zip(row.positional, arrays, strict=False)) | options
    xp = check_arrays(state=state)
    with backend_of(xp).computing(state):
        factor = row.decay(named, options)
    if factor.dtype != state.dtype:
        factor = xp.astype(factor, state.dtype)
    (name,) = set(row.state.fields) - {"state"}
    shape = state.shape if name == "decay" else (*state.shape[:-1], state.shape[-2])
    if tuple(factor.shape) != tuple(shape):
        factor = xp.broadcast_to(factor, shape)
    return {"state": state, name: factor}


def merge_scan(left: State | None, right: State | None, /) -> State | None:
    """Merge the states of two adjacent chunks, of which the scan passes `left` first.

        state = decay_right ∘ state_left + state_right,    decay = decay_right ∘ decay_left

    and with matrix products for transitions.

    Parameters
    ----------
    left, right : dict of array, or None
        States that `summarize_scan` returned; None stands for no chunk. With ``reverse=True`` the later chunk is
        `left`.

    Returns
    -------
    dict of array, or None
        The state of both chunks together, of the same fields, associative up to rounding; None if both are None.

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
    kind = _kind(given)
    for name, state in given.items():
        arrays |= SPECS[kind].check(name, state)
    if not arrays:
        return None
    xp = check_arrays(**arrays)
    check_floating(xp, complex_too=True, **arrays)
    _check_sizes(kind, arrays)
    if left is None or right is None:
        return dict(_named(right if left is None else left))
    with backend_of(xp).computing(left["state"]):
        return _merged(kind, xp, dict(left), dict(right))


def _kind(given: Mapping[str, Any]) -> str:
    """The name of the factor that the states have, "decay" if none is a mapping with a transition."""
    return "transition" if any(isinstance(x, Mapping) and "transition" in x for x in given.values()) else "decay"


def _check_sizes(kind: str, arrays: Mapping[str, Array]) -> None:
    """ValueError unless the arrays of two states, named as errors name them, fit together."""
    tail = 0 if kind == "decay" else 2
    for name, x in arrays.items():
        if x.ndim < tail:
            msg = f"{name} has shape {tuple(x.shape)}, expected at least {tail} axes"
            raise ValueError(msg)
    broadcast_batch(**{name: tuple(x.shape[: x.ndim - tail]) for name, x in arrays.items()})
    if tail:
        sizes = {name: tuple(x.shape[-2:]) for name, x in arrays.items()}
        d = next(iter(sizes.values()))[0]
        width = {size[1] for name, size in sizes.items() if "transition" not in name}
        for name, size in sizes.items():
            if size != (d, d) if "transition" in name else size[0] != d or len(width) > 1:
                listed = ", ".join(f"{other} {list(size)}" for other, size in sizes.items())
                msg = f"{name} does not fit: the last axes are {listed}, expected (d, d_v) of states and (d, d) else"
                raise ValueError(msg)


def _merged(kind: str, xp: ModuleType, left: State, right: State) -> State:
    merge = SPECS[kind].merge
    assert merge is not None
    return merge(xp, left, right)


def _named(state: Mapping[str, Array] | None) -> Mapping[str, Array]:
    assert state is not None
    return state
