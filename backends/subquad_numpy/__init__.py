"""NumPy backend: arrays that are computed at once and may be filled in place; compiled kernels, attention in place."""

from subquad._dispatch import Override
from subquad_numpy import _kernels
from subquad_numpy.plain import attention as _attention

in_place = True

KERNELS = {
    "feature_product": (
        Override("numba", _kernels.feature_product, _kernels.feature_product_declines),
        Override("in-place", _attention.feature_product, _attention.feature_product_declines),
    ),
    "iterative_pinv": (Override("numba", _kernels.iterative_pinv, _kernels.iterative_pinv_declines),),
    "linear_scan": (Override("numba", _kernels.linear_scan, _kernels.linear_scan_declines),),
    "selective_scan": (Override("numba", _kernels.selective_scan, _kernels.scan_declines),),
    "softmax_attention": (
        Override("numba", _kernels.softmax_attention, _kernels.softmax_attention_declines),
        Override("in-place", _attention.softmax_attention, _attention.softmax_attention_declines),
    ),
}
