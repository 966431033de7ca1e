"""Two operators for all kernels, `subquad::forward` and `subquad::backward`: what compilers and recorders see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.backend import Like
from subquad.core.kernel import Kernel
from subquad_torch.generic import differentiate_generic, or_zero
from subquad_torch.keywords import decode, encode
from subquad_torch.native import Arrays, Static, kernel_of, native_of


def forward(kernel: str, arrays: Arrays, keywords: Static | str) -> tuple[Tensor, ...]:
    """The outputs by the operator; keywords may be a text already."""
    return tuple(torch.ops.subquad.forward(kernel, list(arrays), _text(keywords)))


def backward(
    kernel: str, arrays: Arrays, keywords: Static | str, outputs: Arrays, grads: Arrays, need: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients by the operator, None where none is needed."""
    given = list(arrays), _text(keywords), list(outputs), list(grads), list(need)
    found = torch.ops.subquad.backward(kernel, *given)
    return [by if needed else None for by, needed in zip(found, need, strict=True)]


def _text(keywords: Static | str) -> str:
    return keywords if isinstance(keywords, str) else encode(keywords)


@torch.library.custom_op(
    "subquad::forward", mutates_args=(), schema="(str kernel, Tensor?[] arrays, str static) -> Tensor[]"
)
def _forward(kernel: str, arrays: list[Tensor | None], static: str) -> list[Tensor]:
    """The outputs of a kernel, in rows as the fake has them."""
    outputs, _ = native_of(kernel, arrays).forward(arrays, decode(static))
    return [x.contiguous() for x in outputs]


@_forward.register_fake
def _(kernel: str, arrays: list[Tensor | None], static: str) -> list[Tensor]:
    like = arrays[0]
    assert like is not None
    return [like.new_empty(x.shape, dtype=x.dtype) for x in _declared(kernel_of(kernel), arrays, decode(static))]


@torch.library.custom_op(
    "subquad::backward",
    mutates_args=(),
    schema="(str kernel, Tensor?[] arrays, str static, Tensor?[] outputs, Tensor?[] grads, bool[] need) -> Tensor[]",
)
def _backward(
    kernel: str,
    arrays: list[Tensor | None],
    static: str,
    outputs: list[Tensor | None],
    grads: list[Tensor | None],
    need: list[bool],
) -> list[Tensor]:
    """Gradients of a kernel by its arrays; an empty tensor where none is needed."""
    native, keywords = native_of(kernel, arrays), decode(static)
    assert native.backward is not None
    # Compiled programs pass zeros for an output that nobody differentiates. None in their place allows more kernels to
    # run; on CUDA, to look at values would wait for the device.
    if arrays[0] is not None and not arrays[0].is_cuda:
        grads = [by if i == 0 or (by is not None and bool(by.any())) else None for i, by in enumerate(grads)]
    left = native.forward(arrays, keywords, save=True)[1] if native.saves else None
    found = native.backward(arrays, keywords, left, outputs, grads, need)
    if found is None:
        # inside an operator PyTorch records no gradients; the generic form needs them
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            found = differentiate_generic(kernel_of(kernel), arrays, keywords, grads, need, outputs)
    found = [or_zero(by, x) if needed else None for by, x, needed in zip(found, arrays, need, strict=True)]
    return [_or_empty(by, arrays[0]) for by in found]


@_backward.register_fake
def _(
    kernel: str,
    arrays: list[Tensor | None],
    static: str,
    outputs: list[Tensor | None],
    grads: list[Tensor | None],
    need: list[bool],
) -> list[Tensor]:
    found = [x.new_empty(x.shape) if needed and x is not None else None for x, needed in zip(arrays, need, strict=True)]
    return [_or_empty(by, arrays[0]) for by in found]


def _or_empty(grad: Tensor | None, like: Tensor | None) -> Tensor:
    """The gradient, contiguous as the fake promises, or an empty tensor where none is needed."""
    assert like is not None
    return like.new_empty(0) if grad is None else grad.contiguous()


def _declared(kernel: Kernel, arrays: Arrays, static: Static) -> tuple[Like, ...]:
    """Shapes and dtypes of the outputs, as the kernel declares them."""
    if "key_mask" not in kernel.options:
        return kernel.outputs(*arrays, **static)
    *given, key_mask = arrays
    return kernel.outputs(*given, **static, key_mask=key_mask)
