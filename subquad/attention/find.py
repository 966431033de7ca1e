"""The method of a call: a name and its options, or an object."""

from __future__ import annotations

from typing import Any

from subquad.attention.method import Method
from subquad.registry import METHODS, make_method


def find_method(method: str | Method, options: dict[str, Any]) -> Method:
    """The method object of a name and its options; a method object comes back as it is.

    Raises TypeError for options beside a method object, for an option that does not exist and for other types,
    ValueError for an unknown name.
    """
    if isinstance(method, Method):
        if options:
            msg = f"options {sorted(options)} were given with a {type(method).__name__} object; put them into it"
            raise TypeError(msg)
        return method
    if not isinstance(method, str):
        msg = f"method must be a name or a method object, got {type(method).__name__}; names: {', '.join(METHODS)}"
        raise TypeError(msg)
    return make_method(method, options)
