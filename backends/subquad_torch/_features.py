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
    if causal and torch.is_grad_enabled() and any(x.requires_grad for x in floats):
        return "gradients of causal use are recorded through the generic form"
    return declines_compiled(floats, key_mask)


def feature_product(
    q: Tensor, k: Tensor, v: Tensor, /, *, phi: FeatureMap, causal: bool = False, key_mask: Tensor | None = None
) -> Tensor:
    """The kernel `feature_product`."""
    assert phi.fused is not None
    if causal:
        return _causal_product(phi.fused, q, k, v, key_mask)
    return FeatureProduct.apply(phi.fused.without_arrays, key_mask, q, k, v, *phi.fused.arrays)  # type: ignore[no-untyped-call, no-any-return]


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

            def again(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
                phi = map_of(xp, ctx.bare.with_arrays(*rest), q.shape[-1])
                return generic_product(q, k, v, phi=phi, key_mask=key_mask)  # type: ignore[no-any-return]

            return None, None, *differentiate_again(again, floats, need, grad)
        from subquad_numpy.feature_gradients import feature_product_gradient
        from subquad_torch._threads import threads

        q, k, v, *rest = map(in_place, floats)
        found = feature_product_gradient(
            q, k, v, ctx.sums, in_place(out), in_place(grad), phi=ctx.bare.with_arrays(*rest),
            key_mask=in_place(key_mask), directions=any(need[3:5]), threads=threads(),
        )  # fmt: skip
        return (
            None,
            None,
            *(
                torch.from_numpy(by).sum_to_size(x.shape) if needed else None
                for by, x, needed in zip(found, floats, need, strict=False)
            ),
        )


def _causal_product(phi: Exponential | Elu, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Causal attention of which no gradient is recorded."""
    from subquad_numpy import features
    from subquad_torch._threads import threads

    out = _new_output(q, k, v, key_mask, *phi.arrays[2:])
    features.causal_product(
        *map(in_place, (q, k, v)), phi=phi.with_arrays(*map(in_place, phi.arrays)),
        key_mask=in_place(key_mask), threads=threads(), out=in_place(out),
    )  # fmt: skip
    return out


def _new_output(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *center: Tensor) -> Tensor:
    """Memory of torch's, so that torch accounts for it."""
    batches = [x.shape[:-2] for x in (q, k, v, *center)]
    batch = torch.broadcast_shapes(*batches, () if key_mask is None else key_mask.shape[:-1])
    return q.new_empty((*batch, q.shape[-2], v.shape[-1]))
