"""What is not finite at a step of a scan changes no earlier output, and makes those outputs not finite that depend on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import EAGER, Jax, Library, NumPy, Torch
from rows.times import Arrays, drawn, out_axis, time_axes

from subquad.registry import SCANS

N, STEP = 70, 40  # in a chunk with earlier and with later steps
INPUTS = [(name, key) for name in SCANS for key in (*time_axes(name), "initial_state")]
implementations = pytest.mark.parametrize("implementation", ["auto", "generic"])
COMBINATIONS = [
    pytest.param(*library.values, name, id=f"{library.id}-{name}", marks=library.marks)
    for library in EAGER
    for name in SCANS
]


def first_channels(name: str) -> tuple[Arrays, dict[str, Any]]:
    """The example inputs, few of their channels where a library takes long for many."""
    arrays, options = drawn(name, N)
    if name == "causal_conv1d":
        arrays = {key: x[(..., slice(4), *[slice(None)] * (key == "weight"))] for key, x in arrays.items()}
    return arrays, options


def spoilt(x: np.ndarray, axis: int, value: float) -> np.ndarray:
    """A copy in which one number of the step is `value`."""
    x = x.copy()
    x[(0,) * (x.ndim + axis) + (STEP,) + (0,) * (-axis - 1)] = value
    return x


@implementations
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("library", "name"), COMBINATIONS)
def test_earlier_outputs_keep_every_bit(library: Library, name: str, reverse: bool, implementation: str) -> None:
    (arrays, options), axes, row = first_channels(name), time_axes(name), SCANS[name]
    earlier = slice(STEP + 1, None) if reverse else slice(STEP)
    dtype = "float32" if isinstance(library, Jax) else "float64"
    how = options | {"reverse": reverse, "implementation": implementation}

    def out(given: Arrays) -> np.ndarray:
        found = library.call(lambda given: row.call(given, how), given, dtype=dtype)
        return np.moveaxis(library.numpy(found), out_axis(name), 0)

    clean = out(arrays)
    one_by_one = [{key: axis} for key, axis in axes.items()] if type(library) in (NumPy, Torch) else []
    for keys in (axes, *one_by_one):
        for value in (np.nan, np.inf):
            with np.errstate(all="ignore"):
                dirty = out(arrays | {key: spoilt(arrays[key], axis, value) for key, axis in keys.items()})
            assert np.array_equal(dirty[earlier], clean[earlier])
            assert not np.isfinite(dirty[: STEP + 1] if reverse else dirty[STEP:]).all()


@implementations
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "key"), INPUTS)
def test_reaches_what_its_definition_lets_it_reach(name: str, key: str, value: float, implementation: str) -> None:
    (arrays, options), row = first_channels(name), SCANS[name]
    if key == "initial_state":
        _, state = row.call(arrays, options | {"return_state": True})
        state[(0,) * state.ndim] = value
        given = arrays | {key: state}
    else:
        given = arrays | {key: spoilt(arrays[key], time_axes(name)[key], value)}
    assert row.reference is not None
    with np.errstate(all="ignore"):
        expected = row.reference(given, options)
        found = row.call(given, options | {"implementation": implementation})
    assert np.array_equal(np.isfinite(found), np.isfinite(expected))


@implementations
@pytest.mark.parametrize("name", SCANS)
def test_states_before_it_keep_every_bit(name: str, implementation: str) -> None:
    (arrays, options), axes, row = first_channels(name), time_axes(name), SCANS[name]
    how = options | {"implementation": implementation, "states_at": (STEP, STEP + 1)}
    dirty = arrays | {key: spoilt(arrays[key], axis, np.nan) for key, axis in axes.items()}
    one, other = (NumPy().call(lambda x: row.call(x, how), x, dtype="float64")[-1] for x in (arrays, dirty))
    assert np.array_equal(one[0], other[0])
    assert not np.isfinite(other[1]).all()
