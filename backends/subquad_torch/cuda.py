"""The CUDA selective scan on PyTorch's tensors, in PyTorch's memory and on its stream, launched by CuPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subquad.backend import Call
from subquad.kernels.selective_scan import Inputs
from subquad_cupy.selective_scan import calls
from subquad_torch.adapt import override
from subquad_torch.conditions import why_missing
from subquad_torch.native import Arrays, Native


def declines(call: Call) -> str | None:
    """The reason why the CUDA kernel cannot take the call, or None."""
    if (missing := why_missing("cupy", True)) is not None:
        return f"{missing}, which launches it"
    return calls.declines(call)


def forward(arrays: Arrays, static: Mapping[str, Any], save: bool = False) -> tuple[tuple[Tensor, ...], None]:
    """y and the last state; half precision is read and written as it is."""
    inputs = Inputs(*map(_plain, arrays))
    y, state, _ = calls.scan_forward(inputs, **static, device=device_of(inputs.u))
    return (y, state), None


def backward(
    arrays: Arrays, static: Mapping[str, Any], saved: None, outputs: Arrays, grads: Arrays, need: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Gradients by the arrays; none by the resets."""
    inputs = Inputs(*map(_plain, arrays))
    by_y, by_state = map(_plain, grads)
    by_y = torch.zeros_like(inputs.u) if by_y is None else by_y
    return calls.scan_backward(by_y, by_state, inputs, **static, device=device_of(inputs.u))


def device_of(like: Tensor) -> Any:
    """The launcher on PyTorch's current stream and allocator."""
    from subquad_cupy.device import TorchDevice

    index = like.device.index
    return TorchDevice(index, torch.cuda.current_stream(index).cuda_stream)


def _plain(x: Tensor | None) -> Tensor | None:
    """The tensor without history and without lazy negation; kernels read slices in place."""
    return None if x is None else x.detach().resolve_neg()


OVERRIDE = override(
    Native("selective_scan", forward, backward, unread=frozenset({10, 11}), watched=True),
    "rawkernel",
    replace(calls.ACCEPTS, also=declines),
)
