"""Whether XLA can call the compiled CPU kernels here."""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
from jax import Array

from subquad_numpy._kernels import without_numba


def declines(first: Array, *others: Array | None) -> str | None:
    """Why the compiled kernels cannot take the arrays."""
    if reason := without_numba():
        return reason
    for x in (first, *others):
        if isinstance(x, jax.core.Tracer):
            continue
        if x is not None and any(device.platform != "cpu" for device in x.devices()):
            return f"it runs on the CPU, the arrays are on {x.devices()}"
    if jax.default_backend() != "cpu":
        return f"it runs on the CPU, JAX's default is {jax.default_backend()}"
    if 0 in first.shape:
        return "an axis is empty"
    return None


_found: dict[Callable[[], bool], str | None] = {}


def self_check(is_right: Callable[[], bool]) -> str | None:
    """Does a round trip through XLA give the right numbers? The call frame is an interface of bytes."""
    if platform.system() not in ("Linux", "Darwin"):
        return f"its threads are not supported on {platform.system()}"
    if is_right not in _found:
        try:
            with ThreadPoolExecutor(1) as elsewhere:  # what is traced here, a call under vmap, would reach into it
                _found[is_right] = elsewhere.submit(_answer, is_right).result()
        except (MemoryError, RuntimeError) as error:  # no memory, no thread: the next call asks again
            return f"its self-check failed: {error}"
    return _found[is_right]


def _answer(is_right: Callable[[], bool]) -> str | None:
    try:
        right = is_right()
    except MemoryError:
        raise
    except Exception as error:  # whatever went wrong, the generic form is there
        return f"its self-check failed: {error}"
    return None if right else "its self-check gave wrong numbers"
