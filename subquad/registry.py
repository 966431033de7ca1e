"""The registry: two tables, of methods and of scans, which `explain`, `compare`, benchmarks, tests and docs read.

`register` makes a class a method, and `register_scan` makes a function a scan. Another distribution may add methods by
entry points of the group "subquad.methods": each gives the name of a method and the module that registers it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from subquad.backend import Array
from subquad.core.spelling import nearest
from subquad.core.states import State, StateSpec

GROUP = "subquad.methods"
Cls = TypeVar("Cls", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])
Host = np.ndarray[Any, Any]
Inputs = tuple[dict[str, Host], dict[str, Any]]  # (arrays by name, in the order of the scan's arguments; options)


@dataclass(frozen=True)
class MethodRow:
    """The row of an attention method.

    Attributes
    ----------
    name, aliases : str, tuple of str
        Names of the method in `subquad.attention`.
    cls : type
        Class of the method's objects, a subclass of `subquad.Method`.
    cost : str
        Number of operations in n, n_kv, d, d_v and m, such as "n m (d + d_v)".
    size : str or None
        Name of the option that sets the size m, such as "num_features"; None if the method has no such option.
    defaults : tuple of dict
        Options with which `subquad compare` runs the method by default, one run for each.
    options : tuple of str
        Names of the options: the fields of the class.
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
    """The row of a scan.

    Attributes
    ----------
    name : str
        Name of the function.
    function : callable
        The scan; it takes arrays by position, then options and further arrays by keyword.
    state : StateSpec
        The arrays that `summarize_scan` returns, and how two such states merge.
    decay : callable or None
        ``decay(arrays, options)`` returns the factor by which the arrays multiply the state before them, a decay or,
        if `state` has the field "transition", a matrix; None if they do something else to it, so that states do not
        merge.
    draw : callable
        ``draw(rng, n)`` returns example inputs of n steps, in float64, of realistic sizes and time scales.
    cost : str
        Number of operations, such as "n d d_state".
    positional : tuple of str
        Names of the arrays that the scan takes by position.
    step : callable or None
        Function of one step, for decoding; None if the scan has none.
    activations : callable or None
        ``activations(q, k, v)`` makes inputs of real queries, keys and values.
    reference : callable or None
        ``reference(arrays, options)`` computes the definition by NumPy, in float64.
    """

    name: str
    function: Callable[..., Any]
    state: StateSpec
    decay: Callable[[Mapping[str, Any], Mapping[str, Any]], Array] | None
    draw: Callable[[np.random.Generator, int], Inputs]
    cost: str = ""
    positional: tuple[str, ...] = ()
    step: Callable[..., Any] | None = None
    activations: Callable[[Host, Host, Host], Inputs] | None = None
    reference: Callable[[Mapping[str, Host], Mapping[str, Any]], Host] | None = None

    def call(self, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
        """Call the scan with arrays given by name.

        Parameters
        ----------
        arrays : mapping
            Name → array.
        options : mapping
            Further keywords of the scan.

        Returns
        -------
        array or tuple of array
            The output of the scan.
        """
        by_position = [arrays.get(name) for name in self.positional]
        while by_position and by_position[-1] is None:
            by_position.pop()
        return self.function(*by_position, **{name: x for name, x in arrays.items() if name not in self.positional},
                             **options)  # fmt: skip

    def inputs(self, q: Host, k: Host, v: Host) -> Inputs:
        """Make inputs of real activations; without `activations`, draw example inputs as long as `v`.

        Parameters
        ----------
        q, k, v : numpy.ndarray
            Queries, keys and values.

        Returns
        -------
        arrays : dict
            Name → NumPy array, in the order of the scan's arguments.
        options : dict
            Further keywords of the scan.
        """
        if self.activations is None:
            return self.draw(np.random.Generator(np.random.PCG64(0)), v.shape[-2])
        return self.activations(q, k, v)


_methods: dict[str, type[Any]] = {}
_aliases: dict[str, str] = {}
_scans: dict[str, ScanRow] = {}
OF_METHODS, OF_SCANS = "subquad.attention", "subquad.scans"  # packages that fill the tables when they are imported
_rows: dict[type, MethodRow] = {}
_defaults: dict[type, Any] = {}
MADE: dict[Any, Any] = {}  # methods with options that are integers or words, by class and options
MOST_MADE = 256


def register(
    name: str,
    *,
    aliases: Sequence[str] = (),
    cost: str = "",
    size: str | None = None,
    defaults: Sequence[Mapping[str, Any]] = ({},),
) -> Callable[[Cls], Cls]:
    """Register a class as an attention method: a decorator.

    Parameters
    ----------
    name : str
        Name of the method in `subquad.attention`.
    aliases : sequence of str
        Further names.
    cost : str
        Number of operations in n, n_kv, d, d_v and m.
    size : str or None
        Name of the option that sets the size m.
    defaults : sequence of dict
        Options with which `subquad compare` runs the method by default.

    Returns
    -------
    callable
        A decorator that registers a class and returns it.

    Raises
    ------
    ValueError
        From the decorator, if the name or an alias belongs to another class. A class that is defined again under the
        same path, as in a notebook, replaces the first.
    """

    def decorate(cls: Cls) -> Cls:
        for word in (name, *aliases):
            taken = _methods.get(_aliases.get(word, word))
            if taken is not None and _path(taken) != _path(cls):
                msg = f"the name {word!r} is taken by {_path(taken)}; choose another"
                raise ValueError(msg)
        _methods[name] = cls
        _rows[cls] = MethodRow(name, cls, tuple(aliases), cost, size, tuple(defaults))
        _aliases.update(dict.fromkeys(aliases, name))
        return cls

    return decorate


def register_scan(name: str, **fields: Any) -> Callable[[Function], Function]:
    """Register a function as a scan: a decorator.

    Parameters
    ----------
    name : str
        Name of the function.
    **fields
        Further fields of `ScanRow`: `state`, `decay` and `draw` are required.

    Returns
    -------
    callable
        A decorator that registers a function and returns it.

    Raises
    ------
    ValueError
        From the decorator, if the name belongs to another function; one under the same path is replaced.
    """

    def decorate(function: Function) -> Function:
        taken = _scans.get(name)
        if taken is not None and _path(taken.function) != _path(function):
            msg = f"the name {name!r} is taken by {_path(taken.function)}; choose another"
            raise ValueError(msg)
        _scans[name] = ScanRow(name, function, **fields)
        return function

    return decorate


def _path(thing: Any) -> str:
    """Module and qualified name of a class or function."""
    return f"{thing.__module__}.{thing.__qualname__}"


def method_row(name: str) -> MethodRow:
    """The row of a method by its name or an alias; ValueError, with the nearest names, for an unknown name."""
    cls = _methods.get(_aliases.get(name, name))
    if cls is None:
        import_module(OF_METHODS)
        cls = _methods.get(_aliases.get(name, name)) or _from_entry_point(name)
    if cls is None:
        msg = f"unknown method {name!r}; {nearest(name, [*_methods, *_aliases])}"
        raise ValueError(msg)
    return _rows.get(cls) or MethodRow(name, cls)  # a class put into METHODS without `register` has no row


def scan_row(scan: str | Callable[..., Any]) -> ScanRow:
    """The row of a scan by its name or its function; ValueError for an unknown one."""
    import_module(OF_SCANS)
    for row in _scans.values():
        if scan == row.name or scan is row.function:
            return row
    name = scan if isinstance(scan, str) else getattr(scan, "__name__", repr(scan))
    msg = f"unknown scan {name!r}; {nearest(name, _scans)}"
    raise ValueError(msg)


def make_method(name: str, options: Mapping[str, Any]) -> Any:
    """The method object of a name with these options.

    Raises ValueError for an unknown name, TypeError for an option that the method does not have.
    """
    if not options:
        return _default(_methods.get(_aliases.get(name, name)) or method_row(name).cls)
    cls = _methods.get(_aliases.get(name, name))
    key = None if cls is None or not all(map(_is_plain, options.values())) else (cls, *options.items())
    method = None if key is None else MADE.get(key)
    if method is not None:
        return method
    row = method_row(name)
    for option in options:
        if option not in row.options:
            msg = f"method {name!r} has no option {option!r}; {nearest(option, row.options)}"
            raise TypeError(msg)
    method = row.cls(**options)
    if key is not None:
        if len(MADE) >= MOST_MADE:
            MADE.clear()
        MADE[key] = method
    return method


def _is_plain(value: Any) -> bool:
    """Whether a value of an option tells equal options apart from all others: 1, 1.0 and True are equal as keys."""
    return value.__class__ is int or value.__class__ is str


def _default(cls: type[Any]) -> Any:
    """The object of a class with default options, made once: it can be shared, being frozen and without arrays."""
    method = _defaults.get(cls)
    if method is None:
        method = _defaults[cls] = cls()
    return method


def _from_entry_point(name: str) -> type[Any] | None:
    """The class of a method that an entry point of another distribution names and registers; None if there is none."""
    from importlib import metadata  # see `loading`

    for entry in metadata.entry_points(group=GROUP, name=name):
        entry.load()
        return _methods.get(name)
    return None


if TYPE_CHECKING:
    METHODS, ALIASES, SCANS = _methods, _aliases, _scans
else:

    def __getattr__(name: str) -> Any:
        """A table, once the package that fills it is imported: whoever reads it before that would find it empty."""
        tables = {"METHODS": (_methods, OF_METHODS), "ALIASES": (_aliases, OF_METHODS), "SCANS": (_scans, OF_SCANS)}
        if name not in tables:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        table, package = tables[name]
        import_module(package)
        return table


__all__ = ["ALIASES", "METHODS", "SCANS", "MethodRow", "ScanRow", "State", "register", "register_scan"]
