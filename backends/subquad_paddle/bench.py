"""What a comparison or a benchmark asks of Paddle: arrays, compilation, time and memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle


def describe() -> dict[str, Any]:
    """The version and the devices: CUDA, if Paddle was built for it and there is a GPU, and the CPU."""
    has_gpu = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    return {"version": paddle.__version__, "devices": ["cuda", "cpu"] if has_gpu else ["cpu"], "reason": None}


def asarray(host: np.ndarray, dtype: str | None = None, device: str | None = None) -> paddle.Tensor:
    """Copy a host array to a device."""
    place = {None: None, "cuda": "gpu", "cpu": "cpu"}[device]
    return paddle.to_tensor(np.array(host), place=place).astype(dtype or host.dtype.name)


def to_numpy(x: paddle.Tensor) -> np.ndarray:
    """Copy to the host; bfloat16, which NumPy does not know, arrives as float32."""
    return (x.astype("float32") if x.dtype == paddle.bfloat16 else x).numpy()


def compile(function: Callable[..., Any]) -> Callable[..., Any]:  # noqa: A001
    """The function as a program of Paddle, recorded once for each signature."""

    def recorded(args: list[paddle.Tensor]) -> Any:  # arguments of `to_static`, which sees none in a *args
        return function(*args)

    program = paddle.jit.to_static(recorded, full_graph=True)
    return lambda *args: program(list(args))


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs `function` forward and backward: the gradients of ½‖out‖² by all arguments."""

    def forward_backward(*args: paddle.Tensor) -> list[paddle.Tensor]:
        own = [x.detach() for x in args]
        for x in own:
            x.stop_gradient = False
        return paddle.grad(0.5 * paddle.sum(function(*own) ** 2), own)

    return forward_backward


def synchronize(*arrays: paddle.Tensor) -> None:
    """Wait for the results."""
    if arrays and arrays[0].place.is_gpu_place():
        paddle.device.synchronize()


def peak_extra_memory(function: Callable[..., Any], *args: Any) -> int | None:
    """Peak bytes of `function(*args)` beyond arguments and result; None on a CPU, where Paddle does not count."""
    if not args[0].place.is_gpu_place():
        return None
    synchronize(function(*args))
    before = paddle.device.cuda.memory_allocated()
    paddle.device.cuda.reset_max_memory_allocated()
    out = function(*args)
    synchronize(out)
    return max(paddle.device.cuda.max_memory_allocated() - max(paddle.device.cuda.memory_allocated(), before), 0)
