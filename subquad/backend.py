"""The interface for authors of backends: facts about an array library, and replacements of kernels.

A *kernel* is a function of `subquad.kernels`, complete in plain Array API: its generic form. A *backend* supplies
functions of its library that the standard lacks, and may replace kernels by *overrides*. An override declares the calls
that it takes; the reasons for declining any other call follow from the declaration. Overrides are asked in order; the
generic form is the last candidate, and every override must compute what it computes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

from array_api_compat import array_namespace, device

from subquad.core.override import PLAIN, Accepts, Array, Call, Conditions, Like, Override

__all__ = ["Accepts", "Array", "Backend", "Call", "Conditions", "Like", "Override"]

NO_CONTEXT = nullcontext()


class Backend:
    """Base of the backends: functions of a library that the standard lacks, and the overrides of kernels.

    Every default is right for a library that computes each operation at once, on a CPU, without compilation. A package
    exposes an instance of a subclass as `BACKEND`.

    Attributes
    ----------
    library : str
        Name of the array library, such as "numpy".
    overrides : tuple of Override
        The overrides, in the order in which they are asked.
    fills_in_place : bool
        Whether `fold_blocks` may write outputs block by block into one array.
    loops_any_length : bool
        Whether programs leave lengths open, down to parts of an array that have no rows; `fold_blocks` can then record
        a loop over any number of rows.
    """

    library: ClassVar[str] = ""
    overrides: ClassVar[tuple[Override, ...]] = ()
    fills_in_place: ClassVar[bool] = False
    loops_any_length: ClassVar[bool] = False

    def namespace(self, array: Array) -> ModuleType:
        """Return the array namespace of an array; TypeError if it is none.

        Parameters
        ----------
        array : array
            An object whose class is defined in the package of the library.

        Returns
        -------
        module
            The namespace; by default, the one that `array_api_compat.array_namespace` finds.
        """
        return array_namespace(array)

    def place_of(self, array: Array) -> Any:
        """Return where to make new arrays, of any shape, beside an array.

        Parameters
        ----------
        array : array
            An array of the library.

        Returns
        -------
        device or None
            The argument `device` of functions that make arrays; by default, the device of the array.
        """
        return self.device_of(array)

    def device_of(self, array: Array) -> Any:
        """Return the device of an array, or None for a traced one that has none yet.

        Parameters
        ----------
        array : array
            An array of the library.

        Returns
        -------
        device or None
            An object of the library that equals that of another array on the same device.
        """
        return device(array)

    def refuses(self, array: Array) -> str | None:
        """Return the reason why an array cannot be computed with, such as its layout, or None.

        Parameters
        ----------
        array : array
            An array of the library.

        Returns
        -------
        str or None
            What it is and what to pass in its place, as the end of the sentence "q is …".
        """
        return None

    def whole_call(
        self, name: str, function: Callable[..., Any], arrays: Mapping[str, Any], options: Mapping[str, Any]
    ) -> Any:
        """Return the result of a call on an array that `refuses` refuses, if this backend has a form of the whole call.

        Parameters
        ----------
        name : str
            "attention", "linear_scan" or "selective_scan".
        function : callable
            The method object, or the function of the scan.
        arrays : mapping
            The arrays of the call by name, in the order of positions.
        options : mapping
            The keywords of the call, arrays included.

        Returns
        -------
        object
            What ``function(*arrays.values(), **options)`` should return; NotImplemented, the default: the array is
            refused.
        """
        return NotImplemented

    def signature(self, arrays: Sequence[Array | None]) -> Hashable | None:
        """Return a key of everything in these arrays that decides how a call runs: types, shapes, dtypes, devices.

        Parameters
        ----------
        arrays : sequence of array or None
            The arrays of the call.

        Returns
        -------
        hashable or None
            The key under which checks and choices are remembered. None, the default: nothing is remembered.
        """
        return None

    def recognises(self) -> bool:
        """Return whether `likeness` may be used now: not while the library traces, transforms or watches operations.

        Returns
        -------
        bool
            False by default: `signature` is as good.
        """
        return False

    def likeness(self, arrays: Sequence[Array]) -> Callable[..., bool] | None:
        """Return a function of arrays that tells at once whether others are like these, in less time than `signature`.

        Parameters
        ----------
        arrays : sequence of array
            The arrays of a call.

        Returns
        -------
        callable or None
            Whether as many arrays have the signature of these, under modes of the library that are those of now. It may
            be false for some that do. None, the default: there is no such function.
        """
        return None

    def conditions(self, arrays: Sequence[Array | None]) -> Conditions:
        """Return the state of the library around a call with these arrays.

        Parameters
        ----------
        arrays : sequence of array
            The arrays of the call.

        Returns
        -------
        Conditions
            The state; by default, the library computes at once.
        """
        return PLAIN

    def device_kind(self, array: Array) -> str:
        """Return the kind of device that an array is on, as `Accepts.devices` lists it.

        Parameters
        ----------
        array : array
            An array of the library.

        Returns
        -------
        str
            Name of the kind, such as "cpu" (the default) or "cuda".
        """
        return "cpu"

    def why_missing(self, package: str, *, load: bool = True) -> str | None:
        """Return the reason why a package cannot be used, or None if it can.

        Parameters
        ----------
        package : str
            Name of the package, as in ``import``.
        load : bool, default True
            Whether to import the package, to see if that works. If not, an installed package counts as usable.

        Returns
        -------
        str or None
            That it is not installed, or the error that its import raises; found out once a process.
        """
        return why_missing(package, load=load)

    def fold_blocks(
        self, step: Callable[..., Any], carry: Any, arrays: Sequence[Array | None], size: int, *, exact: bool = False
    ) -> tuple[Any, Array | None]:
        """Fold a step over blocks of rows, by a loop of the library; by default, a Python loop.

        Parameters
        ----------
        step : callable
            ``step(carry, *blocks)`` returns (carry, out); out may be None.
        carry : pytree of arrays
            The first carry.
        arrays : sequence of array or None
            Arrays with equally many rows (axis −2), cut into blocks; None is passed on as None.
        size : int
            Number of rows of a block; the last block may have fewer.
        exact : bool, default False
            Whether `size` must be kept. If not, a backend may take larger blocks.

        Returns
        -------
        carry : pytree of arrays
            The last carry.
        out : array or None
            The outputs joined along axis −2; None if the step returns None.
        """
        from subquad.core.block_loop import loop_blocks

        return loop_blocks(step, carry, arrays, size)

    def as_program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that the library runs as one program, where operations one by one would be slow.

        Parameters
        ----------
        function : callable
            A pure function of arrays, None, and dicts and tuples of these.

        Returns
        -------
        callable
            A function of the same arguments; by default, `function` itself.
        """
        return function

    def on_host(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of Python values on the host, even while a program is traced.

        Parameters
        ----------
        function : callable
            A function that takes Python values and returns NumPy arrays.
        *args
            The Python values.

        Returns
        -------
        object
            ``function(*args)``.
        """
        return function(*args)

    def is_concrete(self, *arrays: Array | None) -> bool:
        """Return whether the values of these arrays can be read now, that is, whether none is traced or lazy.

        Parameters
        ----------
        *arrays : array or None
            The arrays; None does not count.

        Returns
        -------
        bool
            Whether all values can be read; by default, whether all arrays have ``__dlpack__``, which gives access to
            memory and which lazy arrays lack.
        """
        return all(x is None or hasattr(x, "__dlpack__") for x in arrays)

    def same_numbers(self, x: Array, y: Array) -> bool:
        """Return whether two arrays of one shape and dtype, whose values can be read, hold the same numbers.

        Parameters
        ----------
        x, y : array
            The arrays. NaN is not the same as NaN.

        Returns
        -------
        bool
            Whether all numbers are equal, by default as the array API compares them.
        """
        return bool(self.namespace(x).all(x == y))

    def may_fill(self, *arrays: Array) -> bool:
        """Return whether arrays like these may be written into, because nobody records or traces what is done to them.

        Parameters
        ----------
        *arrays : array
            The arrays.

        Returns
        -------
        bool
            `fills_in_place` by default.
        """
        return self.fills_in_place

    def empty_like(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Return an array to be filled, of another shape.

        Parameters
        ----------
        x : array
            An array that `may_fill` takes, of the dtype and on the device of the new one.
        shape : tuple of int
            The shape.

        Returns
        -------
        array
            The array; its numbers are any. That of ``xp.empty`` by default.
        """
        return self.namespace(x).empty(shape, dtype=x.dtype, device=x.device)

    def items_behind(self, *arrays: Array | None) -> int:
        """Return how many items a transform such as ``vmap`` computes at once for one item of these arrays.

        Parameters
        ----------
        *arrays : array or None
            The arrays; None does not count.

        Returns
        -------
        int
            The number of items, which the memory of temporaries is multiplied by; 1 by default.
        """
        return 1

    def constant(self, x: Array) -> Array:
        """Return an array that counts as a constant when gradients are computed.

        Parameters
        ----------
        x : array
            The array.

        Returns
        -------
        array
            An array of the same values; by default, the array itself, as fits a library without gradients.
        """
        return x

    def holds(self, condition: Any) -> bool:
        """Return whether a condition on sizes holds for all sizes that a program, if one is recorded, will serve.

        Parameters
        ----------
        condition : bool, or symbolic condition of the library
            A comparison of sizes.

        Returns
        -------
        bool
            The condition; False for one that holds for some sizes only. By default, sizes are known numbers.
        """
        return bool(condition)

    def reshaped(self, xp: Any, x: Array, shape: tuple[int, ...]) -> Array:
        """Return an array in another shape, as scans take it.

        Parameters
        ----------
        xp : module
            The array namespace.
        x : array
            The array.
        shape : tuple of int
            The shape, often that of `x` with axes of length 1 more.

        Returns
        -------
        array
            The array in this shape; by default, by its own method if there is one.
        """
        method = getattr(x, "reshape", None)
        return xp.reshape(x, shape) if method is None else method(shape)

    def run_sizes(self, n: Any, longest: int, *, chunks: bool = False) -> tuple[Any, Any]:
        """Return how a recurrence of n ≥ 1 steps is cut into equal runs, which advance together.

        Parameters
        ----------
        n : int, or symbolic size of the library
            The number of steps.
        longest : int
            The most steps of a run.
        chunks : bool, default False
            Whether the work in a run grows as the square of its steps, so that `longest` must be kept. If not, a
            library that has a loop of its own may take longer runs.

        Returns
        -------
        columns, steps : int, or symbolic sizes of the library
            The number of runs, and their length; together they cover n steps.
        """
        columns = -(-n // longest)
        steps = -(-n // columns)
        return -(-n // steps), steps

    def where_any(self, condition: Array, change: Callable[..., Any], given: tuple[Array, ...]) -> Any:
        """Return ``change(*given)`` if the condition is true, else `given`; for conditions that cannot be read.

        `change` leaves entries as they are where there is nothing to change. The default therefore calls it in any
        case; a library that can trace a conditional saves the work.

        Parameters
        ----------
        condition : array of bool, shape ()
            The condition.
        change : callable
            Function of the arrays given; it returns arrays of the same shapes and dtypes.
        given : tuple of array
            The arrays.

        Returns
        -------
        tuple of array
            The changed arrays, or the arrays given.
        """
        return change(*given)

    def computing(self, like: Array) -> AbstractContextManager[Any]:
        """Return the context in which every call of the library computes.

        In it, matrix products have the precision of the dtype of their factors, whatever the program's settings, and
        underflow, overflow and NaN raise nothing.

        Parameters
        ----------
        like : array
            An array of the dtype and on the device of the factors.

        Returns
        -------
        context manager
            The context; by default, one that changes nothing.
        """
        return NO_CONTEXT

    def exp_difference(self, xp: Any, x: Array, y: Array) -> Array:
        """Return exp(x − y), where x is a temporary that may be overwritten.

        Parameters
        ----------
        xp : module
            The array namespace.
        x, y : array
            Exponents; y broadcasts against x.

        Returns
        -------
        array
            exp(x − y), possibly in the memory of `x`.
        """
        return xp.exp(x - y)

    def mean_rows(self, xp: Any, x: Array) -> Array:
        """Return the mean over axis −2 of floating-point numbers.

        Parameters
        ----------
        xp : module
            The array namespace.
        x : array
            The numbers.

        Returns
        -------
        array
            The means, without that axis.
        """
        rows = x.shape[-2]
        if not isinstance(rows, int):  # a length that a program leaves open
            return xp.mean(x, axis=-2)
        return xp.sum(x / max(rows, 1), axis=-2)  # rows have their weight before they are added: no sum overflows

    def mean_stored_rows(self, xp: Any, x: Array) -> Array | None:
        """Return the mean over axis −2 in at least float32, without a copy of half precision in float32.

        Parameters
        ----------
        xp : module
            The array namespace.
        x : array, shape (..., segments, rows, d)
            Floating-point numbers.

        Returns
        -------
        array or None
            The means, (..., segments, d). Default: None, the means are those of `mean_rows`, of copies if need be.
        """
        return None

    def softmax(self, xp: Any, x: Array) -> Array:
        """Return exp(x) / Σ exp(x), the sum over the last axis; NaN in rows with NaN or +∞, and of −∞ alone.

        Parameters
        ----------
        xp : module
            The array namespace.
        x : array
            Exponents, a temporary that may be overwritten.

        Returns
        -------
        array
            The weights, in the shape of x.
        """
        weights = self.exp_difference(xp, x, xp.max(x, axis=-1, keepdims=True))
        return weights / xp.sum(weights, axis=-1, keepdims=True)


@cache
def why_missing(package: str, *, load: bool = True) -> str | None:
    """The reason why a package cannot be used, or None; found out once a process, with `load` by importing it."""
    if importlib.util.find_spec(package) is None:
        return f'{package} is not installed (pip install "subquad[{package}]")'
    if not load:
        return None
    try:
        importlib.import_module(package)
    except Exception as error:  # a package may raise anything at import, such as beside a NumPy that is too new for it
        if "." in package and isinstance(error, ImportError):  # a module of a backend, which says what is wrong
            return str(error)
        return f"{package} is installed, but its import raises {type(error).__name__}: {error}"
    return None
