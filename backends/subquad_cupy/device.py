"""What the scan needs of an array library: pointers, strides, memory and a launch on the current stream.

`SCAN` is the argument record of all kernels, struct Scan of selective_scan/cuda/scan.cu.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from subquad_cupy.compile import compiled
from subquad_cupy.selective_scan.plan import THREADS

Array = Any

# dtypes of u, delta, z, by their C++ names; then the fields of `SCAN`
STORAGE = {"float32": "float", "float64": "double", "float16": "fp16", "bfloat16": "bf16"}
SERIES = ("u", "delta", "z", "B", "C", "y", "dy", "du", "ddelta", "dz", "dB", "dC")

_POINTERS = ("A", "D", "bias", "first", "last", "carry", "sums", "checkpoints", "dA", "dD", "dbias", "resets")
_SIZES = ("batch", "n", "d", "d_state", "groups", "blocks", "chunk", "chunks", "tiles")
_FLAGS = ("softplus", "vector", "vector_state", "resets_batch", "resets_time")
_ROWS = np.dtype([("data", np.uint64), ("batch", np.int64), ("time", np.int64), ("group", np.int64)])
SCAN = np.dtype(
    [("rows", _ROWS, len(SERIES))]
    + [(name, np.uint64) for name in _POINTERS]
    + [(name, np.int64) for name in _SIZES + _FLAGS]
)  # CuPy passes a structured NumPy array of one element by value


class Device(Protocol):
    """The device of the arrays and its library: the interface that the scan is written against."""

    multiprocessors: int

    def dtype(self, x: Array) -> str:
        """The name of the data type, such as ``"bfloat16"``."""
        ...

    def pointer(self, x: Array) -> int:
        """The address of the first element."""
        ...

    def strides(self, x: Array) -> tuple[int, ...]:
        """The strides in bytes."""
        ...

    def contiguous(self, x: Array) -> Array:
        """`x`, or a copy if `x` is not contiguous."""
        ...

    def empty(self, shape: tuple[int, ...], like: Array) -> Array:
        """Uninitialised memory with the data type and on the device of `like`."""
        ...

    def cast(self, x: Array, like: Array) -> Array:
        """`x`, or a copy if `x` does not have the data type of `like`."""
        ...

    def launch(self, kernel: str, blocks: int, arguments: np.ndarray) -> None:
        """Start a kernel with one `Scan` as its argument, in the order of the current stream."""
        ...


class CupyDevice:
    """CuPy arrays on the current device and stream."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._index = cupy.cuda.Device().id
        self.multiprocessors = _multiprocessors(self._index)

    def dtype(self, x: Array) -> str:
        return x.dtype.name

    def pointer(self, x: Array) -> int:
        return x.data.ptr

    def strides(self, x: Array) -> tuple[int, ...]:
        return x.strides

    def contiguous(self, x: Array) -> Array:
        return self._cupy.ascontiguousarray(x)

    def empty(self, shape: tuple[int, ...], like: Array) -> Array:
        return self._cupy.empty(shape, dtype=like.dtype)

    def cast(self, x: Array, like: Array) -> Array:
        return x.astype(like.dtype, copy=False)

    def launch(self, kernel: str, blocks: int, arguments: np.ndarray) -> None:
        compiled(kernel, self._index)((blocks,), (THREADS,), (arguments,))


class TorchDevice:
    """Torch CUDA tensors, in memory from torch's allocator and on torch's current stream; CuPy only launches.

    No tensor is converted to a CuPy array: the kernel's argument takes the addresses, also of bfloat16.

    Parameters
    ----------
    index : int
        Device index.
    stream : int
        ``torch.cuda.current_stream(index).cuda_stream``.
    """

    def __init__(self, index: int, stream: int) -> None:
        self.multiprocessors = _multiprocessors(index)
        self._index = index
        self._stream = _adopt(stream, index)

    def dtype(self, x: Array) -> str:
        return str(x.dtype).removeprefix("torch.")

    def pointer(self, x: Array) -> int:
        return x.data_ptr()

    def strides(self, x: Array) -> tuple[int, ...]:
        return tuple(stride * x.element_size() for stride in x.stride())

    def contiguous(self, x: Array) -> Array:
        return x.contiguous()

    def empty(self, shape: tuple[int, ...], like: Array) -> Array:
        return like.new_empty(shape)

    def cast(self, x: Array, like: Array) -> Array:
        return x.to(like.dtype)

    def launch(self, kernel: str, blocks: int, arguments: np.ndarray) -> None:
        import cupy

        with cupy.cuda.Device(self._index), self._stream:
            compiled(kernel, self._index)((blocks,), (THREADS,), (arguments,))


@contextmanager
def launcher(device: Device | None, u: Array) -> Iterator[Device]:
    """A context with `device`; if None is given, with CuPy on the device of `u` and its current stream."""
    if device is not None:
        yield device
        return
    with u.device:
        yield CupyDevice()


class _Foreign:
    """A stream of another library, as the CUDA stream protocol wants it."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream


def _adopt(stream: int, index: int) -> Any:
    import cupy

    if stream == 0:
        return cupy.cuda.Stream.null
    if hasattr(cupy.cuda.Stream, "from_external"):  # CuPy 14 deprecates ExternalStream for it
        with cupy.cuda.Device(index):  # some versions note the current device as that of the stream
            return cupy.cuda.Stream.from_external(_Foreign(stream))
    return cupy.cuda.ExternalStream(stream, index)


def address(pointer: int, *strides: int) -> int:
    """The address and all strides combined by "or": its low zeros are those that all have, hence the alignment."""
    return functools.reduce(lambda bits, stride: bits | abs(stride), strides, pointer)


@functools.cache
def _multiprocessors(index: int) -> int:
    import cupy

    return int(cupy.cuda.runtime.deviceGetAttribute(cupy.cuda.runtime.cudaDevAttrMultiProcessorCount, index))
