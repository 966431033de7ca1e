"""Window, BigBird and LSH attention equal those of other packages, which run here too.

Equal plans and rotations are read from the peer or put into it. Where it rounds to float32 or adds an ε, it is told not
to: what is left to compare is the pattern.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import relative_error
from rows.methods import D

import subquad

torch = pytest.importorskip("torch")
HEADS = 3


def hidden(n: int, heads: int = HEADS) -> Any:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((2, n, heads * D)))


def split(x: Any, heads: int = HEADS) -> Any:
    return x.reshape(*x.shape[:2], heads, D).transpose(1, 2)


def joined(x: Any) -> np.ndarray:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1).detach().numpy()


def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `softmax` compute in the dtype of its input."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))


@pytest.mark.parametrize("places", [{}, {0: [0, 17, 50], 1: [3]}, {1: [95]}], ids=["none", "several", "one-item"])
def test_window_equals_longformer(places: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """With global tokens, more in one item than in the other, and padding. A padded row is 0 there, and a row here."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.longformer.modeling_longformer")
    in_double(monkeypatch)
    n, window = 96, 16
    config = transformers.LongformerConfig(hidden_size=HEADS * D, num_attention_heads=HEADS, attention_window=[window],
                                           attention_probs_dropout_prob=0.0)  # fmt: skip
    module, x = modeling.LongformerSelfAttention(config, 0).double().eval(), hidden(n)
    mask, keep = np.zeros((2, n), bool), np.ones((2, n), bool)
    keep[1, 80:] = not places.get(0) and bool(places)
    for item, rows in places.items():
        mask[item, rows] = True
    keep |= mask
    told = torch.from_numpy(np.where(mask, 1e4, np.where(keep, 0.0, -1e4)))
    with torch.no_grad():
        theirs = module(
            x, told, is_index_masked=told < 0, is_index_global_attn=told > 0, is_global_attn=bool(mask.any())
        )[0]
        q, k, v = (split(linear(x)) for linear in (module.query, module.key, module.value))
        own = tuple(split(linear(x)) for linear in (module.query_global, module.key_global, module.value_global))
        given = {"global_mask": torch.from_numpy(mask)[:, None], "global_qkv": own}
        ours = subquad.attention(q, k, v, "window", left=window // 2, key_mask=torch.from_numpy(keep)[:, None], **given)
    assert relative_error(joined(ours)[keep], theirs.numpy()[keep]) < 1e-12


@pytest.mark.parametrize("padded", [0, 5])
def test_bigbird_equals_transformers_in_training(padded: int) -> None:
    """In training it draws its plan, which has neither near nor global blocks; in evaluation every random block is 0."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.big_bird.modeling_big_bird")
    size, blocks = 8, 12
    config = transformers.BigBirdConfig(hidden_size=HEADS * D, num_attention_heads=HEADS, block_size=size,
                                        num_random_blocks=2, max_position_embeddings=size * blocks)  # fmt: skip
    module, x = modeling.BigBirdBlockSparseAttention(config, seed=3).double().train(), hidden(size * blocks)
    drawn: list[Any] = []
    draw = module._bigbird_block_rand_mask_with_head
    module._bigbird_block_rand_mask_with_head = lambda **given: drawn.append(draw(**given)) or drawn[-1]
    keep = torch.ones(2, size * blocks, dtype=torch.float64)
    keep[1, size * blocks - padded :] = 0
    blocked, band, rows, keys = modeling.BigBirdModel.create_masks_for_block_sparse_attn(keep, size)
    before = np.random.get_state()  # noqa: NPY002
    try:
        with torch.no_grad():
            theirs = module(x, band, rows, keys, blocked, blocked)[0]
            q, k, v = (split(linear(x)) for linear in (module.query, module.key, module.value))
    finally:
        np.random.set_state(before)  # noqa: NPY002  it seeds the generator of the whole process
    plan = np.full((HEADS, blocks, 2), -1)
    plan[:, 1:-1] = np.stack(drawn[0])
    ours = subquad.attention(q, k, v, "bigbird", block_size=size, plan=plan, key_mask=(keep > 0)[:, None])
    visible = keep.numpy() > 0
    assert relative_error(joined(ours)[visible], theirs.numpy()[visible]) < 1e-12


def told_rotations(monkeypatch: pytest.MonkeyPatch, rotations: Any) -> None:
    """Let the peer draw these."""

    def randn(*shape: Any, **_: Any) -> Any:
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        assert tuple(shape) == tuple(rotations.shape), "the peer draws something else"
        return rotations

    monkeypatch.setattr(torch, "randn", randn)


def past_the_first_chunk(x: np.ndarray, R: np.ndarray, size: int) -> np.ndarray:
    """The rows (..., n) that are not in the first chunk of sorted rows, whose chunk before is the last one in the peers."""
    bucket = np.argmax(np.concatenate([x @ R, -x @ R], axis=-1), axis=-1)
    rank = np.argsort(np.argsort(bucket, axis=-1, kind="stable"), axis=-1)
    return rank >= size


@pytest.mark.parametrize("causal", [False, True])
def test_lsh_equals_transformers(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are q·k / ‖k‖, without d ** -0.5; each head has rotations of its own."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.reformer.modeling_reformer")
    n, size, buckets = 96, 8, 6
    config = transformers.ReformerConfig(hidden_size=HEADS * D, num_attention_heads=HEADS, attention_head_size=D,
                                         lsh_attn_chunk_length=size, num_buckets=buckets, num_hashes=1, is_decoder=causal,
                                         lsh_attention_probs_dropout_prob=0.0, hash_seed=None)  # fmt: skip
    module, x = modeling.LSHSelfAttention(config).double().eval(), hidden(n)
    module._len_norm = lambda x: x * torch.rsqrt((x**2).mean(-1, keepdim=True))
    rotations = torch.from_numpy(np.random.default_rng(1).standard_normal((HEADS, D, 1, buckets // 2)))
    told_rotations(monkeypatch, rotations)
    with torch.no_grad():
        theirs = split(module(x).hidden_states).numpy()
        q, v = split(module.query_key(x)), split(module.value(x))
    for head in range(HEADS):
        R = rotations[head].transpose(0, 1)
        method = subquad.LSH(
            bucket_size=size, num_rounds=1, rotations=R, shared_qk=True, unit_keys=True, allow_self=False
        )
        own = q[:, head]
        ours = method(own, own, v[:, head], causal=causal, scale=1.0).numpy()
        rows = past_the_first_chunk(own.numpy(), R[0].numpy(), size)
        assert rows.sum() == 2 * (n - size)
        assert relative_error(ours[rows], theirs[:, head][rows]) < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_lsh_equals_reformer_pytorch(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One round; with more, it counts a pair that meets again twice."""
    peer = pytest.importorskip("reformer_pytorch.reformer_pytorch")
    n, size = 96, 8
    module = peer.LSHAttention(bucket_size=size, n_hashes=1, causal=causal).eval()
    q, v = (torch.from_numpy(np.random.default_rng(i).standard_normal((2, n, D))) for i in range(2))
    rotations = torch.from_numpy(np.random.default_rng(3).standard_normal((1, D, 1, n // size // 2)))
    told_rotations(monkeypatch, rotations)
    theirs = module(q, v)[0]
    R = rotations[0].transpose(0, 1)
    method = subquad.LSH(bucket_size=size, num_rounds=1, rotations=R, shared_qk=True, unit_keys=True, allow_self=False)
    ours = method(q, q, v, causal=causal)
    rows = past_the_first_chunk(q.numpy(), R[0].numpy(), size)
    assert relative_error(ours.numpy()[rows], theirs.numpy()[rows]) < 1e-12
