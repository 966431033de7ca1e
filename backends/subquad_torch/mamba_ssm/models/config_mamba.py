"""The configuration of a language model, as its config.json has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["MambaConfig"]


@dataclass
class MambaConfig:
    """The fields of config.json of state-spaces' models, with their defaults.

    Parameters
    ----------
    d_model, d_intermediate, n_layer, vocab_size : int
        Width, width of the multilayer perceptrons (0: none), layers, tokens.
    ssm_cfg, attn_cfg : dict
        Arguments of the mixers; ``layer`` of `ssm_cfg` is "Mamba1" or "Mamba2".
    attn_layer_idx : list of int
        Layers of attention, which are not provided.
    rms_norm, residual_in_fp32, fused_add_norm : bool
        Which norm, and the dtype of the residual stream.
    pad_vocab_size_multiple : int
        The number of tokens is rounded up to a multiple.
    tie_embeddings : bool
        Whether embedding and output share their weight.
    """

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True
