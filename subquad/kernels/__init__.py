"""The closed list of operations that a backend may replace, each complete in plain Array API."""

from subquad.kernels.feature_product import feature_product
from subquad.kernels.iterative_pinv import iterative_pinv
from subquad.kernels.linear_scan import linear_scan
from subquad.kernels.selective_scan import selective_scan
from subquad.kernels.softmax_attention import softmax_attention

__all__ = ["feature_product", "iterative_pinv", "linear_scan", "selective_scan", "softmax_attention"]
