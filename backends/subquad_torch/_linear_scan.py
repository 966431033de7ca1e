"""The compiled linear scan under PyTorch: a raw CPU operator, zero copy, and its gradient; laid out as `_scan`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.kernels._linear_scan_gradient import linear_scan_gradient
from subquad_torch._plain import as_numpy, sees_through


def linear_scan(a: Tensor, b: Tensor, initial_state: Tensor | None, /, *, reverse: bool) -> Tensor:
    """The kernel `linear_scan`."""
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in (a, b, initial_state)):
        return scan_forward(a, b, initial_state, reverse)
    return LinearScan.apply(a, b, initial_state, reverse)  # type: ignore[no-untyped-call]


class LinearScan(torch.autograd.Function):
    """Scan whose backward is one operator too; differentiated once more, it is a scan of the other direction."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
        return scan_forward(a, b, initial_state, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, _, initial_state, ctx.reverse = inputs
        ctx.save_for_backward(a, output, initial_state)

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Any, ...]:
        a, h, initial_state = ctx.saved_tensors
        if sees_through(grad_h, operator=True):
            by_a, by_b, by_state = linear_scan_gradient(a, h, initial_state, grad_h, reverse=ctx.reverse)
        else:
            by_a, by_b, by_state = scan_backward(a, h, initial_state, ctx.reverse, grad_h)
        return by_a, by_b, None if initial_state is None else by_state, None


@torch.library.custom_op("subquad::linear_scan", mutates_args=(), device_types="cpu")
def scan_forward(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    from subquad_numpy.linear_scan.calls import linear_scan_forward
    from subquad_torch._threads import threads

    h = torch.empty_like(b, memory_format=torch.contiguous_format)  # torch's memory, so that torch accounts for it
    flags = {"threads": threads(), "out": h.numpy()}
    linear_scan_forward(*map(as_numpy, (a, b, initial_state)), reverse, **flags)
    return h


@scan_forward.register_fake
def _(a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    return b.new_empty(b.shape)


@torch.library.custom_op("subquad::linear_scan_backward", mutates_args=(), device_types="cpu")
def scan_backward(
    a: Tensor, h: Tensor, initial_state: Tensor | None, reverse: bool, grad_h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by a, b and the initial state; an empty tensor where there was none."""
    from subquad_numpy.linear_scan.calls import linear_scan_backward
    from subquad_torch._threads import threads

    given = (*map(as_numpy, (a, h, initial_state)), reverse, as_numpy(grad_h))
    by_a, by_b, by_state = linear_scan_backward(*given, threads=threads())
    return (
        torch.from_numpy(by_a),
        torch.from_numpy(by_b),
        a.new_empty(0) if by_state is None else torch.from_numpy(by_state),
    )


@scan_backward.register_fake
def _(
    a: Tensor, h: Tensor, initial_state: Tensor | None, reverse: bool, grad_h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        a.new_empty(a.shape),
        h.new_empty(h.shape),
        a.new_empty((0,) if initial_state is None else initial_state.shape),
    )
