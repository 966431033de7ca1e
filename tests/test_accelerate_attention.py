"""Attention of Nyströmformer, Longformer, BigBird and Reformer by subquad, with their weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import subquad  # noqa: E402
from subquad_torch.transformers import accelerate, explain, restore  # noqa: E402
from subquad_torch.transformers.accelerate.bigbird import plan_of_training  # noqa: E402

# wide weights make sharp attention, in which a key too many shows
WIDE = {"initializer_range": 0.3, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 64}  # fmt: skip
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
REFORMER = {"vocab_size": 64, "hidden_size": 32, "attention_head_size": 8, "num_attention_heads": 4, "feed_forward_size": 32,
            "attn_layers": ["lsh", "local"], "axial_pos_embds": False, "lsh_attn_chunk_length": 16, "num_hashes": 4,
            "local_attn_chunk_length": 16, "num_buckets": 4, "initializer_range": 0.3, "max_position_embeddings": 128,
            "hidden_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0,
            "local_attention_probs_dropout_prob": 0.0}  # fmt: skip


def made(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**fields)
    return getattr(transformers, f"{name}Model")(config).eval()


def tokens(n: int, count: int = 2) -> Any:
    return torch.randint(3, 60, (count, n), generator=torch.Generator().manual_seed(0))


def padding(n: int, missing: int) -> Any:
    mask = torch.ones((2, n), dtype=torch.int64)
    mask[0, n - missing :] = 0
    return mask


def states(model: Any, *args: Any, grad: bool = False, **keywords: Any) -> Any:
    with torch.set_grad_enabled(grad):
        return model(*args, **keywords).last_hidden_state


def assert_close(got: Any, want: Any, keep: Any = None) -> None:
    """Equal at all tokens that are no padding, to 1e-5 of the largest."""
    if keep is not None:
        got, want = got[keep.bool()], want[keep.bool()]
    assert float((got - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("with_global", [False, True])
def test_longformer_equals_the_original(with_global: bool) -> None:
    model, x, mask = made("Longformer", **WIDE, **CALM, attention_window=4, sep_token_id=2), tokens(21), padding(21, 6)
    given = {"attention_mask": mask}
    if with_global:
        given["global_attention_mask"] = torch.zeros_like(x).index_put(
            (torch.tensor([0, 1, 1]), torch.tensor([0, 0, 7])), torch.tensor(1)
        )
    want = states(model, x, **given)
    accelerate(model)
    assert_close(states(model, x, **given), want, mask)
    assert all("window, left=2, right=2, global tokens" in layer.runs for layer in explain(model))


@pytest.mark.parametrize("name", ["Longformer", "Nystromformer", "BigBird"])
def test_gradients_equal_the_originals(name: str) -> None:
    """In training, where BigBird's own plan is the one that is drawn."""
    fields = {"Longformer": {"attention_window": 4}, "Nystromformer": {"num_landmarks": 64, "segment_means_seq_len": 64, "conv_kernel_size": 3}, "BigBird": {"block_size": 2, "num_random_blocks": 1, "max_position_embeddings": 64}}  # fmt: skip
    model, n = made(name, **WIDE, **CALM, **fields[name], sep_token_id=2), 32
    mask = padding(n, 0 if name == "Nystromformer" else 5)

    def gradients() -> Any:
        model.train().zero_grad()
        out = states(model, tokens(n), attention_mask=mask, grad=True)
        (out * mask[..., None]).square().sum().backward()
        return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])

    want = gradients()
    accelerate(model)
    assert_close(gradients(), want)


def test_nystromformer_is_exact_where_the_original_is() -> None:
    """With as many landmarks as segment_means_seq_len, as its defaults and released weights have."""
    model = made("Nystromformer", **WIDE, num_landmarks=64, segment_means_seq_len=64, conv_kernel_size=3)
    want = states(model, tokens(70))
    accelerate(model)
    assert_close(states(model, tokens(70)), want)
    assert [layer.runs for layer in explain(model)] == ["subquad: exact"] * 2


def test_nystromformer_equals_the_original_where_its_start_is_that_of_one_matrix() -> None:
    fields = WIDE | {"num_attention_heads": 1, "num_landmarks": 5, "segment_means_seq_len": 20, "conv_kernel_size": 3}
    model = made("Nystromformer", **fields)
    want = states(model, tokens(20, 1))
    accelerate(model)
    assert_close(states(model, tokens(20, 1)), want)
    assert "nystrom, num_landmarks=5" in str(explain(model))


def test_nystromformer_repeats_none_of_the_originals_faults() -> None:
    """Other items of a batch, padding and lengths: the original mixes items, raises for masks, and takes one length."""
    model = made("Nystromformer", **WIDE, num_landmarks=5, segment_means_seq_len=20, conv_kernel_size=3)
    own = copy.deepcopy(model)
    accelerate(model)
    x, mask = tokens(21), padding(21, 6)
    padded = states(model, x, attention_mask=mask)
    assert_close(padded[:1, :15], states(model, x[:1, :15]))
    assert_close(padded[1:], states(model, x[1:]))
    with pytest.raises(RuntimeError):
        states(own, x[:, :20], attention_mask=mask[:, 1:])
    ten = tokens(10)  # 2 · 10 rows are one segment of 20: a silent mixture
    other = torch.cat([ten[:1], ten[:1]])
    assert float((states(own, ten)[0] - states(own, other)[0]).abs().max()) > 0.1
    assert_close(states(model, ten)[0], states(model, other)[0])


def test_bigbird_in_evaluation_is_what_it_was_in_training() -> None:
    model = made(
        "BigBird", **WIDE, **CALM, block_size=2, num_random_blocks=1, sep_token_id=2, max_position_embeddings=64
    )
    x, mask = tokens(40), padding(40, 7)
    trained = states(model.train(), x, attention_mask=mask)
    evaluated = states(model.eval(), x, attention_mask=mask)
    assert float((trained - evaluated)[mask.bool()].abs().max()) > 0.1  # the original's own difference
    accelerate(model)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for _ in range(2):
        assert_close(states(model, x, attention_mask=mask), trained, mask)
        assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
        model.train()


def test_a_key_of_bigbird_counts_once_where_random_blocks_meet_the_window() -> None:
    """The original's plan for 1024 tokens has such blocks, and it counts their keys twice."""
    fields = WIDE | {"num_hidden_layers": 1, "block_size": 64, "num_random_blocks": 3, "max_position_embeddings": 4096}
    model, x = made("BigBird", **fields, **CALM, sep_token_id=2), tokens(1024, 1)
    core = model.encoder.layer[0].attention.self
    plan = plan_of_training(type(core), 1024, 64, 3, 4, core.max_seqlen, core.seed)
    near = np.arange(16)[:, None] + [-1, 0, 1]
    met = {i for i in range(1, 15) for row in plan[:, i] if set(row) & {*near[i], 0, 15} or len(set(row)) < 3}
    trained = states(model.train(), x)
    out = states(accelerate(model), x)
    assert {int(i) // 64 for i in ((out - trained)[0].abs().amax(-1) > 1e-4).nonzero()} == met
    assert met


def test_bigbird_stays_sparse_after_a_short_sequence() -> None:
    model = made(
        "BigBird", **WIDE, **CALM, block_size=2, num_random_blocks=1, sep_token_id=2, max_position_embeddings=64
    )
    full, x, mask = copy.deepcopy(model), tokens(9), padding(9, 3)
    want = states(full, x, attention_mask=mask)
    assert full.attention_type == "original_full"  # for good, in the original
    accelerate(model)
    long = states(model, tokens(40))
    assert_close(states(model, x, attention_mask=mask), want, mask)
    assert_close(states(model, tokens(40)), long)
    assert all("bigbird, block_size=2, num_random_blocks=1" in layer.runs for layer in explain(model))
    with pytest.raises(ValueError, match="attention_type is 'original_full'"):
        accelerate(full)
    assert_close(states(restore(model), x, attention_mask=mask), want, mask)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_reformer_equals_the_original_up_to_a_chunk(is_decoder: bool) -> None:
    model, x = made("Reformer", **REFORMER, is_decoder=is_decoder), tokens(13)
    for mask in (torch.ones_like(x), padding(13, 4)):
        want = states(restore(model), x, attention_mask=mask)
        assert_close(states(accelerate(model), x, attention_mask=mask), want, mask)


def test_reformer_beyond_a_chunk_can_be_repeated() -> None:
    """The original draws other rotations at each call, from the global generator."""
    model, x = made("Reformer", **REFORMER | {"attn_layers": ["lsh", "lsh"]}), tokens(64)
    own = copy.deepcopy(model)
    assert float((states(own, x) - states(own, x)).abs().max()) > 0.1
    accelerate(model)
    before = torch.get_rng_state()
    first = states(model, x)
    assert torch.equal(states(model, x), first)
    assert torch.equal(torch.get_rng_state(), before)
    layer, h = (
        model.encoder.layers[1].attention.self_attention,
        torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        q, v = (to(h).unflatten(-1, (4, 8)).transpose(1, 2) for to in (layer.query_key, layer.value))
        method = subquad.LSH(16, 4, 1, shared_qk=True, unit_keys=True, allow_self=False)
        want = method(q, q, v, scale=1.0).transpose(1, 2).flatten(-2)
        assert torch.equal(layer(h).hidden_states, want)


def test_reformer_trains_and_generates() -> None:
    torch.manual_seed(0)
    config = transformers.ReformerConfig(**REFORMER, is_decoder=True)
    model = accelerate(transformers.ReformerModelWithLMHead(config))
    loss = model.train()(tokens(32), labels=tokens(32)).loss
    loss.backward()
    assert all(x.grad is None or bool(x.grad.isfinite().all()) for x in model.parameters())
    assert float(model.reformer.encoder.layers[0].attention.self_attention.query_key.weight.grad.abs().sum()) > 0
    for n in (9, 30):  # one chunk of the prompt, and two: steps after it are the original's
        answer = model.eval().generate(
            tokens(n, 1), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert answer.shape == (1, n + 3)


def test_what_cannot_be_computed_raises() -> None:
    x = tokens(8)
    model = accelerate(made("Longformer", **WIDE, attention_window=4, sep_token_id=2))
    with pytest.raises(
        NotImplementedError, match=r"LongformerSelfAttention: dropout=0.1 of attention weights in training"
    ):
        model.train()(x)
    with pytest.raises(NotImplementedError, match="LongformerSelfAttention: output_attentions=True"):
        model.eval()(x, output_attentions=True)
    even = made("Nystromformer", **WIDE, conv_kernel_size=4)
    with pytest.raises(ValueError, match="convolution has an even size, 4"):
        accelerate(even)
    both = made("Reformer", **REFORMER | {"lsh_num_chunks_after": 1})
    with pytest.raises(ValueError, match="1 chunks before and 1 after"):
        accelerate(both)
    decoder = transformers.BigBirdConfig(**WIDE, is_decoder=True, sep_token_id=2)
    with pytest.raises(ValueError, match="a decoder has full attention"):
        accelerate(transformers.BigBirdModel(decoder))
