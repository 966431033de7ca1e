"""What a comparison or a benchmark asks of JAX: arrays, compilation, time and memory."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def describe() -> dict[str, Any]:
    """The version and the devices; `reason` says why no arrays can be made here, and is None where they can."""
    try:
        devices = [f"{x.platform}:{x.id}" if x.platform != "cpu" else "cpu" for x in jax.devices()]
    except RuntimeError as error:  # a GPU plugin that finds no driver
        return {"version": jax.__version__, "devices": [], "reason": str(error)}
    return {"version": jax.__version__, "devices": devices, "reason": None}


def asarray(host: np.ndarray, dtype: str | None = None, device: str | None = None) -> jax.Array:
    """Copy a host array to `device` (default: JAX's own default device)."""
    host = np.array(host, dtype=dtype and jax.numpy.dtype(dtype))
    if device is None:
        return jax.numpy.asarray(host)
    platform, _, index = device.partition(":")
    return jax.device_put(host, jax.devices(platform)[int(index or 0)])


def to_numpy(x: jax.Array) -> np.ndarray:
    """Copy to the host; bfloat16, which NumPy does not know, arrives as float32."""
    return np.asarray(x.astype("float32") if x.dtype == jax.numpy.bfloat16 else x)


def compile(function: Callable[..., Any]) -> Callable[..., Any]:  # noqa: A001
    """The function under `jax.jit`: without it every operation would be dispatched alone."""
    return jax.jit(function)


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs `function` forward and backward: the gradients of ½‖out‖² by all arguments."""

    def forward_backward(*args: jax.Array) -> tuple[jax.Array, ...]:
        out, pull_back = jax.vjp(function, *args)
        return pull_back(out)

    return forward_backward


def synchronize(*arrays: jax.Array) -> None:
    """Wait for the results."""
    jax.block_until_ready(arrays)


def peak_extra_memory(function: Callable[..., Any], *args: Any) -> int | None:
    """Bytes of temporary buffers that XLA plans for `function(*args)`, beyond arguments and result.

    The number is read from the compiled program, and nothing runs. None where the platform does not tell. All inputs
    must be arguments: arrays that `function` closes over would become constants, and be computed on while compiling.
    """
    function = function if hasattr(function, "lower") else jax.jit(function)
    plan = function.lower(*args).compile().memory_analysis()
    return None if plan is None else int(plan.temp_size_in_bytes)
