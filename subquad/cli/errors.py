"""Errors of the command line for wrong requests."""

from collections.abc import Iterable

from subquad.core.spelling import nearest


class CommandError(Exception):
    """A request that cannot be met; its one-line message says what came, what was expected, and the fix."""


def missing_for(command: str, error: ModuleNotFoundError) -> str:
    """The message that a command needs a library that is not installed."""
    library = (error.name or "a library").partition(".")[0]
    return f'{command} needs {library}, which is not installed: pip install "subquad[cli]"'


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The message that no `kind` is called `name`, with the nearest names and all known names."""
    return f"no {kind} is called {name!r}; {nearest(name, sorted(known))}"
