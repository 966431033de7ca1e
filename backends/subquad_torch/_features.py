"""Attention through exponential features, or elu(x) + 1, by the compiled CPU kernels, zero copy, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from subquad.kernels._feature_map import Elu, Exponential, FeatureMap, map_of
from subquad.kernels.feature_product import feature_product as dispatched_product
from subquad_torch._plain import declines_compiled, differentiate_again, in_place, sees_through

generic_product = dispatched_product.__wrapped__  # type: ignore[attr-defined]


def declines(
    q: Tensor, k: Tensor, v: Tensor, /, *, phi: FeatureMap, causal: bool = False, key_mask: Tensor | None = None
) -> str | None:
    """Why the compiled product cannot take the call."""
    if phi.fused is None:
        return "the features are neither exponentials nor elu(x) + 1"
    floats = [q, k, v, *phi.fused.arrays]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in floats)
    if causal and recorded and (phi.fused.arrays[2:] or any(x.requires_grad for x in phi.fused.arrays)):
        return "causal gradients by directions or with a center are recorded through the generic form"
    return declines_compiled(floats, key_mask)


def feature_product(
    q: Tensor, k: Tensor, v: Tensor, /, *, phi: FeatureMap, causal: bool = False, key_mask: Tensor | None = None
) -> Tensor:
    """The kernel `feature_product`."""
    assert phi.fused is not None
    function = CausalProduct if causal else FeatureProduct
    return function.apply(phi.fused.without_arrays, key_mask, q, k, v, *phi.fused.arrays)  # type: ignore[no-untyped-call, no-any-return]


class FeatureProduct(torch.autograd.Function):
    """Attention whose backward is compiled too; differentiated once more, it takes the generic form."""

    @staticmethod
    def forward(ctx: Any, bare: Exponential | Elu, key_mask: Tensor | None, *floats: Tensor) -> Tensor:
        from subquad_numpy import features
        from subquad_torch._threads import threads

        q, k, v, *_ = floats
        out = _new_output(q, k, v, key_mask, *floats[5:])
        _, ctx.sums = features.product_and_sums(
            *map(in_place, (q, k, v)), phi=bare.with_arrays(*map(in_place, floats[3:])),
            key_mask=in_place(key_mask), threads=threads(), out=in_place(out),
        )  # fmt: skip
        ctx.bare = bare
        ctx.save_for_backward(key_mask, out, *floats)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        key_mask, out, *floats = ctx.saved_tensors
        need = ctx.needs_input_grad[2:]
        if sees_through(grad):
            return None, None, *_again(ctx.bare, key_mask, floats, need, grad, causal=False)
        from subquad_numpy.feature_gradients import feature_product_gradient
        from subquad_torch._threads import threads

        q, k, v, *rest = map(in_place, floats)
        found = feature_product_gradient(
            q, k, v, ctx.sums, in_place(out), in_place(grad), phi=ctx.bare.with_arrays(*rest),
            key_mask=in_place(key_mask), directions=any(need[3:5]), threads=threads(),
        )  # fmt: skip
        return None, None, *_own(found, floats, need)


class CausalProduct(torch.autograd.Function):
    """The same, causal, by q, k and v; what exceeds the range of the compiled kernel takes the generic form too."""

    @staticmethod
    def forward(ctx: Any, bare: Exponential | Elu, key_mask: Tensor | None, *floats: Tensor) -> Tensor:
        from subquad_numpy import features
        from subquad_torch._threads import threads

        q, k, v, *_ = floats
        out = _new_output(q, k, v, key_mask, *floats[5:])
        _, ctx.trace = features.causal_and_trace(
            *map(in_place, (q, k, v)), phi=bare.with_arrays(*map(in_place, floats[3:])), key_mask=in_place(key_mask),
            threads=threads(), out=in_place(out), traced=any(ctx.needs_input_grad),
        )  # fmt: skip
        ctx.bare = bare
        ctx.save_for_backward(key_mask, out, *floats)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        key_mask, out, *floats = ctx.saved_tensors
        need = ctx.needs_input_grad[2:]
        if ctx.trace is None or sees_through(grad):
            return None, None, *_again(ctx.bare, key_mask, floats, need, grad, causal=True)
        from subquad_numpy.feature_gradients import causal_product_gradient
        from subquad_torch._threads import threads

        q, k, v, *rest = map(in_place, floats)
        found = causal_product_gradient(
            q, k, v, ctx.trace, in_place(out), in_place(grad), phi=ctx.bare.with_arrays(*rest),
            key_mask=in_place(key_mask), threads=threads(),
        )  # fmt: skip
        return None, None, *_own((*found, None, None), floats, need)


def _again(
    bare: Exponential | Elu, key_mask: Tensor | None, floats: Sequence[Tensor], need: Sequence[bool], grad: Tensor, *,
    causal: bool,
) -> Iterator[Tensor | None]:  # fmt: skip
    """The gradient through the generic form."""

    def product(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        phi = map_of(xp, bare.with_arrays(*rest), q.shape[-1])
        return generic_product(q, k, v, phi=phi, causal=causal, key_mask=key_mask)  # type: ignore[no-any-return]

    return differentiate_again(product, floats, need, grad)


def _own(found: Sequence[Any], floats: Sequence[Tensor], need: Sequence[bool]) -> Iterator[Tensor | None]:
    """Gradients of the shapes of the tensors, from those with the batch axes of the whole call."""
    return (
        torch.from_numpy(by).sum_to_size(x.shape) if needed else None
        for by, x, needed in zip(found, floats, need, strict=False)
    )


def _new_output(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *center: Tensor) -> Tensor:
    """Memory of torch's, so that torch accounts for it."""
    batches = [x.shape[:-2] for x in (q, k, v, *center)]
    batch = torch.broadcast_shapes(*batches, () if key_mask is None else key_mask.shape[:-1])
    return q.new_empty((*batch, q.shape[-2], v.shape[-1]))
