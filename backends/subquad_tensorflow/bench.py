"""What a comparison or a benchmark asks of TensorFlow: arrays, compilation, time and memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf


def describe() -> dict[str, Any]:
    """The version and the devices: CUDA, if there is a GPU, and the CPU."""
    kinds = ["cuda", "cpu"] if tf.config.list_physical_devices("GPU") else ["cpu"]
    return {"version": tf.__version__, "devices": kinds, "reason": None}


def asarray(host: np.ndarray, dtype: str | None = None, device: str | None = None) -> tf.Tensor:
    """Copy a host array to a device."""
    with tf.device({None: None, "cuda": "GPU:0", "cpu": "CPU:0"}[device]):
        return tf.cast(tf.constant(host), dtype or host.dtype.name)


def to_numpy(x: tf.Tensor) -> np.ndarray:
    """Copy to the host; bfloat16, which NumPy does not know, arrives as float32."""
    return (tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x).numpy()


def compile(function: Callable[..., Any]) -> Callable[..., Any]:  # noqa: A001
    """The function under `tf.function`: its graph is built once for each signature."""
    return tf.function(function)


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs `function` forward and backward: the gradients of ½‖out‖² by all arguments."""

    def forward_backward(*args: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(args)
            half = 0.5 * tf.reduce_sum(function(*args) ** 2)
        return list(tape.gradient(half, args))

    return forward_backward


def synchronize(*arrays: tf.Tensor) -> None:
    """Wait for the results."""
    for x in arrays:
        x.numpy()


def peak_extra_memory(function: Callable[..., Any], *args: Any) -> int | None:
    """Peak bytes of `function(*args)` beyond arguments and result; None on a CPU, where TensorFlow does not count."""
    if "GPU" not in args[0].device:
        return None
    synchronize(function(*args))
    before = tf.config.experimental.get_memory_info("GPU:0")["current"]
    tf.config.experimental.reset_memory_stats("GPU:0")
    out = function(*args)
    synchronize(out)
    found = tf.config.experimental.get_memory_info("GPU:0")
    return max(found["peak"] - max(found["current"], before), 0)
