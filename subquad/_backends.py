"""The table of backends: `_backends.of_<library>` is the `Backend` of that array library, loaded when first asked for.

A backend is a package named by an entry point of the group `subquad.backends` (its name is the library's), or,
in a source tree that is not installed, the package `subquad_<library>`. A library without one gets the generic
code alone. The table is a module attribute and not a dictionary because tracers read module attributes eagerly:
that lets a backend load while a function is being compiled.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from types import ModuleType

from subquad._dispatch import Backend

GROUP = "subquad.backends"
PREFIX = "subquad_"


def __getattr__(name: str) -> Backend:
    library = name.removeprefix("of_")
    if library == name:
        raise AttributeError(name)
    backend = Backend.from_package(library, load(library))
    globals()[name] = backend
    return backend


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
