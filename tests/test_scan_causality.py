"""What is not finite at a step of a scan changes no earlier output, and reaches what its definition lets it reach."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from rows.libraries import EAGER, Library, NumPy, Torch
from rows.times import Arrays, cut, drawn, out_axis, time_axes

from subquad.registry import SCANS

N, STEP = 70, 40  # in a chunk with earlier and with later steps
FORMS = (
    *SCANS,
    "gated_linear_attention of one decay",
    "gated_linear_attention without decay",
    *("wkv of version 4", "wkv of version 5", "wkv of version 7"),
)
INPUTS = [(form, key) for form in SCANS for key in (*time_axes(form), "initial_state")]
implementations = pytest.mark.parametrize("implementation", ["auto", "generic"])
COMBINATIONS = [
    pytest.param(*library.values, form, id=f"{library.id}-{form}", marks=library.marks)
    for library in EAGER
    for form in (FORMS if type(library.values[0]) in (NumPy, Torch) else SCANS)
]


@functools.cache
def inputs(form: str) -> tuple[str, Arrays, dict[str, Any], dict[str, int]]:
    """(name of the scan, arrays, options, the axes of time of the arrays that have one)."""
    name, _, kind = form.partition(" ")
    arrays, options = drawn(name, N)
    if kind == "of one decay":
        arrays = arrays | {"g": arrays["g"][..., :1]}
    elif kind == "without decay":
        arrays = {key: x for key, x in arrays.items() if key != "g"}
    elif kind == "of version 4":
        arrays, options = (
            {key: x[0, 0] if key in "wu" and x.ndim == 3 else x[0] for key, x in arrays.items()},
            {"version": 4},
        )
    elif kind == "of version 5":
        arrays, options = arrays | {"w": arrays["w"][:, 0, :1]}, {"version": 5}
    elif kind == "of version 7":
        arrays = {key: arrays[key] for key in "rkvw"} | {"a": -arrays["k"] / 4, "b": arrays["k"] / 4}
        options = {"version": 7}
    axes = {key: -2 for key in ("a", "b") if kind == "of version 7"} | time_axes(name)
    return name, arrays, options, {key: axis for key, axis in axes.items() if key in arrays and N in arrays[key].shape}


def spoilt(x: np.ndarray, axis: int, value: float) -> np.ndarray:
    """A copy in which one number of the step is `value`."""
    x = x.copy()
    x[(0,) * (x.ndim + axis) + (STEP,) + (0,) * (-axis - 1)] = value
    return x


@implementations
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("library", "form"), COMBINATIONS)
def test_earlier_outputs_keep_every_bit(library: Library, form: str, reverse: bool, implementation: str) -> None:
    name, arrays, options, axes = inputs(form)
    earlier, others = slice(STEP), slice(STEP, None)
    if reverse:
        earlier, others = slice(STEP + 1, None), slice(STEP + 1)
    how = options | {"reverse": reverse, "implementation": implementation}

    one_by_one = [{key: axis} for key, axis in axes.items()] if type(library) in (NumPy, Torch) else []
    changed = [arrays | {key: spoilt(arrays[key], axis, value) for key, axis in keys.items()}
               for keys in (axes, *one_by_one) for value in (np.nan, np.inf)]  # fmt: skip
    with np.errstate(all="ignore"):  # JAX compiles one program for all
        found = library.calls(
            lambda given: SCANS[name].call(given, how), [arrays], *([x] for x in changed), dtype="float32"
        )
    clean, *dirty = (np.moveaxis(library.numpy(x), out_axis(name), 0) for x in found)
    for got in dirty:
        assert np.array_equal(got[earlier], clean[earlier])
        assert not np.array_equal(got[others], clean[others])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "key"), INPUTS)
def test_reaches_what_its_definition_lets_it_reach(name: str, key: str, value: float) -> None:
    """In both forms, whose last states are finite alike; a state too may be where it begins."""
    _, arrays, options, axes = inputs(name)
    row = SCANS[name]
    if key == "initial_state":
        _, state = row.call(arrays, options | {"return_state": True})
        state = state.copy()
        state[(0,) * state.ndim] = value
        given = arrays | {key: state}
    else:
        given = arrays | {key: spoilt(arrays[key], axes[key], value)}
    assert row.reference is not None
    with np.errstate(all="ignore"):
        expected = np.isfinite(row.reference(given, options))
        how = options | {"return_state": True}
        (out, state), (generic, other) = (
            row.call(given, how | {"implementation": form}) for form in ("auto", "generic")
        )
    assert np.array_equal(np.isfinite(out), expected)
    assert np.array_equal(np.isfinite(generic), expected)
    assert np.array_equal(np.isfinite(state), np.isfinite(other))


FORGETS = {"linear_scan": ("a", 0.0), "selective_scan": ("delta", 1e9), "ssd": ("delta", 1e9), "delta_rule": ("g", -np.inf),
           "gated_linear_attention": ("g", -np.inf), "wkv": ("w", -np.inf)}  # fmt: skip


@implementations
@pytest.mark.parametrize("n", [1, 6, N])
@pytest.mark.parametrize(("library", "name"), [
    pytest.param(*library.values, name, id=f"{library.id}-{name}", marks=library.marks)
    for library in EAGER if type(library.values[0]) in (NumPy, Torch) for name in FORGETS
])  # fmt: skip
def test_a_decay_of_0_does_not_forget_an_infinite_state(
    library: Library, name: str, n: int, implementation: str
) -> None:
    """0 · ∞ is NaN by the definition; a reset forgets, by selection."""
    _, arrays, options, axes = inputs(name)
    arrays = cut(name, arrays, slice(n))
    key, value = FORGETS[name]
    decays = np.moveaxis(arrays[key].copy(), axes[key], 0)
    decays[min(n - 1, 3)] = value
    _, state = SCANS[name].call(arrays, options | {"return_state": True})
    given = arrays | {key: np.moveaxis(decays, 0, axes[key]), "initial_state": np.full_like(state, np.inf)}
    how = options | {"implementation": implementation, "return_state": True}
    with np.errstate(all="ignore"):
        expected = np.isfinite(SCANS[name].reference(given, options))
        out, last = library.call(lambda given: SCANS[name].call(given, how), given, dtype="float32")
    assert np.array_equal(np.isfinite(library.numpy(out)), expected)
    assert np.all(np.isnan(library.numpy(last)))


@implementations
@pytest.mark.parametrize("form", FORMS)
def test_states_before_it_keep_every_bit(form: str, implementation: str) -> None:
    name, arrays, options, axes = inputs(form)
    how = options | {"implementation": implementation, "states_at": (STEP, STEP + 1)}
    dirty = arrays | {key: spoilt(arrays[key], axis, np.nan) for key, axis in axes.items()}
    one, other = (NumPy().call(lambda x: SCANS[name].call(x, how), x, dtype="float64")[-1] for x in (arrays, dirty))
    assert np.array_equal(one[0], other[0])
    assert not np.isfinite(other[1]).all()
