"""Tiny language models of random weights in every format that `subquad.load_model` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from subquad.models import ModelConfig, init_params

Host = np.ndarray[Any, Any]
CONFIGS = {
    "mamba": ModelConfig("mamba", d_model=16, n_layers=2, vocab_size=56, d_inner=32, d_state=4, d_conv=4, dt_rank=3,
                         used_vocab=50, eos=(7,)),
    "mamba2": ModelConfig("mamba2", d_model=16, n_layers=2, vocab_size=56, d_inner=32, d_state=4, d_conv=4, heads=4,
                          groups=2, tied=False, used_vocab=50, eos=(7,)),
}  # fmt: skip


def flat_params(config: ModelConfig, seed: int = 0) -> dict[str, Host]:
    """Parameters by their names without "backbone.": no vector is constant, and steps are long enough to forget by."""
    params, rng = init_params(config, seed=seed), np.random.default_rng(seed)
    flat = {name: x for name, x in params.items() if name != "layers"}
    for i, layer in enumerate(params["layers"]):
        flat[f"layers.{i}.norm.weight"] = layer["norm.weight"]
        flat |= {f"layers.{i}.mixer.{name}": x for name, x in layer["mixer"].items()}
    flat = {name: x + 2.0 if name.endswith(("dt_bias", "dt_proj.bias")) else x for name, x in flat.items()}
    return {name: (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32) for name, x in flat.items()}


def transformers_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of transformers."""
    c = config
    shared = {
        "model_type": c.kind, "hidden_size": c.d_model, "num_hidden_layers": c.n_layers, "vocab_size": c.vocab_size,
        "state_size": c.d_state, "conv_kernel": c.d_conv, "expand": 2, "layer_norm_epsilon": c.norm_eps,
        "use_bias": c.bias, "use_conv_bias": c.conv_bias, "hidden_act": "silu", "tie_word_embeddings": c.tied,
        "eos_token_id": c.eos[0],
    }  # fmt: skip
    if c.kind == "mamba":
        return shared | {"intermediate_size": c.d_inner, "time_step_rank": c.dt_rank}
    limits = [0.0, {"__float__": "Infinity"}] if c.delta_limits is None else list(c.delta_limits)
    heads = {"num_heads": c.heads, "head_dim": c.d_inner // c.heads, "n_groups": c.groups}
    return shared | heads | {"time_step_limit": limits}


def mamba_ssm_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of mamba-ssm."""
    c = config
    ssm: dict[str, Any] = {"d_state": c.d_state, "d_conv": c.d_conv, "expand": c.d_inner // c.d_model}
    if c.kind == "mamba":
        ssm["dt_rank"] = c.dt_rank
    else:
        ssm |= {"layer": "Mamba2", "headdim": c.d_inner // c.heads, "ngroups": c.groups}
    return {
        "d_model": c.d_model, "n_layer": c.n_layers, "vocab_size": c.used_vocab, "ssm_cfg": ssm, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": c.tied,
    }  # fmt: skip


def write_directory(folder: Path, description: dict[str, Any], tensors: dict[str, Host], shards: int = 1) -> Path:
    """A directory with a config.json, and the tensors in one file or in several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, places = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        places |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def transformers_directory(folder: Path, config: ModelConfig, flat: dict[str, Host], shards: int = 1) -> Path:
    tensors = {f"backbone.{name}" if name != "lm_head.weight" else name: x for name, x in flat.items()}
    tensors["backbone.embeddings.weight"] = tensors.pop("backbone.embedding.weight")
    return write_directory(folder, transformers_config(config), tensors, shards)


def mlx_directory(folder: Path, config: ModelConfig, flat: dict[str, Host]) -> Path:
    """As of transformers, but for the taps: (channels, width, 1)."""
    flat = {name: np.swapaxes(x, 1, 2).copy() if "conv1d.weight" in name else x for name, x in flat.items()}
    return transformers_directory(folder, config, flat)


def mamba_ssm_directory(folder: Path, config: ModelConfig, flat: dict[str, Host]) -> Path:
    tensors = {f"backbone.{name}" if name != "lm_head.weight" else name: x for name, x in flat.items()}
    return write_directory(folder, mamba_ssm_config(config), tensors)


def gguf_tensors(config: ModelConfig, flat: dict[str, Host]) -> dict[str, Host]:
    """The tensors of a GGUF file, as llama.cpp reads them: written out, not by the table of the library."""
    tensors = {"token_embd.weight": flat["embedding.weight"], "output_norm.weight": flat["norm_f.weight"]}
    if not config.tied:
        tensors["output.weight"] = flat["lm_head.weight"]
    for i in range(config.n_layers):
        p, b = {name.removeprefix(f"layers.{i}."): x for name, x in flat.items() if f"layers.{i}." in name}, f"blk.{i}."
        tensors |= {
            f"{b}attn_norm.weight": p["norm.weight"], f"{b}ssm_in.weight": p["mixer.in_proj.weight"],
            f"{b}ssm_conv1d.weight": p["mixer.conv1d.weight"][:, 0, :], f"{b}ssm_conv1d.bias": p["mixer.conv1d.bias"],
            f"{b}ssm_out.weight": p["mixer.out_proj.weight"],
        }  # fmt: skip
        if config.kind == "mamba":
            tensors |= {
                f"{b}ssm_x.weight": p["mixer.x_proj.weight"], f"{b}ssm_dt.weight": p["mixer.dt_proj.weight"],
                f"{b}ssm_dt.bias": p["mixer.dt_proj.bias"], f"{b}ssm_a": -np.exp(p["mixer.A_log"]),
                f"{b}ssm_d": p["mixer.D"],
            }  # fmt: skip
        else:
            tensors |= {
                f"{b}ssm_dt.bias": p["mixer.dt_bias"], f"{b}ssm_a": -np.exp(p["mixer.A_log"])[:, None],
                f"{b}ssm_d": p["mixer.D"][:, None],
                f"{b}ssm_norm.weight": p["mixer.norm.weight"].reshape(config.groups, -1),
            }  # fmt: skip
    return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


def gguf_file(
    path: Path, config: ModelConfig, flat: dict[str, Host], *, quantise: str = "F32", words: list[str] | None = None,
    merges: list[str] | None = None, architecture: str | None = None, **entries: Any,
) -> Path:  # fmt: skip
    """A GGUF file, its matrices of the given type; `entries` are further or other numbers of its metadata."""
    import gguf

    c, arch = config, architecture or config.kind
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "context_length": 64, "embedding_length": c.d_model, "block_count": c.n_layers, "feed_forward_length": 0,
        "attention.head_count": 0, "ssm.conv_kernel": c.d_conv, "ssm.inner_size": c.d_inner, "ssm.state_size": c.d_state,
        "ssm.time_step_rank": c.dt_rank or c.heads, "vocab_size": c.vocab_size,
    } | ({"ssm.group_count": c.groups} if c.kind == "mamba2" else {})  # fmt: skip
    for name, value in (numbers | {k.replace("__", "."): v for k, v in entries.items()}).items():
        if isinstance(value, bool):
            writer.add_bool(f"{arch}.{name}", value)
        else:
            writer.add_uint32(f"{arch}.{name}", value)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_tokenizer_model("gpt2" if words else "no_vocab")
    if words:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(words)
        writer.add_token_merges(merges or [])
        writer.add_token_types([3 if word.startswith("<|") else 1 for word in words])
        writer.add_eos_token_id(c.eos[0])
    kind = gguf.GGMLQuantizationType[quantise]
    for name, x in gguf_tensors(config, flat).items():
        matrix = x.ndim == 2 and x.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 and "ssm_a" not in name
        matrix = matrix and not any(part in name for part in ("ssm_d", "conv1d", "norm"))
        if matrix and quantise != "F32":
            writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
