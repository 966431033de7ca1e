"""Attention through exponential features, or elu(x) + 1, by the compiled CPU kernels, zero copy, and its gradient."""

from __future__ import annotations

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
    return FeatureProduct.apply(phi.fused.without_arrays, causal, key_mask, q, k, v, *phi.fused.arrays)  # type: ignore[no-untyped-call, no-any-return]


class FeatureProduct(torch.autograd.Function):
    """Attention whose backward is compiled too, where the forward pass left what it needs.

    Differentiated once more, it takes the generic form.
    """

    @staticmethod
    def forward(ctx: Any, bare: Exponential | Elu, causal: bool, key_mask: Tensor | None, *floats: Tensor) -> Tensor:
        from subquad_numpy.features import calls as features
        from subquad_torch._threads import threads

        q, k, v, *rest = map(in_place, floats)
        out = _new_output(*floats[:3], key_mask, *floats[5:])
        options = {"phi": bare.with_arrays(*rest), "key_mask": in_place(key_mask), "threads": threads()}
        if causal:
            recorded = any(ctx.needs_input_grad)
            _, ctx.left = features.causal_and_trace(q, k, v, **options, out=in_place(out), traced=recorded)
        else:
            _, ctx.left = features.product_and_sums(q, k, v, **options, out=in_place(out))
        ctx.bare, ctx.causal = bare, causal
        ctx.save_for_backward(key_mask, out, *floats)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        key_mask, out, *floats = ctx.saved_tensors
        need = ctx.needs_input_grad[3:]
        if ctx.left is None or sees_through(grad):

            def again(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
                phi = map_of(xp, ctx.bare.with_arrays(*rest), q.shape[-1])
                return generic_product(q, k, v, phi=phi, causal=ctx.causal, key_mask=key_mask)  # type: ignore[no-any-return]

            return None, None, None, *differentiate_again(again, floats, need, grad)
        from subquad_numpy.features import gradient_calls as feature_gradients
        from subquad_torch._threads import threads

        q, k, v, *rest = map(in_place, floats)
        given = q, k, v, ctx.left, in_place(out), in_place(grad)
        options = {"phi": ctx.bare.with_arrays(*rest), "key_mask": in_place(key_mask), "threads": threads()}
        found: tuple[Any, ...]
        if ctx.causal:
            found = *feature_gradients.causal_product_gradient(*given, **options), None, None
        else:
            found = feature_gradients.feature_product_gradient(*given, **options, directions=any(need[3:5]))
        return (
            *(None, None, None),
            *(
                torch.from_numpy(by).sum_to_size(x.shape) if needed else None
                for by, x, needed in zip(found, floats, need, strict=False)
            ),
        )


def _new_output(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *center: Tensor) -> Tensor:
    """Memory of torch's, so that torch accounts for it."""
    batches = [x.shape[:-2] for x in (q, k, v, *center)]
    batch = torch.broadcast_shapes(*batches, () if key_mask is None else key_mask.shape[:-1])
    return q.new_empty((*batch, q.shape[-2], v.shape[-1]))
