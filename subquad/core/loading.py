"""The table of backends: `loading.of_<library>` is the `Backend` of that array library, loaded when first asked for.

A backend is a package with a `BACKEND`, named by an entry point of the group `subquad.backends` (its name is the
library's), or, in a source tree that is not installed, the package `subquad_<library>`. A library without one gets the
generic code alone. The table is made of module attributes and is no dictionary because tracers read module attributes
eagerly: that lets a backend load while a function is being compiled.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from subquad.backend import Backend, Override, hooks
from subquad.core.spelling import nearest

GROUP = "subquad.backends"
PREFIX = "subquad_"
GENERIC = Backend()
KERNELS: dict[str, Mapping[str, Any]] = {}
"""Name → optional keywords of every kernel, filled in where kernels are declared."""


def __getattr__(name: str) -> Backend:
    library = name.removeprefix("of_")
    if library == name:
        raise AttributeError(name)
    package = load(library)
    backend = GENERIC if package is None else checked(package)
    globals()[name] = backend
    return backend


def library_of(xp: ModuleType) -> str:
    """The name of the array library behind a namespace, e.g. "numpy"."""
    return xp.__name__.removeprefix("array_api_compat.").partition(".")[0]


def backend_of(xp: ModuleType) -> Backend:
    """The backend of a namespace; its package is imported at the first call."""
    from subquad.core import loading  # this module itself, by an attribute that a tracer can follow

    return getattr(loading, "of_" + library_of(xp))


def names() -> dict[str, str]:
    """Library name → package of every backend that can be found, without importing any."""
    found = {
        module.name.removeprefix(PREFIX): module.name
        for module in pkgutil.iter_modules()
        if module.ispkg and module.name.startswith(PREFIX)
    }
    found |= {entry.name: entry.value for entry in importlib.metadata.entry_points(group=GROUP)}
    return dict(sorted(found.items()))


def load(library: str) -> ModuleType | None:
    """Import the backend package of `library`; None where there is none."""
    entries = tuple(importlib.metadata.entry_points(group=GROUP, name=library))
    if entries:
        return importlib.import_module(entries[0].value)
    package = PREFIX + library
    return importlib.import_module(package) if importlib.util.find_spec(package) else None


def checked(package: ModuleType) -> Backend:
    """The `BACKEND` of a package, after a look at every name in it; a misspelt one would never be asked for."""
    backend: Any = getattr(package, "BACKEND", None)
    if not isinstance(backend, Backend):
        msg = f"{package.__name__} must have BACKEND, an instance of a subclass of subquad.backend.Backend"
        raise TypeError(msg)
    known = list(hooks(Backend))
    for cls in type(backend).__mro__:
        if cls in (Backend, object):
            continue
        for name in hooks(cls):
            if name not in known:
                msg = f"{cls.__module__}.{cls.__qualname__} has {name!r}, which no backend has; {nearest(name, known)}"
                raise TypeError(msg)
    for override in backend.overrides:
        if not isinstance(override, Override):
            msg = f"overrides of {package.__name__} holds {override!r}, expected subquad.backend.Override objects"
            raise TypeError(msg)
        if override.kernel not in KERNELS:
            where = f"{package.__name__}, override {override.name!r}"
            msg = f"{where}: there is no kernel {override.kernel!r}; {nearest(override.kernel, KERNELS)}"
            raise ValueError(msg)
        for option in override.accepts.options:
            if option not in KERNELS[override.kernel]:
                where = f"{package.__name__}, override {override.name!r} of {override.kernel}"
                msg = f"{where}: the kernel has no option {option!r}; {nearest(option, KERNELS[override.kernel])}"
                raise ValueError(msg)
    return backend
