"""The compiled selective scan under PyTorch: a raw operator on CPU and CUDA, zero copy, and its gradient.

Layout: `autograd.Function` over `torch.library` operators that have no autograd formula of their own. That is the one
arrangement in which eager mode, double backward, `torch.compile(fullgraph=True)` forward and backward, and
`torch.export` all work. Functional transforms (`torch.func`) and forward mode take the generic form and see through it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from subquad.kernels.selective_scan import Inputs, widened
from subquad.kernels.selective_scan import selective_scan as dispatched_scan
from subquad_torch._plain import as_numpy, declines_plain, differentiate_again, has, sees_through

generic_scan = dispatched_scan.__wrapped__  # type: ignore[attr-defined]
MAPS = 9  # tensor inputs of the scan: u, delta, A, B, C, D, z, delta_bias, initial_state


def declines_cuda(*tensors: Tensor | None, delta_softplus: bool, reverse: bool) -> str | None:
    """Why the CUDA kernel cannot take the call."""
    given = [x for x in tensors if x is not None]
    if given[0].device.type != "cuda":
        return f"it runs on cuda, the tensors are on {given[0].device.type}"
    if not has("cupy"):
        return "cupy, which launches it, is not installed"
    from subquad_cupy import _scan as cuda

    reason = cuda.declines(*tensors, delta_softplus=delta_softplus, reverse=reverse)  # type: ignore[arg-type]
    return reason or declines_plain(given)


def selective_scan(*tensors: Tensor | None, delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """The kernel `selective_scan`; on CUDA half precision is read and written as it is."""
    inputs = Inputs(*tensors)
    tensors = inputs if inputs.u.is_cuda else widened(xp, inputs)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors):
        return scan_forward(*tensors, delta_softplus, reverse)
    return Scan.apply(delta_softplus, reverse, *tensors)  # type: ignore[no-untyped-call]


class Scan(torch.autograd.Function):
    """Scan whose backward is one operator too; differentiated once more, it takes the generic form."""

    @staticmethod
    def forward(delta_softplus: bool, reverse: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return scan_forward(*tensors, delta_softplus, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.delta_softplus, ctx.reverse, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
        tensors, need = ctx.saved_tensors, ctx.needs_input_grad[2:]
        flags = {"delta_softplus": ctx.delta_softplus, "reverse": ctx.reverse}
        if sees_through(grad_y, grad_state, operator=True):
            again = partial(generic_scan, **flags)
            return None, None, *differentiate_again(again, tensors, need, (grad_y, grad_state))
        found = scan_backward(*tensors, ctx.delta_softplus, ctx.reverse, grad_y, grad_state)
        return None, None, *(grad if needed else None for grad, needed in zip(found, need, strict=True))


@torch.library.custom_op("subquad::selective_scan", mutates_args=(), device_types="cpu")
def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    from subquad_numpy.selective_scan import calls as scan
    from subquad_torch._threads import threads

    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)  # torch's memory, so that torch accounts for it
    flags = {"threads": threads(), "out": y.numpy()}
    _, state = scan.scan_forward(*map(as_numpy, tensors), delta_softplus, reverse, **flags)
    return y, torch.from_numpy(state)


@scan_forward.register_kernel("cuda")
def forward_on_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from subquad_cupy import _scan as cuda

    *tensors, delta_softplus, reverse = args
    flags = {"delta_softplus": delta_softplus, "reverse": reverse, "device": _cuda_device(args[0])}
    y, state, _ = cuda.scan_forward(Inputs(*map(_plain, tensors)), **flags)
    return y, state


@scan_forward.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), A.new_empty((u.shape[0], *A.shape))


@torch.library.custom_op("subquad::selective_scan_backward", mutates_args=(), device_types="cpu")
def scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    grad_y: Tensor,
    grad_state: Tensor,
) -> list[Tensor]:
    """Gradients by the nine tensors; an empty tensor where there was none."""
    from subquad_numpy.selective_scan import calls as scan
    from subquad_torch._threads import threads

    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    grads = scan.scan_backward(
        *map(as_numpy, tensors),
        delta_softplus,
        reverse,
        as_numpy(grad_y),
        as_numpy(grad_state),
        threads=threads(),
    )
    return [u.new_empty(0) if grad is None else torch.from_numpy(grad) for grad in grads]


@scan_backward.register_kernel("cuda")
def backward_on_cuda(*args: Any) -> list[Tensor]:
    from subquad_cupy import _scan as cuda

    *tensors, delta_softplus, reverse, grad_y, grad_state = args
    flags = {"delta_softplus": delta_softplus, "reverse": reverse, "device": _cuda_device(args[0])}
    inputs = Inputs(*map(_plain, tensors))
    grads = cuda.scan_backward(_plain(grad_y), _plain(grad_state), inputs, **flags)
    return [args[0].new_empty(0) if grad is None else grad for grad in grads]


@scan_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    return [args[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:MAPS]]


def _cuda_device(like: Tensor) -> Any:
    """The launcher on torch's current stream and allocator."""
    from subquad_cupy._launch import TorchDevice

    index = like.device.index
    return TorchDevice(index, torch.cuda.current_stream(index).cuda_stream)


def _plain(x: Tensor | None) -> Tensor | None:
    """Memory that holds the values themselves; the kernels read slices in place."""
    return None if x is None else x.detach().resolve_neg()
