"""Plain tensors: which of them an operator without autograd formula may take, and their memory as NumPy arrays."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from subquad_numpy import _kernels

without_numba = torch.compiler.assume_constant_result(_kernels.without_numba)  # asked while compiling too
FORWARD_MODE = "forward-mode differentiation sees through the generic form only"


def declines_plain(tensors: Sequence[Tensor]) -> str | None:
    """Why an operator cannot take the tensors: those of a transform, with a tangent, or of a subclass."""
    compiling = torch.compiler.is_compiling()
    wrapped = not compiling and any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
    if wrapped or torch._C._are_functorch_transforms_active():  # also of a function that closes over the tensors
        return "functional transforms see through the generic form only"
    if _with_tangent(tensors):
        return FORWARD_MODE
    if compiling:
        return None  # the operator is a node of the graph
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return f"it takes plain tensors, got {[type(x).__name__ for x in tensors]}"
    return None


def declines_orders(tensors: Sequence[Tensor]) -> str | None:
    """Why an operator of which PyTorch knows the first derivatives only, backward, cannot take the tensors."""
    levels = _levels()
    if "Jvp" in levels or _with_tangent(tensors):
        return FORWARD_MODE
    if levels.count("Grad") > 1:
        return "functional second derivatives see through the generic form only"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _levels() -> list[str]:
    """Names of the functional transforms that are active, of which a compiled function is made for each."""
    return [level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()]


def _with_tangent(tensors: Sequence[Tensor]) -> bool:
    """Has one of them a tangent, or may it while compiling? An operator without formula would lose it."""
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_eager(tensors: Sequence[Tensor]) -> bool:
    """Are they plain tensors, and is nothing compiled or recorded as a program?"""
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing() and declines_plain(tensors) is None


def declines_operator(*tensors: Tensor | None, **_: bool) -> str | None:
    """Why a kernel that is an operator on the CPU cannot take the call."""
    given = [x for x in tensors if x is not None]
    where = given[0].device.type
    if where not in ("cpu", "meta"):
        return f"it runs on cpu, the tensors are on {where}"
    return without_numba() or declines_plain(given)


def declines_compiled(floats: Sequence[Tensor], mask: Tensor | None) -> str | None:
    """Why a compiled CPU kernel that is no operator of PyTorch's cannot take the tensors."""
    if floats[0].device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {floats[0].device.type}"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a compiler sees through the generic form"
    if len({x.dtype for x in floats}) > 1:
        return "it computes in one dtype"
    if torch._C._len_torch_dispatch_stack():
        return "what watches or records operations sees through the generic form only"  # counters, make_fx
    return without_numba() or declines_plain(floats if mask is None else [*floats, mask])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has(package: str) -> bool:
    """Is it installed?"""
    return importlib.util.find_spec(package) is not None


def as_numpy(x: Tensor | None) -> Any:
    """The tensor's memory as a NumPy array."""
    return None if x is None else x.detach().contiguous().resolve_conj().resolve_neg().numpy()


def in_place(x: Tensor | None) -> Any:
    """The tensor's memory as a NumPy array, strides as they are."""
    return None if x is None else x.detach().resolve_neg().numpy()


def sees_through(*grads: Tensor, operator: bool = False) -> bool:
    """Must a backward pass be generic: to be differentiated again (create_graph=True), or as `grads` are not plain?

    One that is an `operator` runs wherever PyTorch does, and is a node of the graph while compiling.
    """
    if operator and torch.compiler.is_compiling():
        return False
    legacy = any(torch._C._functorch.is_legacy_batchedtensor(x) for x in grads)  # is_grads_batched=True
    reason = declines_plain(grads) if operator else declines_compiled(grads, None)
    return torch.is_grad_enabled() or legacy or reason is not None


def differentiate_again(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], need: Sequence[bool], grad: Any
) -> Iterator[Tensor | None]:
    """Gradients of a function by the tensors that need one, which can be differentiated further where that is recorded.

    Each stands for itself alone, also where one was computed from another: what it depends on is not the function's.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [None if x is None else x.view_as(x) for x in tensors]
        wanted = [x for x, needed in zip(own, need, strict=True) if needed]
        out = function(*own)
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=create_graph))
    return (next(found) if needed else None for needed in need)
