"""subquad: sequence operators whose cost grows more slowly than the square of the length, on any array library."""

from subquad.attention import (
    LSH,
    METHODS,
    Auto,
    BigBird,
    Clustered,
    Crossover,
    ErrorEstimate,
    Exact,
    Favor,
    Linear,
    Linformer,
    Method,
    Nystrom,
    PoorApproximation,
    Window,
    attention,
    attention_weights,
    estimate_error,
    measure_crossover,
)
from subquad.core.loading import load_imported
from subquad.explain import Explanation, explain
from subquad.random import draw_omega
from subquad.scans import (
    ScanErrorEstimate,
    causal_conv1d,
    causal_conv1d_step,
    discretize,
    estimate_scan_error,
    every,
    linear_scan,
    lti_scan,
    lti_scan_step,
    merge_scan,
    selective_scan,
    selective_scan_step,
    summarize_scan,
)

__version__ = "0.1.0"

__all__ = [
    "LSH",
    "METHODS",
    "Auto",
    "BigBird",
    "Clustered",
    "Crossover",
    "ErrorEstimate",
    "Exact",
    "Explanation",
    "Favor",
    "Linear",
    "Linformer",
    "Method",
    "Nystrom",
    "PoorApproximation",
    "ScanErrorEstimate",
    "Window",
    "attention",
    "attention_weights",
    "causal_conv1d",
    "causal_conv1d_step",
    "discretize",
    "draw_omega",
    "estimate_error",
    "estimate_scan_error",
    "every",
    "explain",
    "linear_scan",
    "lti_scan",
    "lti_scan_step",
    "measure_crossover",
    "merge_scan",
    "selective_scan",
    "selective_scan_step",
    "summarize_scan",
]

load_imported()
