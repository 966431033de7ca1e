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
from subquad.blocks import check_mamba, init_mamba, mamba
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
    "check_mamba",
    "discretize",
    "draw_omega",
    "estimate_error",
    "estimate_scan_error",
    "every",
    "explain",
    "init_mamba",
    "linear_scan",
    "lti_scan",
    "lti_scan_step",
    "mamba",
    "measure_crossover",
    "merge_scan",
    "selective_scan",
    "selective_scan_step",
    "summarize_scan",
]

load_imported()
