"""Methods and scans as rows of two tables: what `explain`, `compare`, benchmarks, tests and docs read.

A class becomes a method by `register`, a function a scan by `register_scan`. A distribution may add methods by entry
points of the group "subquad.methods": the name of a method, and the module that registers it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from subquad.backend import Array
from subquad.core.spelling import nearest
from subquad.core.states import State, StateSpec

GROUP = "subquad.methods"
Cls = TypeVar("Cls", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])
Host = np.ndarray[Any, Any]
Inputs = tuple[dict[str, Host], dict[str, Any]]  # arrays by name in the order of a scan's arguments; its options


@dataclass(frozen=True)
class MethodRow:
    """An attention method.

    Attributes
    ----------
    name, aliases : str, tuple of str
        What `attention` calls it.
    cls : type
        The class of its objects.
    cost : str
        Its operations in n, n_kv, d, d_v and m, such as "n m (d + d_v)".
    size : str or None
        The option that says how large it is, such as "num_features".
    defaults : tuple of dict
        The options with which it is compared unless somebody says otherwise.
    options : tuple of str
        Names of its options; those of the class.
    """

    name: str
    cls: type[Any]
    aliases: tuple[str, ...] = ()
    cost: str = ""
    size: str | None = None
    defaults: tuple[Mapping[str, Any], ...] = ({},)
    options: tuple[str, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        names = tuple(field.name for field in dataclasses.fields(self.cls) if field.init)
        object.__setattr__(self, "options", names)  # once: tracers cannot ask a class for its fields


@dataclass(frozen=True)
class ScanRow:
    """A recurrence.

    Attributes
    ----------
    name : str
        Name of the function.
    function : callable
        The scan: arrays by position, then options and further arrays by keyword.
    state : StateSpec
        What `summarize_scan` gives, and how two of these merge.
    decay : callable
        ``decay(arrays, options)``: the factor from the state before the arrays to the state after them.
    draw : callable
        ``draw(rng, n)``: example inputs of n steps, float64, at the sizes and time scales of its first use.
    cost : str
        Its operations.
    positional : tuple of str
        The arrays that it takes by position.
    step : callable or None
        One step of it, for decoding.
    activations : callable or None
        ``activations(q, k, v)``: inputs made of real queries, keys and values.
    reference : callable or None
        ``reference(arrays, options)``: its definition in float64, on NumPy.
    """

    name: str
    function: Callable[..., Any]
    state: StateSpec
    decay: Callable[[Mapping[str, Any], Mapping[str, Any]], Array]
    draw: Callable[[np.random.Generator, int], Inputs]
    cost: str = ""
    positional: tuple[str, ...] = ()
    step: Callable[..., Any] | None = None
    activations: Callable[[Host, Host, Host], Inputs] | None = None
    reference: Callable[[Mapping[str, Host], Mapping[str, Any]], Host] | None = None

    def call(self, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """The function's answer for arrays by name."""
        by_position = [arrays.get(name) for name in self.positional]
        while by_position and by_position[-1] is None:
            by_position.pop()
        return self.function(*by_position, **{name: x for name, x in arrays.items() if name not in self.positional},
                             **options)  # fmt: skip

    def inputs(self, q: Host, k: Host, v: Host) -> Inputs:
        """Inputs made of real activations; where the scan has no such maker, example inputs as long as `v`."""
        if self.activations is None:
            return self.draw(np.random.Generator(np.random.PCG64(0)), v.shape[-2])
        return self.activations(q, k, v)


METHODS: dict[str, type[Any]] = {}
ALIASES: dict[str, str] = {}
SCANS: dict[str, ScanRow] = {}
_rows: dict[type, MethodRow] = {}
_defaults: dict[type, Any] = {}


def register(
    name: str,
    *,
    aliases: Sequence[str] = (),
    cost: str = "",
    size: str | None = None,
    defaults: Sequence[Mapping[str, Any]] = ({},),
) -> Callable[[Cls], Cls]:
    """Give a class of methods a name; the arguments are fields of `MethodRow`. A decorator.

    Raises
    ------
    ValueError
        If the name or an alias is taken by a class that stands elsewhere.
    """

    def decorate(cls: Cls) -> Cls:
        for word in (name, *aliases):
            taken = METHODS.get(ALIASES.get(word, word))
            if taken is not None and _path(taken) != _path(cls):
                msg = f"the name {word!r} is taken by {_path(taken)}; choose another"
                raise ValueError(msg)
        METHODS[name] = cls
        _rows[cls] = MethodRow(name, cls, tuple(aliases), cost, size, tuple(defaults))
        ALIASES.update(dict.fromkeys(aliases, name))
        return cls

    return decorate


def register_scan(name: str, **fields: Any) -> Callable[[Function], Function]:
    """Make a function a scan; the keywords are fields of `ScanRow`. A decorator.

    Raises
    ------
    ValueError
        If the name is taken by a function that stands elsewhere.
    """

    def decorate(function: Function) -> Function:
        taken = SCANS.get(name)
        if taken is not None and _path(taken.function) != _path(function):
            msg = f"the name {name!r} is taken by {_path(taken.function)}; choose another"
            raise ValueError(msg)
        SCANS[name] = ScanRow(name, function, **fields)
        return function

    return decorate


def _path(thing: Any) -> str:
    """Where a class or function stands; one that is defined again, as in a notebook, stands where it stood."""
    return f"{thing.__module__}.{thing.__qualname__}"


def method_row(name: str) -> MethodRow:
    """The row of a method by its name or an alias; ValueError names those that are most like an unknown one."""
    cls = METHODS.get(ALIASES.get(name, name))
    if cls is None:
        cls = _from_entry_point(name)
    if cls is None:
        msg = f"unknown method {name!r}; {nearest(name, [*METHODS, *ALIASES])}"
        raise ValueError(msg)
    return _rows.get(cls) or MethodRow(name, cls)  # a class that somebody put into METHODS by hand


def scan_row(scan: str | Callable[..., Any]) -> ScanRow:
    """The row of a scan by its name or function."""
    for row in SCANS.values():
        if scan == row.name or scan is row.function:
            return row
    name = scan if isinstance(scan, str) else getattr(scan, "__name__", repr(scan))
    msg = f"unknown scan {name!r}; {nearest(name, SCANS)}"
    raise ValueError(msg)


def make_method(name: str, options: Mapping[str, Any]) -> Any:
    """The method object for a name and its options; TypeError for an option that it does not have."""
    if not options:
        return _default(METHODS.get(ALIASES.get(name, name)) or method_row(name).cls)
    row = method_row(name)
    for option in options:
        if option not in row.options:
            msg = f"method {name!r} has no option {option!r}; {nearest(option, row.options)}"
            raise TypeError(msg)
    return row.cls(**options)


def _default(cls: type[Any]) -> Any:
    """The object with default options; it is frozen and holds no array."""
    method = _defaults.get(cls)
    if method is None:
        method = _defaults[cls] = cls()
    return method


def _from_entry_point(name: str) -> type[Any] | None:
    """The class of a method that another distribution brings, once its module is imported."""
    for entry in importlib.metadata.entry_points(group=GROUP, name=name):
        entry.load()
        return METHODS.get(name)
    return None


__all__ = ["ALIASES", "METHODS", "SCANS", "MethodRow", "ScanRow", "State", "register", "register_scan"]
