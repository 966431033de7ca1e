"""What an array is like, so that others can be made beside it: its namespace, and the place of new arrays.

Both are asked of the backend, which the package of the array's class names: a tracer follows this without guards on the
caches of the compatibility layer, and a sharded array has no device that a constant of another shape could take.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from subquad.backend import Array, Backend
from subquad.core import loading
from subquad.core.loading import backend_of


def backend_for(x: Any) -> Backend:
    """The backend that the package of an array's class names, as a tracer can follow; the generic one without."""
    return getattr(loading, "of_" + x.__class__.__module__.partition(".")[0])


def namespace_of(x: Array) -> ModuleType:
    """The array namespace of `x`; TypeError if it is no array."""
    backend = backend_for(x)
    if backend is loading.GENERIC:  # of a subclass in the user's own package, the library is known by its namespace
        backend = backend_of(backend.namespace(x))
    return backend.namespace(x)


def place_of(x: Array) -> Any:
    """Where to make arrays beside `x`, of any shape: its device; None, the library's choice, if it has several."""
    return backend_of(namespace_of(x)).place_of(x)
