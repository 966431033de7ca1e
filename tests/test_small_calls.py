"""What a scan remembers of a call, so that the next one is short: the function of its kernel, bound to an array form."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from rows.kernels import overrides_replaced
from rows.libraries import relative_error

import subquad
from subquad.backend import Accepts, Override
from subquad.core.loading import backend_of
from subquad.kernels import linear_scan as kernel
from subquad.kernels.sigmoid import sigmoid

pytest.importorskip("llvmlite")
from subquad_numpy.runtime import direct
from subquad_numpy.table import COMPILED

STEPS = {
    "linear": lambda a, b, h: subquad.linear_scan_step(h[0], a[0], b[0]),
    "conv": lambda a, b, h: subquad.causal_conv1d_step(h[:3], a[0], b[:4].T, activation="silu"),
    "gated": lambda a, b, h: subquad.gated_linear_attention_step(h, a[0], b[0], a[1], -np.abs(b[1])),
    "delta": lambda a, b, h: subquad.delta_rule_step(h, a[0] / 9, b[0] / 9, a[1], np.abs(b[:1, 0]).reshape(())),
    "wkv": lambda a, b, h: subquad.wkv_step(h, a[0], b[0], a[1], -np.abs(b[1]), version=6, u=a[2]),
}


def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.abs(rng.standard_normal((16, 16))) for _ in range(3)]


def spread(x: np.ndarray) -> np.ndarray:
    """The array, in every other place of a larger one."""
    wide = np.full((32, 32), np.nan)
    wide[::2, ::2] = x
    return wide[::2, ::2]


def frozen(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def misaligned(x: np.ndarray) -> np.ndarray:
    bytes_ = np.zeros(x.nbytes + 1, np.uint8)[1:]
    y = bytes_.view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


class Kind(np.ndarray):
    """A class that computes as arrays of NumPy do."""


FORMS = {
    "spread": spread, "frozen": frozen, "misaligned": misaligned, "by columns": np.asfortranarray,
    "reversed": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_a_remembered_call_takes_arrays_of_any_layout(name: str, form: str) -> None:
    """The first call binds the layout of its arrays; a later call of the same shapes may have any other."""
    step, given = STEPS[name], arrays()
    expected = [step(*given) for _ in range(3)][2]  # of compiled code alone
    for got in (step(*map(FORMS[form], given)), step(*given)):
        for x, y in zip(got, expected, strict=True):
            assert (np.asarray(x) == y).all()
    kernel.forget()
    got = step(*map(FORMS[form], given))  # and the first one any, too
    for x, y in zip(got, expected, strict=True):
        assert (np.asarray(x) == y).all()
    for x, y in zip(step(*given), expected, strict=True):
        assert (x == y).all()


@pytest.mark.parametrize("name", STEPS)
def test_a_remembered_call_refuses_a_subclass(name: str) -> None:
    """Whose results would be bare arrays: a quantity would lose its unit."""
    step, given = STEPS[name], arrays()
    step(*given)
    with pytest.raises(TypeError, match=r"a subclass of numpy\.ndarray"):
        step(*(x.copy().view(Kind) for x in given))


def test_outputs_of_two_calls_are_two_arrays() -> None:
    a, b, h = arrays()
    first, second = subquad.linear_scan_step(h[0], a[0], b[0]), subquad.linear_scan_step(h[0], a[0], b[0])
    for x in first:
        x[...] = 0
    assert not (second[0] == 0).any()
    assert not (second[1] == 0).any()
    state = second[1].copy()
    second[0][...] = 0  # and the state is not the output
    assert (second[1] == state).all()


def test_what_is_called_once_compiles_its_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of compiled code alone is made when a second one has come, and gives the same."""
    made, make = list[int](), direct.direct
    monkeypatch.setattr(direct, "direct", lambda: made.append(1) or make())
    monkeypatch.setattr(COMPILED["linear_scan"].forward, "kept", {})
    kernel.forget()
    a, b, _ = arrays()
    found = []
    for count in (0, 1, 1, 1):
        found.append(subquad.linear_scan(a, b))
        assert len(made) == count
    assert all((x == found[0]).all() for x in found)


def test_another_override_is_asked_at_once() -> None:
    a, b, h = arrays()
    before, _ = subquad.linear_scan_step(h[0], a[0], b[0])

    def run(a: Any, b: Any, *others: Any, **keywords: Any) -> Any:
        return np.zeros_like(b)

    with overrides_replaced(backend_of(np), "linear_scan", Override("linear_scan", "none", run, Accepts())):
        for _ in range(2):
            assert (subquad.linear_scan_step(h[0], a[0], b[0])[0] == 0).all()
    assert (subquad.linear_scan_step(h[0], a[0], b[0])[0] == before).all()


def test_a_function_is_bound_to_the_keywords_that_its_override_knows() -> None:
    a, b, h = arrays()
    seen: list[Any] = []

    def bind(arrays: Any, keywords: Any) -> Any:
        seen.append(dict(keywords))
        return lambda a, b, *others: np.full_like(b, 7.0)

    def run(a: Any, b: Any, *others: Any, **keywords: Any) -> Any:
        return np.zeros_like(b)

    override = Override("linear_scan", "bound", run, Accepts(), bind)
    with overrides_replaced(backend_of(np), "linear_scan", override):
        found = [subquad.linear_scan_step(h[0], a[0], b[0])[0].max() for _ in range(3)]
    assert found == [0.0, 7.0, 7.0]
    assert seen == [{"reverse": False}]


def test_explain_hears_a_remembered_call() -> None:
    a, b, h = arrays()
    for _ in range(2):
        subquad.linear_scan_step(h[0], a[0], b[0])
    assert subquad.explain(subquad.linear_scan_step, h[0], a[0], b[0]).implementation == "compiled"
    generic = subquad.linear_scan_step(h[0], a[0], b[0], implementation="generic")
    assert relative_error(generic[0], subquad.linear_scan_step(h[0], a[0], b[0])[0]) < 1e-15
    for implementation in ("nothing", ["compiled"]):
        for _ in range(2):
            with pytest.raises(ValueError, match="implementation is"):
                subquad.linear_scan_step(h[0], a[0], b[0], implementation=implementation)


def test_no_step_warns() -> None:
    """Values that overflow, and NaN, as in a longer call."""
    a, b, h = (np.full((16, 16), x) for x in (1e300, np.nan, np.inf))
    with np.errstate(all="raise"):
        for step in STEPS.values():
            for _ in range(2):
                step(a, b, h)


def test_the_gate_of_ssd_has_small_temporaries() -> None:
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((2, 1, 4096, 4, 64), dtype=np.float32)
    delta, A = np.full((1, 4096, 4), 0.1, np.float32), -np.ones(4, np.float32)
    B = rng.standard_normal((1, 4096, 1, 4), dtype=np.float32)
    plain = subquad.ssd(x, delta, A, B, B)
    expected = plain * z / (1 + np.exp(-z.astype(np.float64)))
    tracemalloc.start()
    try:
        got = subquad.ssd(x, delta, A, B, B, z=z)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert relative_error(got, expected) < 1e-6
    assert peak < 2 * got.nbytes + 8e6  # the output of the scan, that of the gate, and blocks


def test_sigmoid_far_from_zero() -> None:
    import array_api_compat.numpy as xp

    x = np.asarray([-np.inf, -1e30, -100.0, -80.0, -1.0, 0.0, 1.0, 50.0, 1e30, np.inf, np.nan], np.float32)
    with np.errstate(all="ignore"):
        got, expected = sigmoid(xp, x), 1 / (1 + np.exp(-x.astype(np.float64)))
    assert got.dtype == np.float32
    near = np.abs(x) < 90
    assert relative_error(got[near], expected[near]) < 1e-6
    assert (np.abs(got - expected)[~near & (x == x)] < 1e-37).all()
    assert np.isnan(got[-1])
