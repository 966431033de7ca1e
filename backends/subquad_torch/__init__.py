"""PyTorch backend: what tracing needs, and PyTorch's own fused attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat.torch as xp
import torch

from subquad._blocks import loop_blocks, rows
from subquad._dispatch import Override
from subquad_torch import _attention, _features, _few, _linear_scan, _pinv, _plain, _scan

KERNELS = {
    "feature_product": (Override("numba", _features.feature_product, _features.declines),),
    "softmax_attention": (
        Override("numba", _few.softmax_attention, _few.declines),
        Override("sdpa", _attention.softmax_attention, _attention.declines),
    ),
    "iterative_pinv": (Override("numba", _pinv.iterative_pinv, _pinv.declines),),
    "linear_scan": (Override("numba", _linear_scan.linear_scan, _plain.declines_operator),),
    "selective_scan": (
        Override("numba", _scan.selective_scan, _plain.declines_operator),
        Override("rawkernel", _scan.selective_scan, _scan.declines_cuda),
    ),
}

TRACED_BLOCKS = 16  # a traced loop is unrolled: more blocks cost compile time, fewer cost memory


def concrete(*arrays: Any) -> bool:
    """Can values be read? Not in a compiled or recorded function, under a transform, or on the meta device."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    tensors = [x for x in arrays if isinstance(x, torch.Tensor)]
    return not any(x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)


def full_precision(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Without `torch.autocast`: in its half precision, exponents of some hundreds would be off by 1 and more."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def exp_minus(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """exp(x − y), over x where nothing is recorded or traced."""
    recorded = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if recorded or not concrete(x, y) or torch.broadcast_shapes(x.shape, y.shape) != x.shape:
        return torch.exp(x - y)
    return x.sub_(y).exp_()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def host(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of Python values while compiling; its result is a constant of the graph."""
    return function(*args)


def scan_blocks(
    step: Callable[..., tuple[Any, Any]], carry: Any, arrays: Sequence[Any], size: int, *, exact: bool = False
) -> tuple[Any, Any]:
    """The Python loop; with fewer and larger blocks where it gets unrolled into a graph."""
    if torch.compiler.is_compiling() and not exact:
        size = max(size, -(-rows(arrays) // TRACED_BLOCKS))
    return loop_blocks(step, carry, arrays, size, xp=xp)
