"""The selective scan equals the loop over time that defines it, in one call, in chunks and step by step."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import pytest
from rows.libraries import LIBRARIES, Jax, Library, relative_error, tolerance
from rows.scans import D_STATE, SCANS, D, Scan, is_shared, scans

import subquad

LENGTHS = (1, 2, 63, 257)


@functools.cache
def reference(scan_name: str, n: int, library: Library, dtype: str) -> Any:
    scan = next(scan for scan in SCANS if scan.name == scan_name)
    return scan.reference(library.rounded(scan.draw(n), dtype))


_numpy = Library()
COMBINATIONS = [
    pytest.param(*library.values, scan, n, id=f"{library.id}-{scan.name}-n={n}", marks=library.marks)
    for library in LIBRARIES
    for scan in SCANS
    for n in LENGTHS
    if not isinstance(library.values[0], Jax) or n == 63
]


@pytest.mark.parametrize(("library", "scan", "n"), COMBINATIONS)
def test_equals_the_loop(library: Library, scan: Scan, n: int) -> None:
    for dtype in library.dtypes:
        y, state = library.call(scan.call(), scan.draw(n), dtype=dtype)
        assert library.dtype_name(y) == dtype
        held = "float32" if dtype == "bfloat16" else dtype
        assert library.dtype_name(state) == library.target(np.zeros(1, complex if scan.complex_ else float), held)
        expected = reference(scan.name, n, library if dtype == "bfloat16" else _numpy, dtype)
        assert [tuple(x.shape) for x in (y, state)] == [x.shape for x in expected]
        if library.has_values:
            for got, ref in zip((y, state), expected, strict=True):
                assert relative_error(library.numpy(got), ref) <= tolerance(dtype)


@scans()
def test_generic_equals_the_loop(scan: Scan, small_spans: None) -> None:
    """Asked for by name, and cut into several spans."""
    for n in (2, 31, 257):
        for got, ref in zip(
            scan.call(implementation="generic")(scan.draw(n)), scan.reference(scan.draw(n)), strict=True
        ):
            assert relative_error(got, ref) <= tolerance("float64")


@pytest.fixture
def small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a span to two runs of 32 steps, so that 257 steps are four spans and one step."""
    module = importlib.import_module("subquad.kernels.selective_scan")  # the package's attribute is the function
    monkeypatch.setattr(module, "STEP_ELEMENTS", 2 * 2 * D * D_STATE)


def cut(drawn: dict[str, Any], start: int, stop: int, state: Any) -> dict[str, Any]:
    """Steps start … stop of all inputs, from a state."""

    def part(name: str, x: Any) -> Any:
        if is_shared(name, x):
            return x
        return (
            x[..., start:stop, :, :] if name in ("B", "C") and x.ndim == drawn["u"].ndim + 1 else x[..., start:stop, :]
        )

    parts = {name: part(name, x) for name, x in drawn.items() if name != "initial_state"}
    return parts | ({} if state is None else {"initial_state": state})


@pytest.mark.parametrize("chunk", [1, 7, 50])
@scans()
def test_full_equals_chunks(scan: Scan, chunk: int) -> None:
    n = 65
    drawn = scan.draw(n)
    full, last = scan.call()(drawn)
    state, parts = drawn.get("initial_state"), {}
    starts = range(0, n, chunk)
    for start in reversed(starts) if scan.reverse else starts:
        parts[start], state = scan.call()(cut(drawn, start, min(start + chunk, n), state))
    assert relative_error(np.concatenate([parts[start] for start in starts], axis=-2), full) < 1e-12
    assert relative_error(state, last) < 1e-12


@scans(*(scan.name for scan in SCANS if not scan.reverse))
def test_full_equals_steps(scan: Scan) -> None:
    check_steps(Library(), scan)


@scans("gated", "groups", "complex")
def test_full_equals_steps_elsewhere(eager: Library, scan: Scan) -> None:
    check_steps(eager, scan)


def check_steps(library: Library, scan: Scan) -> None:
    drawn = scan.draw(9)
    shared = {name for name, x in drawn.items() if is_shared(name, x)}

    def step(state: Any, token: dict[str, Any]) -> Any:
        names = ("u", "delta", "A", "B", "C", "D")
        more = {name: token.get(name) for name in ("z", "delta_bias")}
        return subquad.selective_scan_step(
            state, *(token.get(name) for name in names), **more, delta_softplus=scan.softplus
        )

    def steps(given: dict[str, Any]) -> Any:
        state, outs = given.get("initial_state"), []
        for t in range(9):
            token = {name: x if name in shared else take(name, x, t) for name, x in given.items()}
            y, state = step(state, token)
            outs.append(y)
        return *outs, state

    def take(name: str, x: Any, t: int) -> Any:
        if name == "initial_state":
            return x
        return x[..., t, :, :] if name in ("B", "C") and scan.maps == "groups" else x[..., t, :]

    *outs, state = (library.numpy(x) for x in library.call(steps, drawn, dtype="float64"))
    full, last = scan.call()(drawn)
    assert relative_error(np.stack(outs, axis=-2), full) < 1e-12
    assert relative_error(state, last) < 1e-12


@scans()
def test_reverse_is_the_scan_of_the_flipped_sequence(scan: Scan) -> None:
    drawn = scan.draw(33)
    flipped = {}
    for name, x in drawn.items():
        axis = -3 if name in ("B", "C") and scan.maps == "groups" else -2
        flipped[name] = x if is_shared(name, x) or name == "initial_state" else np.flip(x, axis=axis)
    other = Scan(**{**vars(scan), "reverse": not scan.reverse})
    y, state = scan.call()(drawn)
    y_other, state_other = other.call()(flipped)
    assert relative_error(np.flip(y_other, axis=-2), y) < 1e-12
    assert relative_error(state_other, state) < 1e-12


@scans("gated", "groups", "complex")
def test_changing_the_future_leaves_the_past_bit_equal(scan: Scan) -> None:
    n, t = 150, 70
    drawn = scan.draw(n)
    later = {name: x if is_shared(name, x) or name == "initial_state" else x.copy() for name, x in drawn.items()}
    for name, x in later.items():
        if not is_shared(name, x) and name != "initial_state":
            x[..., t:, :, :] *= np.nan if x.ndim > drawn["u"].ndim else 1
            if x.ndim == drawn["u"].ndim:
                x[..., t:, :] = np.nan
    y, y_later = (scan.call(return_state=False)(given) for given in (drawn, later))
    assert np.array_equal(y[..., :t, :], y_later[..., :t, :])
    assert np.all(np.isnan(y_later[..., t:, :]))


def test_step_size_zero_passes_the_state_through() -> None:
    scan = Scan("state", extras=("initial_state",))
    drawn = scan.draw(40)
    drawn["delta"][..., 20:, :] = 0
    _, last = scan.call()(drawn)
    _, early = scan.call()(cut(drawn, 0, 20, drawn["initial_state"]))
    assert relative_error(last, early) < 1e-14


@pytest.mark.parametrize("rate", [-1e4, -1e-8, 0.0])
def test_extreme_rates_stay_finite(rate: float) -> None:
    """No exp(−cumsum), no division by a cumulative product: a fast decay underflows to 0 and nothing else."""
    scan = Scan("plain")
    drawn = scan.draw(257)
    drawn["A"] = np.full((D, D_STATE), rate)
    for dtype in ("float32", "float64"):
        y, _ = scan.call()({name: x.astype(dtype) for name, x in drawn.items()})
        assert relative_error(y, scan.reference(drawn)[0]) <= tolerance(dtype)


def test_softplus_of_large_steps_does_not_overflow() -> None:
    drawn = Scan("plain", softplus=True).draw(5)
    for x, expected in ((1e3, 1e3), (-1e3, 0.0)):
        drawn["delta"][...] = x
        y = Scan("plain", softplus=True).call(return_state=False)(drawn)
        linear = Scan("plain").call(return_state=False)({**drawn, "delta": np.full_like(drawn["delta"], expected)})
        assert relative_error(y, linear) < 1e-14


def test_empty_sequence_returns_the_initial_state() -> None:
    scan = Scan("state", extras=("initial_state",))
    drawn = scan.draw(0)
    y, state = scan.call()(drawn)
    assert y.shape == (2, 0, D)
    assert np.array_equal(state, drawn["initial_state"])


def test_maps_broadcast_over_the_batch() -> None:
    scan = Scan("broadcast", batch=(3,))
    drawn = scan.draw(20)
    for name in ("B", "C"):
        drawn[name] = drawn[name][:1]
    full = {**drawn, **{name: np.repeat(drawn[name], 3, axis=0) for name in ("B", "C")}}
    for got, expected in zip(scan.call()(drawn), scan.call()(full), strict=True):
        assert relative_error(got, expected) < 1e-14


@scans("gated", "complex", "groups")
def test_inputs_are_not_written_to(scan: Scan) -> None:
    drawn = scan.draw(40)
    for x in drawn.values():
        x.setflags(write=False)
    before = {name: x.copy() for name, x in drawn.items()}
    scan.call()(drawn)
    assert all(np.array_equal(before[name], x) for name, x in drawn.items())


def test_maps_of_a_step_bring_the_batch() -> None:
    """One input for two items that differ in their maps alone, with a state for each and without."""
    rng = np.random.default_rng(3)
    u, delta = rng.standard_normal((1, 1, D)), rng.uniform(0.1, 1, (1, 1, D))
    A, maps = -rng.uniform(0.1, 1, (D, D_STATE)), rng.standard_normal((2, 2, 1, D_STATE))
    for state in (None, rng.standard_normal((2, D, D_STATE))):
        y, last = subquad.selective_scan(u, delta, A, *maps, initial_state=state, return_state=True)
        step = subquad.selective_scan_step(state, u[:, 0], delta[:, 0], A, *maps[..., 0, :])
        for got, expected in zip(step, (y[:, 0], last), strict=True):
            assert relative_error(got, expected) < 1e-14


def test_maps_of_one_item_beside_a_batch_of_states() -> None:
    """Groups where no batch has so many items; as rows, and as groups, where u says with an axis how they are meant."""
    rng = np.random.default_rng(4)
    u, delta, A = rng.standard_normal(6), rng.uniform(0.1, 1, 6), -rng.uniform(0.1, 1, (6, D_STATE))
    state, maps = rng.standard_normal((3, 6, D_STATE)), rng.standard_normal((2, 3, D_STATE))
    step = subquad.selective_scan_step

    def expected(*each: np.ndarray) -> np.ndarray:
        """y of maps that are written out, (3 items, 6 channels, d_state)."""
        h = np.exp(delta[:, None] * A) * state + each[0] * (delta * u)[:, None]
        return np.sum(h * each[1], axis=-1)

    written = [np.broadcast_to(x[:, None], (3, 6, D_STATE)) for x in maps]
    assert relative_error(step(state, u[None], delta, A, *maps)[0], expected(*written)) < 1e-14
    grouped = [np.broadcast_to(np.repeat(x, 2, axis=0), (3, 6, D_STATE)) for x in maps]
    assert relative_error(step(state, u[None], delta, A, *maps[:, None])[0], expected(*grouped)) < 1e-14
    with pytest.raises(ValueError, match="could have 3 groups, or the batch axes"):
        step(state, u, delta, A, *maps)
    grouped = [np.broadcast_to(np.repeat(x, 3, axis=0), (3, 6, D_STATE)) for x in maps[:, :2]]
    assert relative_error(step(state, u, delta, A, *maps[:, :2])[0], expected(*grouped)) < 1e-14


def test_one_group_of_one_step_is_no_question() -> None:
    """Every axis before d_state is 1, among the groups as among the rows: each reading gives the same numbers."""
    rng = np.random.default_rng(0)
    delta, state = rng.uniform(0.1, 1, (1, 1, 4)), rng.standard_normal((1, 4, D_STATE))
    A, *maps = -rng.uniform(0.1, 1, (4, D_STATE)), *rng.standard_normal((2, 1, 1, D_STATE))
    y = subquad.selective_scan(np.ones((1, 4)), delta, A, *maps, initial_state=state)
    h = np.exp(delta[..., None] * A) * state + delta[..., None] * maps[0]
    assert relative_error(y, np.sum(h * maps[1], axis=-1)) < 1e-14


def test_two_axes_are_constant_maps_beside_a_batch_and_beside_one_item() -> None:
    """In a scan of d steps, and in a step of one item; written out, they are a group for each channel."""
    drawn = Scan("constant", maps="constant", batch=(1,)).draw(D)
    u, delta, A, *maps = drawn.values()
    each = [np.broadcast_to(x, (1, D, D, D_STATE)) for x in maps]
    constant, expected = (subquad.selective_scan(u, delta, A, *given) for given in (maps, each))
    assert relative_error(constant, expected) < 1e-14
    first, _ = subquad.selective_scan_step(None, u[:, 0], delta[:, 0], A, *maps)
    assert relative_error(first, expected[:, 0]) < 1e-14


@pytest.mark.parametrize("implementation", ["generic", "auto"])
def test_maps_may_have_some_of_the_batch_axes(implementation: str) -> None:
    """B differs by the second axis of the batch alone, C by the first: each item reads its own."""
    rng = np.random.default_rng(0)
    u, delta, A = rng.standard_normal((2, 3, 9, 4)), rng.random((2, 3, 9, 4)), -rng.random((4, 5))
    B, C = rng.standard_normal((1, 3, 9, 5)), rng.standard_normal((2, 1, 9, 5))
    whole = [np.broadcast_to(x, (2, 3, 9, 5)).copy() for x in (B, C)]
    y = subquad.selective_scan(u, delta, A, B, C, implementation=implementation)
    expected = subquad.selective_scan(u, delta, A, *whole, implementation=implementation)
    assert np.max(np.abs(y - expected)) <= 1e-14 * np.max(np.abs(expected))
