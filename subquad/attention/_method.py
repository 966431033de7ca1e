"""What every attention method is: a frozen dataclass of options that can be called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from subquad import _arrays
from subquad._dispatch import Array
from subquad.attention import _door

State = dict[str, Any]


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

    def summarize(self, k: Array, v: Array, /, *, key_mask: Array | None = None, scale: float | None = None) -> State:
        """What a chunk of keys (..., n, d) and values (..., n, d_v) leaves behind: a dict of small arrays."""
        xp = _arrays.check_arrays(k=k, v=v, key_mask=key_mask)
        _arrays.check_floating(xp, k=k, v=v)
        _door.check_keys(k, v, key_mask, xp)
        scale = _door.check_scale(self.default_scale(scale), _door.check_widths(k, k))
        dtype = _arrays.compute_dtype(xp, k, v)
        return self.summarize_keys(
            xp, _arrays.cast(xp, k, dtype), _arrays.cast(xp, v, dtype), key_mask=key_mask, scale=scale
        )

    def merge(self, left: State | None, right: State | None, /) -> State | None:
        """The state of both chunks together; None stands for no keys."""
        if left is None or right is None:
            return right if left is None else left
        xp = _arrays.check_arrays(
            **{f"left[{name!r}]": x for name, x in left.items()}, **{f"right[{name!r}]": x for name, x in right.items()}
        )
        return self.merge_states(xp, left, right)

    def attend(self, q: Array, state: Mapping[str, Any], /, *, scale: float | None = None) -> Array:
        """Read the state with queries (..., n, d): shape (..., n, d_v), dtype of q."""
        xp = _arrays.check_arrays(q=q, **state)
        _arrays.check_floating(xp, q=q)
        scale = _door.check_scale(self.default_scale(scale), _door.check_widths(q, q))
        held = next(iter(state.values()))
        grouped = q.ndim >= 3 and held.ndim >= 3 and held.shape[-3] not in (1, q.shape[-3]) and q.shape[-3] > 1
        ungrouped = q
        if grouped:
            if q.shape[-3] % held.shape[-3]:
                msg = f"q has {q.shape[-3]} heads and the state {held.shape[-3]}, which must divide them"
                raise ValueError(msg)
            q = _door.split_heads(xp, q, held.shape[-3])
            state = {name: xp.expand_dims(x, axis=-3) for name, x in state.items()}
        out = self.read_state(xp, _arrays.cast(xp, q, _arrays.compute_dtype(xp, q, held)), state, scale=scale)
        out = _arrays.cast(xp, out, ungrouped.dtype)
        return _door.merge_heads(xp, out) if grouped else out

    def summarize_keys(self, xp: ModuleType, k: Array, v: Array, *, key_mask: Array | None, scale: float) -> State:
        raise NotImplementedError

    def merge_states(self, xp: ModuleType, left: State, right: State) -> State:
        raise NotImplementedError

    def read_state(self, xp: ModuleType, q: Array, state: Mapping[str, Any], *, scale: float) -> Array:
        raise NotImplementedError
