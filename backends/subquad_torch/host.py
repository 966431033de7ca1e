"""Any compiled kernel of `subquad_numpy` on the memory of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from subquad.backend import Override
from subquad_numpy.compiled import Compiled
from subquad_numpy.runtime import addresses
from subquad_numpy.runtime.arguments import LARGE, Forms
from subquad_torch.adapt import HALF, Reason, first_of, override
from subquad_torch.conditions import PLAIN, is_recorded
from subquad_torch.native import Arrays, Native, Static
from subquad_torch.openmp import threads

HALVES = frozenset(HALF.values())
MADE = ("float16", "float32", "float64", "complex64", "complex128", "int32", "bool")
DTYPES = {np.dtype(name): getattr(torch, name) for name in MADE}  # of outputs
DTYPES[np.dtype("uint16")] = torch.bfloat16  # see `memory_of`

addresses.KNOWN |= dict.fromkeys(PLAIN, Tensor.data_ptr)


def as_override(compiled: Compiled, *, watched: bool = False, also: Reason | None = None) -> Override:
    """The override "compiled" of a compiled kernel; `also` looks for one more reason to decline."""
    native = Native(
        compiled.kernel,
        partial(_forward, compiled),
        None if compiled.backward is None else partial(_backward, compiled),
        tuple(sorted(compiled.unaided)),
        compiled.saves,
        compiled.unread,
        watched,
        compiled.constant,
    )
    accepts = replace(compiled.accepts, devices=("cpu", "meta"), also=first_of(compiled.accepts.also, also))
    made = override(native, "compiled", accepts, widened=True, as_stored=compiled.as_stored)
    return replace(made, bind=partial(_bind, compiled, made.run))


def _forward(compiled: Compiled, arrays: Arrays, static: Static, save: bool = False) -> tuple[tuple[Tensor, ...], Any]:
    """`Native.forward` of a compiled kernel of `subquad_numpy`."""
    like = arrays[0]
    assert like is not None
    made: dict[int, tuple[Any, Tensor]] = {}  # arrays that are the memory of a tensor, by their id

    def new(shape: tuple[int, ...], dtype: Any) -> Any:
        """An output in memory of PyTorch, which PyTorch's profilers then count."""
        tensor = _empty(like, shape, dtype)
        memory = memory_of(tensor)
        made[id(memory)] = memory, tensor
        return memory

    given = [memory_of(x) for x in arrays]
    outputs, left = compiled.forward(given, static, new=new, save=save, threads=threads())
    return tuple([made[id(x)][1] if id(x) in made else _tensor(x, given) for x in outputs]), left


def _empty(like: Tensor, shape: tuple[int, ...], dtype: Any) -> Tensor:
    """An output, in huge pages if it is large."""
    return _maker(like, shape, dtype)(like)


def _maker(like: Tensor, shape: tuple[int, ...], dtype: Any) -> Callable[[Tensor], Tensor]:
    """What makes an output beside a tensor of the shape, dtype and layout of `like`."""
    kind = DTYPES.get(dtype) or DTYPES[np.dtype(dtype)]
    if like.shape == shape and like.dtype is kind and like.is_contiguous():  # half the time
        make: Callable[[Tensor], Tensor] = torch.empty_like
    else:

        def make(like: Tensor) -> Tensor:
            return like.new_empty(shape, dtype=kind)

    if math.prod(shape) * kind.itemsize < LARGE:
        return make

    return lambda like: in_huge_pages(make(like))


def in_huge_pages(made: Tensor) -> Tensor:
    """A tensor of the host that nobody has written, in huge pages if it is large."""
    from subquad_numpy.runtime.huge_pages import ask

    ask(made.data_ptr(), made.nbytes)
    return made


def _bind(
    compiled: Compiled, general: Callable[..., Any], arrays: Arrays, keywords: Static
) -> Callable[..., Any] | None:
    """`Override.bind` of a compiled kernel: what reads tensors of these layouts by their addresses, or None."""
    forward, static, masked = compiled.forward, dict(keywords), "key_mask" in compiled.accepts.options
    given = (*arrays, static.pop("key_mask", None)) if masked else arrays
    like = given[0]
    if not isinstance(forward, Forms) or like is None or like.device.type != "cpu":
        return None
    layouts = [Layout.of(x) for x in given]
    if is_recorded(given) or not _have_layouts(given, layouts):  # the signature tells the former
        return None
    if any(x is not None and x.dtype in HALVES and not _is_read(compiled, i) for i, x in enumerate(given)):
        return None
    planned = forward.planned([memory_of(x) for x in given], static, save=False)
    if not getattr(planned, "is_straight", False):
        return None
    makers: dict[Any, Callable[[Tensor], Tensor]] = {}  # of outputs, by shape and dtype
    all_plain = all(layout is None or layout == PLAIN_LAYOUT for layout in layouts)
    team = None if getattr(planned, "is_short", False) else threads

    def run(*arrays: Any, key_mask: Tensor | None = None) -> Any:
        given = (*arrays, key_mask) if masked else arrays
        if _are_plain(given) if all_plain else _have_layouts(given, layouts):
            like = arrays[0]

            def new(shape: tuple[int, ...], dtype: Any) -> Tensor:
                make = makers.get((shape, dtype))
                if make is None:
                    make = makers[shape, dtype] = _maker(like, shape, dtype)
                return make(like)

            found = planned(given, new, None if team is None else team())
            if found is not None:
                outputs = found[0]
                return outputs if len(outputs) > 1 else outputs[0]
        return general(*arrays, **static, key_mask=key_mask) if masked else general(*arrays, **static)

    return run


def _is_read(compiled: Compiled, place: int) -> bool:
    """Whether a kernel reads half precision at this place as it is stored."""
    return compiled.as_stored is not None and compiled.as_stored(place)


class Layout(NamedTuple):
    """How the numbers of a tensor lie in memory."""

    strides: tuple[int, ...] | None  # None: contiguous
    may_be_conjugate: bool

    @classmethod
    def of(cls, x: Tensor | None) -> Layout | None:
        """The layout of a tensor."""
        return None if x is None else cls(None if x.is_contiguous() else x.stride(), x.is_complex())


PLAIN_LAYOUT = Layout(None, may_be_conjugate=False)


def _are_plain(arrays: Arrays) -> bool:
    """`_have_layouts` for real tensors that are contiguous, in half the time."""
    for x in arrays:  # noqa: SIM110  # a generator takes twice the time
        if x is not None and (not x.is_contiguous() or x.is_neg()):
            return False
    return True


def _have_layouts(arrays: Arrays, layouts: Sequence[Layout | None]) -> bool:
    """Whether tensors have these layouts, and memory holds their numbers."""
    for x, layout in zip(arrays, layouts):  # noqa: B905  # a check of lengths takes time at every call
        if x is not None:
            strides, may_be_conjugate = layout
            if not (x.is_contiguous() if strides is None else x.stride() == strides):
                return False
            if x.is_neg() or (may_be_conjugate and x.is_conj()):
                return False
    return True


def _backward(
    compiled: Compiled,
    arrays: Arrays,
    static: Static,
    left: Any,
    outputs: Arrays,
    grads: Arrays,
    need: Sequence[bool],
) -> Sequence[Tensor | None] | None:
    """`Native.backward` of a compiled kernel of `subquad_numpy`."""
    assert compiled.backward is not None
    given, results, by = ([memory_of(x) for x in tensors] for tensors in (arrays, outputs, grads))
    found = compiled.backward(given, static, left, results, by, need, threads=threads())
    if found is None:
        return None
    return [
        _as_wide_as(x, _tensor(by)) if needed and by is not None else None
        for by, x, needed in zip(found, arrays, need, strict=True)
    ]


def _as_wide_as(x: Tensor | None, grad: Tensor) -> Tensor:
    """A gradient added up to the shape of x, in its dtype; one by an array that was not kept has both."""
    return grad if x is None else grad.sum_to_size(x.shape).to(x.dtype)


def memory_of(x: Tensor | None) -> Any:
    """The tensor's memory as a NumPy array with the tensor's strides; of bfloat16, which NumPy lacks, the bits."""
    if x is None:
        return None
    if x.requires_grad:
        x = x.detach()
    try:
        return _array(x)
    except RuntimeError:  # lazy conjugation or negation: memory holds other values than the tensor
        return _array(x.resolve_conj().resolve_neg())


def _array(x: Tensor) -> Any:
    return (x.view(torch.uint16) if x.dtype is torch.bfloat16 else x).numpy()


def _tensor(memory: Any, given: Sequence[Any] = ()) -> Tensor:
    """A tensor on an array that a kernel returned; a copy if the array shares memory with one that was given."""
    if not memory.flags.writeable or any(x is not None and np.may_share_memory(memory, x) for x in given):
        memory = memory.copy()
    if memory.dtype == np.uint16:
        return torch.from_numpy(memory).view(torch.bfloat16)
    return torch.from_numpy(memory)
