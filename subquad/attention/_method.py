"""What every attention method is: a frozen dataclass of options that can be called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from subquad import _arrays
from subquad._dispatch import Array, backend_of
from subquad.attention import _door
from subquad.attention._heads import Pair, counts, find_heads
from subquad.kernels._online import State


@dataclass(frozen=True)
class Method:
    """Base of the methods. A method implements `evaluate`."""

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        /,
        *,
        causal: bool = False,
        key_mask: Array | None = None,
        scale: float | None = None,
    ) -> Array:
        """The method's output for queries q, keys k and values v; arguments as `subquad.attention`."""
        inputs = _door.enter(q, k, v, causal=causal, key_mask=key_mask, scale=self.default_scale(scale))
        with backend_of(inputs.xp).full_precision(inputs.q):
            return inputs.leave(self.evaluate(inputs))

    def default_scale(self, scale: float | None) -> float | None:
        """The scale to use where none is given; None is d ** -0.5."""
        return scale

    def evaluate(self, inputs: _door.Inputs) -> Array:
        raise NotImplementedError


class Streaming(Method):
    """A method that reads the keys through a state of fixed size.

    A state is a dict of arrays, each with two axes after the batch axes; `merge` is associative, and None is its
    identity. `attend(q, merge(summarize(k₁, v₁), summarize(k₂, v₂)))` is the method on the joined keys.
    """

    holds: ClassVar[tuple[str, ...]]  # names of the arrays of a state

    def summarize(self, k: Array, v: Array, /, *, key_mask: Array | None = None, scale: float | None = None) -> State:
        """What a chunk of keys (..., n, d) and values (..., n, d_v) leaves behind: a dict of small arrays."""
        xp = _door.check_rows({"key_mask": key_mask}, k=k, v=v)
        key_mask = _door.check_keys(k, v, key_mask, xp)
        scale = _door.check_scale(self.default_scale(scale), k.shape[-1])
        dtype = _arrays.compute_dtype(xp, k, v)
        k, v = _arrays.cast(xp, k, dtype), _arrays.cast(xp, v, dtype)
        pair, keys = self.given_rows(xp, k), counts(k, v)
        per_query = keys | counts(key_mask, tail=1) | counts(*pair or ())
        heads = find_heads(xp, keys, per_query, many="key_mask or an option")
        k, v, key_mask, pair = heads.fold(k), heads.fold(v), heads.fold_mask(key_mask), heads.fold_pair(pair)
        with backend_of(xp).full_precision(k):
            state = self.summarize_keys(xp, k, v, key_mask=key_mask, scale=scale, pair=pair)
        return {name: heads.unfold(x) for name, x in state.items()}

    def merge(self, left: State | None, right: State | None, /) -> State | None:
        """The state of both chunks together; None stands for no keys."""
        given = {name: x for name, x in (("left", left), ("right", right)) if x is not None}
        arrays = {
            key: x for name, state in given.items() for key, x in _door.check_state(name, state, self.holds).items()
        }
        if not arrays:
            return None
        xp = _arrays.check_arrays(**arrays)
        _arrays.check_floating(xp, **arrays)
        if left is None or right is None:
            return right if left is None else left
        _door.check_tails("right", right, {name: tuple(x.shape[-2:]) for name, x in left.items()})
        some = {name: counts(*state.values()) for name, state in given.items()}
        few, many = sorted(some, key=lambda name: max(some[name], default=1))
        heads = find_heads(xp, some[few], some[many], few=f"the arrays of {few}", many=many)
        left, right = ({name: heads.fold(x) for name, x in state.items()} for state in (left, right))
        _arrays.broadcast_batch(left=left[self.holds[0]].shape[:-2], right=right[self.holds[0]].shape[:-2])
        return {name: heads.unfold(x) for name, x in self.merge_states(xp, left, right).items()}

    def attend(self, q: Array, state: Mapping[str, Any], /, *, scale: float | None = None) -> Array:
        """Read the state with queries (..., n, d): shape (..., n, d_v), dtype of q."""
        arrays = _door.check_state("state", state, self.holds)
        xp = _door.check_rows(arrays, q=q)
        _arrays.check_floating(xp, **arrays)
        scale = _door.check_scale(self.default_scale(scale), q.shape[-1])
        out_dtype, dtype = q.dtype, _arrays.compute_dtype(xp, q, *state.values())
        q, state = _arrays.cast(xp, q, dtype), {name: _arrays.cast(xp, x, dtype) for name, x in state.items()}
        pair = self.given_rows(xp, q)
        held = counts(*state.values(), *pair or ())
        few, many = "the state and its options", "q, the state or an option"
        heads = find_heads(xp, {min(held, default=1)}, held | counts(q), few=few, many=many)
        q, state = heads.fold(q), {name: heads.fold(x) for name, x in state.items()}
        _arrays.broadcast_batch(q=q.shape[:-2], state=next(iter(state.values())).shape[:-2])
        with backend_of(xp).full_precision(q):
            out = self.read_state(xp, q, state, scale=scale, pair=heads.fold_pair(pair))
        return heads.unfold(_arrays.cast(xp, out, out_dtype))

    def given_rows(self, xp: ModuleType, like: Array) -> Pair:
        """The option that is a pair of rows (..., rows, d), for q and for k, beside `like`."""
        return None

    def summarize_keys(
        self, xp: ModuleType, k: Array, v: Array, *, key_mask: Array | None, scale: float, pair: Pair
    ) -> State:
        """The state of checked keys; `pair` is what `given_rows` gave, folded like them."""
        raise NotImplementedError

    def merge_states(self, xp: ModuleType, left: State, right: State) -> State:
        raise NotImplementedError

    def read_state(self, xp: ModuleType, q: Array, state: Mapping[str, Any], *, scale: float, pair: Pair) -> Array:
        raise NotImplementedError
