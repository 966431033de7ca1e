"""The CUDA selective scan on PyTorch's tensors, in PyTorch's memory and on its stream, launched by CuPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.backend import Accepts, Call
from subquad.kernels.selective_scan import Inputs
from subquad_torch.adapt import Native, override
from subquad_torch.conditions import is_installed

Arrays = Sequence[Tensor | None]


def declines(call: Call) -> str | None:
    """The reason why the CUDA kernel cannot take the call, or None."""
    if not is_installed("cupy"):
        return "cupy, which launches it, is not installed"
    from subquad_cupy.selective_scan import calls as cuda

    return cuda.declines(*call.arrays, **call.static)


def forward(arrays: Arrays, static: Mapping[str, Any], save: bool = False) -> tuple[tuple[Tensor, ...], Any]:
    """y and the last state; inputs of half precision are read as they are, and y has their dtype."""
    from subquad_cupy.selective_scan import calls as cuda

    inputs = Inputs(*map(_plain, arrays))
    y, state, _ = cuda.scan_forward(inputs, **static, device=_device(inputs.u))
    return (y, state), None


def backward(
    arrays: Arrays,
    static: Mapping[str, Any],
    saved: Any,
    outputs: Arrays,
    grads: Arrays,
    need: Sequence[bool],
) -> Sequence[Tensor | None]:
    """The gradients by the nine arrays."""
    from subquad_cupy.selective_scan import calls as cuda

    inputs = Inputs(*map(_plain, arrays))
    by_y, by_state = map(_plain, grads)
    by_y = torch.zeros_like(outputs[0]) if by_y is None else by_y
    return cuda.scan_backward(by_y, by_state, inputs, **static, device=_device(inputs.u))


def _device(like: Tensor) -> Any:
    """The `Device` that launches on PyTorch's current stream and takes memory from PyTorch."""
    from subquad_cupy.device import TorchDevice

    index = like.device.index
    return TorchDevice(index, torch.cuda.current_stream(index).cuda_stream)


def _plain(x: Tensor | None) -> Tensor | None:
    """The tensor without history and without lazy negation; kernels read slices in place."""
    return None if x is None else x.detach().resolve_neg()


OVERRIDE = override(
    Native("selective_scan", forward, backward, watched=True),
    "rawkernel",
    Accepts(dtypes=("float16", "bfloat16", "float32", "float64"), one_dtype=False, devices=("cuda",), also=declines),
)
