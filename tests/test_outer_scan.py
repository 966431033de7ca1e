"""The kernel `outer_scan` equals the loop that defines it; resets part segments for good; decays of every size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows import definitions
from rows.kernels import EXAMPLES, Example
from rows.libraries import relative_error, tolerance

from subquad.kernels import outer_scan
from subquad_numpy.outer_scan import calls

implementations = pytest.mark.parametrize("implementation", ["auto", "generic"])
examples = pytest.mark.parametrize("example", EXAMPLES["outer_scan"], ids=str)
NAMES = ("q", "k", "v", "g", "weight", "bonus", "skip", "initial_state", "resets")
OVER_TIME = (*NAMES[:5], "resets")
Array = np.ndarray


def drawn(n: int, decay: str, seed: int = 1) -> dict[str, Any]:
    """Inputs by name: two items, two groups of two heads, 9 channels of keys and 20 of values."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 2, n, 2, 9))
    g = None if not decay else -rng.uniform(0, 0.5, (2, n, 4, 9 if decay == "channel" else 1))
    state = rng.standard_normal((2, 4, 9, 20))
    return dict(zip(NAMES, (q, k, rng.standard_normal((2, n, 4, 20)), g, rng.random((2, n, 4)), None, None, state, None),
                    strict=True))  # fmt: skip


def scan(given: dict[str, Any], implementation: str = "auto", **options: Any) -> tuple[Array, Array]:
    return outer_scan(*given.values(), **{"scale": 0.5, "reverse": False} | options, implementation=implementation)


def cut(given: dict[str, Any], steps: slice) -> dict[str, Any]:
    return {name: x[:, steps] if name in OVER_TIME and x is not None else x for name, x in given.items()}


@implementations
@examples
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_equals_the_loop(example: Example, implementation: str, dtype: str) -> None:
    rounded = [None if x is None else x if x.dtype == bool else x.astype(dtype) for x in example.arrays]
    got = outer_scan(*rounded, **example.static, implementation=implementation)
    wide = [None if x is None else x if x.dtype == bool else x.astype("f8") for x in rounded]
    for x, expected in zip(got, definitions.outer_scan(*wide, **example.static), strict=True):
        assert (x.shape, x.dtype) == (expected.shape, dtype)
        assert relative_error(x, expected) <= tolerance(dtype)


@implementations
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("g", [0.0, -1e-6, -1e-3, -0.3, -5.0, -100.0, -1e30, -np.inf])
def test_no_decay_is_too_small_or_too_near_one(g: float, decay: str, bonus: bool, implementation: str) -> None:
    """At one and the same decay for all steps, the rounding of exp(g) would add up."""
    given = drawn(2000, decay)
    given["bonus"] = np.ones((1, 4, 9)) if bonus else None
    given["g"] = np.full_like(given["g"], np.float32(g))
    single = {name: None if x is None else x.astype("f4") for name, x in given.items()}
    wide = {name: None if x is None else x.astype("f8") for name, x in single.items()}
    for x, expected in zip(scan(single, implementation), definitions.outer_scan(**wide, scale=0.5), strict=True):
        assert relative_error(x, expected) <= 5e-6


@implementations
@pytest.mark.parametrize("decay", ["", "head", "channel"])
@pytest.mark.parametrize("reverse", [False, True])
def test_full_equals_chunks(reverse: bool, decay: str, implementation: str) -> None:
    n, given = 150, drawn(150, decay)
    given["resets"] = np.random.default_rng(0).random((2, n)) < 0.03
    full, last = scan(given, implementation, reverse=reverse)
    starts, parts = range(0, n, 47), {}
    for start in reversed(starts) if reverse else starts:
        part = cut(given, slice(start, start + 47))
        parts[start], given["initial_state"] = scan(part, implementation, reverse=reverse)
    whole = np.concatenate([parts[start] for start in starts], axis=1)
    if implementation == "generic":
        assert relative_error(whole, full) <= tolerance("float64")
        assert relative_error(given["initial_state"], last) <= tolerance("float64")
    else:
        assert np.array_equal(whole, full)
        assert np.array_equal(given["initial_state"], last)


@pytest.mark.parametrize("columns", [75, 96])
@pytest.mark.parametrize("extra", ["skip", "bonus", "gate"])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_panels_of_a_task_do_not_know_each_other(decay: str, extra: str, columns: int) -> None:
    """A task of all panels of a head gives the bits that tasks of one panel give; a single step too."""
    threads = (1, 8, 64)  # of eight heads
    assert {calls.cut_work(8, columns, np.float32, count)[1] for count in threads} > {8}
    rng, static = np.random.default_rng(3), {"scale": 0.5, "reverse": False}
    for n in (1, 77):
        given = drawn(n, decay)
        given["v"] = rng.standard_normal((2, n, 4, columns))
        given["initial_state"] = rng.standard_normal((2, 4, 9, columns))
        if extra == "skip":
            given["skip"] = rng.standard_normal((4, columns))
        if extra == "bonus":
            given["bonus"] = rng.standard_normal((1, 4, 9))
        arrays = [None if x is None else x.astype("f4") for x in given.values()]
        gates = [rng.standard_normal(given["v"].shape).astype("f4")] if extra == "gate" else []
        found = [calls.scan([*arrays, *gates], static, new=np.empty, threads=count)[0] for count in threads]
        expected = definitions.outer_scan(*(None if x is None else x.astype("f8") for x in arrays), scale=0.5)
        if gates:
            z = gates[0].astype("f8")
            expected = (expected[0] * z / (1 + np.exp(-z)), expected[1])
        for one, *others, exact in zip(*found, expected, strict=True):
            assert relative_error(one, exact) <= tolerance("float32")
            assert all(np.array_equal(one, other) for other in others)


@examples
def test_gradients_in_spans_are_those_of_the_whole(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long sequence is cut so that memory stays small; strided gradients and inputs are read in place."""
    torch = pytest.importorskip("torch")

    def gradients(implementation: str) -> list[Any]:
        given = [None if x is None else torch.from_numpy(x.copy()) for x in example.arrays]
        leaves = [x.requires_grad_() for x in given if x is not None and x.dtype != torch.bool]
        o, state = outer_scan(*given, **example.static, implementation=implementation)
        weights = torch.from_numpy(np.random.default_rng(2).standard_normal(o.shape[::-1]).T)
        return list(torch.autograd.grad((o * weights).sum() + state.sin().sum(), leaves))

    expected = gradients("generic")
    for most in (calls.MOST_BYTES, 20_000):
        monkeypatch.setattr(calls, "MOST_BYTES", most)
        for x, y in zip(gradients("compiled"), expected, strict=True):
            assert relative_error(x.numpy(), y.numpy()) <= tolerance("float64")


@implementations
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("decay", ["", "head", "channel"])
def test_a_segment_knows_nothing_of_others(decay: str, bonus: bool, implementation: str) -> None:
    """A reset selects: NaN in another segment and in the state before changes no bit of an output or gradient."""
    torch = pytest.importorskip("torch")
    n, found = 130, []
    given = drawn(n, decay)
    given["bonus"] = np.ones((1, 4, 9)) if bonus else None
    given["resets"] = np.zeros((2, n), bool)
    given["resets"][:, [20, 41, 47, 90]] = True
    own = np.r_[20:41, 47:n]
    for bad in (False, True):
        mine = {name: None if x is None else torch.from_numpy(x.copy()) for name, x in given.items()}
        if bad:
            for name in NAMES[:5]:
                if mine[name] is not None:
                    mine[name][:, 41:47] = np.nan
            mine["initial_state"][:] = np.nan
        leaves = [x.requires_grad_() for name, x in mine.items() if name in NAMES[:5] and x is not None]
        o, state = scan(mine, implementation)
        grads = torch.autograd.grad(o[:, own].square().sum() + state.square().sum(), leaves)
        found.append([o[:, own].detach(), state.detach(), *(x[:, own] for x in grads)])
    for x, y in zip(*found, strict=True):
        assert torch.isfinite(x).all()
        assert torch.equal(x, y)
