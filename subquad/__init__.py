"""subquad: sequence operators that cost less than quadratic, on any array library."""

from subquad._dispatch import Explanation
from subquad._draw import draw_omega
from subquad.attention import METHODS, Exact, Favor, Linear, Method, Nystrom, attention
from subquad.explain import explain
from subquad.ssm import linear_scan, selective_scan, selective_scan_step

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Exact",
    "Explanation",
    "Favor",
    "Linear",
    "Method",
    "Nystrom",
    "attention",
    "draw_omega",
    "explain",
    "linear_scan",
    "selective_scan",
    "selective_scan_step",
]
