"""What every attention method is: a frozen dataclass of options that can be called, and may keep a state.

The calls of users stand here, once; each goes through `enter` and leaves by the same door. An author gives `_evaluate`;
or, for a method with a state, `_summarize`, `_attend` and `_step`, as far as it has them, and `_evaluate` follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Literal

from array_api_compat import device

from subquad.attention.call import ArrayOptions, AttentionCall, enter
from subquad.attention.grouped_heads import find_heads, head_counts
from subquad.backend import Array
from subquad.core.checks import check_arrays, check_floating
from subquad.core.shapes import broadcast_batch
from subquad.core.states import State, StateSpec
from subquad.kernels.visibility import alignment


@dataclass(frozen=True, repr=False)
class Method:
    """Base of the methods.

    Attributes
    ----------
    causal : True or str
        True, or the reason why there is no causal form.
    state : StateSpec or None
        The arrays of its state, where it reads the keys through one of fixed size.
    """

    causal: ClassVar[Literal[True] | str] = True
    state: ClassVar[StateSpec | None] = None

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
        call = enter(
            None,
            {"q": q, "k": k, "v": v},
            key_mask=key_mask,
            causal=causal,
            scale=self.default_scale(scale),
            array_options=self._array_options if self._holds_arrays() else None,
        )
        if call.causal and self.causal is not True:
            raise NotImplementedError(self.causal)
        with call.full_precision():
            return call.leave(self._evaluate(call))

    def summarize(self, k: Array, v: Array, /, *, key_mask: Array | None = None, scale: float | None = None) -> State:
        """What a chunk of keys (..., n, d) and values (..., n, d_v) leaves behind: a dict of small arrays."""
        self._check_streams("summarize")
        call = enter(
            self.state,
            {"k": k, "v": v},
            key_mask=key_mask,
            scale=self.default_scale(scale),
            array_options=self._array_options if self._holds_arrays(streaming=True) else None,
        )
        with call.full_precision():
            return call.leave_state(self._summarize(call))

    def merge(self, left: State | None, right: State | None, /) -> State | None:
        """The state of both chunks together; None stands for no keys."""
        spec = self._check_streams("merge")
        given = {name: x for name, x in (("left", left), ("right", right)) if x is not None}
        arrays = {key: x for name, state in given.items() for key, x in spec.check(name, state).items()}
        if not arrays:
            return None
        xp = check_arrays(**arrays)
        check_floating(xp, **arrays)
        if left is None or right is None:
            return right if left is None else left
        if spec.merge is None:
            msg = f"states of {type(self).__name__} do not merge; step goes on from one"
            raise NotImplementedError(msg)
        spec.check_sizes("left", left)
        spec.check_sizes("right", right, **spec.sizes_of(left))
        some = {name: head_counts(*state.values()) for name, state in given.items()}
        few, many = sorted(some, key=lambda name: max(some[name], default=1))
        heads = find_heads(xp, some[few], some[many], few=f"the arrays of {few}", many=many)
        left, right = ({name: heads.fold(x) for name, x in state.items()} for state in (left, right))
        first = next(iter(spec.fields))
        broadcast_batch(left=left[first].shape[:-2], right=right[first].shape[:-2])
        return {name: heads.unfold(x) for name, x in spec.merge(xp, left, right).items()}

    def attend(self, q: Array, state: Mapping[str, Any], /, *, scale: float | None = None) -> Array:
        """The output for queries (..., n, d) that read a state: shape (..., n, d_v), dtype of q."""
        self._check_streams("attend")
        call = enter(
            self.state,
            {"q": q},
            state=_given(state),
            scale=self.default_scale(scale),
            array_options=self._array_options if self._holds_arrays(streaming=True) else None,
        )
        with call.full_precision():
            return call.leave(self._attend(call))

    def step(
        self,
        q: Array,
        k: Array,
        v: Array,
        state: Mapping[str, Any] | None = None,
        /,
        *,
        key_mask: Array | None = None,
        scale: float | None = None,
    ) -> tuple[Array, State]:
        """Any number of new tokens after `state`, causally: their output, and the state that includes them."""
        if type(self)._step is Method._step:
            self._no_such_call("step")
        call = enter(
            self.state,
            {"q": q, "k": k, "v": v},
            key_mask=key_mask,
            state=state,
            causal=True,
            scale=self.default_scale(scale),
            array_options=self._array_options if self._holds_arrays(streaming=True) else None,
        )
        if q.shape[-2] != k.shape[-2]:
            msg = f"step takes one key per query, got {q.shape[-2]} queries and {k.shape[-2]} keys"
            raise ValueError(msg)
        with call.full_precision():
            out, after = self._step(call)
        return call.leave(out), call.leave_state(after)

    def default_scale(self, scale: float | None) -> float | None:
        """The scale to use where none is given; None is d ** -0.5."""
        return scale

    def _evaluate(self, call: AttentionCall) -> Array:
        """The output for checked arrays; here by what the method does to its state."""
        if not call.causal:
            return self._attend(call.part(queries=slice(None), state=self._summarize(call)))
        ahead, early = alignment(call.q.shape[-2], call.k.shape[-2])
        state = self._summarize(call.part(keys=slice(None, ahead))) if ahead else None
        out, _ = self._step(call.part(queries=slice(early, None), keys=slice(ahead, None), state=state))
        return before_first_key(call.xp, out, early)

    def _summarize(self, call: AttentionCall) -> State:
        """The state of checked keys and values."""
        raise NotImplementedError

    def _attend(self, call: AttentionCall) -> Array:
        """The output for checked queries that read `call.state`."""
        raise NotImplementedError

    def _step(self, call: AttentionCall) -> tuple[Array, State]:
        """The output of checked new tokens, and the state after them; `call.state` is the one before, or None."""
        raise NotImplementedError

    def _holds_arrays(self, *, streaming: bool = False) -> bool:
        """Whether `_array_options` has anything to say."""
        return False

    def _array_options(self, xp: ModuleType, like: Array) -> ArrayOptions:
        """Options that are arrays of rows (..., rows, d), checked, beside `like`."""
        return {}

    def _in_force(self) -> dict[str, Any]:
        """The options that take effect, with their values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __repr__(self) -> str:
        words = ", ".join(f"{name}={_shown(value)}" for name, value in self._in_force().items())
        return f"{type(self).__qualname__}({words})"

    def _check_streams(self, call: str) -> StateSpec:
        """The specification of the state of a method that reads the keys through one."""
        if self.state is None or type(self)._summarize is Method._summarize:
            self._no_such_call(call)
        assert self.state is not None
        return self.state

    def _no_such_call(self, call: str) -> None:
        msg = f"{type(self).__name__} has no {call}: it does not read the keys through a state of fixed size"
        raise NotImplementedError(msg)


def before_first_key(xp: ModuleType, out: Array, early: int) -> Array:
    """The output with rows of zeros before it, for queries that have their place before the first key."""
    if not early:
        return out
    zeros = xp.zeros((*out.shape[:-2], early, out.shape[-1]), dtype=out.dtype, device=device(out))
    return xp.concat([zeros, out], axis=-2)


def _given(state: Any) -> Any:
    """The state that a call must be given; TypeError for None."""
    if state is None:
        msg = "state is a NoneType, expected the dict that summarize, merge or step returned"
        raise TypeError(msg)
    return state


def _shown(value: Any) -> str:
    """How `repr` shows an option: an array by its shape and dtype."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{tuple(value.shape)} {value.dtype}>"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)
