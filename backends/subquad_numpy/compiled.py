"""A compiled kernel is one `Compiled`, which NumPy runs and PyTorch and JAX adapt: no kernel has glue of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from subquad.backend import Accepts, Override
from subquad_numpy.runtime.arguments import Forms
from subquad_numpy.runtime.stored import widened

Array = np.ndarray[Any, Any]
Arrays = Sequence[Any]  # arrays, or None where there is none
Static = Mapping[str, Any]


class Forward(Protocol):
    """``forward(arrays, static) -> (outputs, saved)``; `saved` is what the backward pass needs beside the outputs.

    `new(shape, dtype)` allocates an output. `save` says that a backward pass will come. `threads` is the number of
    threads, or a `runtime.threads.Team` of another library's threads.
    """

    def __call__(
        self,
        arrays: Arrays,
        static: Static,
        *,
        new: Callable[[tuple[int, ...], Any], Array] = ...,
        save: bool = ...,
        threads: int | None = ...,
    ) -> tuple[tuple[Array, ...], Any]: ...


class Backward(Protocol):
    """``backward(arrays, static, saved, outputs, grads, need)`` is a gradient for each array.

    It has the array's shape, or the batch axes of the whole call, over which the caller then adds it up.

    `grads` has None for an output that nobody differentiates; `need` says which arrays want a gradient. A returned
    gradient that is None is zero or was not needed. The gradient by a complex array is ∂/∂Re + i ∂/∂Im of a real loss.
    `backward` returns None alone where it cannot be used: then the generic form is differentiated.
    """

    def __call__(
        self,
        arrays: Arrays,
        static: Static,
        saved: Any,
        outputs: Arrays,
        grads: Arrays,
        need: Sequence[bool],
        *,
        threads: int | None = ...,
    ) -> tuple[Array | None, ...] | None: ...


@dataclass(frozen=True)
class Compiled:
    """A kernel on memory of the host.

    `arrays` are the kernel's positional arguments, and last its `key_mask` (or None) if the kernel has that keyword;
    `static` holds the other keywords.

    Attributes
    ----------
    kernel : str
        Name of the kernel of `subquad.kernels`.
    accepts : Accepts
        Which calls the compiled code takes.
    forward : Forward
        Computes the outputs.
    backward : Backward or None
        Computes the gradients; None if the generic form is to be differentiated.
    launch : callable or None
        ``launch(arrays, static, run)`` returns the outputs, for a library that runs compiled code from its own
        programs. The library provides ``run(launch, operands)``: see `runtime.launch`. All else is plain Array API.
        If the kernel `saves`, ``launch(…, save=True)`` returns more outputs, which `launch_backward` reads.
    launch_backward : callable or None
        ``launch_backward(arrays, static, outputs, grads, run)`` returns a gradient for each array, or None alone, as
        `backward`. `run` is a `GradientRun`. `grads` has None for an output of a kernel that `broadcasts` that nobody
        differentiates, else zeros.
    unaided : frozenset of int
        Outputs without gradient, because the kernel is free to choose their value: the shift of a state.
    saves : bool
        Whether `backward` needs what a forward pass with `save` leaves beside its outputs.
    broadcasts : bool
        Whether all arrays and outputs have two axes of their own, a key mask one, and batch axes that broadcast. Then a
        batch of calls is one call with one more batch axis.
    unread : frozenset of int
        What `launch_backward` does not read: places in (*arrays, *outputs).
    constant : bool
        Whether no output has a gradient: all are numbers of rows.
    launches_half : bool
        Whether `launch` and `launch_backward` take half precision too, where `accepts` names it.
    as_stored : callable or None
        ``as_stored(place)`` tells of which arrays half precision is read as it is; others are converted to float32.
    """

    kernel: str
    accepts: Accepts
    forward: Forward
    backward: Backward | None = None
    launch: Callable[..., tuple[Any, ...]] | None = None
    launch_backward: Callable[..., tuple[Any, ...]] | None = None
    unaided: frozenset[int] = frozenset()
    saves: bool = False
    broadcasts: bool = False
    unread: frozenset[int] = frozenset()
    constant: bool = False
    launches_half: bool = True
    as_stored: Callable[[int], bool] | None = None

    def as_read(self, arrays: Sequence[Any], widen: Callable[[Any], Any]) -> tuple[Any, ...]:
        """The arrays as the kernel reads them: `widen(x)`, in float32, of those in half precision that it cannot."""
        if self.as_stored is None:
            return tuple(arrays)
        return tuple([x if x is None or self.as_stored(i) else widen(x) for i, x in enumerate(arrays)])


def as_override(compiled: Compiled) -> Override:
    """The override "compiled" by which NumPy runs a compiled kernel."""
    forward, masked = compiled.forward, "key_mask" in compiled.accepts.options

    def run(*arrays: Array | None, **static: Any) -> Any:
        if masked:
            arrays = (*arrays, static.pop("key_mask", None))
        outputs, _ = forward(compiled.as_read(arrays, widened), static)
        return outputs if len(outputs) > 1 else outputs[0]

    def bind(arrays: Arrays, static: Static) -> Callable[..., Any] | None:
        if not isinstance(forward, Forms):
            return None
        static = dict(static)
        given = (*arrays, static.pop("key_mask", None)) if masked else arrays
        if any(x is not y for x, y in zip(given, compiled.as_read(given, widened), strict=True)):
            return None
        return forward.bound(given, static, masked=masked)

    return Override(compiled.kernel, "compiled", run, compiled.accepts, bind)
