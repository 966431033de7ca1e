"""The table of backends: `loading.of_<library>` is the `Backend` of that array library, loaded when first asked for.

A backend is a package with an attribute `BACKEND`: the package `subquad_<library>`, or the one that an entry point of
the group "subquad.backends" names, if its own name is the library's. A library without a backend gets the generic code.
The table consists of module attributes, not of dictionary entries, because tracers read module attributes eagerly: a
backend can therefore load while a function is being compiled.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

import numpy as np

from subquad.backend import Backend, Override
from subquad.core.override import UNLESS_UNDER
from subquad.core.spelling import nearest

GROUP = "subquad.backends"
PREFIX = "subquad_"
GENERIC = Backend()
KERNELS: dict[str, Mapping[str, Any]] = {}
"""Kernel name → optional keywords with their unused values; every `Kernel` adds an entry when it is declared."""


def __getattr__(name: str) -> Backend:
    # Load the backend of an attribute `of_<library>` that does not exist yet, and store it as that attribute
    library = name.removeprefix("of_")
    if library == name:
        raise AttributeError(name)
    package = load(library)
    backend = GENERIC if package is None else checked(package)
    globals()[name] = backend
    return backend


def library_of(xp: ModuleType) -> str:
    """The name of the array library behind a namespace, e.g. "numpy"."""
    return xp.__name__.removeprefix("array_api_compat.").removeprefix(PREFIX).partition(".")[0]


def backend_of(xp: ModuleType) -> Backend:
    """The backend of a namespace; its package is imported at the first call."""
    from subquad.core import loading  # this module, read as an attribute, which a tracer can follow

    return getattr(loading, "of_" + library_of(xp))


def names() -> dict[str, str]:
    """Library name → package of every backend that can be found; no backend is imported."""
    found = {
        module.name.removeprefix(PREFIX): module.name
        for module in pkgutil.iter_modules()
        if module.ispkg and module.name.startswith(PREFIX)
    }
    return dict(sorted({**_declared(), **found}.items()))


def load_imported() -> None:
    """Load the backends of all libraries that the program has imported, which makes their operators known to them.

    A library that restores a saved program looks the operators up by name; NumPy has no such programs. What a backend
    raises here, it raises again when it is first used.
    """
    for library in names():
        if library in sys.modules and library != np.__name__:
            with suppress(Exception):
                getattr(sys.modules[__name__], "of_" + library)


def load(library: str) -> ModuleType | None:
    """Import the backend package of `library` and return it; None if there is none."""
    package = PREFIX + library
    if importlib.util.find_spec(package) is None:
        package = _declared().get(library, "")
    return importlib.import_module(package) if package else None


def _declared() -> dict[str, str]:
    # Library name → package of every entry point
    from importlib import metadata  # takes as long to be imported as half of our own modules

    return {entry.name: entry.value for entry in metadata.entry_points(group=GROUP)}


def _hooks(cls: type) -> Iterator[str]:
    """The public names that a class of backends defines in its own body."""
    return (name for name in vars(cls) if not name.startswith("_"))


def checked(package: ModuleType) -> Backend:
    """The `BACKEND` of a package, after a check of every name in it.

    Raises TypeError or ValueError with the nearest known name: a misspelt kernel, option or hook would never be used,
    and nobody would notice.
    """
    backend: Any = getattr(package, "BACKEND", None)
    if not isinstance(backend, Backend):
        msg = f"{package.__name__} must have BACKEND, an instance of a subclass of subquad.backend.Backend"
        raise TypeError(msg)
    known = list(_hooks(Backend))
    for cls in type(backend).__mro__:
        if cls in (Backend, object):
            continue
        for name in _hooks(cls):
            if name not in known:
                msg = f"{cls.__module__}.{cls.__qualname__} has {name!r}, which no backend has; {nearest(name, known)}"
                raise TypeError(msg)
    seen: set[tuple[str, str]] = set()
    for override in backend.overrides:
        if not isinstance(override, Override):
            msg = f"overrides of {package.__name__} holds {override!r}, expected subquad.backend.Override objects"
            raise TypeError(msg)
        kernel, where = override.kernel, f"{package.__name__}, override {override.name!r}"
        if kernel not in KERNELS:
            msg = f"{where}: there is no kernel {kernel!r}; {nearest(kernel, KERNELS)}"
            raise ValueError(msg)
        if override.name in ("auto", "generic"):
            msg = f"{where} of {kernel}: the name has a meaning of its own; take another"
            raise ValueError(msg)
        if (kernel, override.name) in seen:
            msg = f"{package.__name__} has two overrides of {kernel} that are called {override.name!r}"
            raise ValueError(msg)
        seen.add((kernel, override.name))
        for name in override.accepts.options:
            if name not in KERNELS[kernel]:
                msg = f"{where} of {kernel}: the kernel has no option {name!r}; {nearest(name, KERNELS[kernel])}"
                raise ValueError(msg)
        for name in override.accepts.under:
            if name not in UNLESS_UNDER:
                msg = f"{where} of {kernel}: there is no condition {name!r}; {nearest(name, UNLESS_UNDER)}"
                raise ValueError(msg)
    return backend
