"""Modules of PyTorch: reversible residual layers, whose activations are computed again and not stored; Mamba blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from subquad.blocks import init_mamba, mamba
from subquad_torch import reversible


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


class Mamba(torch.nn.Module):
    """A Mamba block as a module, with the state_dict of mamba-ssm's ``Mamba`` and transformers' ``MambaMixer`` [1]_.

    Parameters
    ----------
    d_model : int
        Width of the input and output.
    d_state : int, default 16
        Number of states of a channel.
    d_conv : int, default 4
        Number of taps of the convolution.
    expand : int, default 2
        d_inner = expand · d_model channels inside.
    dt_rank : int, optional
        Rank of the map to the step sizes. Default: d_model / 16, rounded up.
    bias : bool, default False
        Whether ``in_proj`` and ``out_proj`` have biases, which begin as 0.
    conv_bias : bool, default True
        Whether ``conv1d`` has a bias.
    seed : int, default 0
        Seed of the parameters, which `subquad.init_mamba` draws: give each layer of a model its own.
    device, dtype : optional
        Device and dtype of the parameters, as of any module.

    See Also
    --------
    Reversible : A residual layer that stores no activations.

    Notes
    -----
    `subquad.mamba` describes the computation. ``A_log``, ``D`` and ``dt_proj.bias`` have the attribute
    ``_no_weight_decay``, as in mamba-ssm. A model that initialises its linear layers anew must leave these out:
    `subquad.check_mamba` tells if it has not.

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.

    Examples
    --------
    >>> import torch, subquad_torch.nn
    >>> layer = subquad_torch.nn.Mamba(32)
    >>> x = torch.randn(2, 10, 32)
    >>> whole = layer(x)
    >>> first, state = layer(x[:, :7], return_state=True)
    >>> second = layer(x[:, 7:], state=state)
    >>> torch.allclose(torch.cat([first, second], dim=1), whole, atol=1e-6)
    True
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        seed: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        drawn = init_mamba(d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank, seed=seed)
        (d_inner, rank), made = drawn["dt_proj.weight"].shape, {"device": device, "dtype": dtype}
        self.in_proj = torch.nn.Linear(d_model, 2 * d_inner, bias=bias, **made)
        self.conv1d = torch.nn.Conv1d(
            d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=conv_bias, **made
        )
        self.x_proj = torch.nn.Linear(d_inner, rank + 2 * d_state, bias=False, **made)
        self.dt_proj = torch.nn.Linear(rank, d_inner, **made)
        self.A_log = torch.nn.Parameter(torch.empty(d_inner, d_state, **made))
        self.D = torch.nn.Parameter(torch.empty(d_inner, **made))
        self.out_proj = torch.nn.Linear(d_inner, d_model, bias=bias, **made)
        with torch.no_grad():
            for name, x in self.named_parameters():
                x.copy_(torch.from_numpy(drawn[name])) if name in drawn else x.zero_()
        for x in (self.A_log, self.D, self.dt_proj.bias):
            x._no_weight_decay = True  # type: ignore[attr-defined] # what optimisers look for

    def forward(
        self,
        x: Tensor,
        *,
        state: Mapping[str, Tensor] | None = None,
        return_state: bool = False,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Any:
        """Compute the block.

        Parameters
        ----------
        x : Tensor, shape (..., n, d_model)
            Input sequence.
        state : mapping of Tensor, optional
            What an earlier call returned.
        return_state : bool, default False
            Return (out, state) instead of out.
        segments : Tensor of int, shape (..., n), optional
            Numbers of documents, each of which is as alone.
        mask : Tensor of bool, shape (..., n), optional
            False for a padded step.

        Returns
        -------
        Tensor, shape (..., n, d_model), or tuple
            The output; with `return_state`, the output and the state.

        Raises
        ------
        TypeError, ValueError
            As `subquad.mamba`.
        """
        params = dict(self.named_parameters())
        given: Any = None if state is None else dict(state)
        return mamba(x, params, state=given, return_state=return_state, segments=segments, mask=mask)  # type: ignore[call-overload]
