"""Which implementations would a call use, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from subquad.attention import Method, attention
from subquad.core.kernel import Choice, listening
from subquad.core.loading import library_of
from subquad.core.spelling import nearest
from subquad.registry import SCANS

CALLS = ("summarize", "attend", "step")  # of a method


@dataclass(frozen=True)
class Explanation:
    """Which implementations a call uses, kernel by kernel, and why not others. `print` it.

    Attributes
    ----------
    library : str
        Name of the array library.
    choices : tuple of Choice
        One for each kernel that the call reaches, in order: its `kernel`, `implementation` and `declined`.
    """

    library: str
    choices: tuple[Choice, ...] = ()

    @property
    def kernel(self) -> str | None:
        """Name of the first kernel; None where the call reaches none."""
        return self.choices[0].kernel if self.choices else None

    @property
    def implementation(self) -> str:
        """The implementation of the first kernel: "generic", or the name of an override."""
        return self.choices[0].implementation if self.choices else "generic"

    @property
    def declined(self) -> tuple[tuple[str, str], ...]:
        """The overrides of the first kernel that declined, each with its reasons."""
        return self.choices[0].declined if self.choices else ()

    def __str__(self) -> str:
        if not self.choices:
            return f"no replaceable kernel on {self.library}: generic"
        lines = []
        for choice in self.choices:
            lines.append(f"{choice.kernel} on {self.library}: {choice.implementation}")
            lines += [f"  {name} declined: {reason}" for name, reason in choice.declined]
        return "\n".join(lines)


def explain(function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Say which implementations a call uses, and why not others, without running a kernel.

    Parameters
    ----------
    function : callable or str
        `subquad.attention`, a scan such as `subquad.selective_scan` or one step of it, or the name of one of these;
        or a method object or a call of it, such as ``subquad.Favor().step``.
    *args, **kwargs
        The arguments of the call. They are checked as the call would check them.

    Returns
    -------
    Explanation
        Print it, or read its `library` and `choices`.

    Raises
    ------
    ValueError
        For a function that is none of these; and whatever the call itself raises for its arguments.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q = np.zeros((4, 2))
    >>> print(subquad.explain(subquad.attention, q, q, q, "exact", causal=True))
    softmax_attention on numpy: generic
      numba declined: it has no causal form
      in-place declined: it has no causal form
    """
    call = _find(function)
    with listening() as choices:
        call(*args, **kwargs)
    kept: dict[Choice, None] = dict.fromkeys(choices)  # a kernel that is chosen twice alike is told once
    first = next(x for x in args if hasattr(x, "dtype"))
    return Explanation(library_of(array_namespace(first)), tuple(kept))


def _find(function: Any) -> Callable[..., Any]:
    """The function to call; ValueError for one that is not this package's."""
    known = {"attention": attention} | {row.name: row.function for row in SCANS.values()}
    known |= {row.step.__name__: row.step for row in SCANS.values() if row.step is not None}
    if isinstance(function, str) and function in known:
        return known[function]
    if any(function is own for own in known.values()) or isinstance(function, Method):
        return function
    if isinstance(getattr(function, "__self__", None), Method) and function.__name__ in CALLS:
        return function
    name = function if isinstance(function, str) else getattr(function, "__name__", repr(function))
    msg = f"explain knows these functions and calls of methods, got {function!r}; {nearest(name, known)}"
    raise ValueError(msg)
