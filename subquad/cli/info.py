"""`subquad info`: the array libraries, devices and kernels of this machine, and why others are absent."""

import itertools
import platform

from subquad.cli.libraries import Library, find
from subquad.cli.report import versions


def text() -> str:
    """The text that `subquad info` prints; no library beyond NumPy is required."""
    have = versions()
    lines = [
        f"subquad {have['subquad']}, Python {have['python']}, NumPy {have['numpy']}, {platform.platform()}",
        "",
    ]
    libraries = find()
    width = max(map(len, libraries), default=0)
    for library in libraries.values():
        for first, rest in itertools.zip_longest([library.name], _facts(library), fillvalue=""):
            lines.append(f"{first:{width}}  {rest}")
    if not libraries:
        lines.append("no backend package was found: the generic code runs on any Array API library")
    return "\n".join(lines)


def _facts(library: Library) -> list[str]:
    if library.reason is not None:
        version = f"{library.version}, " if library.version else ""
        return [f"absent   {version}{library.reason}"]
    facts = [f"usable   {library.version} on {', '.join(library.devices)}"]
    for kernel, overrides in library.kernels.items():
        facts.append(f"         {kernel}: {', then '.join([*overrides, 'generic'])}")
    facts += [f"         {note}" for note in _notes(library)]
    if not library.kernels:
        facts.append("         no kernels of its own: generic code")
    return facts


def _notes(library: Library) -> list[str]:
    """The notes of a backend on its kernels; an exception becomes a note."""
    try:
        return list(getattr(library.bench, "kernel_notes", list)())
    except Exception as error:
        return [f"its kernels cannot be made: {type(error).__name__}: {error}"]
