"""What a comparison or a benchmark asks of PyTorch: arrays, time and memory, on the CPU and on CUDA."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from subquad_numpy.needs import why_not_compiled as why_not_compiled

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler narrates each start and stop on stderr


def describe() -> dict[str, Any]:
    """The version and the devices; `reason` says why no arrays can be made here, and is None where they can."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {"version": torch.__version__, "devices": devices, "reason": None}


def asarray(host: np.ndarray, dtype: str | None = None, device: str | None = None) -> torch.Tensor:
    """Copy a host array to `device` (default: where torch makes new tensors)."""
    target = None if dtype is None else getattr(torch, dtype)
    return torch.tensor(host, dtype=target, device=device)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """Copy to the host; bfloat16, which NumPy does not know, arrives as float32."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def compile(function: Callable[..., Any]) -> Callable[..., Any]:  # noqa: A001
    """Return the function itself: eager mode is how torch is used by default."""
    return function


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs `function` forward and backward: the gradients of ½‖out‖² by all arguments."""

    def forward_backward(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args = tuple(x.detach().requires_grad_() for x in args)
        out = function(*args)
        return torch.autograd.grad(out, args, out.detach())

    return forward_backward


def synchronize(*arrays: torch.Tensor) -> None:
    """Wait until the devices of `arrays` have finished."""
    for device in {x.device for x in arrays}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def peak_extra_memory(function: Callable[..., Any], *args: Any) -> int | None:
    """Peak number of bytes that `function(*args)` allocates, without those of the returned tensors."""
    device = next((x.device for x in args if isinstance(x, torch.Tensor)), torch.device("cpu"))
    out = function(*args)  # caches and compiled code belong to the first call
    size = sum(x.numel() * x.element_size() for x in (out if isinstance(out, tuple) else (out,)))
    del out
    peak = _peak_on_cuda if device.type == "cuda" else _peak_on_cpu
    return max(0, peak(device, function, *args) - size)


def _peak_on_cuda(device: torch.device, function: Callable[..., Any], *args: Any) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = function(*args)
    torch.cuda.synchronize(device)
    del out
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(_device: torch.device, function: Callable[..., Any], *args: Any) -> int:
    """The maximum running sum of the profiler's allocations and frees, since the CPU allocator keeps no peak."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        out = function(*args)
    del out
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak
