"""What an override of a kernel declares, and the call that it is asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subquad.backend import Backend

Array = Any  # any object with an array namespace; the standard has no common class

NO_NUMBERS = ("int", "uint", "bool")  # how the names of dtypes begin that no override computes in


@dataclass(frozen=True)
class Like:
    """The shape and dtype of an array that does not exist yet.

    Attributes
    ----------
    shape : tuple of int
        Shape of the array.
    dtype : dtype of the library
        Data type of the array.
    """

    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class Conditions:
    """The state of a library around a call; all False if the library computes each operation at once.

    Attributes
    ----------
    tracing : bool
        The call is being recorded into a program, such as under ``jax.jit`` or ``torch.compile``.
    transformed : bool
        An array is the wrapper of a functional transform, such as ``vmap``.
    tangents : bool
        An array carries a forward-mode tangent.
    recorded : bool
        Operations are recorded for a backward pass.
    watched : bool
        A mode counts or rewrites single operations, such as a dispatch mode of PyTorch.
    """

    tracing: bool = False
    transformed: bool = False
    tangents: bool = False
    recorded: bool = False
    watched: bool = False


PLAIN = Conditions()
UNLESS_UNDER = {  # condition → the reason to decline of an override that does not list it in `Accepts.under`
    "tracing": "a compiler sees through the generic form",
    "transformed": "functional transforms see through the generic form only",
    "tangents": "forward-mode differentiation sees through the generic form only",
    "recorded": "gradients are recorded through the generic form",
    "watched": "what watches or records operations sees through the generic form only",
}


@dataclass(frozen=True)
class Call:
    """One call of a kernel, as `Accepts.also` receives it.

    Attributes
    ----------
    kernel : str
        Name of the kernel.
    arrays : tuple of array or None
        The positional arguments; None for an optional array that is not given.
    key_mask : array of bool, or None
        The one array that is passed by keyword.
    static : mapping
        The other keywords, optional ones included; their values are hashable.
    conditions : Conditions
        The state of the library around the call.
    """

    kernel: str
    arrays: tuple[Any, ...]  # None for an optional array that is not given
    key_mask: Array | None = None
    static: Mapping[str, Any] = field(default_factory=dict)
    conditions: Conditions = PLAIN


@dataclass(frozen=True)
class Accepts:
    """The calls that an override takes.

    Attributes
    ----------
    dtypes : tuple of str, default ("float32", "float64")
        Names of the dtypes that positional arrays may have; arrays of integers or bool do not count.
    one_dtype : bool, default True
        Whether all positional arrays must have one and the same dtype.
    devices : tuple of str, default ("cpu",)
        Kinds of devices, as `Backend.device_kind` names them; () means every kind. The first array decides.
    options : frozenset of str
        Optional keywords of the kernel that the override takes. A call that uses another one is declined.
    under : frozenset of str
        Names of the `Conditions` under which the override may run. Under any other condition a call is declined.
    needs : tuple of str
        Packages that must be installed. `Backend.why_missing` looks for each once a process, and imports it if no other
        field gives a reason.
    also : callable, optional
        ``also(call)`` returns a further reason to decline, or None. It is called only if no field gives a reason.
    """

    dtypes: tuple[str, ...] = ("float32", "float64")
    one_dtype: bool = True
    devices: tuple[str, ...] = ("cpu",)
    options: frozenset[str] = frozenset()
    under: frozenset[str] = frozenset()
    needs: tuple[str, ...] = ()
    also: Callable[[Call], str | None] | None = None

    def why_not(self, call: Call, backend: Backend, unused: Mapping[str, Any]) -> list[str]:
        """Find all reasons to decline a call.

        Parameters
        ----------
        call : Call
            The call of the kernel.
        backend : Backend
            The backend of the arrays, which names devices and finds packages.
        unused : mapping
            Optional keyword of the kernel → the value that means "not used".

        Returns
        -------
        list of str
            The reasons; empty if the override takes the call.
        """
        reasons = []
        for name, value in unused.items():
            option = call.key_mask if name == "key_mask" else call.static[name]
            if name not in self.options and option is not value:
                is_form = name != "key_mask" and not isinstance(option, int | float)  # such as "causal"
                reasons.append(f"it has no {option} form" if is_form else f"it takes no {name}")
        given = [x for x in call.arrays if x is not None]
        names: list[str] = []
        for x in given:
            kind = dtype_name(x)
            if kind not in names and not kind.startswith(NO_NUMBERS):
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
            missing = backend.why_missing(package, load=not reasons)
            if missing is not None:
                reasons.append(missing)
        if self.also is not None and not reasons:  # `also` may rely on the fields, so it is not asked after a refusal
            own = self.also(call)
            reasons += [] if own is None else [own]
        return reasons


@dataclass(frozen=True)
class Override:
    """A backend's replacement of one kernel.

    Attributes
    ----------
    kernel : str
        Name of the kernel, one of `subquad.kernels`; a name that does not exist raises when the backend is loaded.
    name : str
        Name of the override in `explain` and in ``implementation=``; not "auto" or "generic".
    run : callable
        Function of the kernel's arguments, without the optional keywords that ``accepts.options`` does not list.
        It returns the outputs that `Kernel.outputs` declares.
    accepts : Accepts
        The calls that the override takes.
    bind : callable or None
        ``bind(arrays, keywords)`` is a function like `run`, for calls that share the signature of these arrays, a
        `key_mask` among the keywords, and the other keywords, or None. It gets arrays and, where calls have one, the
        `key_mask` alone, and need not look at the signature again, but at what the backend's `signature` does not tell,
        such as layouts; it raises no floating-point warning. Default: none.
    """

    kernel: str
    name: str
    run: Callable[..., Any]
    accepts: Accepts = Accepts()
    bind: Callable[[Sequence[Any], Mapping[str, Any]], Callable[..., Any] | None] | None = None


def dtype_name(x: Array) -> str:
    """The name of an array's dtype without the library's name, such as "float32"."""
    return str(x.dtype).rpartition(".")[2]
