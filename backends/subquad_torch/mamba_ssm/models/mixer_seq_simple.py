"""A language model of Mamba blocks, as ``mamba_ssm`` has it."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from subquad_torch.mamba_ssm.models.config_mamba import MambaConfig
from subquad_torch.mamba_ssm.models.create import create_block, init_weights
from subquad_torch.mamba_ssm.modules.block import add_and_norm
from subquad_torch.mamba_ssm.ops.triton.layer_norm import RMSNorm
from subquad_torch.mamba_ssm.utils.generation import GenerationMixin
from subquad_torch.mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf, save_model

__all__ = ["MambaLMHeadModel", "MixerModel", "create_block"]

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


class MixerModel(nn.Module):
    """Embedding, blocks and last norm.

    Parameters
    ----------
    d_model, n_layer, d_intermediate, vocab_size : int
        As in `MambaConfig`.
    ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm, fused_add_norm, residual_in_fp32 : optional
        Those of each block.
    initializer_cfg : dict, optional
        ``initializer_range``, 0.02, and ``rescale_prenorm_residual``, True.
    device, dtype : optional
        Those of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **made)
        self.layers = nn.ModuleList(
            create_block(
                d_model, d_intermediate, ssm_cfg, attn_layer_idx, attn_cfg, norm_epsilon, rms_norm, residual_in_fp32,
                fused_add_norm, layer_idx=i, **made,
            )
            for i in range(n_layer)
        )  # fmt: skip
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(d_model, eps=norm_epsilon, **made)
        residuals = 2 if d_intermediate else 1
        self.apply(partial(init_weights, n_layer=n_layer, **(initializer_cfg or {}), n_residuals_per_layer=residuals))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of all layers, by their numbers."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def forward(self, input_ids: Tensor, inference_params: Any = None, **mixer_kwargs: Any) -> Tensor:
        """The last hidden states (batch, seqlen, d_model) of tokens (batch, seqlen)."""
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        return add_and_norm(self, self.norm_f, hidden, residual)[0]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model: `MixerModel`, and logits of the next token.

    Parameters
    ----------
    config : MambaConfig
        The sizes.
    initializer_cfg : dict, optional
        As in `MixerModel`.
    device, dtype : optional
        Those of the parameters.

    Examples
    --------
    >>> import torch
    >>> from subquad_torch.mamba_ssm import MambaLMHeadModel
    >>> from subquad_torch.mamba_ssm.models.config_mamba import MambaConfig
    >>> model = MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=50))
    >>> model.generate(torch.zeros(1, 3, dtype=torch.long), max_length=8).shape
    torch.Size([1, 8])
    """

    def __init__(
        self, config: MambaConfig, initializer_cfg: dict[str, Any] | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.config = config
        made = {"device": device, "dtype": dtype}
        multiple = config.pad_vocab_size_multiple
        vocab_size = -(-config.vocab_size // multiple) * multiple
        self.backbone = MixerModel(
            config.d_model, config.n_layer, config.d_intermediate, vocab_size, config.ssm_cfg, config.attn_layer_idx,
            config.attn_cfg, rms_norm=config.rms_norm, initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm, residual_in_fp32=config.residual_in_fp32, **made,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, **made)
        self.apply(partial(init_weights, n_layer=config.n_layer, **(initializer_cfg or {})))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let embedding and output share their weight, if the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of all layers, by their numbers."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> Any:
        """Compute the logits of the tokens that come next.

        Parameters
        ----------
        input_ids : Tensor of int, shape (batch, seqlen)
            Tokens.
        position_ids : Tensor, optional
            Positions, which generation passes to models of every kind: those of Mamba have none, and nothing depends
            on it.
        inference_params : InferenceParams, optional
            The cache; see `Mamba.forward`.
        num_last_tokens : int, default 0
            If it is above 0: the logits at as many last tokens alone.
        **mixer_kwargs : object
            Further arguments of the mixers, such as ``seq_idx`` of Mamba-2.

        Returns
        -------
        CausalLMOutput
            A named tuple of one field, ``logits`` (batch, seqlen, vocab_size), vocab_size rounded up.
        """
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        if num_last_tokens > 0:
            hidden = hidden[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | Path, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> MambaLMHeadModel:
        """Load a model from a local directory with config.json and safetensors.

        Parameters
        ----------
        pretrained_model_name : str or Path
            The directory. Nothing is downloaded.
        device, dtype : optional
            Those of the parameters; by default the CPU and float32.
        **kwargs : object
            Further arguments of the class.

        Returns
        -------
        MambaLMHeadModel
            The model.

        Raises
        ------
        FileNotFoundError
            If there is no such directory, or no weights in it.
        ValueError
            If config.json is of another kind of model, or the weights are a pickle, which is not loaded.
        RuntimeError
            If the weights do not fit the configuration; the message names the tensors.
        """
        config = load_config_hf(pretrained_model_name)
        fields = MambaConfig.__dataclass_fields__
        unknown = [name for name in config if name not in fields]
        if unknown:
            msg = (
                f"config.json of {pretrained_model_name} has {unknown[0]!r}, expected the fields of MambaConfig, "
                f"{', '.join(fields)}; the models of transformers load by its own from_pretrained"
            )
            raise ValueError(msg)
        weights = load_state_dict_hf(pretrained_model_name)
        model = cls(MambaConfig(**config), device=device, dtype=dtype, **kwargs)
        if model.config.tie_embeddings and "backbone.embedding.weight" in weights:
            weights.setdefault("lm_head.weight", weights["backbone.embedding.weight"])
        model.load_state_dict(weights)
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json and model.safetensors to a directory, which is made where there is none.

        Parameters
        ----------
        save_directory : str or Path
            The directory. A weight that embedding and output share is written once.
        """
        weights = self.state_dict()
        if self.config.tie_embeddings:
            del weights["lm_head.weight"]
        save_model(save_directory, asdict(self.config), weights)
