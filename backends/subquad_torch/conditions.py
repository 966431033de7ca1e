"""The state of PyTorch around a call: the signature of the call's tensors, and the conditions that the call runs under.

Three words recur. *Recorded*: autograd will be asked for gradients. *Transformed*: `torch.func` is active. *Watched*:
a dispatch mode or `torch.jit.trace` sees each operation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _get_flash_sdp_enabled, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true

from subquad import backend
from subquad.backend import Call, Conditions

STRIDED = torch.strided
PLAIN = (Tensor, torch.nn.Parameter)  # classes whose tensors have memory, and do not override operations
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
transforms_active = torch._C._are_functorch_transforms_active
is_compiling = torch.compiler.is_compiling  # names of this module, since a signature is found at every call


def recognises() -> bool:
    """Whether tensors alone decide how calls go: nothing is compiled, transformed, watched or differentiated ahead."""
    if is_compiling() or transforms_active() or forward_ad._current_level >= 0:
        return False
    return not _len_torch_dispatch_stack() and _get_tracing_state() is None  # as `is_watched`, without the call


def signature(arrays: Sequence[Any]) -> Hashable | None:
    """What decides how a call with these tensors goes; None where more than they decides, or they are not plain."""
    if not recognises():
        return None
    found: list[Any] = [is_grad_enabled(), _get_flash_sdp_enabled()]
    try:
        for x in arrays:
            if x is None:
                found.append(None)
            elif x.__class__ in PLAIN and x.layout is STRIDED and not is_wrapped(x):
                found += (x.shape, x.dtype, x.device, x.requires_grad)  # a quantised tensor has a dtype of its own
            else:
                return None
    except RuntimeError:  # a nested tensor has no shape
        return None
    return tuple(found)


def likeness(arrays: Sequence[Tensor]) -> Callable[..., bool] | None:
    """A function that tells whether other tensors have the signature of these, which so is neither made nor looked up.

    PyTorch's own compiled check, `TensorGuards`, takes half the time, but ends the process for a nested tensor.
    """
    if signature(arrays) is None:
        return None
    is_recording, has_flash = is_grad_enabled(), _get_flash_sdp_enabled()
    known = [(x.shape, x.dtype, x.device, x.requires_grad) for x in arrays]

    def is_like(*arrays: Any) -> bool:
        if is_grad_enabled() is not is_recording or _get_flash_sdp_enabled() is not has_flash:
            return False
        try:
            for x, (shape, dtype, device, learned) in zip(arrays, known):  # noqa: B905  # as in `host`
                if x.__class__ not in PLAIN or x.layout is not STRIDED or x.shape != shape or x.dtype is not dtype:
                    return False
                if x.device != device or x.requires_grad is not learned or is_wrapped(x):
                    return False
        except RuntimeError:  # a nested tensor has no shape
            return False
        return True

    return is_like


def conditions(arrays: Sequence[Tensor]) -> Conditions:
    """The conditions under which a call with these tensors runs."""
    compiling = torch.compiler.is_compiling()
    return Conditions(
        tracing=compiling,
        transformed=is_transformed(arrays),
        tangents="Jvp" in transforms() or has_tangent(arrays),
        recorded=is_recorded(arrays),
        watched=not compiling and is_watched(),
    )


def is_recorded(arrays: Sequence[Tensor | None]) -> bool:
    """Whether autograd records the call: grad mode is on and a tensor requires a gradient."""
    if torch.is_grad_enabled():
        for x in arrays:
            if x is not None and x.requires_grad:
                return True
    return False


def is_watched() -> bool:
    """Whether something sees each operation: a dispatch mode (counters, make_fx), or torch.jit.trace."""
    return bool(_len_torch_dispatch_stack()) or _get_tracing_state() is not None


def is_transformed(arrays: Sequence[Tensor]) -> bool:
    """Whether a functional transform is active, even if no tensor is its argument, or a tensor comes from one."""
    if transforms_active():
        return True
    return not torch.compiler.is_compiling() and any(is_wrapped(x) for x in arrays)


def has_tangent(arrays: Sequence[Tensor]) -> bool:
    """True if a tensor carries a forward-mode tangent (while compiling: might carry one)."""
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or any(forward_ad.unpack_dual(x).tangent is not None for x in arrays)


def transforms() -> list[str]:
    """The names of the active functional transforms, such as "Grad", "Jvp" and "Vmap", outermost first."""
    return _transforms() if transforms_active() else []


@torch.compiler.assume_constant_result
def _transforms() -> list[str]:
    """`transforms`, as a constant of a compiled function."""
    return [level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()]


def not_plain(call: Call) -> str | None:
    """The reason why code that reads memory cannot take a call, or None: a subclass may override operations."""
    if torch.compiler.is_compiling():
        return None  # the operator becomes a node of the graph, and meets plain tensors when that runs
    given = [x for x in (*call.arrays, call.key_mask) if x is not None]
    if all(type(x) in PLAIN for x in given):
        return None
    return f"it takes plain tensors, got {[type(x).__name__ for x in given]}"


def needs_generic(grads: Sequence[Tensor | None]) -> bool:
    """True if a backward pass must use the generic form.

    That is so if its result will be differentiated again (create_graph=True), or if a gradient is a wrapper, a batch of
    gradients (is_grads_batched=True), or carries a tangent: a kernel cannot read these.
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
    """The reason why the compiled causal gradient, by queries, keys and values only, cannot take a call, or None."""
    weights = call.arrays[6:]
    if call.conditions.recorded and (len(weights) > 2 or any(x is not None and x.requires_grad for x in weights)):
        return "causal gradients by directions or with a center are recorded through the generic form"
    return None


@torch.compiler.assume_constant_result
def why_missing(package: str, load: bool) -> str | None:
    """The reason why a package cannot be used, or None; while compiling, the answer is a constant."""
    return backend.why_missing(package, load=load)


def refuses(x: Any) -> str | None:
    """What a tensor is, if its layout or dtype cannot be computed with, and what to pass instead."""
    if x.is_nested:
        return (
            "a nested tensor, whose items have lengths of their own; pad it, torch.nested.to_padded_tensor(x, 0.0), "
            "and hide the padding by key_mask"
        )
    if x.layout is not torch.strided:
        return f"a tensor of layout {x.layout}; make it dense, x.to_dense()"
    if x.is_quantized:
        return "a quantised tensor; make it floating, x.dequantize()"
    return None


def holds(condition: Any) -> bool:
    """Whether a condition on sizes holds, for all sizes where a program for many sizes is recorded."""
    return statically_known_true(condition) if isinstance(condition, torch.SymBool) else bool(condition)


def is_batch(x: Tensor | None) -> bool:
    """Whether a gradient stands for a batch of them (is_grads_batched=True), an axis that no shape shows."""
    return x is not None and torch._C._functorch.is_legacy_batchedtensor(x)
