"""The functions of the package ``causal_conv1d`` by its names, on any device, around `subquad.causal_conv1d`."""

from subquad_torch.causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update
from subquad_torch.stand_in import install, uninstall

__version__ = "1.6.1"  # the release whose interface this is

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "install", "uninstall"]
