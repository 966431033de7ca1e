"""Which code runs: backends, the kernels that they may replace, and `explain`.

A *kernel* is a function of `subquad.kernels`, complete in plain Array API. A *backend* may replace it by overrides,
each of which says which inputs it takes and gives its reason when it declines. The generic form is always the last
candidate and the meaning of all the others.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from array_api_compat import array_namespace

Array = Any  # any object with an array namespace; the standard has no common class


@dataclass(frozen=True)
class Override:
    """A backend's replacement of one kernel; `run` and `declines` take exactly the kernel's arguments."""

    name: str
    run: Callable[..., Any]
    declines: Callable[..., str | None]  # a reason, or None where the override takes the call


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _always(*arrays: Array) -> bool:
    return True


@dataclass(frozen=True)
class Backend:
    """What the standard lacks and the library has: control flow, host values, and kernels.

    Every field has a default that is right for a library that computes eagerly and is not known any better.
    """

    library: str
    # fold a step over blocks of rows, when a Python loop is not the best way; None: the Python loop
    scan_blocks: Callable[..., Any] | None = None
    # call a function of Python values on the host, also while a program is being traced
    host: Callable[..., Any] = _call
    # can the values of these arrays be read, i.e. is nothing being traced?
    concrete: Callable[..., bool] = _always
    # cond(predicate, function, given): function(*given) where the predicate is true, else `given`, while tracing; None:
    # there the function is always called
    cond: Callable[..., Any] | None = None
    # a context in which products of arrays like the one given are computed in their own dtype
    full_precision: Callable[[Array], AbstractContextManager[Any]] = nullcontext
    # exp(x − y) where x is a temporary that may be overwritten; None: by two operations
    exp_minus: Callable[..., Any] | None = None
    # may an output be filled in place, block by block?
    in_place: bool = False
    kernels: Mapping[str, tuple[Override, ...]] = field(default_factory=dict)

    @classmethod
    def from_package(cls, library: str, package: ModuleType | None) -> Backend:
        names = ("scan_blocks", "host", "concrete", "cond", "full_precision", "exp_minus", "in_place")
        given = {name: getattr(package, name) for name in names if hasattr(package, name)}
        return cls(library, **given, kernels=getattr(package, "KERNELS", {}))


def library_of(xp: ModuleType) -> str:
    """The name of the array library behind a namespace, e.g. "numpy"."""
    return xp.__name__.removeprefix("array_api_compat.").partition(".")[0]


def backend_of(xp: ModuleType) -> Backend:
    """The backend of a namespace; its package is imported at the first call."""
    from subquad import _backends

    return getattr(_backends, "of_" + library_of(xp))


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call uses, and why not the others. `print` it.

    Attributes
    ----------
    library : str
        Name of the array library.
    kernel : str or None
        Name of the kernel; None where the function has no kernel that could be replaced.
    implementation : str
        "generic", or the name of the override.
    declined : tuple of (str, str)
        The overrides that were asked before and declined, with their reasons.
    """

    library: str
    kernel: str | None
    implementation: str
    declined: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        what = self.kernel or "no replaceable kernel"
        lines = [f"{what} on {self.library}: {self.implementation}"]
        lines += [f"  {name} declined: {reason}" for name, reason in self.declined]
        return "\n".join(lines)


class Explained(Exception):
    """Carries the explanation from the kernel that was reached to `explain`."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__(str(explanation))
        self.explanation = explanation


_asking = threading.local()


def explained(call: Callable[[], Any]) -> Explanation | None:
    """Run `call` up to its first kernel and return what that kernel would do; None if it reaches no kernel."""
    _asking.active = True
    try:
        call()
    except Explained as answer:
        return answer.explanation
    finally:
        _asking.active = False
    return None


def kernel(generic: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of `subquad.kernels` replaceable; the generic form stays reachable as `__wrapped__`."""
    name = generic.__name__

    @functools.wraps(generic)
    def dispatched(*args: Any, implementation: str = "auto", **kwargs: Any) -> Any:
        backend = backend_of(array_namespace(args[0]))
        chosen, run, declined = _choose(backend, name, generic, implementation, args, kwargs)
        if getattr(_asking, "active", False):
            raise Explained(Explanation(backend.library, name, chosen, declined))
        return run(*args, **kwargs)

    return dispatched


def _choose(
    backend: Backend,
    name: str,
    generic: Callable[..., Any],
    implementation: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[str, Callable[..., Any], tuple[tuple[str, str], ...]]:
    overrides = backend.kernels.get(name, ())
    known = ["auto", "generic", *(override.name for override in overrides)]
    if not isinstance(implementation, str) or implementation not in known:  # an array would be compared by elements
        msg = f"implementation is {implementation!r}; {name} on {backend.library} has {known}"
        raise ValueError(msg)
    declined: list[tuple[str, str]] = []
    for override in overrides:
        if implementation not in ("auto", override.name):
            continue
        reason = override.declines(*args, **kwargs)
        if reason is None:
            return override.name, override.run, tuple(declined)
        declined.append((override.name, reason))
        if implementation == override.name:
            msg = f"implementation {implementation!r} cannot take this call: {reason}. Use 'auto' or 'generic'"
            raise ValueError(msg)
    return "generic", generic, tuple(declined)
