"""Methods defined by a feature map: the map alone gives attention, causal or not, and all calls that use a state."""

from __future__ import annotations

from dataclasses import dataclass

from subquad.attention.call import AttentionCall
from subquad.attention.method import Method, before_first_key
from subquad.attention.remembered import OneKernel
from subquad.backend import Array
from subquad.core.kernel import Kernel
from subquad.core.states import State, StateSpec, merge_by_shift
from subquad.kernels.feature_attention import feature_attend, feature_step, feature_summarize
from subquad.kernels.feature_map import FeatureMap
from subquad.kernels.feature_whole import NO_KEYS, feature_whole
from subquad.kernels.visibility import alignment

Mapped = tuple[FeatureMap, tuple[Array, ...]]  # a map and its weights


@dataclass(frozen=True, repr=False, eq=False)
class FeatureMethod(Method):
    """Base of the methods defined by a feature map; a subclass implements `_map`.

    out[i] = φ(q[i])ᵀ Σ_j φ(k[j]) v[j]ᵀ / φ(q[i])ᵀ Σ_j φ(k[j])
    """

    restrictions = frozenset({"segments", "visible"})
    state = StateSpec({"shift": ("width", 1), "numerator": ("m", "d_v"), "denominator": ("m", 1)}, merge_by_shift)

    def _prepare(self, call: AttentionCall) -> AttentionCall:
        """The call that `_map` is given and whose queries and keys it maps: by default the one of the user."""
        return call

    def _map(self, call: AttentionCall) -> Mapped:
        """(feature map, its weights) for the arrays of a call."""
        raise NotImplementedError

    def _keeps_map(self) -> bool:
        """Whether calls of one arrangement have one map, whose weights `AttentionCall.made_of` keeps."""
        return False

    def _kernel(self, call: AttentionCall) -> OneKernel | None:
        return None if call.causal else self._of_kept_map(call, feature_whole)

    def _step_kernel(self, call: AttentionCall) -> OneKernel | None:
        assert self.state is not None
        return self._of_kept_map(call, feature_step, tuple(self.state.fields))

    def _of_kept_map(self, call: AttentionCall, kernel: Kernel, state: tuple[str, ...] = ()) -> OneKernel | None:
        """The kernel that computes a call by itself, if the map is kept."""
        if not self._keeps_map():
            return None
        with call.computing():
            phi, weights = self._map(call)
            if call.state is not None:
                self._state(call, phi, weights)
        return OneKernel(kernel, "auto", {"phi": phi}, weights, state)

    def _evaluate(self, call: AttentionCall) -> Array:
        call = self._prepare(call)
        phi, weights = self._map(call)
        q, k, v, key_mask = call.q, call.k, call.v, call.key_mask
        if not call.causal:
            return call.run(self, feature_whole, q, k, v, *weights, phi=phi, key_mask=key_mask)
        ahead, early = alignment(q.shape[-2], k.shape[-2])
        state = NO_KEYS
        if ahead:  # keys before the place of the first query: every row sees them
            mask = None if key_mask is None else key_mask[..., :ahead]
            head = k[..., :ahead, :], v[..., :ahead, :]
            state = call.run(self, feature_summarize, *head, *NO_KEYS, *weights, phi=phi, key_mask=mask)
            k, v = k[..., ahead:, :], v[..., ahead:, :]
            key_mask = None if key_mask is None else key_mask[..., ahead:]
        if early:  # queries before the place of the first key see nothing: their output is 0
            q = q[..., early:, :]
        out, *_ = call.run(self, feature_step, q, k, v, *state, *weights, phi=phi, key_mask=key_mask)
        return before_first_key(call.xp, out, early)

    def _summarize(self, call: AttentionCall) -> State:
        call = self._prepare(call)
        phi, weights = self._map(call)
        return _named(
            call.run(self, feature_summarize, call.k, call.v, *NO_KEYS, *weights, phi=phi, key_mask=call.key_mask)
        )

    def _attend(self, call: AttentionCall) -> Array:
        call = self._prepare(call)
        phi, weights = self._map(call)
        return call.run(self, feature_attend, call.q, *self._state(call, phi, weights), *weights, phi=phi)

    def _step(self, call: AttentionCall) -> tuple[Array, State]:
        call = self._prepare(call)
        phi, weights = self._map(call)
        state = NO_KEYS if call.state is None else self._state(call, phi, weights)
        out, *after = call.run(
            self, feature_step, call.q, call.k, call.v, *state, *weights, phi=phi, key_mask=call.key_mask
        )
        return out, _named(after)

    def _state(self, call: AttentionCall, phi: FeatureMap, weights: tuple[Array, ...]) -> tuple[Array, ...]:
        """(shift, numerator, denominator) of the call's state; ValueError unless they fit the map and the values."""
        state = call.state
        assert state is not None
        m, width = phi.sizes(call.q.shape[-1], *weights)
        sizes = {"m": m, "width": width} | ({} if call.v is None else {"d_v": call.v.shape[-1]})
        call.made_of(self, "sizes of the state", None, lambda: self.state.check_sizes("state", state, **sizes))
        return state["shift"], state["numerator"], state["denominator"]


def _named(state: tuple[Array, ...] | list[Array]) -> State:
    shift, numerator, denominator = state
    return {"shift": shift, "numerator": numerator, "denominator": denominator}
