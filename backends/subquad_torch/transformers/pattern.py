"""What queries see, told by numbers and rows in place of a matrix: a mask that does not grow with the square of n.

    query at place p sees the key at place s  ⟺  s ≤ p (causal),  p − left ≤ s ≤ p + right,
                                                 segment of p = segment of s,  key_mask[s]

A model hands on what its mask function returned, unread, to its attention functions. A model that computes attention by
itself would read it as a tensor; `MaskPattern` then raises, so no mask is lost silently.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

UNREADABLE = (
    "this model computes with its attention mask itself ({what}), and masks of 'subquad-…' are patterns that only "
    "subquad's attention functions read; use attn_implementation='sdpa' or 'eager' for this model"
)


@dataclass(frozen=True, eq=False)
class MaskPattern:
    """Which keys each query of a layer sees.

    Attributes
    ----------
    batch_size, q_length, kv_length : int
        Numbers of items, of queries, and of keys from the first that are seen by some query.
    held : int or None
        Number of keys that the layer holds: a cache of fixed size has more than are seen. None stands for `kv_length`.
    q_offset, kv_offset : int or Tensor
        Places of the first query and of the first key. A Tensor where a program is traced.
    causal : bool
        Whether a query sees no later place.
    left, right : int or None
        How many places before and after its own a query sees; None stands for all.
    segments : tuple of Tensor, or None
        Numbers of the documents of queries (batch, q_length) and of keys (batch, kv_length): a query sees its own.
    key_mask : Tensor of bool, (batch, kv_length), or None
        True = keep.
    pairs : Tensor of bool, (batch, heads or 1, q_length, kv_length), or None
        True = the query sees the key; given where no pattern says it, and then the whole mask.
    bias : Tensor, (batch, heads or 1, q_length, kv_length), or None
        Terms to add to the logits, from an additive mask of the user.
    """

    batch_size: int
    q_length: int
    kv_length: int
    held: int | None = None
    q_offset: Any = 0
    kv_offset: Any = 0
    causal: bool = False
    left: int | None = None
    right: int | None = None
    segments: tuple[Tensor, Tensor] | None = None
    key_mask: Tensor | None = None
    pairs: Tensor | None = None
    bias: Tensor | None = None

    @property
    def ndim(self) -> int:
        """4: code of transformers that prepares masks takes the pattern for a mask that is ready."""
        return 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the matrix that the pattern stands for."""
        return self.batch_size, 1, self.q_length, self.kv_length if self.held is None else self.held

    def to(self, *args: Any, **keywords: Any) -> MaskPattern:
        """The pattern with its tensors moved, as `torch.Tensor.to` moves one; dtypes stay."""
        device = keywords.get("device", next((x for x in args if not isinstance(x, torch.dtype)), None))
        if device is None:
            return self
        move = {name: x.to(device) for name in ("q_offset", "key_mask", "pairs", "bias")
                if isinstance(x := getattr(self, name), Tensor)}  # fmt: skip
        if self.segments is not None:
            move["segments"] = tuple(x.to(device) for x in self.segments)
        return replace(self, **move)

    @property
    def shift(self) -> Any:
        """How many keys lie before the place of the first query."""
        return self.q_offset - self.kv_offset

    def at_end(self) -> MaskPattern:
        """The pattern without the keys that no query sees since they come after the last one.

        Queries and keys are then aligned at their ends, as `subquad.attention` aligns them. Where queries stand after
        the last key, or before the first, the matrix is made.
        """
        if not self.causal or isinstance(self.q_offset, Tensor):
            return self
        stop = self.shift + self.q_length
        if stop > self.kv_length or stop < self.q_length:
            return replace(self, pairs=self.matrix())
        segments = None if self.segments is None else (self.segments[0], self.segments[1][:, :stop])
        key_mask = None if self.key_mask is None else self.key_mask[:, :stop]
        return replace(self, kv_length=stop, held=self.shape[-1], segments=segments, key_mask=key_mask)

    def cuts(self, left: int | None, right: int | None) -> bool:
        """Whether a window of these sizes hides a key that would be seen otherwise."""
        if isinstance(self.q_offset, Tensor):
            return left is not None or right is not None
        behind, ahead = self.shift + self.q_length - 1, self.kv_length - 1 - self.shift
        return (left is not None and left < behind) or (right is not None and not self.causal and right < ahead)

    def matrix(self) -> Tensor:
        """The pattern as a matrix of bool, (batch or 1, heads or 1, q_length, kv_length)."""
        if self.pairs is not None:
            return self.pairs
        given = self.key_mask if self.segments is None else self.segments[0]
        device = given.device if given is not None else getattr(self.q_offset, "device", None)
        own = torch.arange(self.q_length, device=device)[:, None] + self.shift
        place = torch.arange(self.kv_length, device=device)
        seen = torch.ones((1, 1, self.q_length, self.kv_length), dtype=torch.bool, device=device)
        if self.causal:
            seen = seen & (place <= own)
        if self.left is not None:
            seen = seen & (place >= own - self.left)
        if self.right is not None:
            seen = seen & (place <= own + self.right)
        if self.segments is not None:
            of_queries, of_keys = self.segments
            seen = seen & (of_queries[:, None, :, None] == of_keys[:, None, None, :])
        return seen if self.key_mask is None else seen & self.key_mask[:, None, None, :]

    def one_query(self, left: int | None = None) -> MaskPattern:
        """The pattern of a single query whose place is known to the program alone: a mask of keys."""
        place = torch.arange(self.kv_length, device=self.q_offset.device)
        seen = (place <= self.shift) if self.causal else torch.ones_like(place, dtype=torch.bool)
        for size in (self.left, left):
            if size is not None:
                seen = seen & (place >= self.shift - size)
        key_mask = seen.expand(self.batch_size, -1) if self.key_mask is None else self.key_mask & seen
        return replace(self, causal=False, left=None, right=None, key_mask=key_mask, q_offset=self.kv_length - 1,
                       kv_offset=0)  # fmt: skip

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise NotImplementedError(UNREADABLE.format(what=f"by {getattr(func, '__name__', func)}"))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # protocols that Python asks for
            raise AttributeError(name)
        raise AttributeError(UNREADABLE.format(what=f"by its attribute {name!r}"))

    def _refuse(self, *_: Any) -> NoReturn:
        raise NotImplementedError(UNREADABLE.format(what="by an operator of Python"))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __getitem__ = __invert__ = _refuse
    __and__ = __rand__ = __or__ = __ror__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse  # type: ignore[assignment]
    __neg__ = __bool__ = __len__ = __iter__ = _refuse
    __hash__ = object.__hash__
