"""Whole blocks of state-space models: pure functions of a dict of parameters with a checkpoint's keys and shapes."""

from subquad.blocks.mamba import mamba
from subquad.blocks.mamba_parameters import check_mamba, init_mamba

BLOCKS = (mamba,)  # which `explain` knows

__all__ = ["BLOCKS", "check_mamba", "init_mamba", "mamba"]
