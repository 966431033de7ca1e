"""Modules of PyTorch: reversible residual layers, whose activations are computed again and not stored; Mamba blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from subquad_torch import reversible
from subquad_torch.mamba_blocks import Mamba, Mamba2

__all__ = ["Mamba", "Mamba2", "Reversible", "ReversibleSequence"]


class Reversible(torch.nn.Module):
    """One reversible residual layer of two functions, after the Reformer's equations (7) and (8) [1]_, [2]_.

        y1 = x1 + f(x2),    y2 = x2 + g(y1)
        x2 = y2 − g(y1),    x1 = y1 − f(x2)

    The inputs follow from the outputs. The layer therefore keeps its two outputs for the backward pass, and nothing
    else: what f and g stored on their way is computed again. In a chain of layers these outputs would still be kept
    once for each layer; `ReversibleSequence` keeps those of the last layer only.

    Parameters
    ----------
    f, g : torch.nn.Module or callable
        Each maps a tensor to one tensor of the same shape and device, and of a dtype that can be added without changing
        that of the input. A callable that is not a module has no parameters: tensors that it captures must not require
        a gradient.

    See Also
    --------
    ReversibleSequence : Many layers with the memory of one.

    Notes
    -----
    The gradients are those of the plain layer, of inputs, parameters and keyword arguments alike, up to the rounding of
    x2 and x1 as recovered: some units in the last place of y per layer. They are returned to autograd by an operator,
    so hooks of parameters fire once, `torch.autograd.grad` works, and gradients of gradients are right (these store all
    activations). The backward pass calls f and g once more.

    A second call sees what the first one saw: random numbers of PyTorch's default generators, the state of
    `torch.autocast`, the parameters under `torch.func.functional_call`, and the values of buffers. What it writes to
    buffers is dropped, so that the statistics of batch normalisation are updated once, as in a plain layer. A generator
    of one's own, or state in attributes that are no buffers, is not replayed. Forward hooks of f and g run twice.

    The plain computation runs, with its memory, under `torch.func` transforms, forward-mode differentiation,
    ``torch.jit.trace`` and ``torch.export``. `torch.compile` leaves the layer out of its graph where gradients are
    recorded, which ``fullgraph=True`` reports as an error; f and g may be compiled by themselves.

    References
    ----------
    .. [1] N. Kitaev, Ł. Kaiser, A. Levskaya, "Reformer: The Efficient Transformer", ICLR 2020, section 3.
    .. [2] A. Gomez, M. Ren, R. Urtasun, R. Grosse, "The Reversible Residual Network: Backpropagation Without Storing
       Activations", NeurIPS 2017.

    Examples
    --------
    >>> import torch, subquad_torch.nn
    >>> f, g = torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    >>> layer = subquad_torch.nn.Reversible(f, g)
    >>> x1, x2 = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    >>> y1, y2 = layer(x1, x2)
    >>> torch.allclose(layer.inverse(y1, y2)[0], x1, atol=1e-5)
    True
    """

    def __init__(self, f: Any, g: Any) -> None:
        super().__init__()
        for name, function in (("f", f), ("g", g)):
            if not callable(function):
                msg = f"{name} must be a module or another callable, got {type(function).__name__}"
                raise TypeError(msg)
        self.f, self.g = f, g

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        *,
        f_kwargs: Mapping[str, Any] | None = None,
        g_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two outputs y1 and y2 of the layer.

        Parameters
        ----------
        x1, x2 : Tensor, shape (...)
            The two streams, of one shape, dtype and device.
        f_kwargs, g_kwargs : mapping, optional
            Keyword arguments of f and of g. Tensors that are values of the mapping get gradients; a tensor inside of a
            list or another object must not require one.

        Returns
        -------
        y1, y2 : Tensor, shape (...)
            Streams like x1 and x2.

        Raises
        ------
        TypeError
            If a stream or an output of f or g is not a tensor, or a stream is not floating or complex.
        ValueError
            If shapes, dtypes or devices differ, f or g writes to its input, or parameters are lazy. In the backward
            pass: if f or g reads a tensor that requires a gradient and is neither a parameter of it nor a keyword
            argument.
        """
        return reversible.forward([self], x1, x2, f_kwargs, g_kwargs)

    def inverse(
        self,
        y1: Tensor,
        y2: Tensor,
        *,
        f_kwargs: Mapping[str, Any] | None = None,
        g_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The inputs x1 and x2 that belong to outputs, recorded by autograd as any other operation.

        Parameters
        ----------
        y1, y2 : Tensor, shape (...)
            The two outputs, of one shape, dtype and device.
        f_kwargs, g_kwargs : mapping, optional
            Keyword arguments of f and of g.

        Returns
        -------
        x1, x2 : Tensor, shape (...)
            The inputs, up to rounding, if f and g draw no random numbers.

        Raises
        ------
        TypeError, ValueError
            As `forward`.
        """
        return reversible.inverse([self], y1, y2, f_kwargs, g_kwargs)


class ReversibleSequence(torch.nn.Module):
    """Reversible layers one after another, in memory for activations that does not grow with their number.

        x[l+1] = layer l of x[l],    x[l] = inverse of layer l of x[l+1]

    The outputs of the last layer are kept, and nothing between the layers. The backward pass goes from layer to layer:
    each recovers its inputs, which are the outputs of the one before it, and hands on the gradients of its parameters
    before the next one begins.

    Parameters
    ----------
    layers : iterable of Reversible
        The layers, first to last. A layer may occur more than once.

    See Also
    --------
    Reversible : One layer, and all that holds of gradients, random numbers, buffers and `torch.compile`.

    Notes
    -----
    Rounding of what is recovered adds up over the layers: keep the streams in float32, under `torch.autocast` too,
    where f and g compute in half precision. Beyond the two outputs there remain, for each layer, a state of PyTorch's
    random generator (5 kB on the CPU, 16 bytes on CUDA) for f and for g if they draw numbers, and a copy of the buffers
    that the layer wrote to. Forward hooks of the layers themselves do not run; those of f and g, and of the sequence,
    do.

    Examples
    --------
    >>> import torch
    >>> from subquad_torch.nn import Reversible, ReversibleSequence
    >>> layers = [Reversible(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) for _ in range(24)]
    >>> model = ReversibleSequence(layers)
    >>> y1, y2 = model(torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    >>> (y1 + y2).sum().backward()
    >>> layers[0].f.weight.grad.shape
    torch.Size([8, 8])
    """

    def __init__(self, layers: Iterable[Reversible]) -> None:
        super().__init__()
        layers = list(layers)
        for i, layer in enumerate(layers):
            if not isinstance(layer, Reversible):
                msg = f"layers must be Reversible modules, got {type(layer).__name__} at {i}; wrap it: Reversible(f, g)"
                raise TypeError(msg)
        self.layers = torch.nn.ModuleList(layers)

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        *,
        f_kwargs: Mapping[str, Any] | None = None,
        g_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two outputs of the last layer.

        Parameters
        ----------
        x1, x2 : Tensor, shape (...)
            The two streams, of one shape, dtype and device.
        f_kwargs, g_kwargs : mapping, optional
            Keyword arguments of each f and of each g, as in `Reversible.forward`.

        Returns
        -------
        y1, y2 : Tensor, shape (...)
            Streams like x1 and x2.

        Raises
        ------
        TypeError, ValueError
            As `Reversible.forward`.
        """
        return reversible.forward(self.layers, x1, x2, f_kwargs, g_kwargs)

    def inverse(
        self,
        y1: Tensor,
        y2: Tensor,
        *,
        f_kwargs: Mapping[str, Any] | None = None,
        g_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The inputs of the first layer that belong to outputs of the last one.

        Parameters
        ----------
        y1, y2 : Tensor, shape (...)
            The two outputs, of one shape, dtype and device.
        f_kwargs, g_kwargs : mapping, optional
            Keyword arguments of each f and of each g.

        Returns
        -------
        x1, x2 : Tensor, shape (...)
            The inputs, up to rounding, if no f or g draws random numbers.

        Raises
        ------
        TypeError, ValueError
            As `Reversible.forward`.
        """
        return reversible.inverse(self.layers, y1, y2, f_kwargs, g_kwargs)
