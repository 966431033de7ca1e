"""What PyTorch is doing around a call: the signature of its tensors, and the conditions that it runs under."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from subquad import backend
from subquad.backend import Call, Conditions

PLAIN = (Tensor, torch.nn.Parameter)  # tensors with memory of their own and no way of their own to compute
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
transforms_active = torch._C._are_functorch_transforms_active


def signature(arrays: Sequence[Any]) -> Hashable | None:
    """What decides how a call with these tensors goes; None where more than they decides, or they are not plain."""
    if torch.compiler.is_compiling() or transforms_active() or forward_ad._current_level >= 0 or is_watched():
        return None
    found: list[Any] = [torch.is_grad_enabled()]
    for x in arrays:
        if x is None:
            found.append(None)
        elif x.__class__ in PLAIN and not is_wrapped(x):
            found += (x.shape, x.dtype, x.device, x.requires_grad)
        else:
            return None
    return tuple(found)


def conditions(arrays: Sequence[Tensor]) -> Conditions:
    """What PyTorch is doing around a call with these tensors."""
    compiling = torch.compiler.is_compiling()
    return Conditions(
        tracing=compiling,
        transformed=is_transformed(arrays),
        tangents="Jvp" in transforms() or has_tangent(arrays),
        recorded=is_recorded(arrays),
        watched=not compiling and is_watched(),
    )


def is_recorded(arrays: Sequence[Tensor | None]) -> bool:
    """Whether gradients will be asked for."""
    if torch.is_grad_enabled():
        for x in arrays:
            if x is not None and x.requires_grad:
                return True
    return False


def is_watched() -> bool:
    """Whether something sees single operations: counters and recorders such as make_fx, and torch.jit.trace."""
    return bool(torch._C._len_torch_dispatch_stack()) or torch._C._get_tracing_state() is not None


def is_transformed(arrays: Sequence[Tensor]) -> bool:
    """Whether a functional transform is active, also around a function that closes over the tensors, or was."""
    if transforms_active():
        return True
    return not torch.compiler.is_compiling() and any(is_wrapped(x) for x in arrays)


def has_tangent(arrays: Sequence[Tensor]) -> bool:
    """Whether a tensor carries a tangent of forward mode; while compiling, whether one might."""
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or any(forward_ad.unpack_dual(x).tangent is not None for x in arrays)


def transforms() -> list[str]:
    """Names of the functional transforms that are active, such as "Grad", "Jvp" and "Vmap", outermost first."""
    return _transforms() if transforms_active() else []


@torch.compiler.assume_constant_result
def _transforms() -> list[str]:
    """`transforms`, of which a compiled function is made for each."""
    return [level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()]


def not_plain(call: Call) -> str | None:
    """Why code that reads memory cannot take the tensors of a call: a subclass computes in its own way."""
    if torch.compiler.is_compiling():
        return None  # the operator is a node of the graph
    given = [x for x in (*call.arrays, call.key_mask) if x is not None]
    if all(type(x) in PLAIN for x in given):
        return None
    return f"it takes plain tensors, got {[type(x).__name__ for x in given]}"


def needs_generic(grads: Sequence[Tensor | None]) -> bool:
    """Whether a backward pass must be one of plain operations.

    So it is where the pass will be differentiated in its turn (create_graph=True), and where a gradient is a wrapper, a
    batch of gradients (is_grads_batched=True) or has a tangent.
    """
    if torch.is_grad_enabled() or transforms_active():
        return True
    given = [x for x in grads if x is not None]
    for x in given:
        if x.__class__ not in PLAIN or is_wrapped(x) or is_batch(x):
            return True
    return has_tangent(given)


def is_eager(arrays: Sequence[Tensor]) -> bool:
    """Whether the tensors are plain, and nothing is compiled, recorded as a program or transformed."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not is_transformed(arrays)
        and not has_tangent(arrays)
        and all(type(x) in PLAIN for x in arrays)
    )


def fixes_weights(call: Call) -> str | None:
    """Why the compiled causal gradient cannot take a call: it is one by queries, keys and values."""
    weights = call.arrays[6:]
    if call.conditions.recorded and (len(weights) > 2 or any(x is not None and x.requires_grad for x in weights)):
        return "causal gradients by directions or with a center are recorded through the generic form"
    return None


@torch.compiler.assume_constant_result
def is_installed(package: str) -> bool:
    """Whether a package can be imported, asked while compiling too."""
    return backend.is_installed(package)


def is_batch(x: Tensor | None) -> bool:
    """Whether a gradient stands for a batch of them (is_grads_batched=True), an axis that no shape shows."""
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)
