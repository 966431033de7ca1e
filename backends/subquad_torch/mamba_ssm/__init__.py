"""The functions and modules of the package ``mamba_ssm`` by its names, on any device, around subquad's scans."""

from subquad_torch.mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from subquad_torch.mamba_ssm.modules.mamba2 import Mamba2
from subquad_torch.mamba_ssm.modules.mamba3 import Mamba3
from subquad_torch.mamba_ssm.modules.mamba_simple import Mamba
from subquad_torch.mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from subquad_torch.stand_in import install, uninstall

__version__ = "2.3.2"  # the release whose interface this is

__all__ = [
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MambaLMHeadModel",
    "install",
    "mamba_inner_fn",
    "selective_scan_fn",
    "uninstall",
]
