"""Scans, with their steps for decoding, and the states of chunks, which merge."""

from subquad.scans.causal_conv1d import causal_conv1d, causal_conv1d_step
from subquad.scans.delta_rule import delta_rule, delta_rule_step
from subquad.scans.discretize import discretize
from subquad.scans.gated_linear_attention import gated_linear_attention, gated_linear_attention_step
from subquad.scans.linear_scan import linear_scan, linear_scan_step
from subquad.scans.lti_scan import lti_scan, lti_scan_step
from subquad.scans.rounding import ScanErrorEstimate, estimate_scan_error
from subquad.scans.selective_scan import selective_scan, selective_scan_step
from subquad.scans.ssd import ssd, ssd_step
from subquad.scans.states import merge_scan, summarize_scan
from subquad.scans.timeline import every
from subquad.scans.wkv import wkv, wkv_step

__all__ = [
    "ScanErrorEstimate",
    "causal_conv1d",
    "causal_conv1d_step",
    "delta_rule",
    "delta_rule_step",
    "discretize",
    "estimate_scan_error",
    "every",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "linear_scan",
    "linear_scan_step",
    "lti_scan",
    "lti_scan_step",
    "merge_scan",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
    "summarize_scan",
    "wkv",
    "wkv_step",
]
