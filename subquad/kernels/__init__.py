"""The closed list of operations that a backend may replace, each complete in plain Array API.

Positional arguments are arrays or None; keywords are hashable, except the array `key_mask`.
"""

from subquad.kernels.balanced_tree import balanced_tree
from subquad.kernels.block_attention import block_attention
from subquad.kernels.causal_conv1d import causal_conv1d
from subquad.kernels.centroid_attention import centroid_attention
from subquad.kernels.cluster_summaries import cluster_members, cluster_spread
from subquad.kernels.clustered_attention import clustered_attention
from subquad.kernels.delta_scan import delta_scan
from subquad.kernels.feature_attention import feature_attend, feature_step, feature_summarize
from subquad.kernels.feature_whole import feature_whole
from subquad.kernels.gated_outer_scan import gated_outer_scan
from subquad.kernels.hashed_attention import hashed_attention
from subquad.kernels.hashed_order import hashed_order
from subquad.kernels.iterative_pinv import iterative_pinv
from subquad.kernels.landmark_attention import landmark_attention
from subquad.kernels.linear_scan import linear_scan
from subquad.kernels.lti_scan import lti_scan
from subquad.kernels.mamba_step import mamba_step
from subquad.kernels.nearest import nearest
from subquad.kernels.outer_scan import outer_scan
from subquad.kernels.project import project
from subquad.kernels.sampled_attention import sampled_attention
from subquad.kernels.sampled_errors import sampled_errors
from subquad.kernels.selective_scan import selective_scan
from subquad.kernels.softmax_attention import softmax_attention

__all__ = [
    "balanced_tree",
    "block_attention",
    "causal_conv1d",
    "centroid_attention",
    "cluster_members",
    "cluster_spread",
    "clustered_attention",
    "delta_scan",
    "feature_attend",
    "feature_step",
    "feature_summarize",
    "feature_whole",
    "gated_outer_scan",
    "hashed_attention",
    "hashed_order",
    "iterative_pinv",
    "landmark_attention",
    "linear_scan",
    "lti_scan",
    "mamba_step",
    "nearest",
    "outer_scan",
    "project",
    "sampled_attention",
    "sampled_errors",
    "selective_scan",
    "softmax_attention",
]
