"""State-space models: the selective scan and its step."""

from subquad.ssm.selective_scan import selective_scan
from subquad.ssm.selective_scan_step import selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
