"""Base of all attention methods: a frozen dataclass of options, which is called with q, k and v, and may keep a state.

The five calls of users are written here once: each checks its arguments by `enter`, runs the author's code, and returns
through `AttentionCall.leave`. The author of a method implements `_evaluate`; or, with a state, `_summarize` and
`_attend`, and `_step` if tokens can be processed one after the other: `_evaluate` then follows from these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, Literal

from subquad.attention.call import ArrayOptions, AttentionCall, enter
from subquad.attention.grouped_heads import find_heads, head_counts
from subquad.attention.options import Options
from subquad.attention.remembered import NOTHING, OneKernel, Recalled, again, keep_likeness, once_more, recall
from subquad.attention.restrictions import by_documents, by_frontiers, restrict
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_arrays, check_flag, check_floating, whole_call
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.core.states import State, StateSpec
from subquad.kernels.visibility import alignment

Merging = Callable[[ModuleType, State, State], State]
LOGITS = "it has no matrix of logits to change; 'exact' takes it"
UNABLE = {  # restriction → why a method cannot take it, if it cannot
    "segments": "it does not see documents apart",
    "visible": "it does not read the keys one part after the other; 'exact' and 'window' take it",
    "return_lse": "its weights are no exponentials of logits, or not all of them; 'exact' and 'window' return it",
    **dict.fromkeys(("mask", "bias", "softcap", "sinks"), LOGITS),
}


@dataclass(frozen=True, repr=False, eq=False)
class Method(Options):
    """Base of the attention methods. A method is called like a function; its fields are its options.

    Attributes
    ----------
    causal : True or str
        True if the method has a causal form, else the reason why it has none.
    state : StateSpec or None
        The arrays of the method's state; None for a method that cannot sum up keys in a fixed size.
    restrictions : frozenset of str
        The restrictions of `subquad.attention` that the method takes.
    reads : frozenset of str
        Those of them that it reads itself, in `_evaluate_with_lse`. Of the others, it runs once for each document, or
        once for each number of visible keys.
    """

    causal: ClassVar[Literal[True] | str] = True
    state: ClassVar[StateSpec | None] = None
    restrictions: ClassVar[frozenset[str]] = frozenset({"segments"})
    reads: ClassVar[frozenset[str]] = frozenset()

    @property
    def of_logits(self) -> bool:
        """Whether the weights are those of logits q·k: q and k may then have units that cancel."""
        return True

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
        segments: Array | tuple[Array, Array] | None = None,
        visible: Array | None = None,
        return_lse: bool = False,
        mask: Array | None = None,
        bias: Array | None = None,
        softcap: float | None = None,
        sinks: Array | None = None,
    ) -> Any:
        """Compute the output of this method for queries q, keys k and values v.

        Parameters
        ----------
        q : array, shape (..., n, d)
            Queries.
        k, v : array, shape (..., n_kv, d) and (..., n_kv, d_v)
            Keys and values.
        causal : bool, default False
            Query i sees the keys 0 … i + (n_kv − n).
        key_mask : array of bool, broadcastable to (..., n_kv), optional
            True = keep.
        scale : float, optional
            Factor of the logits q·k. Default: `default_scale`.
        segments, visible, return_lse, mask, bias, softcap, sinks : optional
            Restrictions of `subquad.attention`; a method takes those in its attribute `restrictions`.

        Returns
        -------
        out : array, shape (..., n, d_v)
            The output, in the common dtype of q, k and v.
        lse : array, shape (..., n)
            Only if `return_lse` is True.

        Raises
        ------
        TypeError, ValueError
            As `subquad.attention`, which describes the arguments in full.
        NotImplementedError
            If `causal` is True and the method has no causal form, or a restriction is given that it cannot take.
        """
        is_plain = segments is None and visible is None and mask is None and bias is None and sinks is None
        is_plain = is_plain and softcap is None and return_lse is False
        if is_plain and key_mask is None:
            out = once_more(self, (q, k, v), causal, scale)
            if out is not None:
                return out
        try:
            rows, factor, as_stored = {"q": q, "k": k, "v": v}, self.default_scale(scale), self._reads_half()
            holds, given_options, recalled = self._holds_arrays(), None, NOTHING
            if holds:
                given_options = self._given_options()
            if not holds or given_options is not None:
                recalled = recall(self, None, rows, key_mask, None, causal, factor, as_stored, given_options)
                out = again(recalled, (q, k, v), key_mask) if is_plain else None
                if out is not None:
                    return out
            call = enter(
                None,
                rows,
                key_mask=key_mask,
                causal=causal,
                scale=factor,
                array_options=self._array_options if holds else None,
                owner=self,
                as_stored=as_stored,
                given_options=given_options,
                recalled=recalled,
            )
        except TypeError as error:
            options = {
                "causal": causal, "key_mask": key_mask, "scale": scale, "segments": segments, "visible": visible,
                "return_lse": return_lse, "mask": mask, "bias": bias, "softcap": softcap, "sinks": sinks,
            }  # fmt: skip
            return whole_call(error, "attention", self, {"q": q, "k": k, "v": v}, options)
        if call.causal and self.causal is not True:
            raise NotImplementedError(self.causal)
        if is_plain and call.is_whole:
            out = call.by_one_kernel(self, self._kernel(call))
            if out is not None:
                if key_mask is None:
                    keep_likeness(call.arrangement, (q, k, v), causal, scale)
                return out
        with call.computing():
            if is_plain:
                return call.leave(self._evaluate(call))
            given = {"segments": segments, "visible": visible, "mask": mask, "bias": bias, "softcap": softcap}
            given = {name: x for name, x in (given | {"sinks": sinks}).items() if x is not None}
            return self._evaluate_restricted(call, given, check_flag("return_lse", return_lse))

    def summarize(self, k: Array, v: Array, /, *, key_mask: Array | None = None, scale: float | None = None) -> State:
        """Sum up a chunk of keys and values in a state, which `attend` reads and `merge` and `step` continue.

        Parameters
        ----------
        k, v : array, shape (..., n, d) and (..., n, d_v)
            Keys and values of the chunk.
        key_mask : array of bool, broadcastable to (..., n), optional
            True = keep.
        scale : float, optional
            Factor of the logits q·k. Default: `default_scale`.

        Returns
        -------
        dict of array
            "shift" (..., m or 1, 1), "numerator" (..., m, d_v) and "denominator" (..., m, 1), at least float32. Sums
            over keys are stored divided by exp(shift).

        Raises
        ------
        TypeError, ValueError
            As `subquad.attention`; ValueError also if an option depends on the whole sequence, such as ``center=True``.
        NotImplementedError
            If the method has no state.
        """
        self._check_streams("summarize")
        call = self._enter({"k": k, "v": v}, scale, key_mask=key_mask)
        with call.computing():
            return call.leave_state(self._summarize(call))

    def merge(self, left: State | None, right: State | None, /) -> State | None:
        """Merge the states of two chunks into the state of both.

        Parameters
        ----------
        left, right : dict of array, or None
            States that `summarize`, `merge` or `step` of this method returned; None stands for no keys.

        Returns
        -------
        dict of array, or None
            The state of all keys of both, associative up to rounding; None if both are None.

        Raises
        ------
        TypeError, ValueError
            If a state is not one of this method, or libraries, devices, sizes or batch shapes do not fit.
        NotImplementedError
            If the method has no state, or its states do not merge.
        """
        spec = self._check_streams("merge")
        given = {name: x for name, x in (("left", left), ("right", right)) if x is not None}
        arrays = {key: x for name, state in given.items() for key, x in spec.check(name, state).items()}
        if not arrays:
            return None
        xp = check_arrays(**arrays)
        check_floating(xp, **arrays)
        if left is None or right is None:
            return right if left is None else left
        merging = self._merging()
        if merging is None:
            msg = f"states of {type(self).__name__} do not merge; step goes on from one"
            raise NotImplementedError(msg)
        spec.check_sizes("left", left)
        spec.check_sizes("right", right, **spec.sizes_of(left))
        some = {name: head_counts(*state.values()) for name, state in given.items()}
        few, many = sorted(some, key=lambda name: max([1, *some[name]]))
        heads = find_heads(xp, some[few], some[many], few=f"the arrays of {few}", many=many)
        left, right = ({name: heads.fold(x) for name, x in state.items()} for state in (left, right))
        first = next(iter(spec.fields))
        broadcast_batch(left=left[first].shape[:-2], right=right[first].shape[:-2])
        with backend_of(xp).computing(left[first]):
            merged = merging(xp, left, right)
        return {name: heads.unfold(x) for name, x in merged.items()}

    def attend(self, q: Array, state: Mapping[str, Any], /, *, scale: float | None = None) -> Array:
        """Compute the output of queries that see all keys of a state.

        Parameters
        ----------
        q : array, shape (..., n, d)
            Queries.
        state : dict of array
            A state that `summarize`, `merge` or `step` of this method returned.
        scale : float, optional
            Factor of the logits q·k, the one that the state was made with. Default: `default_scale`.

        Returns
        -------
        array, shape (..., n, d_v)
            The output, in the dtype of `q`.

        Raises
        ------
        TypeError, ValueError
            As `subquad.attention`, and for a state whose fields or sizes do not fit.
        NotImplementedError
            If the method has no state, or an option needs more than a state.
        """
        self._check_streams("attend")
        call = self._enter({"q": q}, scale, state=_given(state))
        with call.computing():
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
        """Process new tokens causally after a state: compute their output, and the state that includes them.

        Parameters
        ----------
        q, k : array, shape (..., n, d)
            Queries and keys of the n new tokens, n ≥ 0.
        v : array, shape (..., n, d_v)
            Values of the new tokens.
        state : dict of array, optional
            The state before the new tokens. Default: None, no tokens before.
        key_mask : array of bool, broadcastable to (..., n), optional
            True = keep; hides keys among the new tokens.
        scale : float, optional
            Factor of the logits q·k, the one that the state was made with. Default: `default_scale`.

        Returns
        -------
        out : array, shape (..., n, d_v)
            The output, in the common dtype of q, k and v: token i sees the state and the new tokens 0 … i.
        state : dict of array
            The state after the new tokens; the arrays given are not written to.

        Raises
        ------
        TypeError, ValueError
            As `subquad.attention`; ValueError also for different numbers of queries and keys.
        NotImplementedError
            If the method has no step.
        """
        if type(self)._step is Method._step:
            self._no_such_call("step")
        rows, recalled = {"q": q, "k": k, "v": v}, None
        if not self._holds_arrays(streaming=True):
            factor, as_stored = self.default_scale(scale), self._reads_half(streaming=True)
            recalled = recall(self, self.state, rows, key_mask, state, True, factor, as_stored, None)
            found = again(recalled, (q, k, v, state), key_mask)
            if found is not None:
                return found
        call = self._enter(rows, scale, key_mask=key_mask, state=state, causal=True, recalled=recalled)
        if q.shape[-2] != k.shape[-2]:
            msg = f"step takes one key per query, got {q.shape[-2]} queries and {k.shape[-2]} keys"
            raise ValueError(msg)
        if call.is_whole:
            found = call.by_one_kernel(self, self._step_kernel(call))
            if found is not None:
                return found
        with call.computing():
            out, after = self._step(call)
        return call.leave(out), call.leave_state(after)

    def default_scale(self, scale: float | None) -> float | None:
        """Return the scale that a call uses.

        Parameters
        ----------
        scale : float or None
            The argument of the call; None if the user gave none.

        Returns
        -------
        float or None
            The scale; None stands for d ** -0.5. A method with another default overrides this function.
        """
        return scale

    def why_no_matrix(self) -> str | None:
        """Return why the output is not W v with a matrix W that q and k alone decide, or None.

        Returns
        -------
        str or None
            The reason, by default None.
        """
        return None

    def _extra_bytes(self, call: AttentionCall) -> int | None:
        """The most memory that `_evaluate` takes beyond inputs and output, in bytes; None if it is not known."""
        return None

    def _reads_half(self, *, streaming: bool = False) -> bool:
        """Whether q, k and v may come in half precision, to `_evaluate` or to the parts of calls with a state.

        The output may then have it too.
        """
        return False

    def _kernel(self, call: AttentionCall) -> OneKernel | None:
        """The kernel that computes the output of q, k, v and the mask by itself; None if none does.

        It follows from the arrangement of the call, whether it is causal, and whether it has a mask.
        """
        return None

    def _step_kernel(self, call: AttentionCall) -> OneKernel | None:
        """The kernel that computes a step by itself, of new tokens and the arrays of a state; None if none does."""
        return None

    def _enter(
        self, arrays: dict[str, Array], scale: float | None, *, key_mask: Array | None = None,
        state: Mapping[str, Any] | None = None, causal: bool = False, recalled: Recalled | None = None,
    ) -> AttentionCall:  # fmt: skip
        """`enter` for the calls that make or read a state."""
        return enter(
            self.state, arrays, key_mask=key_mask, state=state, causal=causal, scale=self.default_scale(scale),
            array_options=self._array_options if self._holds_arrays(streaming=True) else None, owner=self,
            as_stored=self._reads_half(streaming=True), recalled=recalled,
        )  # fmt: skip

    def _evaluate_restricted(self, call: AttentionCall, given: dict[str, Any], return_lse: bool) -> Any:
        """The output, and its log-sum-exp if asked for, of a call with these restrictions."""
        names = [*given, *(["return_lse"] if return_lse else [])]
        for name in names:
            if name not in self.restrictions:
                msg = f"{type(self).__name__} cannot take {name}: {UNABLE[name]}"
                raise NotImplementedError(msg)
        call = restrict(call, **given)
        if self.reads.issuperset(names):
            out, lse = self._evaluate_with_lse(call)
            return (call.leave(out), call.leave(lse[..., None], lse=True)[..., 0]) if return_lse else call.leave(out)
        if len(names) > 1:
            msg = f"{type(self).__name__} takes segments or visible, not both: it runs once for each"
            raise NotImplementedError(msg)
        if names == ["segments"]:
            return call.leave(by_documents(call, self._evaluate))
        self._check_streams("visible")
        merging = self._merging()
        assert merging is not None
        return call.leave(by_frontiers(call, self._summarize, partial(merging, call.xp), self._attend))

    def _evaluate_with_lse(self, call: AttentionCall) -> tuple[Array, Array]:
        """(output, log-sum-exp) of a call with `restrictions`, all of them in `reads`."""
        raise NotImplementedError

    def _evaluate(self, call: AttentionCall) -> Array:
        """The output (..., n, d_v) of checked arrays, in the compute dtype; here computed by way of the state."""
        if not call.causal:
            return self._attend(call.part(queries=slice(None), state=self._summarize(call)))
        ahead, early = alignment(call.q.shape[-2], call.k.shape[-2])
        state = self._summarize(call.part(keys=slice(None, ahead))) if ahead else None
        out, _ = self._step(call.part(queries=slice(early, None), keys=slice(ahead, None), state=state))
        return before_first_key(call.xp, out, early)

    def _summarize(self, call: AttentionCall) -> State:
        """The state of checked keys and values."""
        raise NotImplementedError

    def _merging(self) -> Merging | None:
        """What makes the state of two chunks of their checked states; None if states do not merge."""
        return None if self.state is None else self.state.merge

    def _attend(self, call: AttentionCall) -> Array:
        """The output for checked queries that read `call.state`."""
        raise NotImplementedError

    def _step(self, call: AttentionCall) -> tuple[Array, State]:
        """(output of checked new tokens, state after them); `call.state` is the state before them, or None."""
        raise NotImplementedError

    def _holds_arrays(self, *, streaming: bool = False) -> bool:
        """Whether the call uses `_array_options`; `streaming` is True for the calls that make or read a state."""
        return False

    def _array_options(self, xp: ModuleType, like: Array) -> ArrayOptions:
        """The options that are arrays (..., rows, d), by name: checked, in the dtype and on the device of `like`."""
        return {}

    def _given_options(self) -> ArrayOptions | None:
        """What `_array_options` returns where nothing has to be changed; None: not known without a look at a call."""
        return None

    def _check_streams(self, call: str) -> StateSpec:
        """The specification of the method's state; NotImplementedError, naming the call, if the method has no state."""
        if self.state is None or type(self)._summarize is Method._summarize:
            self._no_such_call(call)
        assert self.state is not None
        return self.state

    def _no_such_call(self, call: str) -> None:
        reason = "it does not read the keys through a state of fixed size"
        if call == "step" and self.state is not None and self.causal is not True:
            reason = self.causal
        msg = f"{type(self).__name__} has no {call}: {reason}"
        raise NotImplementedError(msg)


def before_first_key(xp: ModuleType, out: Array, early: int) -> Array:
    """The output with rows of zeros before it, for queries that have their place before the first key."""
    if not early:
        return out
    zeros = xp.zeros((*out.shape[:-2], early, out.shape[-1]), dtype=out.dtype, device=place_of(out))
    return xp.concat([zeros, out], axis=-2)


def _given(state: Any) -> Any:
    """The state given; TypeError if it is None."""
    if state is None:
        msg = "state is a NoneType, expected the dict that summarize, merge or step returned"
        raise TypeError(msg)
    return state
