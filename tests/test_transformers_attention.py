"""Attention of Hugging Face models by subquad: equal to their own, whatever they hand on as a mask; or a clear refusal."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import masking_utils as masks  # noqa: E402

import subquad  # noqa: E402
from subquad_torch.transformers import apply, configure, explain, register  # noqa: E402
from subquad_torch.transformers.mask_function import mask_pattern  # noqa: E402
from subquad_torch.transformers.pattern import MaskPattern  # noqa: E402

NAMES = register()
CAUSAL = [name for name in subquad.METHODS if subquad.METHODS[name].causal is True]
N = 11
# wide weights make sharp attention, in which a key too many shows
WIDE = {
    "initializer_range": 0.3,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = WIDE | {
    "vocab_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODERS = {
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**DECODER, sliding_window=4),
    "gemma2": lambda: transformers.Gemma2Config(**DECODER, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, **SLIDING),
    "gemma3": lambda: transformers.Gemma3TextConfig(**DECODER, head_dim=8, query_pre_attn_scalar=8, **SLIDING),
    "gpt_oss": lambda: transformers.GptOssConfig(**DECODER, head_dim=8, num_local_experts=2, num_experts_per_tok=1, **SLIDING),
    "llama4": lambda: transformers.Llama4TextConfig(**DECODER, head_dim=8, attention_chunk_size=4, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=32, **TOKENS),
}  # fmt: skip


def tokens(count: int = 2, n: int = N) -> Any:
    return torch.randint(3, 60, (count, n), generator=torch.Generator().manual_seed(0))


def padding(side: str | None, n: int = N) -> Any:
    """A 2-D mask whose first row has three tokens less."""
    if side is None:
        return None
    mask = torch.ones((2, n), dtype=torch.int64)
    mask[0, slice(0, 3) if side == "left" else slice(n - 3, n)] = 0
    return mask


_models: dict[str, Any] = {}


def decoder(name: str) -> Any:
    if name not in _models:
        torch.manual_seed(1)
        _models[name] = transformers.AutoModelForCausalLM.from_config(DECODERS[name]()).eval()
    model = _models[name]
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def outputs(model: Any, implementation: str, call: Any) -> Any:
    model.set_attn_implementation(implementation)
    return call(model)


def assert_equal(
    model: Any, call: Any, keep: Any = None, *, ours: str = "subquad-exact", theirs: str = "eager"
) -> None:
    """Outputs of both implementations at all tokens that are no padding: 1e-5 of the largest."""
    want, got = (outputs(model, name, call) for name in (theirs, ours))
    if keep is not None:
        want, got = want[keep.bool()], got[keep.bool()]
    assert float((got - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_exact_equals_eager(name: str, side: str | None) -> None:
    mask = padding(side)
    assert_equal(decoder(name), lambda model: model(tokens(), attention_mask=mask).logits, mask)


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, method) for name in DECODERS for method in ("exact", "window") if (name, method) != ("gemma2", "window")),
     ("llama", "lsh")],
)  # fmt: skip
def test_packed_documents_equal_each_alone(name: str, method: str) -> None:
    """GPT-OSS's own code gives its masks no position ids, so that documents see each other."""
    model, positions = decoder(name), torch.cat([torch.arange(5), torch.arange(6)])[None].expand(2, -1)
    call = lambda model: model(tokens(), position_ids=positions, use_cache=False).logits  # noqa: E731
    packed = outputs(model, f"subquad-{method}", call)
    alone = outputs(model, f"subquad-{method}", lambda model: model(tokens()[:, 5:], use_cache=False).logits)
    torch.testing.assert_close(packed[:, 5:], alone, rtol=0, atol=5e-5)
    if method == "exact":
        error = float((outputs(model, "eager", call) - packed).abs().max())
        assert error > 1 if name == "gpt_oss" else error < 5e-5


@pytest.mark.parametrize(("name", "cached"), [("llama", True), ("gpt_oss", True), ("gpt_oss", False)])
def test_position_ids_that_jump_ahead_are_one_document(name: str, cached: bool) -> None:
    """As in transformers, wherever the ids do not reach its masks: with a cache, and in GPT-OSS."""
    positions = torch.cat([torch.arange(5), 2 * torch.arange(10, 16)])[None].expand(2, -1)
    assert_equal(decoder(name), lambda model: model(tokens(), position_ids=positions, use_cache=cached).logits)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_generate_equals_eager(name: str, cache: str | None) -> None:
    given = {} if cache is None else {"cache_implementation": cache}
    assert_equal(decoder(name), lambda model: generated(model, tokens(), padding("left"), **given))


def generated(model: Any, x: Any, mask: Any, **keywords: Any) -> Any:
    """Logits of seven greedy tokens."""
    answer = model.generate(x, attention_mask=mask, max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=None,
                            output_logits=True, return_dict_in_generate=True, **keywords)  # fmt: skip
    return torch.stack(answer.logits, 1)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prefill_chunk_size": 4}])
def test_other_ways_to_generate_equal_eager(options: dict[str, int]) -> None:
    def scores(model: Any) -> Any:
        answer = model.generate(tokens(), attention_mask=padding("left"), max_new_tokens=5, do_sample=False, pad_token_id=0,
                                eos_token_id=None, output_scores=True, return_dict_in_generate=True, **options)  # fmt: skip
        return torch.stack(answer.scores)

    assert_equal(decoder("llama"), scores)


# blocks and windows of fewer tokens than a prompt has
NARROW: dict[str, dict[str, Any]] = {
    "bigbird": {"block_size": 2, "num_random_blocks": 1},
    "clustered": {"cluster_size": 2, "opened": 1, "chunk": 4, "sinks": 1, "window": 2},
    "lsh": {"bucket_size": 2, "num_rounds": 1},
    "window": {"left": 2},
}


@pytest.mark.parametrize("method", CAUSAL)
def test_left_padding_changes_no_method(method: str) -> None:
    """A padded batch gives what each prompt gives alone, step by step."""
    model = copy.deepcopy(decoder("llama"))
    model.config.subquad = {method: NARROW.get(method, {})}
    model.set_attn_implementation(f"subquad-{method}")
    padded = generated(model, tokens(), padding("left"))[:1]
    alone = generated(model, tokens()[:1, 3:], torch.ones((1, N - 3), dtype=torch.int64))
    torch.testing.assert_close(padded, alone, rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", CAUSAL)
def test_a_later_token_changes_no_earlier_logits(method: str) -> None:
    model, x = decoder("llama"), tokens()
    changed = x.clone()
    changed[:, 6:] = 3 + (changed[:, 6:] + 20) % 57
    with torch.no_grad():
        model.set_attn_implementation(f"subquad-{method}")
        before, after = (model(y).logits for y in (x, changed))
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    assert float((before[:, 6:] - after[:, 6:]).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("side", [None, "left"])
def test_window_equals_the_models_own_window(name: str, side: str | None) -> None:
    mask = padding(side)
    assert_equal(decoder(name), lambda model: model(tokens(), attention_mask=mask).logits, mask, ours="subquad-window")


def test_a_window_of_the_user_is_joined_with_that_of_the_layer() -> None:
    model, x = copy.deepcopy(decoder("mistral")), tokens()
    model.config.subquad = {"window": {"left": 1}}
    mask = torch.ones((N, N), dtype=torch.bool).tril().triu(-1)[None, None]
    want = outputs(model, "sdpa", lambda model: model(x, attention_mask=mask).logits)
    torch.testing.assert_close(outputs(model, "subquad-window", lambda m: m(x).logits), want, rtol=0, atol=5e-5)
    model.config.subquad = {"longformer": {"left": 500}}  # wider than the layer's: an alias, and no effect
    want = outputs(model, "sdpa", lambda model: model(x).logits)
    torch.testing.assert_close(outputs(model, "subquad-window", lambda m: m(x).logits), want, rtol=0, atol=5e-5)


def small(cls: Any, **fields: Any) -> Any:
    return cls(**WIDE, **fields)


def test_encoders_equal_eager() -> None:
    mask = padding("right")
    bert = transformers.BertModel(small(transformers.BertConfig, vocab_size=64)).eval()
    assert_equal(bert, lambda model: model(tokens(), attention_mask=mask).last_hidden_state, mask)
    assert_equal(bert, lambda model: model(tokens()).last_hidden_state)
    fields = {"local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
    modern = transformers.ModernBertModel(
        small(transformers.ModernBertConfig, vocab_size=64, **fields, **TOKENS)
    ).eval()
    for ours in ("subquad-exact", "subquad-window"):  # two-sided windows
        assert_equal(modern, lambda model: model(tokens(), attention_mask=mask).last_hidden_state, mask, ours=ours)
    vit = transformers.ViTModel(small(transformers.ViTConfig, image_size=16, patch_size=4, num_channels=1)).eval()
    image = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert_equal(vit, lambda model: model(image).last_hidden_state)


def test_encoder_and_decoder_equal_eager() -> None:
    mask = padding("right")
    config = transformers.WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=20, max_target_positions=40,
        init_std=0.3, decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None, **TOKENS,
    )  # fmt: skip
    whisper = transformers.WhisperForConditionalGeneration(config).eval()
    sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    assert_equal(whisper, lambda m: m(sound, decoder_input_ids=tokens(), decoder_attention_mask=mask).logits, mask)
    assert_equal(whisper, lambda m: torch.stack(m.generate(
        sound, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True).logits))  # fmt: skip
    whisper.config.subquad = {"window": {"left": 3}}
    with pytest.raises(NotImplementedError, match="11 queries of one sequence see 20 keys of another"):
        outputs(whisper, "subquad-window", lambda m: m(sound, decoder_input_ids=tokens()))
    bert = transformers.BertLMHeadModel(
        small(transformers.BertConfig, vocab_size=64, is_decoder=True, add_cross_attention=True)
    ).eval()
    states, seen = torch.arange(2 * 7 * 32).reshape(2, 7, 32) % 5 * 0.5, torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    assert_equal(bert, lambda m: m(tokens(), encoder_hidden_states=states, encoder_attention_mask=seen).logits)


def test_a_position_bias_reaches_the_logits() -> None:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4,
                                   decoder_start_token_id=0)  # fmt: skip
    model, mask = transformers.T5ForConditionalGeneration(config).eval(), padding("right")
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.mul_(20)
    call = lambda m: m(tokens(), attention_mask=mask, decoder_input_ids=tokens(n=6)).logits  # noqa: E731
    assert_equal(model, call)
    assert_equal(model, lambda m: generated(m, tokens(), mask, cache_implementation="static"))
    with pytest.raises(NotImplementedError, match=r"subquad-linear in T5Attention.*position_bias"):
        outputs(model, "subquad-linear", call)


def test_masks_of_the_user_of_four_axes() -> None:
    model = decoder("llama")
    mask = torch.ones((1, 1, N, N), dtype=torch.bool).tril()
    mask[..., 4:, 2] = False
    assert_equal(model, lambda m: m(tokens(), attention_mask=mask).logits, theirs="sdpa")
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert_equal(model, lambda m: m(tokens(), attention_mask=added).logits)
    for given, what in ((mask, "a mask of pairs"), (added, "additive mask")):
        with pytest.raises(NotImplementedError, match=f"subquad-favor in LlamaAttention of layer 0: Favor.*{what}"):
            outputs(model, "subquad-favor", lambda m, mask=given: m(tokens(), attention_mask=mask).logits)
    with pytest.raises(TypeError, match="expected bool"):
        outputs(model, "subquad-exact", lambda m: m(tokens(), attention_mask=mask.int()).logits)


def test_documents_of_flash_attention_are_kept_apart() -> None:
    model, lengths = decoder("llama"), torch.tensor([0, 5, N], dtype=torch.int32)
    call = lambda m: m(tokens(1), cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, use_cache=False).logits  # noqa: E731
    got = outputs(model, "subquad-window", call)
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    rows = lambda m: m(tokens(1), attention_mask=mask_of(lengths), use_cache=False).logits  # noqa: E731
    torch.testing.assert_close(got, outputs(model, "sdpa", rows), rtol=0, atol=5e-5)
    both = lambda m: m(tokens(1), position_ids=positions, cu_seq_lens_q=lengths, use_cache=False).logits  # noqa: E731
    torch.testing.assert_close(outputs(model, "subquad-window", both), outputs(model, "eager", lambda m: m(
        tokens(1), position_ids=positions, use_cache=False).logits), rtol=0, atol=5e-5)  # fmt: skip


def mask_of(lengths: Any) -> Any:
    number = torch.searchsorted(lengths[1:], torch.arange(N, dtype=lengths.dtype), right=True)
    return ((number[:, None] == number) & torch.ones((N, N), dtype=torch.bool).tril())[None, None]


@pytest.mark.parametrize("method", ["exact", "window"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_eager(method: str, checkpointing: bool) -> None:
    model = copy.deepcopy(decoder("gpt_oss")).train()
    mask = padding("right")
    if checkpointing:
        model.activation_checkpointing_enable()

    def gradients(implementation: str) -> Any:
        model.zero_grad()
        model.set_attn_implementation(implementation)
        model(
            tokens(), attention_mask=mask, labels=tokens().masked_fill(mask == 0, -100), use_cache=False
        ).loss.backward()
        return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])

    want, got = gradients("eager"), gradients(f"subquad-{method}")
    assert float((got - want).abs().max()) <= 1e-5 * max(1.0, float(want.abs().max()))


# masks

PLAIN = {
    "causal": masks.causal_mask_function,
    "bidirectional": masks.bidirectional_mask_function,
    "sliding": masks.sliding_window_causal_mask_function(4),
    "two-sided": masks.sliding_window_bidirectional_mask_function(2),
    "chunks": masks.chunked_causal_mask_function(4, torch.tensor([0, 2])),
}
PLACES = [(7, 7, 0, 0), (1, 8, 7, 0), (3, 10, 7, 0), (5, 9, 0, 0), (1, 9, 4, 0), (3, 6, 9, 6), (2, 6, 3, 0)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_a_pattern_says_what_transformers_mask_says(name: str, padded: bool) -> None:
    for q_length, kv_length, q_offset, kv_offset in PLACES:
        sizes = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
        seen = torch.ones((2, q_offset + q_length), dtype=torch.bool)
        seen[1, :2] = False
        given = {"batch_size": 2, **sizes, "mask_function": PLAIN[name], "attention_mask": seen if padded else None}
        pattern, want = mask_pattern(**given), masks.sdpa_mask(**given, allow_is_causal_skip=False)
        assert pattern.pairs is None
        assert pattern.shape == (2, 1, q_length, kv_length)
        assert torch.equal(pattern.matrix().expand(2, 1, -1, -1), want[..., : pattern.kv_length])
        assert not want[..., pattern.kv_length :].any()
        counted = mask_pattern(**given | {"q_offset": torch.tensor(q_offset)})  # as caches of fixed size count
        assert torch.equal(counted.matrix(), pattern.matrix())


def test_packed_documents_are_a_pattern_and_other_functions_a_matrix() -> None:
    documents, positions = torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[0, 1, 2, 0, 1]])
    for name in ("causal", "sliding", "chunks"):
        inner = masks.chunked_causal_mask_function(2, torch.tensor([0])) if name == "chunks" else PLAIN[name]
        function = masks.and_masks(
            masks.remap_positions_for_packed_sequence(inner, positions), masks.packed_sequence_mask_function(documents)
        )
        pattern = mask_pattern(1, 5, 5, mask_function=function)
        assert pattern.pairs is None
        assert torch.equal(
            pattern.matrix(), masks.sdpa_mask(1, 5, 5, mask_function=function, allow_is_causal_skip=False)
        )
    for other in (masks.or_masks(PLAIN["sliding"], PLAIN["two-sided"]), lambda b, h, q, k: (q + k) % 2 == 0,
                  masks.and_masks(PLAIN["sliding"], PLAIN["sliding"])):  # fmt: skip
        pattern = mask_pattern(1, 5, 5, mask_function=other)
        want = masks.sdpa_mask(1, 5, 5, mask_function=other, allow_is_causal_skip=False)
        assert pattern.pairs is not None
        assert torch.equal(pattern.matrix().expand_as(want), want)


def test_a_pattern_moves_and_is_no_tensor() -> None:
    pattern = mask_pattern(2, 3, 3, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    moved = pattern.to("meta")
    assert moved.key_mask.device.type == "meta"
    assert mask_pattern(2, 3, 3, attention_mask=pattern) is pattern
    reads = (lambda x: torch.zeros(3) + x, lambda x: 1 - x, lambda x: x == 0, lambda x: torch.where(x, 0.0, 1.0),
             lambda x: x[:, :, 0], lambda x: x.bool(), lambda x: torch.zeros(3).masked_fill(x, 1.0), lambda x: ~x)  # fmt: skip
    for read in reads:
        with pytest.raises((NotImplementedError, AttributeError), match="computes with its attention mask itself"):
            read(pattern)


def test_a_mask_of_another_kind_of_layer_is_refused() -> None:
    layer, q = decoder("llama").model.layers[0].self_attn, torch.zeros(1, 4, 3, 8)
    run = transformers.AttentionInterface()["subquad-exact"]
    for pattern in (MaskPattern(1, 3, 2, causal=True), MaskPattern(1, 2, 3, causal=True)):
        with pytest.raises(ValueError, match="LlamaAttention of layer 0: the mask is for"):
            run(layer, q, q, q, pattern)
    with pytest.raises(ValueError, match="no mask that says which keys"):
        run(layer, q[:, :, :2], q, q, None)


@pytest.mark.parametrize("causal", [True, False])
def test_masks_that_models_make_themselves(causal: bool) -> None:
    """None with a window of the layer, and one row for all queries: bool, additive, or of two axes."""
    layer, x = (
        decoder("llama").model.layers[0].self_attn,
        torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)),
    )
    q, k, v = x
    run = transformers.AttentionInterface()["subquad-exact"]
    far = torch.arange(9)[:, None] - torch.arange(9)
    seen = (far >= 0) & (far < 3) if causal else far.abs() < 3
    want = subquad.attention(q, k, v, "exact", mask=seen)
    got, _ = run(layer, q, k, v, None, is_causal=causal, sliding_window=3)
    torch.testing.assert_close(got.transpose(1, 2), want)
    keep = torch.arange(9) > torch.tensor([[2], [4]])
    want = subquad.attention(q, k, v, "linear", key_mask=keep[:, None])
    run = transformers.AttentionInterface()["subquad-linear"]
    row = keep[:, None, None]
    for mask in (
        keep,
        keep.int(),
        row,
        torch.where(row, 0.0, torch.finfo(torch.float32).min),
        torch.where(row, 0.0, -torch.inf),
    ):
        torch.testing.assert_close(run(layer, q, k, v, mask, scaling=1.0)[0].transpose(1, 2), want)
    with pytest.raises(NotImplementedError, match="additive mask"):
        run(layer, q, k, v, torch.where(row, 0.5, -torch.inf))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 9, 8\), expected"):
        run(layer, q, k, v, torch.ones(2, 1, 9, 8, dtype=torch.bool))


# refusals


def test_what_a_method_cannot_do_raises() -> None:
    x, long = tokens(), lambda model: model(tokens()).logits
    for name, method, words in (
        ("llama", "nystrom", "Nyström attention has no causal form"),
        ("llama", "linformer", "no causal form"),
        ("mistral", "linear", "Linear has no sliding window"),
        ("gemma2", "window", "Window cannot take softcap"),
        ("gemma2", "favor", "Favor.*sliding window"),
        ("gpt_oss", "linear", "Linear has no sliding window"),
    ):
        with pytest.raises(NotImplementedError, match=f"subquad-{method} in .*Attention of layer 0.*{words}"):
            outputs(decoder(name), f"subquad-{method}", long)
    sinks = apply(copy.deepcopy(decoder("gpt_oss")), {"layers": {"1": {"method": "linear"}}})
    with pytest.raises(NotImplementedError, match=r"layer 1: Linear cannot take sinks \(s_aux\)"):
        sinks(x)
    with pytest.raises(NotImplementedError, match=r"output_attentions=True.*'eager'"):
        outputs(decoder("llama"), "subquad-exact", lambda model: model(x, output_attentions=True))
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(NotImplementedError, match=r"output_attentions=True.*'eager'"):
        outputs(gpt2, "subquad-exact", lambda model: model(x, output_attentions=True))
    q, function = torch.zeros(2, 4, N, 8), transformers.AttentionInterface()["subquad-exact"]
    with pytest.raises(NotImplementedError, match=r"sinks of shape \(2, 4, 11, 1\), which are not one logit"):
        function(torch.nn.Identity(), q, q, q, None, sinks=q[..., :1])
    with pytest.raises(NotImplementedError, match="Linear has no sliding window"):
        outputs(decoder("mistral"), "subquad-linear", lambda model: model(x[:, :5]).logits)
    short = outputs(decoder("mistral"), "subquad-linear", lambda model: model(x[:, :4]).logits)
    assert short.shape == (2, 4, 64)  # a window that hides nothing is no reason


def test_dropout_raises_in_training_alone() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, attention_dropout=0.1))
    model.set_attn_implementation("subquad-exact")
    with pytest.raises(NotImplementedError, match=r"dropout=0.1 of attention weights in training.*attention_dropout"):
        model.train()(tokens())
    assert model.eval()(tokens()).logits.isfinite().all()


OTHERS = {
    "BigBird": {"attention_type": "original_full", "sep_token_id": 2},
    "Nystromformer": {},
    "MPNet": {},
    "ConvBert": {"embedding_size": 32},
    "Longformer": {"attention_window": 4},
    "Bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_never_ask_the_registry_are_refused(name: str) -> None:
    """When built, when the name is set, and where both are evaded: when they read their mask."""
    sizes = {} if name == "Bloom" else WIDE
    config = getattr(transformers, f"{name}Config")(vocab_size=64, **sizes, **OTHERS[name])
    cls = getattr(transformers, f"{name}Model")
    words = f"{name}Model cannot run 'subquad-exact': its attention .* never asks transformers' registry"
    with pytest.raises(ValueError, match=words):
        cls._from_config(copy.deepcopy(config), attn_implementation="subquad-exact")
    model = cls(config).eval()
    with pytest.raises(ValueError, match=words):
        model.set_attn_implementation("subquad-exact")
    assert model.config._attn_implementation != "subquad-exact"
    with pytest.raises(ValueError, match="no plan can reach it"):
        apply(model, {})
    assert any("code of its own" in layer.runs for layer in explain(model))
    model.config._attn_implementation = "subquad-exact"
    for mask in (None, padding("right", 8)):
        with pytest.raises(NotImplementedError, match="computes with its attention mask itself"):
            model(tokens(n=8), attention_mask=mask)


OWN = {  # attention by torch.nn.Softmax, by one function of torch, by logsumexp, by Fourier transforms, by a function
    "Vilt": WIDE | {"image_size": 8, "patch_size": 4},
    "WavLM": WIDE | {"conv_dim": [8], "conv_stride": [5], "conv_kernel": [10], "num_conv_pos_embeddings": 4,
                     "num_conv_pos_embedding_groups": 2},
    "Reformer": {"vocab_size": 64, "attn_layers": ["lsh"], "hidden_size": 32, "axial_pos_embds_dim": [16, 16],
                 "axial_pos_shape": [2, 2], "is_decoder": False},
    "Autoformer": {"prediction_length": 4, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1},
    "Mra": WIDE | {"vocab_size": 64},
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_attention_of_a_models_own_is_found_however_it_is_written(name: str) -> None:
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**OWN[name]))
    with pytest.raises(ValueError, match=f"{name}Model cannot run 'subquad-exact': its attention .*Attention"):
        model.set_attn_implementation("subquad-exact")


# options, plans, explain


def test_options_are_checked_and_the_config_is_stronger() -> None:
    model = copy.deepcopy(decoder("llama"))
    call = lambda model: model(tokens()).logits  # noqa: E731
    try:
        wide = outputs(model, "subquad-window", call)
        configure("longformer", left=1)
        narrow = outputs(model, "subquad-window", call)
        assert float((wide - narrow).abs().max()) > 0.1
        model.config.subquad = {"subquad-window": {"left": 64}}
        torch.testing.assert_close(outputs(model, "subquad-window", call), wide)
        saved = transformers.LlamaConfig.from_dict(json.loads(model.config.to_json_string()))
        assert saved.subquad == model.config.subquad
    finally:
        configure("window")
    with pytest.raises(TypeError, match=r"no option 'lfet'.*left"):
        configure("window", lfet=3)
    with pytest.raises(ValueError, match=r"unknown method 'windwo'.*window"):
        configure("windwo")
    model.config.subquad = {"window": 3}
    with pytest.raises(TypeError, match="expected options by method"):
        outputs(model, "subquad-window", call)


def test_a_plan_sets_each_layer(tmp_path: Any) -> None:
    model = copy.deepcopy(decoder("llama"))
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"default": {"method": "exact"}, "layers": {"1": {"method": "window", "left": 1}}}))
    assert apply(model, path) is model
    assert [layer.runs for layer in explain(model)] == ["subquad: exact", "subquad: window, left=1"]
    both = outputs(
        apply(model, {"layers": {"0-1": {"method": "longformer", "left": 1}}}),
        "subquad-plan",
        lambda m: m(tokens()).logits,
    )
    model.config.subquad = {"window": {"left": 1}}
    torch.testing.assert_close(outputs(model, "subquad-window", lambda m: m(tokens()).logits), both)
    apply(model, {"layers": {"model.layers.*": {"method": "linear"}, "1": {"method": "exact"}}})
    assert [layer.runs for layer in explain(model)] == ["subquad: linear", "subquad: exact"]
    before = explain(model)
    for plan, error, words in (
        ({"layers": {"2": {"method": "exact"}}}, ValueError, "number 2.*none of the 2"),
        ({"layers": {"0": {"method": "exakt"}}}, ValueError, r"plan\['layers'\]\['0'\]: unknown method 'exakt'"),
        ({"layers": {"0": {"method": "window", "size": 3}}}, TypeError, "no option 'size'"),
        ({"layers": {"0": "exact"}}, TypeError, "expected a method and its options"),
        ({"layers": {"decoder.*": {"method": "exact"}}}, ValueError, "no attention module has a name like"),
        ({"layer": {}}, ValueError, "plan has the key 'layer'.*layers"),
        ([], TypeError, "expected a dict"),
    ):
        with pytest.raises(error, match=words):
            apply(model, plan)
        assert explain(model) == before
    assert str(before).splitlines()[0].split()[-2:] == ["subquad:", "linear"]
    fresh = copy.deepcopy(decoder("llama"))
    with pytest.raises(ValueError, match="has no plan"):
        outputs(fresh, "subquad-plan", lambda m: m(tokens()))


def test_every_method_and_alias_has_a_name() -> None:
    assert set(NAMES) >= {f"subquad-{name}" for name in itertools.chain(subquad.METHODS, ("performer", "reformer"))}
    assert register() == NAMES
    for name in NAMES:
        assert name in transformers.AttentionInterface()
        assert name in transformers.AttentionMaskInterface()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "window", "linear"])
def test_a_compiled_model_is_one_graph(method: str) -> None:
    model, mask = decoder("llama" if method == "linear" else "mistral"), padding("left")
    model.set_attn_implementation(f"subquad-{method}")

    def call(run: Any) -> Any:
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        first = run(tokens(), attention_mask=mask, use_cache=False).logits
        later = run(tokens(), attention_mask=mask, cache=cache).logits
        last = run(tokens(n=1), attention_mask=torch.cat([mask, mask[:, -1:]], 1), cache=cache).logits
        return torch.cat([first, later, last], 1)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            call(torch.compile(model, fullgraph=True, backend="aot_eager")), call(model), rtol=0, atol=5e-5
        )
