"""The array libraries of this machine: which can be used, and why others cannot."""

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from subquad.cli.errors import CommandError, unknown
from subquad.core import loading


@dataclasses.dataclass(frozen=True)
class Library:
    """A backend package and the facts about its array library.

    `reason` says why the library cannot be used; None if it can.
    """

    name: str
    reason: str | None
    version: str | None = None
    devices: tuple[str, ...] = ()
    kernels: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    bench: ModuleType | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """A library on one of its devices; `label` is its name in tables."""

    library: str
    device: str
    label: str
    version: str | None
    bench: Any


def find(wanted: Iterable[str] | None = None) -> dict[str, Library]:
    """Library name → facts, of the wanted backend packages, by default of all that can be found; NumPy is first.

    The packages are imported. A package that fails gets a `reason`; no exception leaves this function.
    """
    packages = loading.names()
    host_first = sorted(packages, key=lambda name: name != np.__name__)
    return {name: _ask(name, packages[name]) for name in host_first if wanted is None or name in wanted}


def _ask(name: str, package: str) -> Library:
    try:
        module = importlib.import_module(package)
        bench = importlib.import_module(f"{package}.bench")
        about = bench.describe()
        kernels: dict[str, list[str]] = {}
        for override in loading.checked(module).overrides:
            kernels.setdefault(override.kernel, []).append(override.name)
        return Library(name, about["reason"], about["version"], tuple(about["devices"]), kernels, bench)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == package.partition(".")[0]:
            return Library(name, f"there is no module {error.name}: it cannot be measured")
        return Library(name, f"{error.name} is not installed{_remedy(name)}")
    except Exception as error:
        return Library(name, f"fails when imported: {type(error).__name__}: {_one_line(error)}")


def _remedy(name: str) -> str:
    """The advice to install an extra of this distribution that brings a library, by the metadata; "" without one."""
    try:
        extras = importlib.metadata.metadata("subquad").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    fitting = [f'pip install "subquad[{x}]"' for x in extras if x == name or x.startswith(f"{name}-")]
    return f"; install it with {' or '.join(fitting)}" if fitting else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def targets(text: str | None) -> tuple[list[Target], list[str]]:
    """(targets of `--backends`, notes on libraries that are left out by default).

    `text` is "library[:device],…" with the names of `subquad info`; None means every library that can be used, on the
    first device of each kind.
    """
    items = None if text is None else [item.strip() for item in text.split(",")]
    found = find(None if items is None else [item.partition(":")[0] for item in items])
    notes = [f"{x.name} left out: {x.reason}" for x in found.values() if x.reason and items is None]
    wanted = list(dict.fromkeys(_resolve(item, found) for item in (_default(found) if items is None else items)))
    if not wanted:
        msg = f"--backends: no array library can be used here: {'; '.join(notes) or 'none was found'}"
        raise CommandError(msg)
    chosen = []
    for name, device in wanted:
        library = found[name]
        several = [name for name, _ in wanted].count(name) > 1 or device != library.devices[0]
        label = f"{name} {device}" if several else name
        chosen.append(Target(name, device, label, library.version, library.bench))
    return chosen, notes


def _resolve(item: str, found: dict[str, Library]) -> tuple[str, str]:
    """(library, device) of one item of `--backends`; CommandError if either is unknown or cannot be used."""
    name, _, device = item.partition(":")
    if name not in found:
        msg = f"--backends: {unknown('backend', name, loading.names())}"
        raise CommandError(msg)
    library = found[name]
    if library.reason is not None:
        msg = f"--backends: {name} cannot be used on this machine: {library.reason}"
        raise CommandError(msg)
    if device and device not in library.devices:
        msg = f"--backends: {name} has no device {device!r} here; it has {', '.join(library.devices)}"
        raise CommandError(msg)
    return name, device or library.devices[0]


def _default(found: dict[str, Library]) -> list[str]:
    chosen = []
    for library in found.values():
        kinds = {device.partition(":")[0]: device for device in reversed(library.devices)}
        if library.reason is None:
            chosen += [f"{library.name}:{device}" for device in sorted(kinds.values())]
    return chosen
