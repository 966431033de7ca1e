"""The one door of attention: `enter` checks and arranges the arrays of a call, `AttentionCall.leave` undoes it.

An `Arrangement` holds everything that follows from the shapes and dtypes of a call: scale, grouping of heads, dtypes.
It is found once for each signature, and `remembered`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from types import ModuleType
from typing import Any

from subquad.attention.checks import check_keys, check_rows, check_scale
from subquad.attention.grouped_heads import Heads, find_heads, head_counts
from subquad.attention.remembered import (
    NOTHING,
    Arrangement,
    OneKernel,
    Recalled,
    keep_kernel,
    kept_with,
    may_keep,
    recall,
    remember,
)
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_flag, check_floating
from subquad.core.dtypes import cast, common_dtype, compute_dtype, stored_dtype
from subquad.core.kernel import Kernel
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.core.states import State, StateSpec

ArrayOptions = Mapping[str, Array]


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
            keep_kernel(one, self.arrangement)
        return (left, self.leave_state(dict(zip(one.state, after, strict=True)))) if one.state else left

    def made_of(self, method: Any, name: str, option: Array | None, make: Callable[[], Any]) -> Any:
        """What `make()` makes of the numbers of an option that is an array; with None, of the call's signature alone.

        In a remembered call of `method` it is made again only if the option is not what it was, number by number.
        """
        if not self.is_whole or self.arrangement.owner() is not method:
            return make()
        kept = self.arrangement.made
        found = kept.get(name)
        if found is None or not found.holds():
            self.is_whole = may_keep(option, found)
            if not self.is_whole:
                return make()
            found = kept[name] = kept_with(option, make)
        return found.made

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
        values = call.v if state is None or call.v is not None else state.get("numerator")
        if call.q is not None and values is not None:
            arrangement = replace(arrangement, out_shape=(*batch, call.q.shape[-2], values.shape[-1]))
        remember(key, owner, arrangement)
    return call


def _of_dtype(xp: ModuleType, rows: Array, dtype: Any) -> Array:
    """The rows, or one row of zeros in their place if they have another dtype."""
    return rows if rows.dtype == dtype else xp.zeros((1, rows.shape[-1]), dtype=dtype, device=place_of(rows))


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
