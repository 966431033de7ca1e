"""Random weights of Mamba-130m's shapes, as files that each peer reads: a directory of transformers, and GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, D_MODEL, VOCABULARY, D_STATE, RANK, WIDTH = 24, 768, 2000, 16, 48, 4
D_INNER = 2 * D_MODEL
CONFIG = {
    "model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": D_MODEL, "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY, "state_size": D_STATE, "conv_kernel": WIDTH, "expand": 2, "intermediate_size": D_INNER,
    "time_step_rank": RANK, "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": True, "tie_word_embeddings": True, "eos_token_id": None, "bos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
# transformers' equal in size: a Llama of 12 layers of 7.7 million parameters
LLAMA = {
    "hidden_size": D_MODEL, "num_hidden_layers": 12, "intermediate_size": 2304, "num_attention_heads": 12,
    "num_key_value_heads": 12, "vocab_size": VOCABULARY, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def draw(seed: int = 0) -> dict[str, Any]:
    """The weights by the names of transformers."""
    rng = np.random.default_rng(seed)

    def uniform(*shape: int) -> Any:
        return (rng.uniform(-1, 1, shape) * shape[-1] ** -0.5).astype(np.float32)

    steps = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (LAYERS, D_INNER)))
    found = {"embeddings.weight": uniform(VOCABULARY, D_MODEL), "norm_f.weight": np.ones(D_MODEL, np.float32)}
    for i in range(LAYERS):
        mixer = {
            "in_proj.weight": uniform(2 * D_INNER, D_MODEL), "conv1d.weight": uniform(D_INNER, 1, WIDTH),
            "conv1d.bias": np.zeros(D_INNER, np.float32), "x_proj.weight": uniform(RANK + 2 * D_STATE, D_INNER),
            "dt_proj.weight": uniform(D_INNER, RANK), "dt_proj.bias": np.log(np.expm1(steps[i])).astype(np.float32),
            "A_log": np.tile(np.log(np.arange(1.0, D_STATE + 1)), (D_INNER, 1)).astype(np.float32),
            "D": np.ones(D_INNER, np.float32), "out_proj.weight": uniform(D_MODEL, D_INNER),
        }  # fmt: skip
        found |= {f"layers.{i}.mixer.{name}": x for name, x in mixer.items()}
        found[f"layers.{i}.norm.weight"] = np.ones(D_MODEL, np.float32)
    return {f"backbone.{name}": x for name, x in found.items()}


def write(folder: Path) -> None:
    """config.json and model.safetensors, and model.gguf where the package `gguf` is installed."""
    from safetensors.numpy import save_file

    weights = draw()
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    try:
        import gguf
    except ImportError:
        return
    _write_gguf(gguf, folder / "model.gguf", weights)


OF_GGUF = {
    "norm": "attn_norm.weight", "mixer.in_proj": "ssm_in.weight", "mixer.x_proj": "ssm_x.weight",
    "mixer.dt_proj": "ssm_dt.weight", "mixer.out_proj": "ssm_out.weight",
}  # fmt: skip


def _write_gguf(gguf: Any, path: Path, weights: dict[str, Any]) -> None:
    out = gguf.GGUFWriter(path, "mamba")
    out.add_context_length(2**20)
    out.add_embedding_length(D_MODEL)
    out.add_feed_forward_length(0)
    out.add_head_count(0)
    out.add_block_count(LAYERS)
    out.add_ssm_conv_kernel(WIDTH)
    out.add_ssm_inner_size(D_INNER)
    out.add_ssm_state_size(D_STATE)
    out.add_ssm_time_step_rank(RANK)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(VOCABULARY)
    out.add_tokenizer_model("none")
    out.add_file_type(0)
    out.add_tensor("token_embd.weight", weights["backbone.embeddings.weight"])
    out.add_tensor("output_norm.weight", weights["backbone.norm_f.weight"])
    for i in range(LAYERS):
        for name, theirs in OF_GGUF.items():
            out.add_tensor(f"blk.{i}.{theirs}", weights[f"backbone.layers.{i}.{name}.weight"])
        mixer = f"backbone.layers.{i}.mixer."
        out.add_tensor(f"blk.{i}.ssm_conv1d.weight", weights[f"{mixer}conv1d.weight"][:, 0])
        out.add_tensor(f"blk.{i}.ssm_conv1d.bias", weights[f"{mixer}conv1d.bias"])
        out.add_tensor(f"blk.{i}.ssm_dt.bias", weights[f"{mixer}dt_proj.bias"])
        out.add_tensor(f"blk.{i}.ssm_a", -np.exp(weights[f"{mixer}A_log"]))
        out.add_tensor(f"blk.{i}.ssm_d", weights[f"{mixer}D"])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
