"""PyTorch backend: what tracing needs, compiled kernels on tensors, and PyTorch's own fused attention."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from subquad.backend import NO_CONTEXT, Array, Backend, Conditions
from subquad.core.block_loop import loop_blocks, row_count
from subquad_numpy.half.calls import LEAST
from subquad_numpy.segment_means.calls import means
from subquad_numpy.table import COMPILED
from subquad_torch import array_api, cuda, sdpa
from subquad_torch.conditions import (
    conditions,
    fixes_weights,
    holds,
    is_eager,
    is_recorded,
    is_watched,
    is_wrapped,
    likeness,
    recognises,
    refuses,
    signature,
    why_missing,
)
from subquad_torch.host import as_override, in_huge_pages, memory_of
from subquad_torch.keywords import NUMBERS, SYMBOLS
from subquad_torch.openmp import threads

TRACED_BLOCKS = 16  # maximum blocks of a traced loop, which is unrolled: more cost compile time, fewer cost memory
# shown to recorders as one operator: the generic forms are long programs
WATCHED = ("linear_scan", "lti_scan", "outer_scan", "selective_scan")
LIMITS = {"softmax_attention": sdpa.left, "feature_step": fixes_weights}


class TorchBackend(Backend):
    """PyTorch: tensors that may be traced, recorded, transformed or watched, and the overrides on them."""

    library = "torch"
    overrides = (
        *(as_override(x, watched=x.kernel in WATCHED, also=LIMITS.get(x.kernel)) for x in COMPILED.values()),
        sdpa.OVERRIDE,
        cuda.OVERRIDE,
    )

    def namespace(self, array: Array) -> ModuleType:
        return array_api if isinstance(array, Tensor) else super().namespace(array)

    def device_of(self, array: Array) -> torch.device:
        return array.device

    def refuses(self, array: Array) -> str | None:
        return refuses(array)

    def signature(self, arrays: Sequence[Array | None]) -> Hashable | None:
        return signature(arrays)

    def recognises(self) -> bool:
        return recognises()

    def likeness(self, arrays: Sequence[Array]) -> Callable[..., bool] | None:
        return likeness(arrays)

    def conditions(self, arrays: Sequence[Array | None]) -> Conditions:
        return conditions([x for x in arrays if x is not None])

    def device_kind(self, array: Array) -> str:
        return array.device.type

    def why_missing(self, package: str, *, load: bool = True) -> str | None:
        return why_missing(package, load)

    def fold_blocks(
        self, step: Callable[..., Any], carry: Any, arrays: Sequence[Array | None], size: int, *, exact: bool = False
    ) -> tuple[Any, Array | None]:
        """The Python loop over blocks; while compiling, with larger blocks, since the loop is unrolled into a graph."""
        if torch.compiler.is_compiling() and not exact:
            size = max(size, -(-row_count(arrays) // TRACED_BLOCKS))
        return loop_blocks(step, carry, arrays, size)

    def on_host(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`; while compiling, the result is a constant of the program, for the present numbers."""
        if torch.compiler.is_compiling():
            return _constant(function, *(guard_scalar(x) if isinstance(x, NUMBERS) else x for x in args))
        return function(*(guard_scalar(x) if isinstance(x, SYMBOLS) else x for x in args))

    def constant(self, x: Any) -> Any:
        return x.detach()

    def holds(self, condition: Any) -> bool:
        return holds(condition)

    def is_concrete(self, *arrays: Array | None) -> bool:
        """Whether values can be read: not while compiling or recording, under a transform, or on the meta device."""
        if torch.compiler.is_compiling() or is_watched():
            return False
        return not any(isinstance(x, Tensor) and (x.is_meta or is_wrapped(x)) for x in arrays)

    def may_fill(self, *arrays: Array) -> bool:
        """Whether nothing is recorded, traced or transformed."""
        return is_eager(arrays) and not (is_watched() or is_recorded(arrays))

    def empty_like(self, x: Array, shape: tuple[int, ...]) -> Array:
        """In huge pages if it is large and in memory of the host."""
        made = x.new_empty(shape)
        return in_huge_pages(made) if x.device.type == "cpu" else made

    def same_numbers(self, x: Array, y: Array) -> bool:
        """Without the array of comparisons, which takes twice the time."""
        return torch.equal(x, y)

    def computing(self, like: Array) -> AbstractContextManager[Any]:
        """A context without `torch.autocast`, whose half precision would put exponents of some hundreds off by 1."""
        if not torch._C._is_any_autocast_enabled():
            return NO_CONTEXT
        kind = like.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.autocast(kind, enabled=False)
        return NO_CONTEXT

    def mean_rows(self, xp: Any, x: Array) -> Array:
        """A product with a row of equal weights: no sum overflows."""
        rows = x.shape[-2]
        return torch.matmul(x.new_full((1, rows), 1 / max(rows, 1)), x)[..., 0, :]

    def mean_stored_rows(self, xp: Any, x: Array) -> Array | None:
        """By a compiled kernel on the memory of large tensors, where nothing is recorded, traced or transformed."""
        if not self.is_concrete(x) or x.numel() < LEAST or x.device.type != "cpu" or not self.may_fill(x):
            return None
        found = means(memory_of(x), threads())
        return None if found is None else torch.from_numpy(found)

    def exp_difference(self, xp: Any, x: Array, y: Array) -> Array:
        """exp(x − y), written over x where nothing is recorded or traced."""
        recorded = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        if recorded or not self.is_concrete(x, y) or torch.broadcast_shapes(x.shape, y.shape) != x.shape:
            return torch.exp(x - y)
        return x.sub_(y).exp_()

    def softmax(self, xp: Any, x: Array) -> Array:
        return torch.softmax(x, dim=-1)


@torch.compiler.assume_constant_result
def _constant(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


BACKEND = TorchBackend()
