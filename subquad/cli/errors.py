"""What the command line answers to a wrong request."""

from collections.abc import Iterable

from subquad.core.spelling import nearest


class CommandError(Exception):
    """A request that cannot be met; the message is one line: what came, what was expected, the fix."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that there is no `kind` called `name`, and which names come near or exist."""
    return f"no {kind} is called {name!r}; {nearest(name, sorted(known))}"
