"""subquad: sequence operators whose cost grows more slowly than the square of the length, on any array library."""

from subquad.attention import (
    LSH,
    METHODS,
    BigBird,
    Clustered,
    Exact,
    Favor,
    Linear,
    Linformer,
    Method,
    Nystrom,
    Window,
    attention,
    attention_weights,
)
from subquad.core.loading import load_imported
from subquad.explain import Explanation, explain
from subquad.random import draw_omega
from subquad.scans import linear_scan, merge_scan, selective_scan, selective_scan_step, summarize_scan

__version__ = "0.1.0"

__all__ = [
    "LSH",
    "METHODS",
    "BigBird",
    "Clustered",
    "Exact",
    "Explanation",
    "Favor",
    "Linear",
    "Linformer",
    "Method",
    "Nystrom",
    "Window",
    "attention",
    "attention_weights",
    "draw_omega",
    "explain",
    "linear_scan",
    "merge_scan",
    "selective_scan",
    "selective_scan_step",
    "summarize_scan",
]

load_imported()
