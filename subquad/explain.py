"""Which implementation would a call use, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from array_api_compat import array_namespace

from subquad._dispatch import Explanation, explained, library_of
from subquad.attention import attention
from subquad.ssm import linear_scan, selective_scan, selective_scan_step

FUNCTIONS = {f.__name__: f for f in (attention, selective_scan, selective_scan_step, linear_scan)}


def explain(function: str | Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Say which implementation a call uses, and why not the others, without finishing the call.

    Parameters
    ----------
    function : callable or str
        `subquad.attention`, `subquad.selective_scan`, `subquad.selective_scan_step` or `subquad.linear_scan`, or its
        name.
    *args, **kwargs
        The arguments of the call. They are checked as the call would check them.

    Returns
    -------
    Explanation
        Print it, or read its `library`, `kernel`, `implementation` and `declined`.

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
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    if name not in FUNCTIONS or (callable(function) and FUNCTIONS[name] is not function):
        msg = f"explain knows {', '.join(FUNCTIONS)}, got {function!r}"
        raise ValueError(msg)
    call = FUNCTIONS[name]
    answer = explained(lambda: call(*args, **kwargs))
    return answer or Explanation(library_of(array_namespace(args[0])), None, "generic")
