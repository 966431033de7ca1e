"""`explain`: which implementations a call would use, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from subquad.attention import Method, attention
from subquad.blocks import BLOCKS
from subquad.core.beside import namespace_of
from subquad.core.kernel import Choice, listening
from subquad.core.loading import library_of
from subquad.core.spelling import nearest
from subquad.registry import SCANS

CALLS = ("summarize", "attend", "step")  # calls of a method that reach kernels; merge reaches none


@dataclass(frozen=True)
class Explanation:
    """The implementations that a call uses, kernel by kernel, and why others declined; ``print`` shows it as text.

    Attributes
    ----------
    library : str
        Name of the array library.
    choices : tuple of Choice
        The choices in the order of the call, each with `kernel`, `implementation` and `declined`. A choice that the
        call repeats, kernel and reasons alike, is listed once.
    notes : tuple of str
        What the method decided by the values of the arrays, and why: the choices of "auto".
    """

    library: str
    choices: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kernel(self) -> str | None:
        """Name of the first kernel; None if the call reaches no kernel."""
        return self.choices[0].kernel if self.choices else None

    @property
    def implementation(self) -> str:
        """Implementation of the first kernel: "generic", also without a kernel, or the name of an override."""
        return self.choices[0].implementation if self.choices else "generic"

    @property
    def declined(self) -> tuple[tuple[str, str], ...]:
        """Overrides of the first kernel that declined: (name, reasons)."""
        return self.choices[0].declined if self.choices else ()

    def __str__(self) -> str:
        if not self.choices:
            return "\n".join([*self.notes, f"no replaceable kernel on {self.library}: generic"])
        lines = list(self.notes)
        for choice in self.choices:
            lines.append(f"{choice.kernel} on {self.library}: {choice.implementation}")
            lines += [f"  {name} declined: {reason}" for name, reason in choice.declined]
        return "\n".join(lines)


def explain(function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Say which implementations a call would use and why others declined, without running a kernel.

    Parameters
    ----------
    function : callable or str
        One of:

        - `subquad.attention`, a scan such as `subquad.selective_scan`, a step such as `subquad.selective_scan_step`, or
          a block such as `subquad.mamba`;
        - the name of one of these functions;
        - a method object, or its `summarize`, `attend` or `step`, such as ``subquad.Favor().step``.
    *args, **kwargs
        The arguments of the call, which are checked as the call checks them.

    Returns
    -------
    Explanation
        The library and the choices; ``print`` shows them as text.

    Raises
    ------
    ValueError
        If `function` is not one of those above. The call's own errors are raised too.

    Notes
    -----
    In place of the outputs of a kernel, zeros of the declared shapes and dtypes go on through the call. So kernels that
    are reached later are explained as well, while nothing of the cost of a kernel is paid. "auto" does compute the
    estimates by which it chooses.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q = np.zeros((4, 2))
    >>> print(subquad.explain(subquad.attention, q, q, q, "exact", mask=np.eye(4, dtype=bool)))
    block_attention on numpy: generic
      compiled declined: it takes no mask or bias of queries × keys
    """
    call = _find(function)
    with listening() as (choices, notes):
        call(*args, **kwargs)
    kept: dict[Choice, None] = dict.fromkeys(choices)  # a kernel that is chosen twice alike is listed once
    first = next(x for x in args if hasattr(x, "dtype"))
    return Explanation(library_of(namespace_of(first)), tuple(kept), tuple(dict.fromkeys(notes)))


def _find(function: Any) -> Callable[..., Any]:
    """The function that `function` names or is; ValueError if `explain` does not know it."""
    known = {"attention": attention} | {row.name: row.function for row in SCANS.values()}
    known |= {row.step.__name__: row.step for row in SCANS.values() if row.step is not None}
    known |= {block.__name__: block for block in BLOCKS}
    if isinstance(function, str) and function in known:
        return known[function]
    if any(function is own for own in known.values()) or isinstance(function, Method):
        return function
    if isinstance(getattr(function, "__self__", None), Method) and function.__name__ in CALLS:
        return function
    if hasattr(function, "shape") and hasattr(function, "dtype"):
        msg = (
            f"explain takes the function of the call first, got an array of shape {tuple(function.shape)}, "
            f'{function.dtype}; write explain(subquad.attention, q, k, v, "exact")'
        )
        raise ValueError(msg)
    name = function if isinstance(function, str) else getattr(function, "__name__", repr(function))
    msg = f"explain knows these functions and calls of methods, got {function!r}; {nearest(name, known)}"
    raise ValueError(msg)
