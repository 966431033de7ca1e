"""The compiled gradient of the selective scan under JAX begins from the states that its forward pass has saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("llvmlite")
pytest.importorskip("jax")

import jax.numpy as jnp
from compiled_calls import scan_backward

from subquad_jax.programs import InProgram
from subquad_numpy.selective_scan.calls import TILE, scan
from subquad_numpy.table import COMPILED

SCAN = COMPILED["selective_scan"]
STATIC = {"delta_softplus": True, "reverse": False}
N, D, D_STATE = 2 * TILE + 5, 33, 5
CASES = {"real": np.float32, "complex": np.complex64}


def draw(state: Any) -> tuple[Any, ...]:
    """(u, delta, A, B, C, D, z, bias, initial state) of two items."""
    rng = np.random.default_rng(0)
    u, delta, z = rng.standard_normal((3, 2, N, D), dtype=np.float32)
    A, B, C = (rng.standard_normal(shape) for shape in ((D, D_STATE), (2, N, 1, D_STATE), (2, N, 1, D_STATE)))
    turns = 1j * rng.standard_normal(A.shape) if state is np.complex64 else 0
    skip, bias = rng.standard_normal((2, D), dtype=np.float32)
    h = rng.standard_normal((2, D, D_STATE))
    A, B, C, h = (x.astype(state) for x in (turns - np.abs(A), B, C, h))
    return tuple(map(jnp.asarray, (u, delta, A, B, C, skip, z, bias, h)))


def saving(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """(y, last state, saved states)."""
    assert SCAN.launch is not None
    return SCAN.launch((*arrays, None), STATIC, InProgram(), save=True)


def gradients(arrays: tuple[Any, ...], saved: Any, *grads: Any) -> tuple[Any, ...]:
    assert SCAN.launch_backward is not None
    found = SCAN.launch_backward((*arrays, None), STATIC, (None, None, saved), grads, InProgram())
    assert found is not None
    return found


@pytest.mark.parametrize("state", CASES.values(), ids=list(CASES))
def test_saves_the_states_before_each_tile(state: Any) -> None:
    arrays = draw(state)
    _, expected = scan((*map(np.asarray, arrays), None), STATIC, save=True)
    assert expected is not None
    np.testing.assert_array_equal(saving(arrays)[2], expected)


@pytest.mark.parametrize("state", CASES.values(), ids=list(CASES))
def test_is_the_gradient_of_numpy(state: Any) -> None:
    arrays = draw(state)
    y, h, saved = saving(arrays)
    expected = scan_backward(
        *map(np.asarray, arrays), **STATIC, grad_y=np.asarray(y), grad_state=np.asarray(h), saves=True
    )
    for got, by in zip(gradients(arrays, saved, y, h), expected, strict=True):
        if by is not None:
            np.testing.assert_allclose(got, by, rtol=0, atol=1e-6 * (1 + np.abs(by).max(initial=0)))


@pytest.mark.parametrize("state", CASES.values(), ids=list(CASES))
def test_reads_the_saved_states(state: Any) -> None:
    arrays = draw(state)
    y, h, saved = saving(arrays)
    assert np.isnan(gradients(arrays, saved * np.nan, y, h)[4]).all()  # by C
