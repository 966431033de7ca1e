"""NumPy backend: arrays that are computed at once and may be filled in place, and compiled scans."""

from subquad._dispatch import Override
from subquad_numpy import _kernels

IN_PLACE = True

KERNELS = {"selective_scan": (Override("numba", _kernels.selective_scan, _kernels.declines),)}
