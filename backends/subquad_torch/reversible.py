"""Reversible layers as operators of autograd: the outputs of the last layer are saved, all else is computed again.

Each layer is a node. In a backward pass the node of the last layer begins with the saved outputs; a node recovers the
inputs of its layer and leaves them on the *trail*, a list that the nodes of one forward pass share, for the node of the
layer before. There is one node for each layer, and not one for all, so that gradients of parameters are handed to
autograd, and to hooks that send them to other machines, while the backward pass goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call

from subquad_torch.conditions import has_tangent, is_recorded, is_transformed
from subquad_torch.replay import autocast_states, autocasting, random_states, replaying

exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # since PyTorch 2.7
Keywords = Mapping[str, Any]


def forward(layers: Iterable[Any], x1: Tensor, x2: Tensor, f_kwargs: Keywords | None, g_kwargs: Keywords | None) -> Any:
    """The outputs of the last layer; layers from the first one on that has a gradient to give become nodes."""
    _check_streams("x1", x1, "x2", x2)
    f_kwargs, g_kwargs = _checked_keywords("f_kwargs", f_kwargs), _checked_keywords("g_kwargs", g_kwargs)
    layers = list(layers)
    given = [x1, x2, *_tensors(f_kwargs).values(), *_tensors(g_kwargs).values()]
    given += [p for layer in layers for function in (layer.f, layer.g) for p in _parameters(function).values()]
    foreign = exporting() or torch._C._get_tracing_state() is not None or is_transformed(given) or has_tangent(given)
    if foreign or not is_recorded(given):
        for layer in layers:
            x1, x2 = _plain(layer, x1, x2, f_kwargs, g_kwargs)
        return x1, x2
    return _as_nodes(layers, x1, x2, f_kwargs, g_kwargs)


def _plain(layer: Any, x1: Tensor, x2: Tensor, f_kwargs: Keywords, g_kwargs: Keywords) -> tuple[Tensor, Tensor]:
    y1 = x1 + _checked("f", layer.f(x2, **f_kwargs), x1)
    return y1, x2 + _checked("g", layer.g(y1, **g_kwargs), x2)


def inverse(layers: Iterable[Any], y1: Tensor, y2: Tensor, f_kwargs: Keywords | None, g_kwargs: Keywords | None) -> Any:
    """The inputs of the first layer, by plain operations."""
    _check_streams("y1", y1, "y2", y2)
    f_kwargs, g_kwargs = _checked_keywords("f_kwargs", f_kwargs), _checked_keywords("g_kwargs", g_kwargs)
    for layer in reversed(list(layers)):
        x2 = y2 - _checked("g", layer.g(y1, **g_kwargs), y2)
        y1, y2 = y1 - _checked("f", layer.f(x2, **f_kwargs), y1), x2
    return y1, y2


@torch.compiler.disable  # a compiler sees no difference between computing again and keeping
def _as_nodes(layers: Sequence[Any], x1: Tensor, x2: Tensor, f_kwargs: Keywords, g_kwargs: Keywords) -> Any:
    if any(torch.nn.parameter.is_lazy(p) for layer in layers for p in layer.parameters()):
        msg = "parameters have no shape yet; run the layers once under torch.no_grad() before gradients are recorded"
        raise ValueError(msg)
    trail: list[Tensor] = []
    for i, layer in enumerate(layers):
        f, g = _Function("f", layer.f, f_kwargs), _Function("g", layer.g, g_kwargs)
        tensors = [*f.tensors.values(), *g.tensors.values()]
        if not any(x.requires_grad for x in (x1, x2, *tensors)):  # a first layer without gradients of its own
            x1, x2 = _plain(layer, x1, x2, f_kwargs, g_kwargs)
            continue
        x1, x2 = _Layer.apply(f, g, trail, i == len(layers) - 1, x1, x2, *tensors)
        del f.tensors, g.tensors  # autograd keeps them, and checks that nobody writes to them
    return x1, x2


class _Layer(torch.autograd.Function):
    """One layer as a node of autograd."""

    @staticmethod
    def forward(
        ctx: Any, f: _Function, g: _Function, trail: list[Tensor], last: bool, x1: Tensor, x2: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        f_buffers, f_out = f.call(x2, x1)
        y1 = x1 + f_out
        g_buffers, g_out = g.call(y1, x2)
        y2 = x2 + g_out
        del f_out, g_out
        ctx.save_for_backward(*tensors, *f_buffers, *g_buffers, *([y1, y2] if last else []))
        ctx.f, ctx.g, ctx.trail, ctx.last = f, g, trail, last
        ctx.set_materialize_grads(False)  # None says that nothing depends on an output, and then nothing is computed
        return y1, y2

    @staticmethod
    def backward(ctx: Any, dy1: Tensor | None, dy2: Tensor | None) -> Any:
        f, g = ctx.f, ctx.g
        tensors = list(ctx.saved_tensors)
        if ctx.last:
            *tensors, y1, y2 = tensors
            # when the pass ends: one that asks for gradients of late layers only ends before the first node
            torch.autograd.Variable._execution_engine.queue_callback(ctx.trail.clear)
        else:
            y1, y2 = ctx.trail
        ctx.trail.clear()
        parts = iter(tensors)
        f_tensors, g_tensors, f_buffers, g_buffers = (
            [next(parts) for _ in range(n)] for n in (f.n_tensors, g.n_tensors, f.n_buffers, g.n_buffers)
        )
        needs_x1, needs_x2, *needs = ctx.needs_input_grad[4:]
        f_needs, g_needs = needs[: f.n_tensors], needs[f.n_tensors :]

        g_out, dy1_by_g, dg = g.call_again(y1, g_tensors, g_buffers, dy2, [True, *g_needs])
        x2 = y2 - g_out
        dx1 = _sum(dy1, dy1_by_g)  # the gradient of f's output, too
        f_out, dx2_by_f, df = f.call_again(x2, f_tensors, f_buffers, dx1, [needs_x2, *f_needs])
        x1 = y1 - f_out
        if needs_x1 or needs_x2:  # else no node comes after this one
            ctx.trail[:] = [x1, x2]
        return None, None, None, None, dx1, _sum(dy2, dx2_by_f), *df, *dg


class _Function:
    """A call of f or g in a forward pass, and all that it takes to make the call again."""

    def __init__(self, name: str, function: Any, kwargs: Keywords) -> None:
        self.name, self.function = name, function
        self.others = {key: x for key, x in kwargs.items() if not isinstance(x, Tensor)}
        self.parameter_names, self.keys = list(_parameters(function)), list(_tensors(kwargs))
        self.tensors = {**_parameters(function), **{("keyword", key): x for key, x in _tensors(kwargs).items()}}
        self.n_tensors = len(self.tensors)

    def call(self, x: Tensor, like: Tensor) -> tuple[list[Tensor], Tensor]:
        """The values that buffers had before, and function(x), which is to be added to a tensor `like`."""
        tensors = list(self.tensors.values())
        keywords = dict(zip(self.keys, tensors[len(self.parameter_names) :], strict=True))
        buffers = dict(self.function.named_buffers()) if isinstance(self.function, torch.nn.Module) else {}
        before = {name: (buffer._version, buffer.clone()) for name, buffer in buffers.items()}
        self.buffer_names, self.n_buffers = list(buffers), len(buffers)
        self.autocast = autocast_states(x.device)
        devices = {t.device for t in (x, *tensors)}
        version, random = x._version, random_states(devices)
        with autocasting(self.autocast):
            out = _checked(self.name, self.function(x, **keywords, **self.others), like)
        if x._version != version:
            msg = f"{self.name} writes to its input, which the layer needs again; let it write to a copy, x.clone()"
            raise ValueError(msg)
        after = random_states(devices)
        self.random = {device: state for device, state in random.items() if not torch.equal(state, after[device])}
        kept = [buffers[name] if buffers[name]._version == was else copy for name, (was, copy) in before.items()]
        return kept, out

    def call_again(
        self, x: Tensor, tensors: list[Tensor], buffers: list[Tensor], grad: Tensor | None, needs: Sequence[bool]
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """function(x), the gradient of x, and those of the tensors, each where it is needed.

        Derivatives are by aliases of x and of the tensors: x itself, where it is recorded for a second derivative,
        depends on the parameters, too.
        """
        twice = torch.is_grad_enabled()  # the gradients will be differentiated
        records = twice or grad is not None
        x, *tensors = (_alias(t, need and records, twice) for t, need in zip([x, *tensors], needs, strict=True))
        state = dict(zip(self.parameter_names, tensors, strict=False))
        state |= {name: buffer.clone() for name, buffer in zip(self.buffer_names, buffers, strict=True)}
        keywords = dict(zip(self.keys, tensors[len(self.parameter_names) :], strict=True)) | self.others
        with torch.set_grad_enabled(records), replaying(self.random), autocasting(self.autocast):
            if isinstance(self.function, torch.nn.Module):
                out = functional_call(self.function, state, (x,), keywords)
            else:
                out = self.function(x, **keywords)
        grads: list[Tensor | None] = [None] * len(needs)
        if grad is not None and out.requires_grad:
            self._check_captured(out, [x, *tensors])
            wanted = [t for t, need in zip([x, *tensors], needs, strict=True) if need]
            found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), allow_unused=True, create_graph=twice))
            grads = [next(found) if need else None for need in needs]
        return out if twice else out.detach(), grads[0], grads[1:]

    def _check_captured(self, out: Tensor, known: Iterable[Tensor]) -> None:
        """Raise if `out` depends on a tensor that requires a gradient and that is not known, so would get none."""
        seen = {get_gradient_edge(t).node for t in known if t.requires_grad}
        ahead = [get_gradient_edge(out).node]
        while ahead:
            node = ahead.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                msg = (
                    f"{self.name} reads a tensor of shape {tuple(node.variable.shape)} that requires a gradient and is "
                    f"neither a parameter of it nor a keyword argument; pass it as {self.name}_kwargs={{...}}, make "
                    f"{self.name} a module that owns it, or detach it"
                )
                raise ValueError(msg)
            ahead += [following for following, _ in node.next_functions]


def _parameters(function: Any) -> dict[str, Tensor]:
    return dict(function.named_parameters()) if isinstance(function, torch.nn.Module) else {}


def _tensors(kwargs: Keywords) -> dict[str, Tensor]:
    return {key: x for key, x in kwargs.items() if isinstance(x, Tensor)}


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y


def _alias(x: Tensor, need: bool, twice: bool) -> Tensor:
    """The values of x as a tensor of its own in the graph; connected to x where there will be second derivatives."""
    return x.view_as(x) if twice else x.detach().requires_grad_(need)


def _check_streams(first: str, x1: Any, second: str, x2: Any) -> None:
    for name, x in ((first, x1), (second, x2)):
        if not isinstance(x, Tensor):
            msg = f"{name} must be a tensor, got {type(x).__name__}"
            raise TypeError(msg)
        if not (x.is_floating_point() or x.is_complex()):
            msg = f"{name} must be floating or complex, got {x.dtype}; convert it, {name}.float()"
            raise TypeError(msg)
    for what, a, b in (
        ("shape", tuple(x1.shape), tuple(x2.shape)),
        ("dtype", x1.dtype, x2.dtype),
        ("device", x1.device, x2.device),
    ):
        if a != b:
            msg = f"{first} and {second} must have one {what}, got {a} and {b}"
            raise ValueError(msg)


def _checked_keywords(name: str, kwargs: Any) -> Keywords:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        msg = f"{name} must be a mapping from names of arguments to values, got {type(kwargs).__name__}"
        raise TypeError(msg)
    return kwargs


def _checked(name: str, out: Any, like: Tensor) -> Tensor:
    """The output of f or g, if it can be added to `like` without changing shape, dtype or device."""
    if not isinstance(out, Tensor):
        msg = f"{name} must return one tensor, got {type(out).__name__}; wrap it so that it returns the tensor to add"
        raise TypeError(msg)
    if out.shape != like.shape:
        msg = f"{name} must return the shape that its layer has, {tuple(like.shape)}, got {tuple(out.shape)}"
        raise ValueError(msg)
    if out.device != like.device:
        msg = f"{name} must return a tensor on {like.device}, got one on {out.device}"
        raise ValueError(msg)
    if torch.promote_types(out.dtype, like.dtype) != like.dtype:
        msg = f"{name} must return {like.dtype} or less, which the layer has, got {out.dtype}; convert one of them"
        raise ValueError(msg)
    return out
