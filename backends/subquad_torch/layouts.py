"""Checks of tensors whose axes are named as other packages name them, before they are brought into subquad's layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Layout:
    """The sizes of named axes: the first tensor with an axis sets its size, and later ones must have it.

    Parameters
    ----------
    **sizes : int
        Sizes that are known before.

    Examples
    --------
    >>> import torch
    >>> layout = Layout()
    >>> layout.check("u", torch.zeros(2, 5, 7), "batch dim seqlen")
    >>> layout.check("D", torch.zeros(4), "dim")
    Traceback (most recent call last):
    ...
    ValueError: D has shape (4,), expected (dim) with dim = 5 as u has
    """

    def __init__(self, **sizes: int) -> None:
        self.sizes = dict(sizes)
        self.known_from = dict.fromkeys(sizes, "the other arguments say")

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]

    def check(self, name: str, x: Any, *forms: str) -> None:
        """Raise unless `x` is None or a tensor whose axes are those of a form; axes not met before get their size.

        Parameters
        ----------
        name : str
            The argument.
        x : Tensor or None
            Its value; None passes.
        *forms : str
            The names of the axes, as ``"batch dim seqlen"``, in each of the forms that the argument may have. A name
            that is a number is a size.

        Raises
        ------
        TypeError
            If `x` is no tensor.
        ValueError
            If it has another number of axes, or an axis another size.
        """
        if x is None:
            return
        if not isinstance(x, Tensor):
            msg = f"{name} is a {type(x).__name__}, expected a tensor ({' or '.join(map(_shown, forms))})"
            raise TypeError(msg)
        shape, wrong = tuple(x.shape), ""
        for form in forms:
            axes = form.split()
            if len(axes) != len(shape):
                continue
            sizes = {axis: int(axis) if axis.isdigit() else self.sizes.get(axis) for axis in axes}
            unlike = [
                axis for axis, size in zip(axes, shape, strict=True) if sizes[axis] is not None and sizes[axis] != size
            ]
            if not unlike:
                for axis, size in zip(axes, shape, strict=True):
                    if not axis.isdigit() and axis not in self.sizes:
                        self.sizes[axis], self.known_from[axis] = size, f"{name} has"
                return
            told = [f"{axis} = {sizes[axis]} as {self.known_from[axis]}" for axis in unlike if not axis.isdigit()]
            wrong = f" with {', '.join(told)}" if told else ""
        msg = f"{name} has shape {shape}, expected {' or '.join(map(_shown, forms))}{wrong}"
        raise ValueError(msg)


def check_integers(name: str, x: Tensor | None) -> None:
    """Raise TypeError if a tensor is given whose numbers are no integers."""
    if x is not None and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        msg = f"{name} has dtype {x.dtype}, expected integers"
        raise TypeError(msg)


def _shown(form: str) -> str:
    return f"({', '.join(form.split())})"
