"""The one door of attention: `enter` checks and arranges the arrays of a call, `AttentionCall.leave` undoes it.

An `Arrangement` holds everything that follows from the shapes and dtypes of a call: scale, grouping of heads, dtypes.
Arrangements are found once for each signature and remembered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, NamedTuple

from subquad.attention.grouped_heads import Heads, find_heads, head_counts
from subquad.backend import Array, Backend
from subquad.core.beside import namespace_of, place_of
from subquad.core.checks import check_arrays, check_flag, check_floating, check_given, check_number
from subquad.core.dtypes import cast, common_dtype, compute_dtype, is_dtype, stored_dtype
from subquad.core.kernel import Kernel, signature_of
from subquad.core.loading import backend_of
from subquad.core.override import PLAIN
from subquad.core.shapes import broadcast_batch, check_mask_axes
from subquad.core.states import State, StateSpec

MAX_KEPT = 1024  # arrangements remembered; a full table is cleared
ArrayOptions = Mapping[str, Array]
KEPT: dict[Any, Arrangement] = {}
AGAIN = "again"  # in `Arrangement.made`: what computes the call, left by `AttentionCall.by_one_kernel`


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


class Made(NamedTuple):
    """What `AttentionCall.made_of` has made of the numbers `before` of an option, and how others are compared."""

    made: Any
    option: Array = None
    before: Array = None
    signature: Any = None
    is_same: Callable[[Array, Array], bool] = lambda x, y: False

    def holds(self) -> bool:
        """Whether the option, which may be changed in place, still has the numbers that this was made of."""
        signature = signature_of((self.option,))
        return signature == self.signature is not None and self.is_same(self.option, self.before)


Recalled = tuple[Any, Arrangement | None]  # see `recall`
NOTHING: Recalled = (None, None)


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


class AttentionCall:
    """The checked arguments of a call, in the compute dtype or as they are stored, with grouped heads folded.

        array          without groups     with g query heads for each of h_kv key heads
        q              (..., n, d)        (..., h_kv, g, n, d)
        k, v           (..., n_kv, ·)     (..., h_kv, 1, n_kv, ·)
        key_mask       (..., n_kv)        (..., h_kv or 1, g or 1, n_kv)

    `options` holds the options of the method that are arrays (..., rows, d), cast and folded in this way too.
    """

    q: Array  # None in a call without queries (summarize), as k and v are in a call without keys (attend)
    k: Array
    v: Array
    restrictions: Any  # `attention.restrictions.Restrictions`
    is_whole: bool  # the arrays are those of the caller, so that what is remembered of the arrangement holds for them
    __slots__ = ("arrangement", "causal", "is_whole", "k", "key_mask", "options", "q", "restrictions", "state", "v")

    def __init__(
        self,
        arrangement: Arrangement,
        rows: Mapping[str, Array],
        key_mask: Array | None,
        state: Mapping[str, Array] | None,
        causal: bool,
        options: ArrayOptions,
    ) -> None:
        self.arrangement, self.key_mask, self.state = arrangement, key_mask, state
        self.q, self.k, self.v = rows.get("q"), rows.get("k"), rows.get("v")
        self.causal, self.options, self.restrictions, self.is_whole = causal, options, None, False

    def run(
        self, method: Any, kernel: Kernel, *arrays: Array | None, implementation: str = "auto", **keywords: Any
    ) -> Any:
        """The outputs of a kernel that `method` calls once, for arrays whose shapes and dtypes follow from the call.

        In a remembered call of this method, the implementation is remembered with it. The kernel runs in the context of
        the library, which it enters by itself unless it needs none.
        """
        made = self.arrangement
        if self.is_whole and made.owner() is method:
            return kernel.call_in(made, made.backend.computing, arrays, implementation, keywords)
        with self.computing():
            return kernel(*arrays, implementation=implementation, **keywords)

    def run_one(self, method: Any, one: OneKernel) -> Any:
        """What a kernel returns for the arrays of the call."""
        held = [None if self.state is None else self.state[name] for name in one.state]
        return self.run(
            method, one.kernel, self.q, self.k, self.v, *held, *one.weights, implementation=one.implementation,
            key_mask=self.key_mask, **one.keywords,
        )  # fmt: skip

    def by_one_kernel(self, method: Any, one: OneKernel | None) -> Any:
        """What the caller of `method` gets in a remembered call, if one kernel computes it, else None.

        What calls the kernel is remembered with the call, and then is all that runs: see `again`.
        """
        if one is None:
            return None
        found = self.run_one(method, one)
        out, *after = found if one.state else (found,)
        left = self.leave(out)
        if left is out and self.is_whole:
            self.arrangement.made[AGAIN] = _again(one, self.arrangement)
        return (left, self.leave_state(dict(zip(one.state, after, strict=True)))) if one.state else left

    def made_of(self, method: Any, name: str, option: Array | None, make: Callable[[], Any]) -> Any:
        """What `make()` makes of the numbers of an option that is an array; with None, of the call's signature alone.

        In a remembered call of `method` it is made again only if the option is not what it was, number by number.
        """
        if not self.is_whole or self.arrangement.owner() is not method:
            return make()
        kept = self.arrangement.made
        found = kept.get(name)
        if option is None:
            if found is None:
                found = kept[name] = Made(make())
            return found.made
        if found is not None and found.holds():
            return found.made
        xp = namespace_of(option)
        backend = backend_of(xp)
        if found is not None:
            before = found.before
            self.is_whole = option.shape == before.shape and option.dtype == before.dtype
        if backend.conditions([option]) != PLAIN or not backend.is_concrete(option):
            self.is_whole = False  # other implementations may be chosen
        if not self.is_whole:
            return make()
        before = xp.asarray(option, copy=True)
        kept[name] = Made(make(), option, before, signature_of((option,)), backend.same_numbers)
        return kept[name].made

    def restricted(self, restrictions: Any) -> AttentionCall:
        """The call with these restrictions."""
        rows = {name: getattr(self, name) for name in ("q", "k", "v")}
        call = AttentionCall(self.arrangement, rows, self.key_mask, self.state, self.causal, self.options)
        call.restrictions = restrictions
        call.is_whole = self.is_whole and all(x is None for x in restrictions)
        return call

    @property
    def xp(self) -> ModuleType:
        """The array namespace of the call."""
        return self.arrangement.xp

    @property
    def scale(self) -> float:
        """The factor s of the logits s q·k."""
        return self.arrangement.scale

    @property
    def like(self) -> Array:
        """An array that has the width d and the device of queries and keys, and the compute dtype."""
        return _of_dtype(self.xp, self.k if self.q is None else self.q, self.arrangement.compute)

    def widened(self) -> AttentionCall:
        """The call with q, k and v in the compute dtype."""
        dtype = self.arrangement.compute
        rows = {name: cast(self.xp, getattr(self, name), dtype) for name in ("q", "k", "v")}
        call = AttentionCall(self.arrangement, rows, self.key_mask, self.state, self.causal, self.options)
        call.restrictions = self.restrictions
        return call

    def part(
        self, *, queries: slice | None = None, keys: slice | None = None, state: State | None = None
    ) -> AttentionCall:
        """The call with these rows alone, and a state; without queries, or without keys, where None."""
        rows: dict[str, Array] = {} if queries is None else {"q": self.q[..., queries, :]}
        mask = None
        if keys is not None:
            rows |= {"k": self.k[..., keys, :], "v": self.v[..., keys, :]}
            mask = None if self.key_mask is None else self.key_mask[..., keys]
        return AttentionCall(self.arrangement, rows, mask, state, self.causal, self.options)

    def items(self, axis: int, start: int, stop: int) -> AttentionCall:
        """The call with some items of one axis of the batch, counted from the end of (..., n); the axis stays."""

        def cut(x: Array | None, tail: int) -> Array | None:
            if x is None or x.ndim < tail - axis - 1 or x.shape[axis + 1 - tail] == 1:
                return x
            return x[(..., slice(start, stop), *[slice(None)] * (tail - axis - 2))]

        rows = {name: cut(getattr(self, name), 2) for name in ("q", "k", "v")}
        options = {name: cut(x, 2) for name, x in self.options.items()}
        call = AttentionCall(self.arrangement, rows, cut(self.key_mask, 1), None, self.causal, options)
        call.restrictions = self.restrictions
        return call

    def with_keys(self, k: Array, v: Array, key_mask: Array | None) -> AttentionCall:
        """The call with these keys and values in place of its own, and without a state."""
        rows = {"q": self.q, "k": k, "v": v}
        return AttentionCall(self.arrangement, rows, key_mask, None, self.causal, self.options)

    def with_rows(self, q: Array, k: Array, options: ArrayOptions) -> AttentionCall:
        """The call with these queries and keys in place of its own, None where it has none, and these options."""
        rows = {"q": q, "k": k, "v": self.v}
        call = AttentionCall(self.arrangement, rows, self.key_mask, self.state, self.causal, options)
        call.restrictions = self.restrictions
        return call

    def leave_rows(self, out: Array, count: int) -> Array:
        """`out` of some rows, broadcast to the batch of the call."""
        return self.xp.broadcast_to(out, (*self.batch(out=out.shape[:-2]), count, out.shape[-1]))

    def computing(self) -> AbstractContextManager[Any]:
        """The context in which the call computes."""
        return self.arrangement.backend.computing(self.k if self.q is None else self.q)

    def batch(self, **others: tuple[int, ...]) -> tuple[int, ...]:
        """The common batch shape of the call's arrays and of `others`, all folded; ValueError names misfits."""
        own = {name: x.shape[:-2] for name in ("q", "k", "v") if (x := getattr(self, name)) is not None}
        if self.key_mask is not None:
            own["key_mask"] = self.key_mask.shape[:-1]
        if self.state is not None:
            own["state"] = next(iter(self.state.values())).shape[:-2]
        return broadcast_batch(**own, **others)

    def batch_of_keys(self) -> tuple[int, ...]:
        """The common batch shape of keys, values, mask and state, without that of queries."""
        own = AttentionCall(self.arrangement, {"k": self.k, "v": self.v}, self.key_mask, self.state, self.causal, {})
        return own.batch()

    def leave(self, out: Array, *, lse: bool = False) -> Array:
        """`out` in the dtype and shape that the caller gets.

        The batch may be larger than that of q, k and v: an option or a state may have more batch axes.
        """
        made = self.arrangement
        if out.shape == made.out_shape and out.dtype == made.out_dtype and made.heads.groups == 1:
            return out
        out = out if lse else cast(self.xp, out, made.out_dtype)  # a log-sum-exp stays in the compute dtype
        assert self.q is not None
        shape = (*self.batch(out=out.shape[:-2]), self.q.shape[-2], out.shape[-1])
        if tuple(out.shape) != shape:
            out = self.xp.broadcast_to(out, shape)
        return made.heads.unfold(out)

    def leave_state(self, state: State) -> State:
        """`state` with the folded heads joined again, as the caller gets it."""
        heads = self.arrangement.heads
        return state if heads.groups == 1 else {name: heads.unfold(x) for name, x in state.items()}


def enter(
    spec: StateSpec | None,
    rows: Mapping[str, Any],
    *,
    key_mask: Array | None = None,
    state: Mapping[str, Array] | None = None,
    causal: bool = False,
    scale: float | None = None,
    array_options: Callable[[ModuleType, Array], ArrayOptions] | None = None,
    owner: Any = None,
    as_stored: bool = False,
    given_options: ArrayOptions | None = None,
    recalled: Recalled | None = None,
) -> AttentionCall:
    """Check the arguments of a call and return them arranged, as an `AttentionCall`.

    With `as_stored`, q, k and v that have the same half precision stay as they are.

    `rows` has those of "q", "k" and "v" that this kind of call takes. `array_options(xp, like)` returns the method's
    options that are arrays (..., rows, d), checked; None if the method has none. Then, or with `given_options`, these
    arrays as they are before that, the arrangement can be remembered, for the method `owner`. `recalled` is what
    `recall` has found for these arguments, if it was asked before.
    """
    if recalled is None:
        recalled = NOTHING
        if array_options is None or given_options is not None:
            recalled = recall(owner, spec, rows, key_mask, state, causal, scale, as_stored, given_options)
    key, arrangement = recalled
    if arrangement is not None:
        call = AttentionCall(arrangement, rows, key_mask, state, causal, given_options or {})
        call.is_whole = True
        return call
    held = {} if state is None or spec is None else spec.check("state", state)
    xp = check_rows({"key_mask": key_mask, **held}, **rows)
    check_floating(xp, **held)
    causal = check_flag("causal", causal)
    like = next(iter(rows.values()))
    factor = float(like.shape[-1]) ** -0.5 if scale is None else check_scale(scale)
    mask = check_keys(rows.get("q"), rows["k"], rows["v"], key_mask, xp) if "k" in rows else None
    out_dtype = common_dtype(xp, *rows.values())
    compute = compute_dtype(xp, *rows.values(), *held.values())
    is_one = as_stored and all(x.dtype == like.dtype for x in rows.values())
    of_rows = stored_dtype(xp, like, compute) if is_one else compute
    untouched = mask is key_mask and all(x.dtype == of_rows for x in rows.values())
    untouched = untouched and all(x.dtype == compute for x in held.values())
    rows = {name: cast(xp, x, of_rows) for name, x in rows.items()}
    state = None if state is None else {name: cast(xp, x, compute) for name, x in state.items()}
    options: ArrayOptions = {}
    if array_options is not None:
        options = array_options(xp, _of_dtype(xp, next(iter(rows.values())), compute))
    heads = _find_heads(xp, rows, mask, state, options)
    if given_options is not None:
        untouched = untouched and all(x is given_options.get(name) for name, x in options.items())
    as_given = untouched and heads.groups == 1
    arrangement = Arrangement(xp, backend_of(xp), factor, heads, compute, out_dtype, None, as_given)
    call = AttentionCall(
        arrangement,
        {name: heads.fold(x) for name, x in rows.items()},
        heads.fold_mask(mask),
        None if state is None else {name: heads.fold(x) for name, x in state.items()},
        causal,
        {name: heads.fold(x) for name, x in options.items()},
    )
    batch = call.batch(**{name: x.shape[:-2] for name, x in call.options.items()})
    if key is not None:
        if len(KEPT) >= MAX_KEPT:
            KEPT.clear()
        values = call.v if state is None or call.v is not None else state.get("numerator")
        if call.q is not None and values is not None:
            arrangement = replace(arrangement, out_shape=(*batch, call.q.shape[-2], values.shape[-1]))
        made = arrangement.made
        KEPT[key] = replace(arrangement, owner=weakref.ref(owner, lambda _: made.clear()))
    return call


def _of_dtype(xp: ModuleType, rows: Array, dtype: Any) -> Array:
    """The rows, or one row of zeros in their place if they have another dtype."""
    return rows if rows.dtype == dtype else xp.zeros((1, rows.shape[-1]), dtype=dtype, device=place_of(rows))


def recall(
    owner: Any,
    spec: StateSpec | None,
    rows: Mapping[str, Any],
    key_mask: Array | None,
    state: Mapping[str, Array] | None,
    causal: Any,
    scale: Any,
    as_stored: bool,
    options: ArrayOptions | None,
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


def again(recalled: Recalled, q: Array, k: Array, v: Array, key_mask: Array | None, state: Any = None) -> Any:
    """What the caller gets in a call without restrictions that one kernel has computed before; else None."""
    found = recalled[1]
    run = None if found is None else found.made.get(AGAIN)
    return None if run is None else run(q, k, v, key_mask, state)


def _again(one: OneKernel, arrangement: Arrangement) -> Callable[..., Any] | None:
    """A function of (q, k, v, key_mask, state) that does what `AttentionCall.by_one_kernel` did in a call like these.

    It returns None where an option has other numbers by now, or an implementation is to be chosen anew.
    """
    run = one.kernel.again(arrangement, one.implementation, one.keywords)
    if run is None or not (one.weights or one.state):
        return None if run is None else lambda q, k, v, key_mask, state: run(q, k, v, key_mask=key_mask)
    names, weights = one.state, one.weights
    kept = tuple(arrangement.made.values())  # at once: another thread may add to them
    made = [x for x in kept if isinstance(x, Made) and x.option is not None]

    def again(q: Array, k: Array, v: Array, key_mask: Array | None, state: Any) -> Any:
        for x in made:
            if not x.holds():
                return None
        if not names:
            return run(q, k, v, *weights, key_mask=key_mask)
        held = [None if state is None else state[name] for name in names]
        found = run(q, k, v, *held, *weights, key_mask=key_mask)
        return None if found is None else (found[0], dict(zip(names, found[1:], strict=True)))

    return again


def _find_heads(
    xp: ModuleType, rows: Mapping[str, Array], mask: Array | None, state: State | None, options: ArrayOptions
) -> Heads:
    """The fold of a call, from the numbers of heads of its arrays.

    Keys and values have key heads; queries, masks and options may have query heads. Without keys (attend), the smallest
    number of heads among state and options is that of the keys.
    """
    if "k" in rows:
        keys = head_counts(rows["k"], rows["v"])
        if "q" in rows:
            return find_heads(xp, keys, head_counts(rows["q"]))
        per_query = keys + head_counts(mask, tail=1) + head_counts(*options.values())
        return find_heads(xp, keys, per_query, many="key_mask or an option")
    held = head_counts(*(state or {}).values(), *options.values())
    few, many = "the state and its options", "q, the state or an option"
    return find_heads(xp, [min(held)] if held else [], held + head_counts(rows["q"]), few=few, many=many)


def check_rows(others: Mapping[str, Array | None], **rows: Array) -> ModuleType:
    """The array namespace of q, k and v (as far as given) and of `others`.

    Raises TypeError for libraries and dtypes that do not fit, ValueError for devices, ranks and widths.
    """
    check_given(**rows)
    xp = check_arrays(**rows, **others)
    check_floating(xp, **rows)
    for name, x in rows.items():
        if x.ndim < 2:
            msg = f"{name} has shape {tuple(x.shape)}, expected (..., n, d) with at least two axes"
            raise ValueError(msg)
        if x.shape[-1] == 0 and name != "v":
            msg = f"{name} has no channels: shape {tuple(x.shape)}, expected (..., n, d) with d ≥ 1"
            raise ValueError(msg)
    q, k = rows.get("q"), rows.get("k")
    if q is not None and k is not None and q.shape[-1] != k.shape[-1]:
        msg = f"q has {q.shape[-1]} channels (last axis of {tuple(q.shape)}) but k has {k.shape[-1]} ({tuple(k.shape)})"
        raise ValueError(msg)
    return xp


def check_scale(scale: Any) -> float:
    """The scale as a finite float; TypeError for other types, ValueError for NaN and infinities."""
    return check_number(
        "scale", scale, why="; to scale by an array, multiply q and k by its square root, and pass scale=1"
    )


def check_keys(q: Array | None, k: Array, v: Array, key_mask: Array | None, xp: ModuleType) -> Array | None:
    """The mask broadcast to (..., n_kv), or None; ValueError unless k and v have the same number of rows."""
    if v.shape[-2] != k.shape[-2]:
        msg = (
            f"k has {k.shape[-2]} rows (axis −2 of {tuple(k.shape)}) but v has {v.shape[-2]} "
            f"({tuple(v.shape)}); every key needs one value"
        )
        raise ValueError(msg)
    if key_mask is None:
        return None
    mask = check_mask(xp, "key_mask", key_mask, k.shape[-2], "keys")
    check_mask_axes("key_mask", mask, k.shape[:-2], v.shape[:-2], *(() if q is None else (q.shape[:-2],)))
    return mask


def check_mask(xp: ModuleType, name: str, mask: Array, n: int, rows: str) -> Array:
    """The mask broadcast to (..., n); TypeError unless it is bool, ValueError unless it fits.

    `name` and `rows` ("keys" or "queries") are the words of the errors.
    """
    if not is_dtype(xp, mask.dtype, "bool"):
        msg = (
            f"{name} has dtype {mask.dtype}, expected bool with True = keep; "
            f"an additive mask becomes one by `mask == 0`, a 0/1 mask by `mask == 1`"
        )
        raise TypeError(msg)
    if mask.ndim == 0 or mask.shape[-1] not in (1, n):
        msg = (
            f"{name} has shape {tuple(mask.shape)}, expected (..., {n}): "
            f"its last axis runs over the {rows} (a mask over queries × keys is not supported)"
        )
        raise ValueError(msg)
    return mask if mask.shape[-1] == n else xp.broadcast_to(mask, (*mask.shape[:-1], n))
