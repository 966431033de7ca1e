"""Faster state-space layers in models of transformers: classes of modules, and what computes in their place."""

from subquad_torch.transformers.accelerate.families import FAMILIES
from subquad_torch.transformers.accelerate.model import accelerate, restore
from subquad_torch.transformers.accelerate.swap import Swapped

__all__ = ["FAMILIES", "Swapped", "accelerate", "restore"]
