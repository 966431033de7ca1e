"""A residual block around a mixer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from subquad_torch.mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn

__all__ = ["Block"]


class Block(nn.Module):
    """Add, normalise, mix: the residual stream is handed on beside the output of the mixer.

        residual ← hidden + residual,    hidden ← mixer(norm(residual))

    Parameters
    ----------
    dim : int
        Width.
    mixer_cls, mlp_cls, norm_cls : callable
        Each makes its module from `dim`. With `nn.Identity` there is no second half.
    fused_add_norm : bool, default False
        Add and normalise in one call, in float32.
    residual_in_fp32 : bool, default False
        Keep the stream in float32.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        mlp_cls: Callable[[int], nn.Module] = nn.Identity,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            msg = f"norm_cls makes {type(self.norm).__name__}, expected nn.LayerNorm or RMSNorm with fused_add_norm"
            raise ValueError(msg)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, **mixer_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The output of the mixer, or of the second half, and the stream before it.

        Parameters
        ----------
        hidden_states : Tensor, shape (batch, seqlen, dim)
            The output of the block before, or the embedding.
        residual : Tensor, shape (batch, seqlen, dim), optional
            The stream of the block before.
        inference_params : InferenceParams, optional
            The cache, for the mixer.
        **mixer_kwargs : object
            Further arguments of the mixer.

        Returns
        -------
        hidden_states, residual : Tensor, shape (batch, seqlen, dim)
            Input of the next block.
        """
        hidden_states, residual = add_and_norm(self, self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = add_and_norm(self, self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any) -> Any:
        """The states of the mixer, as it makes them."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def add_and_norm(owner: Any, norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum), in the dtypes that ``fused_add_norm`` and ``residual_in_fp32`` of the owner say."""
    if owner.fused_add_norm:
        return layer_norm_fn(
            hidden, norm.weight, norm.bias, residual, eps=norm.eps, prenorm=True,
            residual_in_fp32=owner.residual_in_fp32, is_rms_norm=isinstance(norm, RMSNorm),
        )  # fmt: skip
    residual = hidden if residual is None else hidden + residual
    normed = norm(residual.to(norm.weight.dtype))
    return normed, residual.to(torch.float32) if owner.residual_in_fp32 else residual
