"""Language models with published weights: every format, on every library, and generation from them."""

from __future__ import annotations

import dataclasses
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
    mamba_ssm_directory,
    mlx_directory,
    transformers_directory,
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


def test_base_models_without_prefix_and_heads(tmp_path: Path) -> None:
    config, flat = CONFIGS["mamba"], flat_params(CONFIGS["mamba"])
    from rows.language_models import transformers_config, write_directory

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
    if not options:
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
    for mass in (1e-9, 0.1, 0.5, 0.93, 1.0):
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes(model: LanguageModel, paths: dict[str, Path], dtype: str, library: Library) -> None:
    """Matrices have the dtype, or it is refused by name; logits are those of the rounded matrices."""
    like = library.array(np.zeros(1), "float32")
    path = paths[model.config.kind]
    try:
        got = subquad.load_model(path, like=like, dtype=dtype)
    except ValueError as error:
        assert f"dtype is {dtype}" in str(error)
        assert dtype not in library.known_dtypes or library.dtype_name(like) != dtype
        return
    assert library.dtype_name(got.params["embedding.weight"]) == dtype
    small = got.params["layers"][0]["mixer"]["A_log"]
    assert library.dtype_name(small) == ("float64" if dtype == "float64" else "float32")
    logits = got.logits(TOKENS)
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
    model = subquad.load_model(paths["mamba2"], like=torch.empty(0), dtype="float64")
    leaves: list[Any] = []

    def watched(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {name: watched(x) for name, x in tree.items()}
        if isinstance(tree, tuple):
            return tuple(map(watched, tree))
        leaves.append(tree.clone().requires_grad_())
        return leaves[-1]

    logits = mamba_logits(torch.from_numpy(TOKENS), watched(model.params), model.config)
    logits.square().sum().backward()
    assert all(x.grad is not None and bool(x.grad.abs().max() > 0) for x in leaves)


def test_numpy_alone_loads_no_framework(paths: dict[str, Path]) -> None:
    code = f"""
import sys, subquad
subquad.load_model({str(paths["mamba"])!r}).generate([1, 2, 3], max_new=2)
print([name for name in ("torch", "jax", "transformers", "gguf", "tokenizers", "rich") if name in sys.modules])
"""
    assert python(code) == "[]"
