"""Whether XLA can call the compiled CPU kernels here."""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax

from subquad.backend import Call


def declines(call: Call, is_right: Callable[[], bool]) -> str | None:
    """Why the compiled kernels cannot take a call, whichever it is; `is_right` is a check for `self_check`."""
    if jax.default_backend() != "cpu":
        return f"it runs on cpu, JAX's default is {jax.default_backend()}"
    if any(0 in x.shape for x in (*call.arrays, call.key_mask) if x is not None):
        return "an axis is empty"
    return self_check(is_right)


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
