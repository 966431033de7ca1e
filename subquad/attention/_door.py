"""The door of every attention method: checks, grouped queries, dtypes; and the way out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from subquad import _arrays
from subquad._dispatch import Array
from subquad.attention._heads import Heads, counts, find_heads


@dataclass(frozen=True)
class Inputs:
    """Checked inputs, in the compute dtype, with grouped queries on an axis of their own.

    Grouped: q (..., h_kv, g, n, d), k and v (..., h_kv, 1, n_kv, ·), key_mask (..., h_kv or 1, g or 1, n_kv).
    """

    xp: ModuleType
    q: Array
    k: Array
    v: Array
    key_mask: Array | None
    causal: bool
    scale: float
    heads: Heads
    dtype: Any  # of the output

    def batch(self, **options: tuple[int, ...]) -> tuple[int, ...]:
        """The common batch shape, also with those of options, folded; ValueError names what does not fit."""
        mask_batch = None if self.key_mask is None else self.key_mask.shape[:-1]
        own = {"q": self.q.shape[:-2], "k": self.k.shape[:-2], "v": self.v.shape[:-2], "key_mask": mask_batch}
        return _arrays.broadcast_batch(**own, **options)

    def leave(self, out: Array) -> Array:
        """`out` as the caller gets it; options and a state may have brought in more batch axes than the inputs."""
        out = _arrays.cast(self.xp, out, self.dtype)
        shape = (*self.batch(out=out.shape[:-2]), self.q.shape[-2], self.v.shape[-1])
        if tuple(out.shape) != shape:
            out = self.xp.broadcast_to(out, shape)
        return self.heads.unfold(out)


def enter(q: Array, k: Array, v: Array, *, causal: bool, key_mask: Array | None, scale: float | None) -> Inputs:
    xp = check_rows({"key_mask": key_mask}, q=q, k=k, v=v)
    causal = _arrays.check_flag("causal", causal)
    scale = check_scale(scale, q.shape[-1])
    key_mask = check_keys(k, v, key_mask, xp)
    heads = find_heads(xp, counts(k, v), counts(q))
    q, k, v, key_mask = heads.fold(q), heads.fold(k), heads.fold(v), heads.fold_mask(key_mask)
    dtype = _arrays.common_dtype(xp, q, k, v)
    compute = _arrays.compute_dtype(xp, q, k, v)
    q, k, v = (_arrays.cast(xp, x, compute) for x in (q, k, v))
    inputs = Inputs(xp, q, k, v, key_mask, causal, scale, heads, dtype)
    inputs.batch()
    return inputs


def check_rows(others: Mapping[str, Array | None], **rows: Array) -> ModuleType:
    """The library of q, k and v, those that there are, and of other arrays; queries and keys are of one width."""
    _arrays.check_given(**rows)
    xp = _arrays.check_arrays(**rows, **others)
    _arrays.check_floating(xp, **rows)
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


def check_state(name: str, state: Any, holds: tuple[str, ...]) -> dict[str, Array]:
    """The arrays of a state that `holds` these, by the names that errors give them."""
    if not isinstance(state, Mapping):
        msg = f"{name} is a {type(state).__name__}, expected the dict that summarize, merge or step returned"
        raise TypeError(msg)
    if set(state) != set(holds):
        got, expected = (", ".join(sorted(map(repr, names))) for names in (state, holds))
        msg = f"{name} holds {got}, expected {expected}: a state belongs to the method that made it"
        raise ValueError(msg)
    arrays = {f"{name}[{key!r}]": x for key, x in state.items()}
    _arrays.check_given(**arrays)
    return arrays


def check_tails(name: str, state: Mapping[str, Array], tails: Mapping[str, tuple[int, int | None]]) -> None:
    """ValueError unless each array of the state has these last two axes; None is any length."""
    for key, tail in tails.items():
        got = tuple(state[key].shape[-2:])
        if len(got) < 2 or any(want not in (None, have) for have, want in zip(got, tail, strict=True)):
            expected = f"({tail[0]}, {'d_v' if tail[1] is None else tail[1]})"
            msg = (
                f"{name}[{key!r}] ends in {got}, expected {expected}: "
                f"a state goes on with the options and the width of values that it began with"
            )
            raise ValueError(msg)


def check_scale(scale: Any, d: int) -> float:
    if scale is None:
        return float(d) ** -0.5
    return _arrays.check_number("scale", scale, why="; to scale by an array, multiply q by it")


def check_keys(k: Array, v: Array, key_mask: Array | None, xp: ModuleType) -> Array | None:
    """The mask with one entry for each key."""
    if v.shape[-2] != k.shape[-2]:
        msg = (
            f"k has {k.shape[-2]} rows (axis −2 of {tuple(k.shape)}) but v has {v.shape[-2]} "
            f"({tuple(v.shape)}); every key needs one value"
        )
        raise ValueError(msg)
    return None if key_mask is None else check_mask(xp, "key_mask", key_mask, k.shape[-2], "keys")


def check_mask(xp: ModuleType, name: str, mask: Array, n: int, rows: str) -> Array:
    """The mask with one entry for each of `n` rows; `rows` is what errors call them."""
    if not _arrays.is_dtype(xp, mask.dtype, "bool"):
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
