"""Kernels: how one implementation is chosen for each call, and how `explain` records the choice.

Positional arguments of a kernel are arrays or None; keywords are hashable, except the array `key_mask`. So one rule
serves every kernel: the signature of the arrays and the keywords together decide the implementation, and the choice is
remembered under both.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from subquad.backend import NO_CONTEXT, Array, Backend, Call, Like, Override
from subquad.core import loading
from subquad.core.beside import namespace_of, place_of
from subquad.core.dtypes import cast, is_half
from subquad.core.loading import backend_of, library_of

# Choices remembered for each kernel. A program has a small number of signatures, but decoding may have one for each
# length of its cache: a full table is cleared and filled anew.
MAX_KEPT = 1024
HALF = frozenset({"float16", "bfloat16"})
Again = Callable[[Sequence[Any], Array | None], Any]  # see `Kernel.again`
Computing = Callable[[Any], AbstractContextManager[Any]]  # `Backend.computing`


@dataclass(frozen=True)
class Choice:
    """The implementation that a kernel uses for a call, and why the overrides before it declined.

    Attributes
    ----------
    kernel : str
        Name of the kernel.
    implementation : str
        "generic", or the name of the override.
    declined : tuple of (str, str)
        The overrides that were asked before and declined: (name, reasons), reasons joined by "; ".
    """

    kernel: str
    implementation: str
    declined: tuple[tuple[str, str], ...] = ()


class _Chosen(NamedTuple):
    """The implementation of a call: its name and function, its override if it is one, and who declined."""

    name: str
    run: Callable[..., Any]
    override: Override | None
    declined: list[tuple[str, list[str]]]  # (override, reasons)
    xp: ModuleType  # namespace of the arrays


class _Listener(threading.local):
    """The choices that `explain` collects in this thread; None while no `explain` is running."""

    choices: list[Choice] | None = None
    notes: list[str] | None = None


_listener = _Listener()


@contextmanager
def listening() -> Iterator[tuple[list[Choice], list[str]]]:
    """Collect the choice of every kernel call within the context, and what methods say by `note`.

    No kernel runs there: a call returns zeros of the shapes and dtypes that `Kernel.outputs` declares.
    """
    with _heard_by([], []) as heard:
        yield heard


def computing_for_real() -> AbstractContextManager[Any]:
    """The context in which kernels run even while `explain` collects choices: for what a method decides by values."""
    return _heard_by(None, None)


@contextmanager
def _heard_by(choices: list[Choice] | None, notes: list[str] | None) -> Iterator[Any]:
    before = _listener.choices, _listener.notes
    _listener.choices, _listener.notes = choices, notes
    try:
        yield choices, notes
    finally:
        _listener.choices, _listener.notes = before


def is_listening() -> bool:
    """Whether `explain` collects choices now."""
    return _listener.choices is not None


def note(text: str) -> None:
    """Tell `explain`, if it is listening, what a method has decided."""
    if _listener.notes is not None:
        _listener.notes.append(text)


def signature_of(arrays: Sequence[Array | None]) -> Hashable | None:
    """What decides how a call with these arrays goes, as the backend of the first one's class says; None: unknown.

    The package in which the class is defined tells the library. No table of classes is kept: it would grow, and a
    program that a tracer made of a call with a smaller one would be made anew.
    """
    library = arrays[0].__class__.__module__.partition(".")[0]
    backend: Backend = getattr(loading, "of_" + library)
    try:
        return backend.signature(arrays)
    except AttributeError:  # one of them is no array; the checks will say which
        return None


class Kernel:
    """A replaceable operation: a generic form in plain Array API, and the choice of an override for each call.

    Attributes
    ----------
    name : str
        Name of the generic function.
    generic : callable
        The form in plain Array API; every override must compute what it computes.
    outputs : callable
        ``outputs(*arrays, **keywords)`` is a tuple of `Like`: shape and dtype of each output, without computing.
    options : mapping
        Optional keywords, each with the value that means "not used"; an override lists those that it takes.
    gradient : callable or None
        ``gradient(arrays, outputs, grads, **static)``: derivatives written with kernels, so that they can be
        differentiated in turn. None: backends differentiate `generic`.
    pinned : callable or None
        ``pinned(arrays, outputs, **keywords)``: the generic form with the shift of a state, which an implementation is
        free to choose, held constant at its value in `outputs`. Backends differentiate `pinned` in place of `generic`
        if an override chose the shift.
    parts : callable or None
        The generic form by other kernels, of which each chooses for itself, and which `explain` then tells. It takes
        the calls that every override declines.
    reads_half : bool
        Whether arrays may come in half precision: an override may read them as they are. The generic form, `gradient`
        and all other overrides get them in float32, and what they return is rounded to what `outputs` declares.
    chosen : dict
        The functions chosen for calls so far, by signature or form, and keywords.
    """

    def __init__(
        self,
        generic: Callable[..., Any],
        outputs: Callable[..., tuple[Like, ...]],
        options: Mapping[str, Any],
        gradient: Callable[..., Any] | None = None,
        pinned: Callable[..., Any] | None = None,
        parts: Callable[..., Any] | None = None,
        *,
        reads_half: bool = False,
    ) -> None:
        functools.update_wrapper(self, generic)
        self.name, self.generic, self.outputs, self.options = generic.__name__, generic, outputs, dict(options)
        self.gradient, self.pinned, self.parts, self.reads_half = gradient, pinned, parts, reads_half
        if reads_half:
            self.generic = functools.wraps(generic)(functools.partial(self._in_float32, generic))
            self.gradient = None if gradient is None else functools.partial(self._gradient_in_float32, gradient)
        self.chosen: dict[Any, Callable[..., Any]] = {}
        loading.KERNELS[self.name] = self.options

    def __repr__(self) -> str:
        return f"<kernel {self.name}>"

    def __call__(self, *arrays: Array | None, implementation: str = "auto", **keywords: Any) -> Any:
        """The outputs of the implementation that is chosen for this call."""
        signature = signature_of((*arrays, keywords.get("key_mask")))
        if signature is None and _listener.choices is None:
            return self._choose(arrays, implementation, keywords).run(*arrays, **keywords)
        return self.call_in(signature, None, arrays, implementation, keywords)

    def call_in(
        self, form: Hashable, computing: Computing | None, arrays: Sequence[Array | None], implementation: str,
        keywords: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        """The outputs for arrays whose signature follows from `form` and the keywords, under which the choice is kept.

        They are computed within ``computing(arrays[0])``, if that is given; what an override has bound to such arrays
        needs no context.
        """
        static = keywords
        if "key_mask" in keywords:  # an array: the form tells of it
            static = dict(keywords)
            del static["key_mask"]
        key: Any = (form, implementation, *static.items())
        try:
            run = self.chosen.get(key)
        except TypeError:  # such as a list given as `implementation`: `_choose` raises for it
            run, form = None, None
        if run is not None and _listener.choices is None:
            return run(*arrays) if static is keywords else run(*arrays, key_mask=keywords["key_mask"])
        within = NO_CONTEXT if computing is None else computing(arrays[0])
        with within:
            chosen = self._choose(arrays, implementation, keywords)
            if _listener.choices is not None and chosen.run is self.parts:
                return chosen.run(*arrays, **keywords)
            if _listener.choices is not None:
                reasons = tuple((other, "; ".join(why)) for other, why in chosen.declined)
                _listener.choices.append(Choice(self.name, chosen.name, reasons))
                return self._zeros(chosen.xp, arrays, keywords)
            made = chosen.run(*arrays, **keywords)
        if form is not None:
            bound = self._bound(chosen, computing, arrays, keywords, static)
            if len(self.chosen) >= MAX_KEPT:
                self.chosen.clear()
            self.chosen[key] = bound
        return made

    def _bound(
        self, chosen: _Chosen, computing: Computing | None, arrays: Sequence[Array | None],
        keywords: Mapping[str, Any], static: Mapping[str, Any],
    ) -> Callable[..., Any]:  # fmt: skip
        """The function for calls of these arrays' signature: as the override binds it, or as it is, in the context.

        It takes the arrays, and the key mask where calls have one: `static`, the other keywords, are known to it.
        """
        override = chosen.override
        if override is not None and override.bind is not None:
            known = {x: y for x, y in keywords.items() if x not in self.options or x in override.accepts.options}
            bound = override.bind(arrays, known)
            if bound is not None:
                return bound
        run = functools.partial(chosen.run, **static)
        if computing is None:
            return run

        def run_within(*arrays: Array | None, **mask: Any) -> Any:
            with computing(arrays[0]):
                return run(*arrays, **mask)

        return run_within

    def again(self, form: Hashable, implementation: str, keywords: Mapping[str, Any]) -> Again | None:
        """What computes a call that `call_in` remembers again, without a look at its form; None if none is remembered.

        It takes the arrays and the key mask, and returns None where the choice is to be made anew or to be told.
        """
        chosen = self.chosen
        run = chosen.get((form, implementation, *keywords.items()))
        if run is None:
            return None

        def again(arrays: Sequence[Array | None], key_mask: Array | None) -> Any:
            if self.chosen is not chosen or _listener.choices is not None:
                return None
            return run(*arrays, key_mask=key_mask)

        return again

    def forget(self) -> None:
        """Drop all remembered choices; to be called when overrides have changed."""
        self.chosen = {}

    def _in_float32(self, run: Callable[..., Any], *arrays: Array | None, **keywords: Any) -> Any:
        """What `run` returns for arrays of half precision in float32, rounded to the dtypes of the outputs."""
        xp = namespace_of(arrays[0])
        wide = _widened(xp, arrays)
        found = run(*wide, **keywords)
        if all(x is y for x, y in zip(wide, arrays, strict=True)):
            return found
        if not isinstance(found, tuple):
            return cast(xp, found, self.outputs(*arrays, **keywords)[0].dtype)
        declared = self.outputs(*arrays, **keywords)
        return tuple(cast(xp, x, like.dtype) for x, like in zip(found, declared, strict=True))

    def _gradient_in_float32(
        self, gradient: Callable[..., Any], arrays: Sequence[Array | None], outputs: Sequence[Array],
        grads: Sequence[Array | None], **static: Any,
    ) -> tuple[Array | None, ...]:  # fmt: skip
        """The gradients of arrays of half precision, computed in float32."""
        xp = namespace_of(next(x for x in arrays if x is not None))
        found = gradient(*(_widened(xp, some) for some in (arrays, outputs, grads)), **static)
        return tuple(
            by if x is None or by is None or not is_half(xp, x.dtype) else cast(xp, by, x.dtype)
            for by, x in zip(found, arrays, strict=True)
        )

    def _choose(self, arrays: Sequence[Array | None], implementation: str, keywords: Mapping[str, Any]) -> _Chosen:
        """The implementation of a call."""
        xp = namespace_of(arrays[0])
        backend = backend_of(xp)
        overrides = [override for override in backend.overrides if override.kernel == self.name]
        known = ["auto", "generic", *(override.name for override in overrides)]
        if not isinstance(implementation, str) or implementation not in known:  # an array would be compared by elements
            msg = f"implementation is {implementation!r}; {self.name} on {library_of(xp)} has {known}"
            raise ValueError(msg)
        key_mask = keywords.get("key_mask")
        static = {name: value for name, value in {**self.options, **keywords}.items() if name != "key_mask"}
        declined: list[tuple[str, list[str]]] = []
        call = None
        is_half_call = self.reads_half and any(x is not None and is_half(xp, x.dtype) for x in arrays)
        for override in overrides:
            if implementation not in ("auto", override.name):
                continue
            if is_half_call and not HALF.intersection(override.accepts.dtypes):
                continue
            if call is None:
                conditions = backend.conditions([x for x in (*arrays, key_mask) if x is not None])
                call = Call(self.name, tuple(arrays), key_mask, static, conditions)
            reasons = override.accepts.why_not(call, backend, self.options)
            if not reasons:
                return _Chosen(override.name, self._runner(override), override, declined, xp)
            declined.append((override.name, reasons))
            if implementation == override.name and not is_half_call:
                msg = (
                    f"implementation {implementation!r} cannot take this call: {'; '.join(reasons)}. "
                    f"Use 'auto' or 'generic'"
                )
                raise ValueError(msg)
        if is_half_call and (self.parts is None or implementation != "auto"):  # else the parts read it
            chosen = self._choose(_widened(xp, arrays), implementation, keywords)
            if chosen.override is None:
                return chosen
            return chosen._replace(run=functools.partial(self._in_float32, chosen.run), override=None)
        run = self.generic if self.parts is None or implementation == "generic" else self.parts
        return _Chosen("generic", run, None, declined, xp)

    def _runner(self, override: Override) -> Callable[..., Any]:
        """The function of an override, wrapped to drop the optional keywords that the override does not list."""
        unknown = [name for name in self.options if name not in override.accepts.options]
        if not unknown:
            return override.run

        def run(*arrays: Array | None, **keywords: Any) -> Any:
            return override.run(*arrays, **{name: x for name, x in keywords.items() if name not in unknown})

        return run

    def _zeros(self, xp: ModuleType, arrays: Sequence[Array | None], keywords: Mapping[str, Any]) -> Any:
        """Zeros of the declared shapes and dtypes, on the device of the first array: one array, or a tuple."""
        where = place_of(arrays[0])
        made = tuple(xp.zeros(x.shape, dtype=x.dtype, device=where) for x in self.outputs(*arrays, **keywords))
        return made[0] if len(made) == 1 else made


def kernel(
    *,
    outputs: Callable[..., tuple[Like, ...]],
    options: Mapping[str, Any] | None = None,
    gradient: Callable[..., Any] | None = None,
    pinned: Callable[..., Any] | None = None,
    parts: Callable[..., Any] | None = None,
    reads_half: bool = False,
) -> Callable[[Callable[..., Any]], Kernel]:
    """Declare a replaceable operation: a decorator of its generic form. The arguments are attributes of `Kernel`."""
    return lambda generic: Kernel(generic, outputs, options or {}, gradient, pinned, parts, reads_half=reads_half)


def _widened(xp: ModuleType, arrays: Sequence[Array | None]) -> tuple[Array | None, ...]:
    """The arrays, those of half precision in float32."""
    return tuple(x if x is None or not is_half(xp, x.dtype) else xp.astype(x, xp.float32) for x in arrays)
