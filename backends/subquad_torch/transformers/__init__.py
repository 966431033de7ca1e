"""Hugging Face models whose recurrent layers run by subquad."""

from subquad_torch.transformers.accelerate import accelerate, restore

__all__ = ["accelerate", "restore"]
