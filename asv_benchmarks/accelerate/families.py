"""Tiny random models of transformers, one for each family of recurrent layers."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

SIZES = {"vocab_size": 50, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"num_hidden_layers": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA2 = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_chunk_size": 8,
}  # fmt: skip

PURE = ("Mamba", "FalconMamba", "Mamba2")  # models without attention, whose decoding takes no mask
GENTLE = ("Zamba2",)  # whose rounding large weights multiply: gradients of float32 are then off by 1e-5, its own too
CONFIGS: dict[str, dict[str, Any]] = {
    "Mamba": {**LAYERS, "state_size": 8, "use_bias": True},
    "FalconMamba": {**LAYERS, "state_size": 8},
    "Jamba": {
        **LAYERS, **ATTENTION, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "num_experts": 1, "num_experts_per_tok": 1, "mamba_proj_bias": True,
    },
    "Mamba2": {
        **LAYERS, "num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 8, "use_bias": True,
        "time_step_limit": (0.0, 0.5),
    },
    "Bamba": {**LAYERS, **ATTENTION, **MAMBA2, "attn_layer_indices": [1]},
    "Zamba2": {
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "mamba_d_state": 8,
        "mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 2, "chunk_size": 8, "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"],
    },
    "NemotronH": {
        **ATTENTION, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8,
    },
    "GraniteMoeHybrid": {
        **LAYERS, **ATTENTION, **MAMBA2, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
        "num_experts_per_tok": 0, "shared_intermediate_size": 48,
    },
    "FalconH1": {**LAYERS, **ATTENTION, **MAMBA2, "mamba_d_ssm": 64, "mamba_rms_norm": True},
    "Qwen3Next": {
        **LAYERS, **ATTENTION, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "head_dim": 8,
    },
    "Qwen3_5": {
        **LAYERS, **ATTENTION, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8,
    },
}  # fmt: skip


@cache
def _tiny(family: str) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    cls = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = cls(cls.config_class(**SIZES | CONFIGS[family])).eval()
    weights, biases = (0.1, 0.1) if family in GENTLE else (0.25, 0.5)
    with torch.no_grad():
        for name, x in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if x.ndim > 1 and "A_log" not in name:  # large enough that every part of the model matters
                x.normal_(std=weights)
            elif last in ("bias", "dt_bias"):
                x.normal_(std=biases)
            elif last == "D":
                x.normal_()
    return model


def tiny_model(family: str) -> Any:
    """A model of the family in evaluation mode, always with the same weights."""
    return copy.deepcopy(_tiny(family))
