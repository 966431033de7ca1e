"""Every registered scan: it equals its definition, its states merge to one scan, its steps are the scan."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from rows.libraries import (
    LIBRARIES,
    Jax,
    Library,
    NumPy,
    NumPyReadOnly,
    StrictNoFloat64,
    Torch,
    relative_error,
    tolerance,
)
from rows.times import Arrays, cut, drawn, time_axes

import subquad
from subquad.registry import SCANS, ScanRow

LENGTHS = (1, 63)
COMBINATIONS = [
    pytest.param(*library.values, name, id=f"{library.id}-{name}", marks=library.marks)
    for library in LIBRARIES
    for name in SCANS
]
every_scan = pytest.mark.parametrize("name", SCANS)
NUMPY = NumPy()


@functools.cache
def definition(name: str, n: int, library: Library, dtype: str) -> np.ndarray:
    """Of the inputs as the library rounds them."""
    reference, (arrays, options) = SCANS[name].reference, drawn(name, n)
    assert reference is not None, f"register_scan of {name} lacks `reference`, its definition"
    return reference(library.rounded(arrays, dtype), options)


def summarize(row: ScanRow, arrays: Arrays, options: dict[str, Any]) -> Any:
    """`summarize_scan` of inputs by name."""
    positional = [arrays.get(key) for key in row.positional]
    return subquad.summarize_scan(
        row.name, *positional, **{key: x for key, x in arrays.items() if key not in row.positional}, **options
    )


@pytest.mark.parametrize(("library", "name"), COMBINATIONS)
def test_equals_its_definition(library: Library, name: str) -> None:
    row = SCANS[name]
    for n in LENGTHS[isinstance(library, Jax) :]:
        arrays, options = drawn(name, n)
        for dtype in library.dtypes:
            out = library.call(lambda given: row.call(given, options), arrays, dtype=dtype)  # noqa: B023
            rounding = library if dtype == "bfloat16" else NUMPY
            expected = definition(name, n, rounding, dtype)
            assert library.dtype_name(out) == dtype
            assert tuple(out.shape) == expected.shape
            if library.has_values:
                assert relative_error(library.numpy(out), expected) <= tolerance(dtype)


OTHERWISE: dict[str, list[dict[str, Any]]] = {  # options of which the example inputs have another value
    "causal_conv1d": [{"activation": None}],
    "delta_rule": [{"scale": 0.3}, {"scale": None}],
    "gated_linear_attention": [{"scale": 0.3}, {"scale": None}, {"normalize": True}],
    "lti_scan": [{"discretization": rule} for rule in ("zoh", "bilinear", "euler", "mamba")],
    "selective_scan": [{"delta_limits": (0.01, 0.3)}, {"delta_softplus": False, "delta_limits": (0.01, 0.3)}],
    "ssd": [{"delta_limits": (0.01, 0.3)}, {"delta_softplus": False, "delta_limits": (0.01, 0.3)}],
}


@every_scan
def test_its_definition_knows_every_option(name: str) -> None:
    """In either direction, with and without each optional array, and from a state: by the scan itself on NumPy."""
    row, (arrays, options) = SCANS[name], drawn(name, 20)
    assert row.reference is not None
    optional = [key for key in arrays if key not in row.positional]
    for more in [{"reverse": True}, *OTHERWISE.get(name, [])]:
        given = options | more
        assert relative_error(row.call(arrays, given), row.reference(arrays, given)) <= 1e-12
    for key in optional:
        left = {other: x for other, x in arrays.items() if other != key}
        try:
            expected = row.call(left, options)
        except (TypeError, ValueError):  # it is not optional for these options
            continue
        assert relative_error(expected, row.reference(left, options)) <= 1e-12
    _, state = row.call(cut(name, arrays, slice(0, 9)), options | {"return_state": True})
    last = cut(name, arrays, slice(9, None)) | {"initial_state": state}
    assert relative_error(row.call(last, options), row.reference(last, options)) <= 1e-12


SEQUENCES = {"causal_conv1d": "x", "delta_rule": "q k v", "gated_linear_attention": "q k v", "linear_scan": "a b",
             "lti_scan": "u", "selective_scan": "u", "ssd": "x", "wkv": "r k v"}  # fmt: skip


@every_scan
def test_the_sequences_decide_the_dtype_of_the_output(name: str) -> None:
    """Each of them that is wider makes it wider; decays, step sizes, weights and states do not."""
    row, (arrays, options) = SCANS[name], drawn(name, 20)
    deciding = SEQUENCES.get(name, " ".join(row.positional)).split()
    assert set(deciding) < set(arrays) or deciding == list(row.positional)
    wide_rest = {key: x.astype("float32") if key in deciding else x for key, x in arrays.items()}
    assert row.call(wide_rest, options).dtype == "float32"
    narrow = {key: x.astype("float32") if x.dtype == "float64" else x for key, x in arrays.items()}
    for key in deciding:
        assert row.call(narrow | {key: arrays[key]}, options).dtype == "float64"


@pytest.mark.parametrize(
    ("library", "name"), [x for x in COMBINATIONS if not isinstance(x.values[0], NumPyReadOnly | StrictNoFloat64)]
)
def test_states_of_chunks_merge_to_the_state_of_all(library: Library, name: str) -> None:
    """And to what a scan from an initial state ends with."""
    row, (arrays, options) = SCANS[name], drawn(name, 63)
    if row.state.merge is None:
        pytest.skip("its states do not merge")

    def merged(given: Arrays) -> Any:
        parts = [
            summarize(row, cut(name, given, steps), options) for steps in (slice(0, 1), slice(1, 30), slice(30, None))
        ]
        return [functools.reduce(subquad.merge_scan, parts, None), summarize(row, given, options)]

    dtype = library.dtypes[0]
    together, whole = library.call(merged, arrays, dtype=dtype)
    assert set(whole) == set(row.state.fields)
    for key, x in whole.items():
        assert tuple(x.shape) == tuple(together[key].shape)
        if library.has_values:
            assert relative_error(library.numpy(together[key]), library.numpy(x)) <= tolerance(dtype)


def test_states_that_do_not_merge_are_no_summaries() -> None:
    for row in SCANS.values():
        if row.decay is None:
            arrays, options = drawn(row.name, 5)
            with pytest.raises(ValueError, match=r"do not merge; give the state .* as initial_state"):
                summarize(row, arrays, options)


@pytest.mark.parametrize("name", [name for name, row in SCANS.items() if row.state.merge is not None])
def test_a_state_is_what_the_scan_goes_on_from(name: str) -> None:
    """h_after = decay ∘ h_before + state, or with a matrix product, whatever h_before is."""
    row, (arrays, options) = SCANS[name], drawn(name, 20)
    state = summarize(row, arrays, options)
    before = np.random.default_rng(0).standard_normal(state["state"].shape)
    _, after = row.call(arrays | {"initial_state": before}, options | {"return_state": True})
    left = {key: 0 * x for key, x in state.items()} | {"state": before}
    assert relative_error(subquad.merge_scan(left, state)["state"], after) <= 1e-13
    assert relative_error(summarize(row, arrays | {"initial_state": before}, options)["state"], after) <= 1e-13


@pytest.mark.parametrize("name", [name for name, row in SCANS.items() if row.step is not None])
def test_its_step_is_the_scan_of_one_token(name: str) -> None:
    row, (arrays, options) = SCANS[name], drawn(name, 7)
    axes, state, outs = time_axes(name), None, []
    assert row.step is not None
    for t in range(7):
        token = {key: np.take(x, t, axis=axes[key]) if key in axes else x for key, x in arrays.items()}
        step = dataclasses.replace(row, function=row.step, positional=("state", *row.positional))
        out, state = step.call({"state": state, **token}, options)
        outs.append(out)
    expected, last = row.call(arrays, options | {"return_state": True})
    assert relative_error(np.stack(outs, axis=axes[row.positional[0]]), expected) <= 1e-13
    assert relative_error(state, last) <= 1e-13


@every_scan
def test_is_explained(name: str) -> None:
    row, (arrays, options) = SCANS[name], drawn(name, 5)
    explained = dataclasses.replace(row, function=functools.partial(subquad.explain, row.function)).call(
        arrays, options
    )
    assert explained.library == "numpy"
    assert explained.choices
    by_name = dataclasses.replace(row, function=functools.partial(subquad.explain, name)).call(arrays, options)
    assert by_name == explained


@every_scan
def test_example_inputs_have_outputs_near_one(name: str) -> None:
    arrays, options = SCANS[name].draw(np.random.default_rng(3), 300)
    assert 0.2 < np.std(SCANS[name].call(arrays, options)) < 5


def test_linear_scan_of_activations() -> None:
    """Factors from 0.9 to 1, by the mean of a key; four query heads over two key heads, of other widths."""
    q, k, v = (np.random.default_rng(0).standard_normal(shape) for shape in ((4, 30, 6), (2, 30, 6), (2, 30, 5)))
    arrays, options = SCANS["linear_scan"].activations(q, 5 * k, v)
    assert options == {}
    assert arrays["b"] is v
    assert arrays["a"].shape == v.shape
    assert 0.9 < arrays["a"].min() < 0.93 < 0.97 < arrays["a"].max() < 1
    gate = (arrays["a"] - 0.9) / 0.1
    assert relative_error(np.log(gate / (1 - gate))[..., 0], 5 * k.mean(axis=-1)) < 1e-12


def test_selective_scan_of_activations() -> None:
    """A step for each value, the maps from keys and the first query head of each key head."""
    q, k, v = (np.random.default_rng(0).standard_normal(shape) for shape in ((4, 30, 6), (2, 30, 6), (2, 30, 5)))
    arrays, options = SCANS["selective_scan"].activations(q, k, v)
    assert arrays["u"] is v
    assert arrays["delta"].shape == v.shape
    assert 0.5 < np.std(arrays["delta"]) < 2
    assert np.array_equal(arrays["A"], np.tile([-1.0, -2, -3, -4, -5, -6], (5, 1)))
    assert np.array_equal(arrays["B"], k)
    assert np.array_equal(arrays["C"], q[::2])
    assert np.array_equal(arrays["D"], np.ones(5))
    assert relative_error(np.log1p(np.exp(arrays["delta_bias"])), np.full(5, 0.05)) < 1e-12
    assert SCANS["selective_scan"].call(arrays, options).shape == v.shape


@pytest.mark.parametrize("name", ["gated_linear_attention", "wkv"])
def test_a_key_head_of_activations_serves_its_query_heads(name: str) -> None:
    """Four query heads over two key heads are four heads over their keys."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, 6, 4)) for heads in (4, 2, 2))
    shared, own = (
        SCANS[name].call(*SCANS[name].activations(q, *(np.repeat(x, count, axis=0) for x in (k, v))))
        for count in (1, 2)
    )
    assert shared.shape == (4, 6, 4)
    assert np.array_equal(shared, own)


@every_scan
def test_activations_are_inputs(name: str) -> None:
    if SCANS[name].activations is None:
        pytest.skip("it has no example of activations")
    q, k, v = (np.random.default_rng(0).standard_normal((heads, 6, 4)) for heads in (4, 2, 2))
    out = SCANS[name].call(*SCANS[name].activations(q, k, v))
    assert 6 in out.shape
    assert np.isfinite(out).all()


@pytest.mark.parametrize("axis", ["time", "batch"])
@every_scan
def test_a_remembered_call_of_no_step_or_no_item(name: str, axis: str) -> None:
    """On NumPy and PyTorch: the second call of a signature takes a shorter way."""
    row, (arrays, options), axes = SCANS[name], drawn(name, 4), time_axes(name)
    no_item = {key: x[None][:0] if key in axes else x for key, x in arrays.items()}
    empty = cut(name, arrays, slice(0, 0)) if axis == "time" else no_item
    for library in (NUMPY, Torch()):
        given = {key: library.array(x, "float32") for key, x in empty.items()}
        outs = [row.call(given, options | {"return_state": True}) for _ in range(3)]
        shapes = [[tuple(x.shape) for x in out] for out in outs]
        assert shapes[0] == shapes[1] == shapes[2]
