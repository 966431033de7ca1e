"""What a comparison or a benchmark asks of MLX: arrays, compilation, time and memory."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np


def describe() -> dict[str, Any]:
    """The version and the devices: the GPU of an Apple chip or CUDA, if MLX was built for one, and the CPU."""
    kinds = ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]
    return {"version": mx.__version__, "devices": kinds, "reason": None}


def asarray(host: np.ndarray, dtype: str | None = None, device: str | None = None) -> mx.array:
    """Copy a host array; `device` becomes the one that all operations run on."""
    if device is not None:
        mx.set_default_device(mx.Device(getattr(mx, device)))
    name = (dtype or host.dtype.name).replace("bool", "bool_")
    return mx.array(host, dtype=getattr(mx, name))


def to_numpy(x: mx.array) -> np.ndarray:
    """Copy to the host; bfloat16, which NumPy does not know, arrives as float32."""
    return np.asarray(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def compile(function: Callable[..., Any]) -> Callable[..., Any]:  # noqa: A001
    """The function under `mx.compile`: its graph is built once."""
    return mx.compile(function)


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs `function` forward and backward: the gradients of ½‖out‖² by all arguments."""

    def forward_backward(*args: mx.array) -> list[mx.array]:
        return mx.grad(lambda *given: 0.5 * mx.sum(function(*given) ** 2), argnums=tuple(range(len(args))))(*args)

    return forward_backward


def synchronize(*arrays: mx.array) -> None:
    """Compute the results, and wait for them."""
    mx.eval(*arrays)


def peak_extra_memory(function: Callable[..., Any], *args: Any) -> int:
    """Bytes of `function(*args)` at the moment when most are held, beyond arguments and result."""
    mx.eval(function(*args))
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = function(*args)
    mx.eval(out)
    peak = mx.get_peak_memory()
    kept = mx.get_active_memory() - before
    return max(peak - before - kept, 0)
