"""Whole blocks of state-space models: pure functions of a dict of parameters with a checkpoint's keys and shapes."""

from subquad.blocks.mamba import mamba
from subquad.blocks.mamba2 import mamba2
from subquad.blocks.mamba2_parameters import init_mamba2
from subquad.blocks.mamba_parameters import check_mamba, init_mamba

BLOCKS = (mamba, mamba2)  # which `explain` knows

__all__ = ["BLOCKS", "check_mamba", "init_mamba", "init_mamba2", "mamba", "mamba2"]
