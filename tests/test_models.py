"""Language models with published weights: every format, on every library, and generation from them."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interpreter import python
from rows.language_models import (
    CONFIGS,
    Host,
    flat_params,
    gguf_file,
    gguf_tensors,
    mamba_ssm_config,
    mamba_ssm_directory,
    mlx_directory,
    transformers_config,
    transformers_directory,
    write_directory,
)
from rows.libraries import Library, relative_error, tolerance

import subquad
from subquad.models import LanguageModel, ModelConfig, mamba_logits
from subquad.models.sampling import Sampler

KINDS = tuple(CONFIGS)
TOKENS = np.random.default_rng(1).integers(0, 50, (2, 12))
ROUNDING = tolerance("float32")
FORMATS = {
    "transformers": transformers_directory,
    "sharded": lambda folder, config, flat: transformers_directory(folder, config, flat, shards=3),
    "mlx-lm": mlx_directory,
    "mamba-ssm": mamba_ssm_directory,
    "gguf": lambda folder, config, flat: gguf_file(folder / "model.gguf", config, flat),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of transformers of either kind."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: transformers_directory(folder / kind, c, flat_params(c)) for kind, c in CONFIGS.items()}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, paths: dict[str, Path]) -> LanguageModel:
    """A tiny model of either kind on NumPy."""
    return subquad.load_model(paths[request.param])


def double_logits(config: ModelConfig, flat: dict[str, Host], tokens: Host) -> Host:
    """The logits in float64: the blocks' definitions step by step, with all else written out."""
    flat = {name: x.astype(np.float64) for name, x in flat.items()}

    def norm(x: Host, weight: Host) -> Host:
        return weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)

    def silu(x: Host) -> Host:
        return x / (1 + np.exp(-x))

    x = flat["embedding.weight"][tokens]
    n = tokens.shape[-1]
    for i in range(config.n_layers):
        p = {name.removeprefix(f"layers.{i}.mixer."): w for name, w in flat.items() if f"layers.{i}.mixer." in name}
        both = norm(x, flat[f"layers.{i}.norm.weight"]) @ p["in_proj.weight"].T
        taps = p["conv1d.weight"][:, 0]
        width, d = taps.shape[1], config.d_inner
        if config.kind == "mamba":
            u, z = both[..., :d], both[..., d:]
        else:
            z, u, delta = np.split(both, [d, both.shape[-1] - config.heads], axis=-1)
        before = np.concatenate([np.zeros((*u.shape[:-2], width - 1, u.shape[-1])), u], axis=-2)
        u = silu(sum(before[..., k : k + n, :] * taps[:, k] for k in range(width)) + p["conv1d.bias"])
        if config.kind == "mamba":
            low = u @ p["x_proj.weight"].T
            delta = low[..., : config.dt_rank] @ p["dt_proj.weight"].T + p["dt_proj.bias"]
            B, C = np.split(low[..., config.dt_rank :], 2, axis=-1)
            B, C = (np.broadcast_to(m[..., None, :], (*m.shape[:-1], d, m.shape[-1])) for m in (B, C))
            A, D = -np.exp(p["A_log"]), p["D"]
        else:
            u, B, C = np.split(u, [d, d + config.groups * config.d_state], axis=-1)
            B, C = (np.repeat(m.reshape(*m.shape[:-1], config.groups, -1), d // config.groups, axis=-2) for m in (B, C))
            each = d // config.heads
            delta = np.repeat(delta + p["dt_bias"], each, axis=-1)
            A, D = -np.exp(np.repeat(p["A_log"], each))[:, None], np.repeat(p["D"], each)
        delta = np.log1p(np.exp(delta))
        h, ys = np.zeros((*u.shape[:-2], d, config.d_state)), []
        for t in range(n):
            h = np.exp(delta[..., t, :, None] * A) * h + (delta * u)[..., t, :, None] * B[..., t, :, :]
            ys.append(np.sum(C[..., t, :, :] * h, axis=-1) + D * u[..., t, :])
        y = np.stack(ys, axis=-2) * silu(z)
        if config.kind == "mamba2":
            parts = y.reshape(*y.shape[:-1], config.groups, -1)
            y = norm(parts, np.ones(parts.shape[-1])).reshape(y.shape) * p["norm.weight"]
        x = x + y @ p["out_proj.weight"].T
    head = flat["embedding.weight" if config.tied else "lm_head.weight"]
    return norm(x, flat["norm_f.weight"]) @ head.T


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_definition(kind: str, paths: dict[str, Path], library: Library) -> None:
    """On every library, and under `jit`, from the arrays of a file."""
    config, flat = CONFIGS[kind], flat_params(CONFIGS[kind])
    params = subquad.load_model(paths[kind]).params
    tokens = TOKENS.astype(np.int32)
    got = library.call(lambda p, t: mamba_logits(t, p, config), params, tokens, dtype="float32")
    assert tuple(got.shape) == (2, 12, 56)
    if library.has_values:
        assert relative_error(library.numpy(got), double_logits(config, flat, TOKENS)) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_formats_have_equal_logits_row_by_row(kind: str, tmp_path: Path) -> None:
    """The table of names and transforms: each tensor in turn is changed, and its change seen through every format."""
    config, flat = CONFIGS[kind], flat_params(CONFIGS[kind])
    rng = np.random.default_rng(3)
    base = double_logits(config, flat, TOKENS[0])
    rows = [None, *(name for name in flat if "layers.1" not in name), "layers.1.mixer.A_log"]
    for i, name in enumerate(rows):
        changed = dict(flat)
        if name is not None:
            changed[name] = flat[name] + 0.4 * rng.standard_normal(flat[name].shape).astype(np.float32)
        reference = double_logits(config, changed, TOKENS[0])
        assert (name is None) or relative_error(reference, base) > 1e-3, name
        for label, write in FORMATS.items():
            if label == "sharded" and name is not None:
                continue
            got = subquad.load_model(write(tmp_path / f"{label} {i}", config, changed)).logits(TOKENS[0])
            assert relative_error(got, reference) < ROUNDING, (label, name)


@pytest.mark.parametrize("quantise", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf_of_other_types(quantise: str, tmp_path: Path) -> None:
    """Matrices in the dtype of the file, or float32 of quantised numbers; the logits are those of the rounded ones."""
    import gguf

    config = dataclasses.replace(CONFIGS["mamba"], d_model=32, d_inner=64)
    flat = flat_params(config)
    model = subquad.load_model(gguf_file(tmp_path / "model.gguf", config, flat, quantise=quantise))
    stored = {"F16": "float16", "BF16": "bfloat16"}.get(quantise, "float32")
    mixer = model.params["layers"][0]["mixer"]
    assert model.params["embedding.weight"].dtype.name == mixer["in_proj.weight"].dtype.name == stored
    assert mixer["A_log"].dtype == mixer["conv1d.weight"].dtype == np.float32
    kind = gguf.GGMLQuantizationType[quantise]
    rounded = {
        name: gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
        if x.ndim == 2 and x.shape[1] % 32 == 0 and "A_log" not in name
        else x
        for name, x in flat.items()
    }
    if stored != "float32":  # which take rows of any length
        small = mixer["dt_proj.weight"].astype(np.float32)
        assert relative_error(small, flat["layers.0.mixer.dt_proj.weight"]) < 2.0**-8
        rounded |= {name: x.astype(stored).astype(np.float32) for name, x in flat.items() if "dt_proj.weight" in name}
    assert relative_error(model.logits(TOKENS), double_logits(config, rounded, TOKENS)) < ROUNDING


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "mamba"},
        {"kind": "mamba", "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
        {"kind": "mamba2", "n_groups": 1, "tie_word_embeddings": True},
        {"kind": "mamba2", "n_groups": 2, "use_bias": True, "time_step_limit": (0.2, 0.9)},
    ],
    ids=str,
)
def test_transformers_own_files(options: dict[str, Any], tmp_path: Path) -> None:
    """What transformers saves is read, and gives its logits and its greedy text."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    options = dict(options)
    kind = options.pop("kind")
    sizes = {"vocab_size": 50, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": None}
    if kind == "mamba":
        config = transformers.MambaConfig(**sizes, **options)
        net = transformers.MambaForCausalLM(config)
    else:
        config = transformers.Mamba2Config(**sizes, num_heads=4, head_dim=8, chunk_size=4, **options)
        net = transformers.Mamba2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for x in net.parameters():
        x.data += 0.1 * torch.randn(x.shape, generator=generator)
    net.eval().save_pretrained(tmp_path)
    model = subquad.load_model(tmp_path)
    with torch.no_grad():
        expected = net(torch.from_numpy(TOKENS)).logits.numpy()
    assert relative_error(model.logits(TOKENS), expected) < ROUNDING
    if "time_step_limit" not in options:  # which transformers forgets in steps of one token
        text = net.generate(torch.from_numpy(TOKENS[:1]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert model.generate(TOKENS[0], max_new=6, stop=[]) == text[0].tolist()


def test_what_ends_a_text_is_read(tmp_path: Path) -> None:
    """From the config, and rather from what transformers keeps beside it for generation."""
    folder = transformers_directory(tmp_path, CONFIGS["mamba"], flat_params(CONFIGS["mamba"]))
    assert subquad.load_model(folder).config.eos == (7,)
    for said, eos in (({"eos_token_id": [3, 4]}, (3, 4)), ({"eos_token_id": 0}, (0,)), ({}, (7,))):
        (folder / "generation_config.json").write_text(json.dumps(said))
        assert subquad.load_model(folder).config.eos == eos


def test_base_models_without_prefix_and_heads(tmp_path: Path) -> None:
    config, flat = CONFIGS["mamba"], flat_params(CONFIGS["mamba"])
    tensors = {("embeddings.weight" if "embedding" in name else name): x for name, x in flat.items()}
    tensors["lm_head.weight"] = flat["embedding.weight"]  # tied, and stored all the same
    model = subquad.load_model(write_directory(tmp_path, transformers_config(config), tensors))
    assert relative_error(model.logits(TOKENS), double_logits(config, flat, TOKENS)) < ROUNDING


def test_config_of_mamba_ssm_pads_the_vocabulary(tmp_path: Path) -> None:
    config = CONFIGS["mamba"]
    flat = flat_params(config)
    flat["embedding.weight"][50:] *= 9  # so that padding is likely
    model = subquad.load_model(mamba_ssm_directory(tmp_path, config, flat))
    logits = model.logits(TOKENS)
    assert (logits.shape[-1], model.config.used_vocab) == (56, 50)
    drawn = model.generate([[i] for i in range(40)], max_new=5, temperature=5.0, stop=[])
    assert max(map(max, drawn)) < 50
    assert {int(x) for x in logits.argmax(-1).ravel()} - set(range(50)), "no padding would have been drawn anyway"


# --- states, masks ---


def test_full_equals_chunks_equals_steps(model: LanguageModel) -> None:
    whole, last = model.logits(TOKENS, return_state=True)
    state, parts = None, []
    for part in np.split(TOKENS, [3, 4, 9], axis=1):
        logits, state = model.logits(part, state, return_state=True)
        parts.append(logits)
    assert relative_error(np.concatenate(parts, axis=1), whole) < ROUNDING
    for one, other in zip(state, last, strict=True):
        assert all(relative_error(one[name], other[name]) < ROUNDING for name in ("conv", "ssm"))
    assert relative_error(model.logits(TOKENS, num_last_tokens=3), whole[:, -3:]) < 1e-6
    assert relative_error(model.logits(TOKENS[0].tolist()), whole[0]) < 1e-6


def test_a_state_whose_layers_are_of_two_batches(paths: dict[str, Path]) -> None:
    model = subquad.load_model(paths["mamba"])
    _, one = model.logits(TOKENS[0], return_state=True)
    _, two = model.logits(TOKENS, return_state=True)
    with pytest.raises(ValueError, match=r"state of layer 1 is of a batch of shape \(2,\)"):
        model.logits([3], (one[0], two[1]))
    assert relative_error(model.logits([[3], [3]], (one[0], two[1]))[0], model.logits([3], one)) < ROUNDING


def test_models_are_copied_and_pickled(model: LanguageModel) -> None:
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(again.logits(TOKENS), model.logits(TOKENS))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint16", "uint32"])
def test_tokens_of_every_integer_dtype(paths: dict[str, Path], dtype: str, eager: Library) -> None:
    tokens = np.asarray([3, 1, 4], dtype)
    model = subquad.load_model(paths["mamba"], like=eager.array(np.zeros(1), "float32"))
    expected = subquad.load_model(paths["mamba"]).logits(tokens)
    assert relative_error(eager.numpy(model.logits(eager.array(tokens, "float32"))), expected) < ROUNDING


def test_padding_and_documents(model: LanguageModel) -> None:
    tokens, mask = TOKENS.copy(), np.ones(TOKENS.shape, np.bool_)
    mask[1, :5], tokens[1, :5] = False, 9
    padded, state = model.logits(tokens, mask=mask, return_state=True)
    alone, own = model.logits(TOKENS[1, 5:], return_state=True)
    assert relative_error(padded[1, 5:], alone) < 1e-6
    assert relative_error(state[1]["ssm"][1], own[1]["ssm"]) < 1e-6
    packed = model.logits(TOKENS[1], segments=np.repeat([0, 1], [5, 7]))
    assert relative_error(packed[5:], alone) < 1e-6


# --- generation ---


def greedy(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    for _ in range(count):
        prompt = [*prompt, int(np.argmax(model.logits(prompt)[-1]))]
    return prompt


def test_greedy_text_and_its_end(model: LanguageModel) -> None:
    prompt = TOKENS[0].tolist()
    expected = greedy(model, prompt, 6)
    assert model.generate(prompt, max_new=6, stop=[]) == expected
    assert model.generate(TOKENS[0], max_new=6, stop=()) == expected
    new = expected[len(prompt) :]
    end = new[2]
    for stop in (end, [end], np.int64(end)):
        assert model.generate(prompt, max_new=6, stop=stop) == expected[: len(prompt) + new.index(end) + 1]
    model = LanguageModel(model.params, dataclasses.replace(model.config, eos=(end,)))
    assert model.generate(prompt, max_new=6) == expected[: len(prompt) + new.index(end) + 1]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "top_k": 20, "seed": 5}])
def test_a_batch_is_its_prompts(model: LanguageModel, options: dict[str, Any]) -> None:
    """Of any lengths, some ending early; the k-th prompt draws alike whatever the others are."""
    prompts = [TOKENS[0].tolist(), TOKENS[1, :3].tolist(), [4]]
    texts = model.generate(prompts, max_new=8, **options)
    assert texts[0] == model.generate(prompts[0], max_new=8, **options)
    other = model.generate([[1, 2], *prompts[1:]], max_new=8, **options)
    assert texts[1:] == other[1:]
    if options:
        one, two = model.generate([[1, 2]] * 2, max_new=8, **options)
        assert one != two
    else:
        assert texts == [model.generate(prompt, max_new=8) for prompt in prompts]
    steps = list(model.stream(prompts, max_new=8, **options))
    for k, prompt in enumerate(prompts):
        assert prompt + [step[k] for step in steps if step[k] is not None] == texts[k]


def test_long_prompts_go_in_pieces(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [TOKENS.ravel().tolist(), TOKENS[0, :4].tolist(), TOKENS[1].tolist()]
    expected = model.generate(prompts, max_new=4)
    for size in (1, 4, 5, 23, 24):
        monkeypatch.setattr("subquad.models.generation.PREFILL", size)
        assert model.generate(prompts, max_new=4) == expected


def test_generation_goes_on_from_a_state(model: LanguageModel) -> None:
    _, state = model.logits(TOKENS[:1, :7], return_state=True)
    text = model.generate(TOKENS[0, 7:], max_new=5, state=state)
    assert text[5:] == model.generate(TOKENS[0], max_new=5)[12:]


def test_libraries_draw_equal_tokens(paths: dict[str, Path], eager: Library) -> None:
    options = {"max_new": 10, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    prompts = [[1, 2, 3, 4], [5]]
    like = eager.array(np.zeros(1), "float32")
    for path in paths.values():
        model = subquad.load_model(path, like=like)
        assert isinstance(model.params["embedding.weight"], type(like))
        assert model.generate(prompts, **options) == subquad.load_model(path).generate(prompts, **options)


def test_top_k_and_top_p_by_definition(rng: np.random.Generator) -> None:
    logits = rng.standard_normal(30).astype(np.float32)
    logits[:4] = logits.max()  # ties
    p = np.exp(logits.astype(np.float64) / 0.7)
    p /= p.sum()
    order = sorted(range(30), key=lambda i: (-p[i], i))
    for k in (1, 3, 7, 30, 99):
        kept = np.flatnonzero(Sampler(0.7, top_k=k).probabilities(logits))
        assert set(kept) == set(order[:k])
    for mass in (1e-9, 0.1, 0.5, 0.93, 0.999, 1.0):
        got = Sampler(0.7, top_p=mass).probabilities(logits)
        fewest = next(m for m in range(1, 31) if p[order[:m]].sum() >= mass - 1e-12)
        assert set(np.flatnonzero(got)) == set(order[:fewest])
        assert got.sum() == pytest.approx(1)
        assert np.allclose(got[order[:fewest]] / got[order[0]], p[order[:fewest]] / p[order[0]])


def test_draws_follow_the_probabilities(rng: np.random.Generator) -> None:
    logits, sampler = rng.standard_normal(6), Sampler(1.5, top_k=5)
    p = sampler.probabilities(logits)
    counts = np.bincount([sampler.choose(logits, rng) for _ in range(4000)], minlength=6)
    spread = 4000 * p * (1 - p)
    assert counts[p == 0].sum() == 0
    assert (np.abs(counts - 4000 * p) <= 4 * np.sqrt(spread)).all()  # four standard deviations


def test_transformers_keeps_the_tokens_that_we_keep(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.from_numpy(rng.standard_normal((1, 40)))
    warped = process.TopKLogitsWarper(9)(None, process.TemperatureLogitsWarper(0.8)(None, scores))
    warped = process.TopPLogitsWarper(0.8)(None, warped)
    got = Sampler(0.8, top_k=9, top_p=0.8).probabilities(scores[0].numpy())
    assert np.allclose(got, torch.softmax(warped, -1)[0].numpy(), atol=1e-12)


# --- dtypes, libraries ---


NARROW_AND_WIDE = ("bfloat16", "float16", "float64")


@pytest.mark.parametrize("dtype", NARROW_AND_WIDE)
def test_dtypes(paths: dict[str, Path], dtype: str, library: Library) -> None:
    """Matrices have the dtype, or it is refused by name; logits are those of the rounded matrices."""
    like, path = library.array(np.zeros(1), "float32"), paths["mamba"]
    model = subquad.load_model(path)
    lacking = {"strict": ("float16", "bfloat16"), "strictnofloat64": NARROW_AND_WIDE, "jax": ("float64",)}
    if dtype in lacking.get(str(library), ()):
        with pytest.raises(ValueError, match=f"dtype is {dtype}, which .* does not have here; expected one of"):
            subquad.load_model(path, like=like, dtype=dtype)
        return
    got = subquad.load_model(path, like=like, dtype=dtype)
    assert library.dtype_name(got.params["embedding.weight"]) == dtype
    small = got.params["layers"][0]["mixer"]["A_log"]
    assert library.dtype_name(small) == ("float64" if dtype == "float64" else "float32")
    logits = got.logits(TOKENS, implementation="generic")  # what places parameters knows no kernel
    assert library.dtype_name(logits) == library.dtype_name(small)
    if library.has_values:
        error = relative_error(library.numpy(logits), model.logits(TOKENS).astype(np.float64))
        assert error < {"bfloat16": 3e-2, "float16": 4e-3, "float64": ROUNDING}[dtype]
        assert (error > 1e-4) == (dtype != "float64")


def test_stored_bfloat16_stays(tmp_path: Path) -> None:
    import ml_dtypes

    flat = {name: x.astype(ml_dtypes.bfloat16) for name, x in flat_params(CONFIGS["mamba"]).items()}
    path = transformers_directory(tmp_path, CONFIGS["mamba"], flat)
    model = subquad.load_model(path)
    assert model.params["embedding.weight"].dtype == ml_dtypes.bfloat16
    reference = double_logits(CONFIGS["mamba"], flat, TOKENS)
    assert relative_error(model.logits(TOKENS), reference) < ROUNDING
    assert relative_error(subquad.load_model(path, dtype=np.float64).logits(TOKENS), reference) < 1e-12
    torch = pytest.importorskip("torch")
    model = subquad.load_model(path, like=torch.empty(0))
    assert model.params["embedding.weight"].dtype == torch.bfloat16
    assert relative_error(model.logits(TOKENS).numpy(), reference) < ROUNDING
    assert subquad.load_model(path, dtype=torch.float32).params["embedding.weight"].dtype == np.float32


def test_gradients_reach_every_parameter(paths: dict[str, Path]) -> None:
    torch = pytest.importorskip("torch")
    model = subquad.load_model(paths["mamba"], like=torch.empty(0), dtype="float64")
    leaves: list[Any] = []

    def watched(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {name: watched(x) for name, x in tree.items()}
        if isinstance(tree, tuple):
            return tuple(map(watched, tree))
        leaves.append(tree.clone().requires_grad_())
        return leaves[-1]

    logits = mamba_logits(torch.from_numpy(TOKENS), watched(model.params), model.config, implementation="generic")
    logits.square().sum().backward()
    assert all(x.grad is not None and bool(x.grad.abs().max() > 0) for x in leaves)


def test_numpy_alone_loads_no_framework(paths: dict[str, Path]) -> None:
    code = f"""
import sys, subquad
subquad.load_model({str(paths["mamba"])!r}).generate([1, 2, 3], max_new=2)
print([name for name in ("torch", "jax", "transformers", "gguf", "tokenizers", "rich") if name in sys.modules])
"""
    assert python(code) == "[]"


# --- text ---

WORDS = [*"abcdefghij", "Ġ", "ab", "cd", "Ġab", "é", "Ã", "©", "<|end|>"]
MERGES = ["a b", "c d", "Ġ ab"]


def byte_level(folder: Path) -> None:
    """A tokenizer.json of byte-level BPE, with a token that ends a text."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [tuple(m.split()) for m in MERGES]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken("<|end|>", normalized=False)])
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A model whose vocabulary is `WORDS`."""
    config = dataclasses.replace(CONFIGS["mamba"], vocab_size=len(WORDS), used_vocab=len(WORDS), eos=(17,))
    folder = transformers_directory(tmp_path_factory.mktemp("text"), config, flat_params(config))
    byte_level(folder)
    return subquad.load_model(folder)


def test_text_in_and_out(talking: LanguageModel) -> None:
    prompt = "abcd ab"
    ids = talking.tokenizer.encode(prompt).ids
    assert ids == [11, 12, 13]
    assert np.array_equal(talking.logits(prompt), talking.logits(ids))
    options: dict[str, Any] = {"max_new": 12, "temperature": 2.0, "stop": []}
    for seed in range(5):
        text = talking.generate(prompt, **options, seed=seed)
        numbers = talking.generate(ids, **options, seed=seed)
        whole = talking.tokenizer.decode(numbers, skip_special_tokens=True)
        assert text == whole[: len(text)]
        assert set(whole[len(text) :]) <= {"�"}  # half of a character at the end is not text yet
        assert prompt + "".join(talking.stream(prompt, **options, seed=seed)) == text
    both = talking.generate([prompt, "ab"], **options, seed=4)
    assert (both[0], both[1][:2]) == (text, "ab")


def test_text_that_is_none(talking: LanguageModel) -> None:
    with pytest.raises(ValueError, match=r"the text holds '\\ud800' at 1, which is no character"):
        talking.generate("a\ud800")


def test_strings_end_a_text(talking: LanguageModel) -> None:
    free = talking.generate("a", max_new=40, temperature=2.0, stop=[], seed=1)
    stop = free[5:8]  # which may begin and end within tokens
    text = talking.generate("a", max_new=40, temperature=2.0, stop=[stop, 99], seed=1)
    assert free.startswith(text)
    end = free.index(stop, 1) + len(stop)
    assert end <= len(text) < end + max(map(len, WORDS))
    numbers = talking.generate([0], max_new=40, temperature=2.0, stop=[stop, 99], seed=1)
    assert talking.tokenizer.decode(numbers) in (text, text + "�")


def test_the_tokenizer_in_a_gguf_file(talking: LanguageModel, tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "model.gguf", talking.config, flat_params(talking.config), words=WORDS, merges=MERGES)
    model = subquad.load_model(path)
    for text in ("abcd ab", "ab<|end|>cd", "é a"):
        assert model.tokenizer.encode(text).ids == talking.tokenizer.encode(text).ids
    assert model.config.eos == talking.config.eos == (17,)
    options: dict[str, Any] = {"max_new": 9, "temperature": 1.0, "seed": 2}
    assert model.generate("ab", **options) == talking.generate("ab", **options)


# --- what is refused ---


def damaged(path: Path, keep: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


@pytest.mark.parametrize("keep", [0.0, 0.003, 0.1, 0.5, 0.999])
def test_truncated_files(keep: float, tmp_path: Path) -> None:
    config, flat = CONFIGS["mamba"], flat_params(CONFIGS["mamba"])
    folder = transformers_directory(tmp_path / "hf", config, flat)
    damaged(folder / "model.safetensors", keep)
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole \.safetensors file"):
        subquad.load_model(folder)
    path = damaged(gguf_file(tmp_path / "model.gguf", config, flat), keep)
    with pytest.raises(ValueError, match=r"no whole GGUF file|is empty|should have \d+ bytes from byte"):
        subquad.load_model(path)


def changed(name: str, x: Any) -> dict[str, Host]:
    """The parameters of Mamba, one of them replaced, or left out for None."""
    flat = flat_params(CONFIGS["mamba"]) | {name: x}
    return {name: x for name, x in flat.items() if x is not None}


@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("layers.1.mixer.D", np.ones(31, np.float32), r"(ssm_d|mixer\.D)' has shape \(31,\), the config expects \(32,\)"),
        ("embedding.weight", np.ones((2000, 16), np.float32), r"'(token_embd|backbone\.embeddings)\.weight' has shape \(2000, 16\)"),
        ("layers.0.mixer.x_proj.weight", None, r"lacks the tensor '(blk\.0\.ssm_x|backbone\.layers\.0\.mixer\.x_proj)\.weight', expected of shape \(11, 32\)"),
    ],
    ids=["shape", "oversized", "missing"],
)  # fmt: skip
def test_mislabelled_tensors(name: str, x: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, flat = CONFIGS["mamba"], changed(name, x)
    folder = transformers_directory(tmp_path / "hf", config, flat)
    if x is None:
        flat = flat_params(config)
        tensors = gguf_tensors(config, flat)
        del tensors["blk.0.ssm_x.weight"]
        monkeypatch.setattr("rows.language_models.gguf_tensors", lambda *_: tensors)
    path = gguf_file(tmp_path / "model.gguf", config, flat)
    monkeypatch.setattr(np, "fromfile", None)  # nothing is read
    for where in (folder, path):
        with pytest.raises(ValueError, match=message):
            subquad.load_model(where)


def test_tensors_that_no_model_has(tmp_path: Path) -> None:
    flat = flat_params(CONFIGS["mamba"])
    extra = flat | {
        "layers.0.mixer.gate.weight": np.ones(3, np.float32),
        "layers.7.norm.weight": np.ones(3, np.float32),
    }
    folder = transformers_directory(tmp_path / "hf", CONFIGS["mamba"], extra)
    with pytest.raises(ValueError, match=r"has the tensor 'backbone\.layers\.\d\.\S+' and 1 more, which the model"):
        subquad.load_model(folder)
    integers = {name: x.astype(np.int32) if name.endswith("D") else x for name, x in flat.items()}
    with pytest.raises(ValueError, match=r"'backbone\.layers\.0\.mixer\.D' has dtype I32, expected one of F64"):
        subquad.load_model(transformers_directory(tmp_path / "int", CONFIGS["mamba"], integers))
    positive = gguf_tensors(CONFIGS["mamba"], flat)
    positive["blk.1.ssm_a"] = -positive["blk.1.ssm_a"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rows.language_models.gguf_tensors", lambda *_: positive)
        path = gguf_file(tmp_path / "model.gguf", CONFIGS["mamba"], flat)
    with pytest.raises(ValueError, match=r"the tensor 'blk\.1\.ssm_a': it holds numbers of 0 or more"):
        subquad.load_model(path)


TRANSFORMERS, MAMBA_SSM = transformers_config(CONFIGS["mamba2"]), mamba_ssm_config(CONFIGS["mamba"])


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"model_type": "llama"}, "a model of type 'llama'; load_model reads 'mamba' and 'mamba2'"),
        ({"model_type": ["mamba"]}, r"a model of type \['mamba'\]"),
        ({}, "neither 'model_type'.* nor 'd_model'"),
        ([], "holds a list, expected a JSON object"),
        (TRANSFORMERS | {"num_hidden_layers": 10**9}, r"has \d+ tensors, too few for the 1000000000 layers"),
        (TRANSFORMERS | {"num_hidden_layers": 2.5}, "num_hidden_layers must be an integer, got 2.5"),
        (TRANSFORMERS | {"hidden_size": 2**40}, "hidden_size must be at most"),
        (TRANSFORMERS | {"hidden_size": 2**30}, r"has shape \(56, 16\), the config expects \(56, 1073741824\)"),
        (TRANSFORMERS | {"state_size": 0}, "state_size must be at least 1, got 0"),
        (TRANSFORMERS | {"vocab_size": None}, "lacks 'vocab_size'"),
        (TRANSFORMERS | {"n_groups": 3}, "4 heads, 3 groups and 32 inner channels do not fit"),
        (TRANSFORMERS | {"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported"),
        (TRANSFORMERS | {"use_bias": "no"}, "use_bias is 'no', expected true or false"),
        (TRANSFORMERS | {"time_step_limit": [0.5, 0.1]}, "expected 0 ≤ low < high"),
        (TRANSFORMERS | {"time_step_limit": [0.5, {"__float__": "NaN"}]}, "expected two numbers"),
        (TRANSFORMERS | {"layer_norm_epsilon": -1}, "layer_norm_epsilon must be positive"),
        (TRANSFORMERS | {"eos_token_id": "x"}, "eos_token_id is 'x', expected a token number"),
        (TRANSFORMERS | {"tie_word_embeddings": True, "num_hidden_layers": 1}, "has the tensor 'backbone.layers.1"),
        (MAMBA_SSM | {"attn_layer_idx": [1]}, "layers have no attention"),
        (MAMBA_SSM | {"d_intermediate": 64}, "layers have no MLP"),
        (MAMBA_SSM | {"rms_norm": False}, "norms are RMS norms"),
        (MAMBA_SSM | {"ssm_cfg": {"layer": "Mamba3"}}, "a model of type 'Mamba3'"),
        (MAMBA_SSM | {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 8}}, "d_ssm is 8"),
        (MAMBA_SSM | {"ssm_cfg": [1]}, "expected a JSON object"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_configs_that_describe_no_such_model(description: Any, message: str, tmp_path: Path) -> None:
    kind = "mamba2" if isinstance(description, dict) and description.get("model_type") == "mamba2" else "mamba"
    folder = transformers_directory(tmp_path, CONFIGS[kind], flat_params(CONFIGS[kind]))
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        subquad.load_model(folder)


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; nothing is downloaded"):
        subquad.load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        subquad.load_model(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no JSON"):
        subquad.load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS))
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors file"):
        subquad.load_model(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"not even read")
    with pytest.raises(ValueError, match=r"weights\.bin, a pickle.* converted to \.safetensors"):
        subquad.load_model(tmp_path)
    with pytest.raises(ValueError, match=r"is the file .*, expected a directory"):
        subquad.load_model(tmp_path / "weights.bin")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has 2 \.safetensors files and no model\.safetensors\.index\.json"):
        subquad.load_model(tmp_path)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"x": "../model.safetensors"}, r"expected the name of a \.safetensors file beside it"),
        ({"x": "/etc/hostname"}, r"expected the name of a \.safetensors file beside it"),
        ({"x": "model.bin"}, r"expected the name of a \.safetensors file beside it"),
        ({"x": "other.safetensors"}, "which is not there"),
        ({"x": "model-00001-of-00002.safetensors"}, "lacks the tensor 'x'"),
        ({"x": 1}, "weight_map is no object"),
        (None, "weight_map is no object"),
    ],
)
def test_an_index_names_files_beside_it(places: Any, message: str, tmp_path: Path) -> None:
    folder = transformers_directory(tmp_path, CONFIGS["mamba"], flat_params(CONFIGS["mamba"]), shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        subquad.load_model(folder)


def gguf_bytes(entries: list[tuple[bytes, int, bytes]], tensors: bytes = b"", *, count: int = 0) -> bytes:
    """A GGUF file of these entries (key, type, value) and tensors."""
    body = b"".join(struct.pack("<Q", len(k)) + k + struct.pack("<I", t) + v for k, t, v in entries)
    return b"GGUF" + struct.pack("<IQQ", 3, count, len(entries)) + body + tensors


TENSOR = struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 2**62, 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(99), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "in the other byte order"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "of version 9, expected version 2 or 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "no whole GGUF file: a key of the metadata"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "no whole GGUF file: the name of a tensor"),
        (gguf_bytes([(b"a", 9, struct.pack("<IQ", 4, 2**60))]), "the value of 'a' should have"),
        (gguf_bytes([(b"a", 9, struct.pack("<IQ", 8, 2**60))]), "the value of 'a' should have"),
        (gguf_bytes([(b"a", 9, struct.pack("<IQ", 9, 2**60))]), "an array of the type 9"),
        (gguf_bytes([(b"a", 8, struct.pack("<Q", 2**63))]), "the value of 'a' should have 9223372036854775808 bytes"),
        (gguf_bytes([(b"a", 77, b"")]), "the value of 'a' has the unknown type 77"),
        (gguf_bytes([(b"a", 0, b"1"), (b"a", 0, b"1")]), "the key 'a' twice"),
        (gguf_bytes([(b"general.alignment", 4, struct.pack("<I", 3))]), "general.alignment is 3"),
        (gguf_bytes([], TENSOR, count=1), r"'t' of shape \(4611686018427387904,\) should have 18446744073709551616 bytes"),
        (gguf_bytes([], TENSOR * 2, count=2), "the tensor 't' twice"),
        (gguf_bytes([], TENSOR[:9] + struct.pack("<I", 2**31) + TENSOR[13:], count=1), "has 2147483648 axes"),
        (gguf_bytes([]), "a model of type None"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_headers_of_gguf_are_held_against_the_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        subquad.load_model(path)


def test_gguf_of_other_models(tmp_path: Path) -> None:
    config, flat = CONFIGS["mamba"], flat_params(CONFIGS["mamba"])
    with pytest.raises(ValueError, match="a model of type 'jamba'"):
        subquad.load_model(gguf_file(tmp_path / "a.gguf", config, flat, architecture="jamba"))
    with pytest.raises(ValueError, match=r"ssm\.dt_b_c_rms is True.* as FalconMamba does"):
        subquad.load_model(gguf_file(tmp_path / "b.gguf", config, flat, ssm__dt_b_c_rms=True))
    with pytest.raises(
        ValueError, match=r"'blk\.0\.ssm_in\.weight' has shape \(64, 16\), the config expects \(48, 16\)"
    ):
        subquad.load_model(gguf_file(tmp_path / "c.gguf", config, flat, ssm__inner_size=24))


@pytest.mark.parametrize("package", ["safetensors", "gguf"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = FORMATS["gguf" if package == "gguf" else "transformers"]
    write(tmp_path, CONFIGS["mamba"], flat_params(CONFIGS["mamba"]))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf'needs {package}, .*pip install "subquad\[models\]"'):
        subquad.load_model(tmp_path / "model.gguf" if package == "gguf" else tmp_path)


def state_of(config: ModelConfig, batch: int) -> tuple[dict[str, Host], ...]:
    """The state of a batch at its beginning."""
    shapes = {"conv": (batch, config.d_conv - 1, config.d_inner), "ssm": (batch, config.d_inner, config.d_state)}
    return tuple({name: np.zeros(shape, np.float32) for name, shape in shapes.items()} for _ in range(config.n_layers))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new": 0}, ValueError, "max_new must be at least 1"),
        ({"temperature": -1}, ValueError, "temperature must be 0 or more"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"top_k": 3}, ValueError, "top_k is 3, but temperature is 0"),
        ({"top_p": 0.5}, ValueError, "top_p is 0.5, but temperature is 0"),
        ({"top_k": 0, "temperature": 1}, ValueError, "top_k must be at least 1"),
        ({"top_p": 1.5, "temperature": 1}, ValueError, "top_p must be above 0 and at most 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"stop": 1.5}, TypeError, "stop is 1.5"),
        ({"stop": b"x"}, TypeError, "stop is b'x'"),
        ({"stop": "x"}, ValueError, "the model has no tokenizer"),
        ({"stop": ""}, ValueError, "an empty string"),
        ({"tokens": "text"}, ValueError, "the model has no tokenizer"),
        ({"tokens": []}, ValueError, "the prompt has no tokens"),
        ({"tokens": [[1], []]}, ValueError, "prompt 1 has no tokens"),
        ({"tokens": [[1], 2]}, TypeError, "a prompt is 2"),
        ({"tokens": [1.5]}, TypeError, "expected a list of token numbers"),
        ({"tokens": 5}, TypeError, "tokens is a int"),
        ({"tokens": np.ones(3)}, TypeError, "dtype float64"),
        ({"tokens": [56]}, ValueError, "a prompt holds 56, expected numbers in 0 … 55"),
        ({"state": {}}, TypeError, "state is a dict"),
        ({"state": state_of(CONFIGS["mamba"], 3)}, ValueError, r"state is of a batch of shape \(3,\), expected"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_requests_that_cannot_be_met(
    paths: dict[str, Path], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, options = subquad.load_model(paths["mamba"]), dict(options)
    tokens = options.pop("tokens", [1, 2])
    with pytest.raises(error, match=message):
        model.generate(tokens, **options)
    with pytest.raises(error, match=message):
        model.stream(tokens, **options)  # at the call, not at the first token


@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    [
        ([1, 99], {}, ValueError, "tokens holds 99, expected numbers in 0 … 55"),
        (np.asarray([-1]), {}, ValueError, "tokens holds -1"),
        ([[1, 2], [3]], {}, ValueError, "lists of several lengths"),
        (np.ones(3), {}, TypeError, "tokens has dtype float64, expected integers"),
        (np.asarray(3), {}, ValueError, r"tokens has shape \(\), expected \(\.\.\., n\)"),
        ([1], {"state": ()}, ValueError, "state has 0 entries, expected one for each of the 2 layers"),
        ([1], {"num_last_tokens": -1}, ValueError, "num_last_tokens must be at least 0"),
        ([1], {"mask": np.ones(2, np.bool_)}, ValueError, "mask has shape"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_logits_that_cannot_be_computed(
    paths: dict[str, Path], tokens: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        subquad.load_model(paths["mamba"]).logits(tokens, **options)


def test_dtypes_by_the_classes_of_jax(paths: dict[str, Path]) -> None:
    jnp = pytest.importorskip("jax.numpy")
    assert subquad.load_model(paths["mamba"], dtype=jnp.bfloat16).params["embedding.weight"].dtype.name == "bfloat16"
    with pytest.raises(ValueError, match="expected one of float64"):
        subquad.load_model(paths["mamba"], dtype=np.ones(1, np.float32))


def test_dtypes_that_are_none(paths: dict[str, Path]) -> None:
    for dtype in ("int8", np.int32, "floating"):
        with pytest.raises(ValueError, match="expected one of float64, float32, float16, bfloat16"):
            subquad.load_model(paths["mamba"], dtype=dtype)
    with pytest.raises(TypeError, match="like is a int"):
        subquad.load_model(paths["mamba"], like=3)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    path = transformers_directory(tmp_path, CONFIGS["mamba"], changed("norm_f.weight", np.full(16, np.nan, np.float32)))
    with pytest.raises(ValueError, match="the logits hold NaN"):
        subquad.load_model(path).generate([1])


def test_logits_without_a_likeliest_token(rng: np.random.Generator) -> None:
    for logits in ([1.0, np.inf, 0.0], [-np.inf, -np.inf], [0.0, np.nan, 1.0]):
        for temperature in (0.0, 1.0):
            with pytest.raises(ValueError, match="the logits hold NaN or infinity"):
                Sampler(temperature).choose(np.asarray(logits), rng)
    for temperature in (0.0, 1e-9):
        assert Sampler(temperature).choose(np.asarray([0.0, -np.inf, 1.0]), rng) == 2


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float, rng: np.random.Generator) -> None:
    logits = rng.standard_normal(50).astype(np.float32)
    for top_p in (None, 0.5):
        assert Sampler(temperature, top_p=top_p).choose(logits, rng) == logits.argmax()


# --- the command line ---


def test_the_command(paths: dict[str, Path], talking: LanguageModel, tmp_path: Path, capsys: Any) -> None:
    from subquad.cli import main

    model = subquad.load_model(paths["mamba"])
    options = ["--max-new", "5", "--temperature", "1.5", "--top-k", "9", "--top-p", "0.95", "--seed", "4"]
    assert main(["generate", str(paths["mamba"]), "--tokens", "3,1,4", *options]) == 0
    out, err = capsys.readouterr()
    expected = model.generate([3, 1, 4], max_new=5, temperature=1.5, top_k=9, top_p=0.95, seed=4)
    assert out == f"{' '.join(map(str, expected))}\n"
    assert "LanguageModel(mamba, 2 layers" in err
    assert "prompt: 3 tokens" in err
    assert len(expected) == 8
    assert "then 4 tokens at " in err
    folder = transformers_directory(tmp_path, talking.config, flat_params(talking.config))
    byte_level(folder)
    assert main(["generate", str(folder), "abcd ab", "--max-new", "6", "--dtype", "float64"]) == 0
    out, err = capsys.readouterr()
    assert out == talking.generate("abcd ab", max_new=6) + "\n"
    assert "float64" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a prompt, either PROMPT as text or --tokens"),
        (["text", "--tokens", "1"], "expected a prompt, either"),
        (["text"], "has no tokenizer that can be read; give the prompt by --tokens"),
        (["--tokens", "one"], "--tokens is 'one', expected whole numbers"),
        (["--tokens", "1", "--top-k", "3"], "top_k is 3, but temperature is 0"),
        (["--tokens", "1", "--dtype", "int8"], "dtype is 'int8'"),
        (["--tokens", "1", "--backend", "nmpy"], "--backend: no backend is called 'nmpy'; did you mean 'numpy'"),
        (["--tokens", "1", "--backend", "numpy,torch"], "expected one library"),
    ],
)
def test_wrong_requests_of_the_command(
    paths: dict[str, Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from subquad.cli import main

    assert main(["generate", str(paths["mamba"]), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_output_that_cannot_be_written(
    paths: dict[str, Path], talking: LanguageModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A reader that has enough, as `head`, a full disk, and a terminal without the characters."""
    from subquad.cli import main

    def run(out: Any, path: Path, *arguments: str) -> tuple[int, str]:
        before, sys.stdout = sys.stdout, out
        try:
            return main(["generate", str(path), *arguments]), capfd.readouterr().err
        finally:
            sys.stdout = before

    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe:
        code, err = run(pipe, paths["mamba"], "--tokens", "3")
    assert (code, err.count("\n")) == (141, 1), err
    if Path("/dev/full").exists():
        with open("/dev/full", "w", encoding="utf-8") as full:
            code, err = run(full, paths["mamba"], "--tokens", "3")
        assert code == 1
        assert "subquad generate: " in err
    folder = transformers_directory(tmp_path / "model", talking.config, flat_params(talking.config))
    byte_level(folder)
    with (tmp_path / "out.txt").open("w", encoding="ascii") as narrow:
        assert run(narrow, folder, "ab é", "--max-new", "3", "--stop", "zzz")[0] == 0
    assert (tmp_path / "out.txt").read_text(encoding="ascii").startswith("ab ?")
