"""The kernel of intervals and listed blocks equals its definition from explicit matrices, and its parts join."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace
from rows.kernels import EXAMPLES, KERNELS, Example, observed
from rows.libraries import Jax, Library, relative_error, tolerance

from subquad.kernels.block_attention import join

examples = pytest.mark.parametrize("example", EXAMPLES["block_attention"], ids=str)
CHOSEN = [some for count in range(3) for some in itertools.combinations(("key_mask", "softcap"), count)]


def seen_by(example: Example, key_mask: np.ndarray | None) -> np.ndarray:
    """Whether each row sees each key, (..., n, n_kv), pair by pair."""
    q, k, _, start, stop, blocks, place, avoid, met_q, met_k, pairs, _ = example.arrays
    n, n_kv, size = q.shape[-2], k.shape[-2], example.static["size"]
    place = np.arange(n_kv) if place is None else place
    own = (np.broadcast_to(np.arange(n_kv), place.shape) if place.ndim == 1 else place)[..., None, :]
    own = np.where(np.ones((n, 1), bool), place[..., None, :], own)
    seen = (own >= start[..., None]) & (own < stop[..., None])
    if avoid is not None:
        seen = seen & (own != avoid[..., None])
    if blocks is not None:
        listed = np.zeros((*blocks.shape[:-2], n, n_kv), bool)
        for i, j in np.ndindex(n, n_kv):
            listed[..., i, j] = (blocks[..., i // size, :] == j // size).any(axis=-1)
        seen = seen & listed
    if met_q is not None:
        distance = met_q[..., :, None, :] - met_k[..., None, :, :]
        seen = seen & ~np.isin(distance, (0, 1)).any(axis=-1)
    if pairs is not None:
        seen = seen & pairs
    return seen if key_mask is None else seen & key_mask[..., None, :]


def dense(example: Example, softcap: float | None = None, key_mask: np.ndarray | None = None) -> tuple[Any, Any]:
    q, k, v, *_, bias = example.arrays
    logits = example.static["scale"] * q @ np.matrix_transpose(k)
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    logits = logits if bias is None else logits + bias
    weights = np.where(seen_by(example, key_mask), np.exp(logits), 0)
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return weights @ v / np.where(total == 0, 1, total), np.log(total)[..., 0]


@pytest.mark.parametrize("chosen", CHOSEN, ids="-".join)
@examples
def test_equals_its_definition(example: Example, chosen: tuple[str, ...], eager: Library) -> None:
    if isinstance(eager, Jax) and len(chosen) != 2:
        return  # each form is compiled
    expected = dense(example, **{name: example.options[name] for name in chosen})
    for dtype in ("float32", "float64"):
        if isinstance(eager, Jax) and dtype == "float64":
            continue
        with eager.context(dtype):
            arrays, keywords = example.given(eager, dtype, chosen)
            got = [eager.numpy(x) for x in KERNELS["block_attention"](*arrays, implementation="generic", **keywords)]
        assert np.array_equal(np.isinf(got[1]), np.isinf(expected[1]))
        for one, other in zip(*(observed("block_attention", x) for x in (got, expected)), strict=True):
            assert relative_error(one, other) <= tolerance(dtype)


@examples
def test_small_blocks_change_nothing(example: Example, small_blocks: None) -> None:
    arrays, keywords = example.given(Library(), "float64", ("key_mask",))
    got = KERNELS["block_attention"].generic(*arrays, **keywords)
    expected = dense(example, key_mask=example.options["key_mask"])
    for one, other in zip(*(observed("block_attention", x) for x in (got, expected)), strict=True):
        assert relative_error(one, other) <= 1e-12


@examples
def test_shapes_are_those_declared(example: Example) -> None:
    arrays, keywords = example.given(Library(), "float32", ("key_mask",))
    kernel = KERNELS["block_attention"]
    for x, like in zip(kernel.generic(*arrays, **keywords), kernel.outputs(*arrays, **keywords), strict=True):
        assert (x.shape, x.dtype) == (tuple(like.shape), like.dtype)


@pytest.mark.parametrize("name", ["intervals of items", "lists of items", "lists, places, met", "pairs and bias"])
def test_gradients_where_rows_see_no_key(name: str) -> None:
    torch = pytest.importorskip("torch")
    example = next(x for x in EXAMPLES["block_attention"] if x.name == name)
    arrays = [None if x is None else torch.from_numpy(x.copy()) for x in example.arrays]
    places = [i for i, x in enumerate(arrays) if x is not None and x.is_floating_point()]
    mask = torch.from_numpy(example.options["key_mask"])

    def call(*given: Any) -> Any:
        mine = list(arrays)
        for i, x in zip(places, given, strict=True):
            mine[i] = x
        return observed("block_attention", KERNELS["block_attention"].generic(
            *mine, **example.static, softcap=1.5, key_mask=mask))  # fmt: skip

    given = [arrays[i].requires_grad_() for i in places]
    assert torch.autograd.gradcheck(call, given, fast_mode=True)


@examples
def test_what_no_row_sees_may_be_anything(example: Example) -> None:
    """A hidden NaN reaches nothing; a value that is seen reaches the rows that see it, and no others."""
    mask = example.options["key_mask"]
    arrays, keywords = example.given(Library(), "float64", ("key_mask",))
    expected = KERNELS["block_attention"].generic(*arrays, **keywords)
    hidden = [np.where(mask[..., None], x, np.nan) for x in arrays[1:3]]
    for got, want in zip(
        KERNELS["block_attention"].generic(arrays[0], *hidden, *arrays[3:], **keywords), expected, strict=True
    ):
        assert np.array_equal(got, want)
    seen = seen_by(example, mask)
    j = int(np.argmax(np.any(seen, axis=tuple(range(seen.ndim - 1)))))
    spoilt = arrays[2].copy()
    spoilt[..., j, :] = np.inf
    out, lse = KERNELS["block_attention"].generic(*arrays[:2], spoilt, *arrays[3:], **keywords)
    reached = np.broadcast_to(seen[..., j], lse.shape)
    assert np.array_equal(np.isfinite(out).all(axis=-1), ~reached)
    assert np.array_equal(out[~reached], expected[0][~reached])
    assert np.array_equal(lse, expected[1])


def test_parts_join(eager: Library) -> None:
    """Over disjoint sets of keys, one of which some rows do not see at all, in any order."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 40, 8))

    def call(q: Any, k: Any, v: Any, starts: Any, stops: Any) -> Any:
        xp = array_namespace(q)
        parts = [
            KERNELS["block_attention"](
                q, k, v, starts[i, ...], stops[i, ...], *[None] * 7, scale=0.3, size=1, implementation="generic"
            )
            for i in range(4)
        ]
        return parts[3], join(xp, *parts[:3]), join(xp, join(xp, parts[2], parts[0]), parts[1])

    first = np.arange(40, dtype=np.int32)
    edges = np.stack([0 * first, np.minimum(first, 13), np.minimum(first, 30), first])
    starts, stops = np.stack([*edges[:3], edges[0]]), np.stack([*edges[1:], edges[3]])
    whole, joined, again = eager.call(call, q, k, v, starts, stops, dtype="float64")
    for parts in (joined, again):
        assert np.array_equal(np.isinf(eager.numpy(parts[1])), np.isinf(eager.numpy(whole[1])))
        for one, other in zip(
            *(observed("block_attention", tuple(map(eager.numpy, x))) for x in (parts, whole)), strict=True
        ):
            assert relative_error(one, other) < 1e-12
