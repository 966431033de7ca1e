"""A native kernel: what computes on the memory of plain tensors. One for each kernel and kind of device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from subquad import kernels
from subquad.core.kernel import Kernel

Arrays = Sequence[Tensor | None]
Static = Mapping[str, Any]


@dataclass(frozen=True)
class Native:
    """A kernel that reads and writes the memory of plain tensors.

    Attributes
    ----------
    kernel : str
        Name of the kernel.
    forward : callable
        ``forward(arrays, static, save=False)`` returns (outputs, saved); with `save`, `saved` is what `backward` needs
        beside the outputs. The arrays are the kernel's, its key mask last.
    backward : callable or None
        ``backward(arrays, static, saved, outputs, grads, need)`` returns the gradients by the arrays that need one, or
        None where it cannot be used.
    unaided : tuple of int
        Places of the outputs that have no gradient.
    saves : bool
        Whether `backward` needs more than the arrays and the outputs.
    unread : frozenset of int
        Places among the arrays and then the outputs of what `backward` does not read: it is not kept.
    watched : bool
        Whether counters and recorders of operations see one operator; else they see the generic form's operations.
    constant : bool
        Whether no output has a gradient, so that there is nothing to record.
    """

    kernel: str
    forward: Callable[..., tuple[tuple[Tensor, ...], Any]]
    backward: Callable[..., Sequence[Tensor | None] | None] | None
    unaided: tuple[int, ...] = ()
    saves: bool = False
    unread: frozenset[int] = frozenset()
    watched: bool = False
    constant: bool = False


_natives: dict[tuple[str, bool], Native] = {}  # by the name of the kernel, and whether the tensors are on CUDA


def kernel_of(name: str) -> Kernel:
    """The kernel of `subquad.kernels` with this name."""
    return getattr(kernels, name)


def native_of(name: str, arrays: Arrays) -> Native:
    """The native kernel for the device of these tensors; the first tensor is never None."""
    like = arrays[0]
    assert like is not None
    return _natives[name, like.is_cuda]


def keep(native: Native, *, on_cuda: bool) -> None:
    """Let `native_of` find a kernel."""
    _natives[native.kernel, on_cuda] = native
