"""Methods that see queries and keys through features: the calls that FAVOR+ and linear attention share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from subquad._arrays import cast, check_arrays, check_floating, compute_dtype
from subquad._dispatch import Array, backend_of
from subquad.attention import _door
from subquad.attention._heads import Pair
from subquad.attention._method import Streaming
from subquad.kernels._feature_map import Center, FeatureMap
from subquad.kernels._online import State
from subquad.kernels.feature_product import absorb, advance, feature_product, merge, no_keys, read


@dataclass(frozen=True)
class FeatureMethod(Streaming):
    """A method defined by a feature map. A subclass gives `map_rows`."""

    holds = ("shift", "kv", "k")

    def map_rows(self, xp: ModuleType, like: Array, *, scale: float, center: Center) -> FeatureMap:
        """The map of rows to features, for arrays of the width, dtype and device of `like`."""
        raise NotImplementedError

    def choose_center(self, inputs: _door.Inputs) -> Center:
        """Points to subtract from queries and keys."""
        pair = inputs.heads.fold_pair(self.given_rows(inputs.xp, inputs.q))
        if pair is not None:
            inputs.batch(q_mean=pair[0].shape[:-2], k_mean=pair[1].shape[:-2])
        return pair

    def evaluate(self, inputs: _door.Inputs) -> Array:
        phi = self.map_rows(inputs.xp, inputs.q, scale=inputs.scale, center=self.choose_center(inputs))
        return feature_product(inputs.q, inputs.k, inputs.v, phi=phi, causal=inputs.causal, key_mask=inputs.key_mask)

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
        inputs = _door.enter(q, k, v, causal=True, key_mask=key_mask, scale=self.default_scale(scale))
        xp = inputs.xp
        if q.shape[-2] != k.shape[-2]:
            msg = f"step takes one key per query, got {q.shape[-2]} queries and {k.shape[-2]} keys"
            raise ValueError(msg)
        if state is not None:
            arrays = _door.check_state("state", state, self.holds)
            check_arrays(q=q, **arrays)
            check_floating(xp, **arrays)
            dtype = compute_dtype(xp, inputs.q, *arrays.values())
            if dtype != inputs.q.dtype:
                q, k, v = (cast(xp, x, dtype) for x in (inputs.q, inputs.k, inputs.v))
                inputs = replace(inputs, q=q, k=k, v=v)
            state = {name: inputs.heads.fold(cast(xp, x, dtype)) for name, x in state.items()}
        with backend_of(xp).full_precision(inputs.q):
            held, out = self._advance(inputs, state)
        return inputs.leave(out), {name: inputs.heads.unfold(x) for name, x in held.items()}

    def _advance(self, inputs: _door.Inputs, state: State | None) -> tuple[State, Array]:
        """The state after checked tokens and their output, folded as the state before is."""
        xp = inputs.xp
        phi = self.map_rows(xp, inputs.q, scale=inputs.scale, center=self.choose_center(inputs))
        if state is None:
            state = no_keys(xp, phi, inputs.k, inputs.v, inputs.key_mask)
        else:
            _door.check_tails("state", state, _tails(phi, inputs.v.shape[-1]))
        return advance(xp, phi, state, inputs.q, inputs.k, inputs.v, inputs.key_mask)

    def summarize_keys(
        self, xp: ModuleType, k: Array, v: Array, *, key_mask: Array | None, scale: float, pair: Pair
    ) -> State:
        phi = self.map_rows(xp, k, scale=scale, center=pair)
        return absorb(xp, phi, no_keys(xp, phi, k, v, key_mask), k, v, key_mask)

    def merge_states(self, xp: ModuleType, left: State, right: State) -> State:
        return merge(xp, left, right)

    def read_state(self, xp: ModuleType, q: Array, state: Mapping[str, Any], *, scale: float, pair: Pair) -> Array:
        phi = self.map_rows(xp, q, scale=scale, center=pair)
        _door.check_tails("state", state, _tails(phi, None))
        return read(xp, phi, q, state)


def _tails(phi: FeatureMap, d_v: int | None) -> dict[str, tuple[int, int | None]]:
    """The last two axes of a state."""
    return {"shift": (1, phi.width), "kv": (phi.m, d_v), "k": (phi.m, 1)}
