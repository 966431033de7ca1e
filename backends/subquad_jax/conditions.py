"""Reasons why XLA cannot call the compiled CPU kernels here."""

from __future__ import annotations

import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax

from subquad.backend import Call


def declines(call: Call, is_right: Callable[[], bool]) -> str | None:
    """The reason why no compiled kernel can take a call, or None; `is_right` is the check that `self_check` runs."""
    if jax.default_backend() != "cpu":
        return f"it runs on cpu, JAX's default is {jax.default_backend()}"
    if any(0 in x.shape for x in (*call.arrays, call.key_mask) if x is not None):
        return "an axis is empty"
    return self_check(is_right)


_found: dict[Callable[[], bool], str | None] = {}


def self_check(is_right: Callable[[], bool]) -> str | None:
    """The reason why kernels cannot be called, or None if a round trip through XLA gives the right numbers.

    The check runs once. It is there because the layout of XLA's call frame in memory is assumed, see `ffi`.
    """
    if platform.system() not in ("Linux", "Darwin"):
        return f"its threads are not supported on {platform.system()}"
    if is_right not in _found:
        try:
            # in another thread, since a trace of this one (a call under vmap, say) would capture the check
            with ThreadPoolExecutor(1) as elsewhere:
                _found[is_right] = elsewhere.submit(_answer, is_right).result()
        except (MemoryError, RuntimeError) as error:  # no memory or no thread at present: the next call asks again
            return f"its self-check failed: {error}"
    return _found[is_right]


def _answer(is_right: Callable[[], bool]) -> str | None:
    try:
        right = is_right()
    except MemoryError:
        raise
    except Exception as error:  # whatever went wrong, the generic form can take the call
        return f"its self-check failed: {error}"
    return None if right else "its self-check gave wrong numbers"
