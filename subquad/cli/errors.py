"""What the command line answers to a wrong request."""

import difflib
from collections.abc import Iterable


class CommandError(Exception):
    """A request that cannot be met; the message is one line: what came, what was expected, the fix."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that there is no `kind` called `name`, and which names come near or exist."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"expected one of {', '.join(known) or 'none: nothing was found'}"
    )
    return f"no {kind} is called {name!r}; {hint}"
