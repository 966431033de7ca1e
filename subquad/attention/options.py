"""Options of a method: fields of a dataclass, which may be arrays; how they are held, compared, hashed and shown."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from subquad.core.beside import namespace_of
from subquad.core.loading import backend_of

NUMBERS = (np.number, np.bool_)  # of NumPy; not a union, which compilers of PyTorch cannot read


@dataclass(frozen=True, repr=False, eq=False)
class Options:
    """Base of methods, which are frozen dataclasses of options."""

    def __post_init__(self) -> None:
        """Hold numbers of NumPy as Python's: sums of theirs overflow, and keep their width."""
        for name, value in vars(self).items():
            if isinstance(value, NUMBERS):
                object.__setattr__(self, name, value.item())

    def _in_force(self) -> dict[str, Any]:
        """The options that take effect, by name, with defaults filled in: what `repr` shows."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __eq__(self, other: object) -> bool:
        """Whether both are methods of one class with equal options; arrays are equal if their elements are."""
        if type(self) is not type(other):
            return False
        return all(_equal(getattr(self, x.name), getattr(other, x.name)) for x in fields(self))

    def __hash__(self) -> int:
        return hash((type(self), *(_hashable(getattr(self, x.name)) for x in fields(self))))

    def __repr__(self) -> str:
        words = ", ".join(f"{name}={_shown(value)}" for name, value in self._in_force().items())
        return f"{type(self).__qualname__}({words})"


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _equal(one: Any, other: Any) -> bool:
    """Whether two options are equal; arrays whose elements cannot be read are equal to themselves alone."""
    if one is other:
        return True
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    if not _is_array(one) or not _is_array(other):
        return not _is_array(one) and not _is_array(other) and bool(one == other)
    if type(one) is not type(other) or one.shape != other.shape or one.dtype != other.dtype:
        return False
    xp = namespace_of(one)
    return backend_of(xp).is_concrete(one, other) and bool(xp.all(one == other))


def _hashable(value: Any) -> Any:
    """An option in a form that has a hash; an array is represented by its shape and dtype."""
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    return (tuple(value.shape), str(value.dtype)) if _is_array(value) else value


def _shown(value: Any) -> str:
    """The text of an option in `repr`; an array is shown by its shape and dtype."""
    if _is_array(value):
        return f"<{tuple(value.shape)} {value.dtype}>"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)
