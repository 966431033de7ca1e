"""One block of a language model, and how its weights begin."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from subquad_torch.mamba_ssm.modules.block import Block
from subquad_torch.mamba_ssm.modules.mamba2 import Mamba2
from subquad_torch.mamba_ssm.modules.mamba3 import Mamba3
from subquad_torch.mamba_ssm.modules.mamba_simple import Mamba
from subquad_torch.mamba_ssm.modules.mlp import GatedMLP
from subquad_torch.mamba_ssm.ops.triton.layer_norm import RMSNorm

MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2, "Mamba3": Mamba3}


def create_block(
    d_model: int,
    d_intermediate: int = 0,
    ssm_cfg: dict[str, Any] | None = None,
    attn_layer_idx: list[int] | None = None,
    attn_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: Any = None,
    dtype: Any = None,
) -> Block:
    """Make one block, of the mixer that ``ssm_cfg["layer"]`` names, with a gated perceptron if it has a width.

    Raises
    ------
    NotImplementedError
        For a layer of attention, or of Mamba-3.
    ValueError
        For an unknown mixer.
    """
    made = {"device": device, "dtype": dtype}
    if attn_layer_idx and layer_idx in attn_layer_idx:
        msg = (
            f"attn_layer_idx holds {layer_idx}, expected no layer of attention: subquad has the mixers Mamba1 and "
            f"Mamba2 (attn_cfg is {attn_cfg})"
        )
        raise NotImplementedError(msg)
    options = dict(ssm_cfg or {})
    kind = options.pop("layer", "Mamba1")
    if kind not in MIXERS:
        msg = f"ssm_cfg has layer {kind!r}, expected 'Mamba1' or 'Mamba2'"
        raise ValueError(msg)
    mlp = partial(GatedMLP, hidden_features=d_intermediate, out_features=d_model, **made) if d_intermediate else None
    block = Block(
        d_model,
        partial(MIXERS[kind], layer_idx=layer_idx, **options, **made),
        nn.Identity if mlp is None else mlp,
        norm_cls=partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **made),
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
    )
    block.layer_idx = layer_idx
    return block


def init_weights(
    module: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Embeddings of spread `initializer_range`, biases 0, and last projections smaller by √(layers), as in GPT-2."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    elif isinstance(module, nn.Linear) and module.bias is not None and not hasattr(module.bias, "_no_reinit"):
        nn.init.zeros_(module.bias)
    if rescale_prenorm_residual:
        for name, weight in module.named_parameters():
            if name in ("out_proj.weight", "fc2.weight"):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # anew each time: a product would shrink at each visit
                with torch.no_grad():
                    weight /= math.sqrt(n_residuals_per_layer * n_layer)
