"""For authors of backends: what a library tells subquad about itself, and how it replaces kernels.

A *kernel* is a function of `subquad.kernels`, complete in plain Array API. A *backend* says what the standard lacks and
its library has, and may replace kernels by *overrides*. An override declares what it takes; from that follow its
reasons for declining a call. The generic form is always the last candidate, and the meaning of all the others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

__all__ = ["Accepts", "Array", "Backend", "Call", "Conditions", "Like", "Override"]

Array = Any  # any object with an array namespace; the standard has no common class

NO_CONTEXT = nullcontext()


@dataclass(frozen=True)
class Like:
    """An array that does not exist yet: its shape and dtype."""

    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class Conditions:
    """What a library is doing around a call; all False where it computes at once.

    Attributes
    ----------
    tracing : bool
        A program is recorded or compiled.
    transformed : bool
        Arrays are wrappers of a functional transform, such as vmap.
    tangents : bool
        Forward-mode derivatives are asked for.
    recorded : bool
        Gradients will be asked for.
    watched : bool
        Something counts or rewrites single operations.
    """

    tracing: bool = False
    transformed: bool = False
    tangents: bool = False
    recorded: bool = False
    watched: bool = False


PLAIN = Conditions()
UNLESS_UNDER = {  # the reason to decline under a condition that an override does not survive
    "tracing": "a compiler sees through the generic form",
    "transformed": "functional transforms see through the generic form only",
    "tangents": "forward-mode differentiation sees through the generic form only",
    "recorded": "gradients are recorded through the generic form",
    "watched": "what watches or records operations sees through the generic form only",
}


@dataclass(frozen=True)
class Call:
    """One call of a kernel, as it is shown to every override.

    Attributes
    ----------
    kernel : str
        Name of the kernel.
    arrays : tuple of array or None
        The positional arguments.
    key_mask : array of bool, or None
        The one array that is passed by keyword.
    static : mapping
        The other keywords; their values are hashable.
    conditions : Conditions
        What the library is doing.
    """

    kernel: str
    arrays: tuple[Any, ...]  # or None where there is none
    key_mask: Array | None = None
    static: Mapping[str, Any] = field(default_factory=dict)
    conditions: Conditions = PLAIN


@dataclass(frozen=True)
class Accepts:
    """What an override takes.

    Attributes
    ----------
    dtypes : tuple of str, default ("float32", "float64")
        Names of the dtypes of the arrays; a key mask is bool and is not asked.
    one_dtype : bool, default True
        All arrays have one dtype.
    devices : tuple of str, default ("cpu",)
        Kinds of devices, as `Backend.device_kind` names them; () is every kind.
    options : frozenset of str
        Optional keywords of the kernel that the override knows. A call that uses another is declined.
    under : frozenset of str
        Names of the `Conditions` that it survives.
    needs : tuple of str
        Packages that must be installed; each is looked for once a process.
    also : callable, optional
        ``also(call)`` gives the reason, or None, for what no field says.
    """

    dtypes: tuple[str, ...] = ("float32", "float64")
    one_dtype: bool = True
    devices: tuple[str, ...] = ("cpu",)
    options: frozenset[str] = frozenset()
    under: frozenset[str] = frozenset()
    needs: tuple[str, ...] = ()
    also: Callable[[Call], str | None] | None = None

    def why_not(self, call: Call, backend: Backend, unused: Mapping[str, Any]) -> list[str]:
        """All reasons to decline a call; `unused` has the values with which optional keywords are not used."""
        reasons = []
        for name, value in unused.items():
            option = call.key_mask if name == "key_mask" else call.static[name]
            if name not in self.options and option is not value:
                reasons.append("it takes no key_mask" if name == "key_mask" else f"it has no {option} form")
        given = [x for x in call.arrays if x is not None]
        names: list[str] = []
        for x in given:
            kind = dtype_name(x)
            if kind not in names:
                names.append(kind)
        odd = [name for name in names if name not in self.dtypes]
        if odd:
            reasons.append(f"it computes in {', '.join(self.dtypes)}, not in {', '.join(odd)}")
        elif self.one_dtype and len(names) > 1:
            reasons.append(f"it computes in one dtype, not in {', '.join(sorted(names))}")
        where = backend.device_kind(given[0])
        if self.devices and where not in self.devices:
            reasons.append(f"it runs on {' or '.join(self.devices)}, the arrays are on {where}")
        for name, reason in UNLESS_UNDER.items():
            if getattr(call.conditions, name) and name not in self.under:
                reasons.append(reason)
        for package in self.needs:
            if not backend.is_installed(package):
                reasons.append(f'{package} is not installed (pip install "subquad[{package}]")')
        if self.also is not None and not reasons:  # it may rely on what the fields say
            own = self.also(call)
            reasons += [] if own is None else [own]
        return reasons


@dataclass(frozen=True)
class Override:
    """A backend's replacement of one kernel.

    Attributes
    ----------
    kernel : str
        Name of the kernel; checked against the list when the backend is loaded.
    name : str
        What `explain` and ``implementation=`` call it.
    run : callable
        Takes the kernel's arguments, less the optional keywords that `accepts` does not list.
    accepts : Accepts
        What it takes.
    """

    kernel: str
    name: str
    run: Callable[..., Any]
    accepts: Accepts = Accepts()


class Backend:
    """What the standard lacks and a library has. Every default is right for a library that computes at once."""

    library: ClassVar[str] = ""
    overrides: ClassVar[tuple[Override, ...]] = ()
    fills_in_place: ClassVar[bool] = False  # may an output be written block by block?

    def signature(self, arrays: Sequence[Array | None]) -> Hashable | None:
        """What decides how a call with these arrays goes, or None where that must be found out at every call."""
        return None

    def conditions(self, arrays: Sequence[Array | None]) -> Conditions:
        """What the library is doing around a call with these arrays."""
        return PLAIN

    def device_kind(self, array: Array) -> str:
        """Name of the kind of device that an array is on, as `Accepts.devices` lists it."""
        return "cpu"

    def is_installed(self, package: str) -> bool:
        """Whether a package can be imported; it is not."""
        return is_installed(package)

    def fold_blocks(
        self, step: Callable[..., Any], carry: Any, arrays: Sequence[Array | None], size: int, *, exact: bool = False
    ) -> tuple[Any, Array | None]:
        """`subquad.core.block_loop.fold_blocks` in this library's own way; here as a Python loop."""
        from subquad.core.block_loop import loop_blocks

        return loop_blocks(step, carry, arrays, size, in_place=self.fills_in_place)

    def on_host(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` of Python values, called on the host also while a program is traced."""
        return function(*args)

    def is_concrete(self, *arrays: Array | None) -> bool:
        """Whether the values of these arrays can be read: nothing is traced."""
        return True

    def where_any(self, condition: Array, change: Callable[..., Any], given: tuple[Array, ...]) -> Any:
        """`change(*given)` where the condition holds anywhere, else `given`; while tracing always the first."""
        return change(*given)

    def full_precision(self, like: Array) -> AbstractContextManager[Any]:
        """A context in which products of arrays like the one given are computed in their own dtype."""
        return NO_CONTEXT

    def exp_difference(self, xp: Any, x: Array, y: Array) -> Array:
        """exp(x − y), where x is a temporary that may be overwritten."""
        return xp.exp(x - y)


@cache
def is_installed(package: str) -> bool:
    """Whether a package can be imported, looked for once a process."""
    return importlib.util.find_spec(package) is not None


def dtype_name(x: Array) -> str:
    """Name of an array's dtype in every library, such as "float32"."""
    return str(x.dtype).rpartition(".")[2]


def hooks(cls: type) -> Iterator[str]:
    """Public names that a class of backends defines itself."""
    return (name for name in vars(cls) if not name.startswith("_"))
