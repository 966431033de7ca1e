"""What attention remembers of a call, by the signature of its arrays, so that the next call like it is short.

An `Arrangement` is found once for each signature. With it are kept what the method has made of its options, and, where
one kernel computes the call, the function that does: then no more than that runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, NamedTuple

from subquad.attention.grouped_heads import Heads
from subquad.backend import Array, Backend
from subquad.core.beside import backend_for, namespace_of
from subquad.core.kernel import Again, Kernel, signature_of
from subquad.core.loading import backend_of
from subquad.core.override import PLAIN

MAX_KEPT = 1024  # arrangements remembered; a full table is cleared
KEPT: dict[Any, Arrangement] = {}
LASTS: dict[int, Last] = {}  # by the id of the method, of those that live
AGAIN, LAST = "again", "last"  # in `Arrangement.made`: what computes the call, of `keep_kernel`; a `Last`


@dataclass(frozen=True, eq=False)
class Arrangement:
    """All that follows from the method, and from the shapes and dtypes of a call."""

    xp: ModuleType
    backend: Backend
    scale: float
    heads: Heads
    compute: Any  # the dtype to compute in
    out_dtype: Any
    out_shape: tuple[int, ...] | None  # with grouped heads folded; None if it is not known
    as_given: bool  # no array needs a cast or a fold, and a mask has one entry for each key
    owner: Callable[[], Any] = lambda: None  # a weak reference to the method, if the arrangement is remembered
    made: dict[str, Any] = field(default_factory=dict)  # of `AttentionCall.made_of`; empty once the method is gone


Recalled = tuple[Any, Arrangement | None]  # see `recall`
NOTHING: Recalled = (None, None)


def recall(
    owner: Any,
    spec: Any,
    rows: Mapping[str, Any],
    key_mask: Array | None,
    state: Mapping[str, Array] | None,
    causal: Any,
    scale: Any,
    as_stored: bool,
    options: Mapping[str, Array] | None,
) -> Recalled:
    """The key under which an arrangement is remembered, None if it must be found anew at every call; and what is there.

    An arrangement is found for arrays that the call takes as they are.
    """
    if owner is None or causal.__class__ is not bool or (scale is not None and scale.__class__ is not float):
        return NOTHING
    arrays = (*rows.values(), key_mask)
    if options:
        arrays += (*options.values(),)
    if state is None:
        signature, names = signature_of(arrays), None
    elif state.__class__ is dict:
        signature, names = signature_of((*arrays, *state.values())), (*state,)
    else:
        return NOTHING
    if signature is None:
        return NOTHING
    key = signature, id(owner), id(spec), *rows, causal, scale, names, as_stored
    found = KEPT.get(key)
    if found is None or not found.as_given or found.owner() is not owner:
        return key, None
    return key, found


def remember(key: Any, owner: Any, arrangement: Arrangement) -> None:
    """Keep an arrangement of the method `owner` under a key of `recall`."""
    if len(KEPT) >= MAX_KEPT:
        KEPT.clear()
    made, method, lasts = arrangement.made, id(owner), LASTS  # at exit, a module has lost its names

    def forget(_: Any) -> None:
        made.clear()
        lasts.pop(method, None)

    KEPT[key] = replace(arrangement, owner=weakref.ref(owner, forget))


# What a method makes of its options -----------------------------------------------------------------------------------


class Made(NamedTuple):
    """What has been made of the numbers `before` of an option, and how others are compared."""

    made: Any
    option: Array = None
    before: Array = None
    signature: Any = None
    is_same: Callable[[Array, Array], bool] = lambda x, y: False

    def holds(self) -> bool:
        """Whether the option, which may be changed in place, still has the numbers that this was made of."""
        if self.option is None:
            return True
        signature = signature_of((self.option,))
        return signature == self.signature is not None and self.is_same(self.option, self.before)


def may_keep(option: Array | None, found: Made | None) -> bool:
    """Whether what is made of the numbers that an option has now may be kept in place of what was found.

    If not, other implementations may be chosen for the call.
    """
    if option is None:
        return True
    if found is not None and not (option.shape == found.before.shape and option.dtype == found.before.dtype):
        return False
    backend = backend_of(namespace_of(option))
    return backend.conditions([option]) == PLAIN and backend.is_concrete(option)


def kept_with(option: Array | None, make: Callable[[], Any]) -> Made:
    """What `make()` makes of the numbers of an option, which are kept to be compared."""
    if option is None:
        return Made(make())
    xp = namespace_of(option)
    before = xp.asarray(option, copy=True)
    return Made(make(), option, before, signature_of((option,)), backend_of(xp).same_numbers)


# Calls that one kernel computes ---------------------------------------------------------------------------------------


class OneKernel(NamedTuple):
    """A kernel of (q, k, v), the arrays of a state, and arrays of the method, with a key mask.

    Attributes
    ----------
    kernel, implementation, keywords
        The kernel, and its keywords but for the mask.
    weights : tuple of array
        The arrays of the method, which has them of `AttentionCall.made_of` alone.
    state : tuple of str
        The fields of the state that the kernel takes, and returns after the output; empty without a state.
    """

    kernel: Kernel
    implementation: str
    keywords: dict[str, Any]
    weights: tuple[Array, ...] = ()
    state: tuple[str, ...] = ()


def again(recalled: Recalled, arrays: Sequence[Any], key_mask: Array | None) -> Any:
    """What the caller gets in a call without restrictions that one kernel has computed before; else None.

    The arrays are q, k and v; in a step, then the state.
    """
    found = recalled[1]
    if found is None:
        return None
    run, last = found.made.get(AGAIN), found.made.get(LAST)
    if last is not None:
        LASTS[last.method] = last
    return None if run is None else run(arrays, key_mask)


def keep_kernel(one: OneKernel, arrangement: Arrangement) -> None:
    """Keep with the arrangement what calls the kernel, once it has computed a call of its own: for `again`."""
    arrangement.made[AGAIN] = _runner(one, arrangement)


def _runner(one: OneKernel, arrangement: Arrangement) -> Again | None:
    """A function of the arrays of `again` that does what `AttentionCall.by_one_kernel` did in a call like these.

    It returns None where an option has other numbers by now, or an implementation is to be chosen anew.
    """
    run = one.kernel.again(arrangement, one.implementation, one.keywords)
    if run is None or not (one.weights or one.state):
        return run
    names, weights = one.state, one.weights
    kept = tuple(arrangement.made.values())  # at once: another thread may add to them
    made = [x for x in kept if isinstance(x, Made) and x.option is not None]

    def of_rows(arrays: Sequence[Any], key_mask: Array | None) -> Any:
        for x in made:
            if not x.holds():
                return None
        return run((*arrays, *weights), key_mask)

    def after_state(arrays: Sequence[Any], key_mask: Array | None) -> Any:
        for x in made:
            if not x.holds():
                return None
        *rows, state = arrays
        held = [None if state is None else state[name] for name in names]
        found = run((*rows, *held, *weights), key_mask)
        return None if found is None else (found[0], dict(zip(names, found[1:], strict=True)))

    return after_state if names else of_rows


# The last call of a method --------------------------------------------------------------------------------------------


class Last(NamedTuple):
    """A call of q, k and v alone that one kernel computes, and what tells whether others are like it."""

    method: int  # its id
    is_like: Callable[..., bool]
    causal: Any
    scale: Any
    arrangement: Arrangement


def keep_likeness(arrangement: Arrangement, arrays: Sequence[Array], causal: Any, scale: Any) -> None:
    """Keep with the arrangement of a call what tells whether others are like it, for `once_more`."""
    is_like = arrangement.backend.likeness(arrays)
    if is_like is not None:
        arrangement.made[LAST] = Last(id(arrangement.owner()), is_like, causal, scale, arrangement)


def once_more(owner: Any, arrays: Sequence[Array], causal: Any, scale: Any) -> Any:
    """What the caller gets if the call, without a mask and without restrictions, is like the last one; else None."""
    if not backend_for(arrays[0]).recognises():
        return None
    last = LASTS.get(id(owner))
    if last is None or last.causal is not causal or last.scale is not scale or not last.is_like(*arrays):
        return None
    found = last.arrangement
    run = found.made.get(AGAIN) if found.owner() is owner else None
    return None if run is None else run(arrays, None)
