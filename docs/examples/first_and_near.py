"""Attention to the first keys and the near ones: two intervals for each query, joined."""

from dataclasses import dataclass

from subquad.attention.method import Method
from subquad.attention.restrictions import NONE, sight_of
from subquad.kernels.block_attention import block_attention, join
from subquad.registry import register


@register("first-and-near", cost="n (first + left) (d + d_v)", size="left")
@dataclass(frozen=True, repr=False, eq=False)
class FirstAndNear(Method):
    """Query i sees the first keys, and `left` keys before its place (and after it, if not causal)."""

    restrictions = frozenset({"segments", "visible", "return_lse"})
    reads = restrictions

    first: int = 4
    left: int = 64

    def _evaluate(self, call):
        return self._evaluate_with_lse(call.restricted(NONE))[0]

    def _evaluate_with_lse(self, call):
        xp = call.xp
        _, start, _ = sight_of(call)
        _, near, until = sight_of(call, left=self.left, right=self.left)
        parts = (start, xp.minimum(start + self.first, near)), (near, until)
        return join(xp, *(self._over(call, *part) for part in parts))

    def _over(self, call, start, stop):
        return block_attention(
            call.q, call.k, call.v, start, stop, *[None] * 7, scale=call.scale, size=1, key_mask=call.key_mask
        )
