"""State-space models: the selective scan and its step, and the plain linear recurrence."""

from subquad.ssm.linear_scan import linear_scan
from subquad.ssm.selective_scan import selective_scan
from subquad.ssm.selective_scan_step import selective_scan_step

__all__ = ["linear_scan", "selective_scan", "selective_scan_step"]
