"""Any compiled kernel under PyTorch: two operators for all kernels, their fakes, gradients and higher derivatives.

A call takes one of these ways:

    eager, no gradient recorded         a plain function: PyTorch's dispatcher would cost more than a small call
    eager, gradient recorded            `Recorded`, an `autograd.Function`
    compilers, recorders, meta device   the operators `subquad::forward` and `subquad::backward`, whose first argument
                                        names the kernel, and whose text `static` holds its keywords
    `torch.func`, forward mode          the generic form, which PyTorch differentiates or transforms itself

The operators have no autograd formula of their own: `Recorded` calls them. Only with this arrangement do eager mode,
double backward, `torch.compile(fullgraph=True)` forward and backward, and `torch.export` all work.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from subquad import kernels
from subquad.backend import Accepts, Call, Like, Override
from subquad.core.kernel import Kernel
from subquad_numpy.compiled import Compiled
from subquad_numpy.runtime import addresses
from subquad_numpy.runtime.arguments import Forms
from subquad_torch.conditions import PLAIN, is_batch, is_recorded, is_watched, needs_generic, not_plain
from subquad_torch.openmp import threads

Arrays = Sequence[Tensor | None]
Static = Mapping[str, Any]
Reason = Callable[[Call], str | None]

SYMBOLS = (torch.SymInt, torch.SymFloat)
NUMBERS = (int, float, *SYMBOLS)
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
HALVES = frozenset(HALF.values())
MADE = ("float16", "float32", "float64", "complex64", "complex128", "int32", "bool")
DTYPES = {np.dtype(name): getattr(torch, name) for name in MADE}  # of outputs
DTYPES[np.dtype("uint16")] = torch.bfloat16  # see `memory_of`


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


addresses.KNOWN |= dict.fromkeys(PLAIN, Tensor.data_ptr)

_natives: dict[tuple[str, bool], Native] = {}  # by the name of the kernel, and whether the tensors are on CUDA


def kernel_of(name: str) -> Kernel:
    """The kernel of `subquad.kernels` with this name."""
    return getattr(kernels, name)


def native_of(name: str, arrays: Arrays) -> Native:
    """The native kernel for the device of these tensors; the first tensor is never None."""
    like = arrays[0]
    assert like is not None
    return _natives[name, like.is_cuda]


def as_override(compiled: Compiled, *, watched: bool = False, also: Reason | None = None) -> Override:
    """The override "numba" of a compiled kernel; `also` looks for one more reason to decline."""
    native = Native(
        compiled.kernel,
        partial(_forward_on_host, compiled),
        None if compiled.backward is None else partial(_backward_on_host, compiled),
        tuple(sorted(compiled.unaided)),
        compiled.saves,
        compiled.unread,
        watched,
        compiled.constant,
    )
    accepts = replace(compiled.accepts, devices=("cpu", "meta"), also=_first_of(compiled.accepts.also, also))
    made = override(native, "numba", accepts, widened=True, as_stored=compiled.as_stored)
    return replace(made, bind=partial(_bind, compiled, made.run))


def override(
    native: Native,
    name: str,
    accepts: Accepts,
    *,
    widened: bool = False,
    as_stored: Callable[[int], bool] | None = None,
) -> Override:
    """The override of a native kernel; if `widened`, tensors of half precision are converted to float32 first.

    Those are not of whose places `as_stored` is true.
    """
    _natives[native.kernel, "cuda" in accepts.devices] = native
    # states of PyTorch in which the override may run: without a gradient it must not hide from recording
    under = {"tracing"} | ({"watched"} if native.watched else set())
    under |= {"recorded"} if native.backward or native.constant else set()
    halves = [dtype for word, dtype in HALF.items() if widened and word in accepts.dtypes]
    masked = "key_mask" in kernel_of(native.kernel).options

    def run(*arrays: Tensor | None, **static: Any) -> Any:
        if masked:
            arrays = (*arrays, static.pop("key_mask", None))
        if halves:
            arrays = tuple(
                x.float() if x is not None and x.dtype in halves and not (as_stored and as_stored(i)) else x
                for i, x in enumerate(arrays)
            )
        if native.constant:
            arrays = tuple(None if x is None else x.detach() for x in arrays)
        if native.backward is not None and is_recorded(arrays):
            if torch.compiler.is_compiling():
                outputs = Recorded.apply(native.kernel, encode(static), *_distinct(arrays))
            else:
                outputs = Recorded.apply(native.kernel, static, *arrays)
        else:
            outputs = _call(native, arrays, static)
        return outputs[0] if len(outputs) == 1 else outputs

    also = _first_of(not_plain, accepts.also)
    return Override(native.kernel, name, run, replace(accepts, under=frozenset(under), also=also))


def _first_of(*reasons: Reason | None) -> Reason:
    """A reason that is the first one found by the given ones."""
    given = [reason for reason in reasons if reason is not None]

    def also(call: Call) -> str | None:
        for reason in given:
            found = reason(call)
            if found is not None:
                return found
        return None

    return also


def _distinct(arrays: Arrays) -> Arrays:
    """The arrays, with views for repeated tensors: compilers take no tensor at two places of a function."""
    found: list[Tensor | None] = []
    for x in arrays:
        again = x is not None and any(x is y for y in found)
        found.append(x.view_as(x) if x is not None and again else x)
    return found


def _call(native: Native, arrays: Arrays, static: Static) -> tuple[Tensor, ...]:
    """The outputs of a kernel, where nothing is recorded."""
    if _meets_operator(arrays):
        return tuple(torch.ops.subquad.forward(native.kernel, list(arrays), encode(static)))
    return native.forward(arrays, static)[0]


def _meets_operator(arrays: Arrays) -> bool:
    """Whether a call must go through PyTorch's dispatcher."""
    like = arrays[0]
    assert like is not None
    return torch.compiler.is_compiling() or like.is_meta or is_watched()


class Recorded(torch.autograd.Function):
    """A kernel with a compiled gradient; second derivatives are those of the generic form."""

    @staticmethod
    def forward(ctx: Any, kernel: str, keywords: Static | str, *arrays: Tensor | None) -> tuple[Tensor, ...]:
        """The outputs; while compiling the keywords are a text."""
        native, left, first = native_of(kernel, arrays), None, 0
        if _meets_operator(arrays):
            text = keywords if isinstance(keywords, str) else encode(keywords)
            outputs = tuple(torch.ops.subquad.forward(kernel, list(arrays), text))
            first = len(arrays)  # the operator asks each array for the shape of its gradient
        else:
            outputs, left = native.forward(arrays, keywords, save=True)
        ctx.kernel, ctx.keywords, ctx.count, ctx.left = kernel, keywords, len(arrays), left
        ctx.set_materialize_grads(False)
        if native.unaided:
            ctx.mark_non_differentiable(*[outputs[i] for i in native.unaided])
        kept = [None if i in native.unread and i >= first else x for i, x in enumerate((*arrays, *outputs))]
        ctx.save_for_backward(*kept)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved, need, keywords = ctx.saved_tensors, ctx.needs_input_grad[2:], ctx.keywords
        arrays, outputs = saved[: ctx.count], saved[ctx.count :]
        native, found = native_of(ctx.kernel, arrays), None
        if torch.compiler.is_compiling():
            if any(needed and x is None for x, needed in zip(arrays, need, strict=True)):  # the forward pass was eager
                found = kernel_of(ctx.kernel).gradient(arrays, outputs, grads, **keywords)
            else:
                text = keywords if isinstance(keywords, str) else encode(keywords)
                given = ctx.kernel, list(arrays), text, list(outputs), list(grads), list(need)
                found = torch.ops.subquad.backward(*given)
            return None, None, *(by if needed else None for by, needed in zip(found, need, strict=True))
        if all(by is None for by in grads):
            return (None,) * (2 + len(need))
        static = decode(keywords) if isinstance(keywords, str) else keywords

        def pull(grads: Arrays) -> Sequence[Tensor | None]:
            found = None
            if (native.watched or not is_watched()) and not needs_generic(grads):
                found = _pull(native, arrays, static, ctx.left, outputs, grads, need)
            if found is None:
                found = differentiate_generic(kernel_of(ctx.kernel), arrays, static, grads, need, outputs)
            return found

        return None, None, *(_row_by_row(pull, grads) if any(map(is_batch, grads)) else pull(grads))


def _pull(
    native: Native, arrays: Arrays, static: Static, left: Any, outputs: Arrays, grads: Arrays, need: Sequence[bool]
) -> Sequence[Tensor | None] | None:
    """Compiled gradients by the arrays, from gradients that are plain tensors; None where they cannot be computed."""
    if _meets_operator(arrays):
        given = native.kernel, list(arrays), encode(static), list(outputs), list(grads), list(need)
        found = torch.ops.subquad.backward(*given)
        return [by if needed else None for by, needed in zip(found, need, strict=True)]
    assert native.backward is not None
    return native.backward(arrays, static, left, outputs, grads, need)


def _row_by_row(pull: Callable[[Arrays], Arrays], grads: Arrays) -> list[Tensor | None]:
    """Gradients by a batch of gradients (is_grads_batched=True), an axis that no shape shows."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    shown = [torch._remove_batch_dim(x, level, 1, 0) if x is not None and is_batch(x) else x for x in grads]
    count = next(len(x) for x, y in zip(shown, grads, strict=True) if x is not None and is_batch(y))
    rows = [
        pull([x[i] if x is not None and is_batch(y) else x for x, y in zip(shown, grads, strict=True)])
        for i in range(count)
    ]
    return [
        None if by[0] is None else torch._add_batch_dim(torch.stack(by), 0, level) for by in zip(*rows, strict=True)
    ]


def differentiate_generic(
    kernel: Kernel,
    arrays: Arrays,
    static: Static,
    grads: Arrays,
    need: Sequence[bool],
    outputs: Arrays | None = None,
) -> list[Tensor | None]:
    """Gradients of the generic form by the arrays that need one, differentiable themselves while grad mode is on.

    Each array is cut from its own history first, so that arrays computed from one another are not counted twice.
    `outputs` are those of an override: values that the override was free to choose, like a shift, are kept.
    """
    if kernel.gradient is not None and outputs is not None:
        found = kernel.gradient(tuple(arrays), outputs, grads, **static)
        return [by if needed else None for by, needed in zip(found, need, strict=True)]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [None if x is None else _cut(x, needed) for x, needed in zip(arrays, need, strict=True)]
        computed = _generic(kernel, own, static, outputs)
    wanted = [x for x, needed in zip(own, need, strict=True) if needed]
    pairs = [(out, by) for out, by in zip(computed, grads, strict=True) if by is not None and out.requires_grad]
    results, given = [out for out, _ in pairs], [by for _, by in pairs]
    pulled = iter(
        torch.autograd.grad(results, wanted, given, create_graph=create_graph, allow_unused=True)
        if pairs
        else [None for _ in wanted]
    )
    return [_or_zero(next(pulled), x) if needed else None for x, needed in zip(arrays, need, strict=True)]


def _cut(x: Tensor, needed: bool) -> Tensor:
    """A tensor with the values of x, to differentiate by; inside an operator x itself does not require a gradient."""
    return x.detach().requires_grad_() if needed and not x.requires_grad else x.view_as(x)


def _generic(kernel: Kernel, arrays: list[Any], static: Static, outputs: Arrays | None) -> tuple[Tensor, ...]:
    """The outputs by the generic form."""
    keywords = dict(static)
    if "key_mask" in kernel.options:
        *arrays, keywords["key_mask"] = arrays
    if kernel.pinned is not None and outputs is not None:
        return kernel.pinned(tuple(arrays), outputs, **keywords)
    found = kernel.generic(*arrays, **keywords)
    return found if isinstance(found, tuple) else (found,)


def _or_zero(grad: Tensor | None, x: Tensor | None) -> Tensor:
    """The gradient by x, as zeros where nothing depends on x."""
    assert x is not None
    return torch.zeros_like(x) if grad is None else grad


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
    found = [_or_zero(by, x) if needed else None for by, x, needed in zip(found, arrays, need, strict=True)]
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


def encode(static: Static) -> str:
    """Keywords as a JSON text; values are numbers, strings, None, and frozen dataclasses of these."""
    words: list[Any] = []
    for name, value in static.items():
        cls = type(value)
        fields = getattr(cls, "__dataclass_fields__", None)
        if fields is None:
            words.append((name, _number(value)))
        else:
            words.append((name, cls.__module__, cls.__name__, {x: _number(getattr(value, x)) for x in fields}))
    return _written(words)


def _number(value: Any) -> Any:
    """The value; a number that varies in a compiled program is fixed to its present value."""
    return guard_scalar(value) if isinstance(value, NUMBERS) else value


@torch.compiler.assume_constant_result
def _written(words: list[Any]) -> str:
    return json.dumps(words)


@cache
def decode(text: str) -> Static:
    """The keywords that `encode` made the text from."""
    static = {}
    for name, value, *rest in json.loads(text):
        if rest:
            cls = getattr(importlib.import_module(value), rest[0])
            static[name] = cls(**rest[1])
        else:
            static[name] = value
    return static


def _forward_on_host(
    compiled: Compiled, arrays: Arrays, static: Static, save: bool = False
) -> tuple[tuple[Tensor, ...], Any]:
    """`Native.forward` of a compiled kernel of `subquad_numpy`."""
    like = arrays[0]
    assert like is not None
    made: dict[int, tuple[Any, Tensor]] = {}  # arrays that are the memory of a tensor, by their id

    def new(shape: tuple[int, ...], dtype: Any) -> Any:
        """An output in memory of PyTorch, which PyTorch's profilers then count."""
        tensor = like.new_empty(shape, dtype=DTYPES[np.dtype(dtype)])
        memory = memory_of(tensor)
        made[id(memory)] = memory, tensor
        return memory

    given = [memory_of(x) for x in arrays]
    outputs, left = compiled.forward(given, static, new=new, save=save, threads=threads())
    return tuple([made[id(x)][1] if id(x) in made else _tensor(x, given) for x in outputs]), left


def _bind(
    compiled: Compiled, general: Callable[..., Any], arrays: Arrays, keywords: Static
) -> Callable[..., Any] | None:
    """`Override.bind` of a compiled kernel: what reads tensors of these layouts by their addresses, or None."""
    forward, static, masked = compiled.forward, dict(keywords), "key_mask" in compiled.accepts.options
    given = (*arrays, static.pop("key_mask", None)) if masked else arrays
    like = given[0]
    if not isinstance(forward, Forms) or like is None or like.device.type != "cpu":
        return None
    layouts = [None if x is None or x.is_contiguous() else x.stride() for x in given]
    if not _have_layouts(given, layouts):
        return None
    if any(x is not None and x.dtype in HALVES and not _is_read(compiled, i) for i, x in enumerate(given)):
        return None
    planned = forward.planned([memory_of(x) for x in given], static, save=False)
    if not getattr(planned, "is_straight", False):
        return None

    def run(*arrays: Any, key_mask: Tensor | None = None, **keywords: Any) -> Any:
        given = (*arrays, key_mask) if masked else arrays
        if _have_layouts(given, layouts):
            new_empty = arrays[0].new_empty
            found = planned(given, lambda shape, dtype: new_empty(shape, dtype=DTYPES[dtype]), threads())
            if found is not None:
                outputs = found[0]
                return outputs if len(outputs) > 1 else outputs[0]
        if masked:
            keywords["key_mask"] = key_mask
        return general(*arrays, **keywords)

    return run


def _is_read(compiled: Compiled, place: int) -> bool:
    """Whether a kernel reads half precision at this place as it is stored."""
    return compiled.as_stored is not None and compiled.as_stored(place)


def _have_layouts(arrays: Arrays, layouts: Sequence[tuple[int, ...] | None]) -> bool:
    """Whether tensors are contiguous (None) or of these strides, memory holds their numbers, and none is recorded."""
    records = torch.is_grad_enabled()
    for x, strides in zip(arrays, layouts, strict=True):
        if x is not None:
            if not (x.is_contiguous() if strides is None else x.stride() == strides):
                return False
            if x.is_neg() or x.is_conj() or (records and x.requires_grad):
                return False
    return True


def _backward_on_host(
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
    return grad if x is None else (grad if grad.shape == x.shape else grad.sum_to_size(x.shape)).to(x.dtype)


def memory_of(x: Tensor | None) -> Any:
    """The tensor's memory as a NumPy array with the tensor's strides; of bfloat16, which NumPy lacks, the bits."""
    if x is None:
        return None
    if x.requires_grad:
        x = x.detach()
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    try:
        return x.numpy()
    except RuntimeError:  # lazy conjugation or negation: memory holds other values than the tensor
        return x.resolve_conj().resolve_neg().numpy()


def _tensor(memory: Any, given: Sequence[Any] = ()) -> Tensor:
    """A tensor on an array that a kernel returned; a copy if the array shares memory with one that was given."""
    if not memory.flags.writeable or any(x is not None and np.may_share_memory(memory, x) for x in given):
        memory = memory.copy()
    if memory.dtype == np.uint16:
        return torch.from_numpy(memory.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(memory)
