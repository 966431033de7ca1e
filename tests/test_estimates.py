"""Estimates of errors: what they say is what the whole output says, within what sampling allows."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Library, NumPy, Torch, tolerance
from rows.methods import CASES, Case, D
from rows.scans import SCANS, Scan, scans

import subquad
from subquad.attention import estimate, sampled_rows
from subquad.core.binomial import upper_bounds
from subquad.kernels import block_attention
from subquad.random import draw_rows

N = 257
FIELDS = subquad.ErrorEstimate._fields[:-1]


@pytest.fixture(autouse=True)
def _no_warning_yet() -> Iterator[None]:
    estimate.WARNED.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", subquad.PoorApproximation)
        yield
    estimate.WARNED.clear()


def seen_by(case: Case, mask: Any, *, causal: bool) -> np.ndarray:
    n, n_kv = case.q[-2], case.k[-2]
    seen = np.tri(n, n_kv, n_kv - n, dtype=bool) if causal else np.ones((n, n_kv), dtype=bool)
    return seen if mask is None else seen & mask[..., None, :]


def by_definition(
    q: Any, k: Any, v: Any, out: Any, seen: Any, rows: Any, scale: float, bound: float
) -> dict[str, np.ndarray]:
    """The fields of an estimate, from all weights; heads of k and v are repeated for grouped queries."""
    if q.ndim > 2 and k.ndim > 2 and k.shape[-3] > 1:
        groups = q.shape[-3] // k.shape[-3]
        k, v = (np.repeat(x, groups, axis=-3) for x in (k, v))
        if seen.ndim > 2 and seen.shape[-3] not in (1, q.shape[-3]):
            seen = np.repeat(seen, groups, axis=-3)
    logits = np.where(seen, scale * q @ np.swapaxes(k, -1, -2), -np.inf)
    w = np.exp(logits - np.max(logits, axis=-1, keepdims=True, initial=-1e300))
    total, number = w.sum(axis=-1, keepdims=True), seen.sum(axis=-1, keepdims=True)
    w = w / np.where(total == 0, 1, total)
    exact, mean = w @ v, np.where(seen, 1.0, 0.0) @ v / np.maximum(number, 1)
    batch = exact.shape[:-2]
    off, off_mean, size = (
        np.broadcast_to((x**2).sum(-1)[..., rows], (*batch, len(rows))) for x in (out - exact, mean - exact, exact)
    )
    sees = np.broadcast_to(number[..., 0] > 0, (*batch, q.shape[-2]))[..., rows]
    fields = {name: np.full(batch, math.nan) for name in FIELDS}
    for head in np.ndindex(*batch):
        here = sees[head]
        r, e, t = here.sum(), off[head][here], size[head][here]
        fields["rows"][head], fields["norm"][head] = r, t.sum() ** 0.5
        fields["bound"][head] = 1.0
        if not r:
            continue
        error = fields["error"][head] = (e.sum() / t.sum()) ** 0.5
        fields["share_above"][head] = np.mean(e > bound**2 * t)
        fields["error_of_mean"][head] = (off_mean[head][here].sum() / t.sum()) ** 0.5
        squares = (np.broadcast_to(w, (*batch, *w.shape[-2:]))[head][rows] ** 2).sum(-1)
        fields["effective_keys"][head] = (
            1 / squares[:: max(1, len(rows) // 32)][here[:: max(1, len(rows) // 32)]]
        ).mean()
        f, n = e - error**2 * t, np.count_nonzero(rows >= 0) if len(rows) == q.shape[-2] else q.shape[-2]
        fields["spread"][head] = (1 - r / n) ** 0.5 * (f @ f * r / max(r - 1, 1)) ** 0.5 / (2 * error * t.sum())
    return fields


ERRORS_CASES = {
    "plain": (CASES["n=257"], False),
    "causal": (CASES["blocks"], True),
    "grouped": (Case((2, 4, N, D), (2, 2, N, D), (2, 2, N, 5), mask="heads"), True),
    "shared": (Case((2, 3, N, D), (1, N, D), (3, N, 5)), False),
    "n<n_kv": (Case((2, 200, D), (2, 300, D), (2, 300, 5), mask="right"), True),
}


@pytest.mark.parametrize("name", ERRORS_CASES)
def test_equals_its_definition(library: Library, name: str) -> None:
    """All fields, on every library, of a method whose error is neither small nor large."""
    case, causal = ERRORS_CASES[name]
    drawn = case.draw()
    dtype = library.dtypes[0]

    def fields(q: Any, k: Any, v: Any, mask: Any) -> list[Any]:
        return list(subquad.estimate_error(
            "window", q, k, v, left=40, causal=causal, key_mask=mask, scale=0.2, rows=70, seed=3, tolerance=0.3))[:-1]  # fmt: skip

    found = library.call(fields, *drawn.values(), dtype=dtype)
    if not library.has_values:
        return
    q, k, v, mask = (drawn[name] for name in ("q", "k", "v", "key_mask"))
    out = subquad.attention(q, k, v, "window", left=40, causal=causal, key_mask=mask, scale=0.2)
    rows = draw_rows(0, q.shape[-2], 70, 3)
    expected = by_definition(q, k, v, out, seen_by(case, mask, causal=causal), rows, 0.2, 0.3)
    for field, got in zip(FIELDS, found, strict=True):
        if field == "bound":
            above, count = expected["share_above"], expected["rows"].astype(int)
            expected[field] = upper_bounds(np.rint(np.nan_to_num(above) * count).astype(int), count)
        np.testing.assert_allclose(
            library.numpy(got), expected[field], rtol=200 * tolerance(dtype),
            atol=0, err_msg=field)  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
def test_all_rows_give_the_error_itself(causal: bool) -> None:
    drawn = CASES["n=63"].draw()
    q, k, v, mask = drawn.values()
    found = subquad.estimate_error("window", q, k, v, left=5, causal=causal, key_mask=mask, rows=63)
    args = {"causal": causal, "key_mask": mask}
    out, exact = subquad.attention(q, k, v, "window", left=5, **args), subquad.attention(q, k, v, "exact", **args)
    seeing = np.any(exact != 0, axis=(-2, -1))
    norm = np.linalg.norm(exact, axis=(-2, -1))[seeing]
    np.testing.assert_allclose(
        found.error[seeing], np.linalg.norm(out - exact, axis=(-2, -1))[seeing] / norm, rtol=1e-12
    )
    assert np.isnan(found.error[~seeing]).all()
    assert np.all(found.spread[seeing] == 0)
    assert np.array_equal(found.bound[seeing], found.share_above[seeing])


def test_packed_documents_and_counts_of_visible_keys() -> None:
    """The rows see what they see in the whole call: with every row sampled, the error of exact attention is 0."""
    q, k, v = (np.random.default_rng(0).standard_normal((2, 90, D)) for _ in range(3))
    segments = np.repeat([3, 1, 2], [20, 45, 25])
    for given in ({"segments": segments}, {"segments": segments, "causal": True}, {"visible": np.arange(90) // 2}):
        assert np.all(subquad.estimate_error("exact", q, k, v, **given).error < 1e-13)
        found = subquad.estimate_error("favor", q, k, v, num_features=16, rows=30, **given)
        assert np.all((found.error > 0.1) & (found.rows >= 29))
    alone = [subquad.estimate_error("exact", *(x[:, i : i + 20] for x in (q, k, v))) for i in (0,)]
    packed = subquad.estimate_error("exact", q, k, v, segments=(segments, segments), rows=90)
    assert packed.error_of_mean.shape == alone[0].error_of_mean.shape == (2,)


def test_rows_are_strata_of_the_sequence() -> None:
    for first, stop, count in ((0, 1000, 128), (17, 400, 100), (0, 5, 128), (3, 3, 4)):
        rows = draw_rows(first, stop, count, 0)
        number = min(count, stop - first)
        edges = first + np.arange(number + 1) * (stop - first) // max(number, 1)
        assert len(rows) == number
        assert np.all((rows >= edges[:-1]) & (rows < edges[1:]))
    assert not np.array_equal(draw_rows(0, 1000, 128, 0), draw_rows(0, 1000, 128, 1))


def test_an_item_does_not_depend_on_its_batch() -> None:
    q, k, v = (np.random.default_rng(1).standard_normal((3, 2, 300, D)) for _ in range(3))
    together = subquad.estimate_error("window", q, k, v, left=20)
    alone = subquad.estimate_error("window", q[1:2], k[1:2], v[1:2], left=20)
    for one, other in zip(together[:-1], alone[:-1], strict=True):
        np.testing.assert_allclose(one[1:2], other, rtol=1e-12)


def test_spread_is_that_of_the_estimate() -> None:
    """Over 200 seeds, the standard deviation of the error is the spread that it tells, on the average."""
    q, k, v = (np.random.default_rng(2).standard_normal((2000, D)) for _ in range(3))
    found = [subquad.estimate_error("window", q, k, v, left=200, rows=64, seed=i) for i in range(200)]
    told, seen = np.mean([x.spread for x in found]), np.std([x.error for x in found])
    assert 0.75 < told / seen < 1.3  # the sd of 200 draws has itself an sd of 5 %; strata make `seen` a bit smaller
    truth = subquad.estimate_error("window", q, k, v, left=200, rows=2000)
    assert abs(np.mean([x.error for x in found]) - truth.error) < 4 * seen / 200**0.5 + 0.01 * seen


@pytest.mark.parametrize("bound", [0.2, 0.4, 0.7])
def test_the_bound_covers(bound: float) -> None:
    """Of 200 draws, the true share is above the bound in at most 5 %, and a few for the luck of 200 draws."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((3000, D)) for _ in range(3))
    q *= rng.uniform(0.1, 4, (3000, 1))  # rows of all degrees of difficulty
    args = {"left": 700, "tolerance": bound}
    truth = subquad.estimate_error("window", q, k, v, rows=3000, **args).share_above
    covered = sum(
        bool(truth <= subquad.estimate_error("window", q, k, v, rows=48, seed=i, **args).bound) for i in range(200)
    )
    assert 0.01 < truth < 0.99
    assert covered >= 190  # rows are drawn from strata, which is better than what the bound assumes


def test_bounds_are_those_of_clopper_and_pearson() -> None:
    stats = pytest.importorskip("scipy.stats")
    k, r = np.tril_indices(70)[::-1]
    expected = np.where(k == r, 1.0, stats.beta.ppf(0.95, k + 1, np.maximum(r - k, 1)))
    np.testing.assert_allclose(upper_bounds(k, r), expected, rtol=1e-10)
    np.testing.assert_allclose(
        upper_bounds(np.array([0, 7]), np.array(3000), 0.99), stats.beta.ppf(0.99, [1, 8], [3000, 2993])
    )
    assert upper_bounds(np.array(0), np.array(128)) == pytest.approx(1 - 0.05 ** (1 / 128), rel=1e-12)


def test_traced_bounds_equal_those_read(jax_library: Jax) -> None:
    """Under jit they come from a table, with a mask (rows that see no key) and without."""
    q, k, v, mask = CASES["n=63"].draw().values()
    for key_mask in (None, mask):
        args = (q, k, v) if key_mask is None else (q, k, v, key_mask)

        def bounds(*given: Any) -> Any:
            masks = {"key_mask": given[3]} if len(given) > 3 else {}
            return subquad.estimate_error(
                "window", *given[:3], left=3, causal=True, rows=30, tolerance=0.4, **masks
            ).bound

        read, traced = bounds(*args), jax_library.call(bounds, *args, dtype="float32")
        np.testing.assert_allclose(jax_library.numpy(traced), read, rtol=1e-6)
        assert np.unique(read).size > 1


def test_costs_at_most_4_percent_of_exact_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """At n = 4096 and 128 rows, counted in products of all calls of exact attention that the generic form makes; the mean
    takes none."""
    products = []
    module = sys.modules["subquad.kernels.sampled_attention"]
    generic, original = partial(sampled_rows.sampled_attention, implementation="generic"), block_attention

    def counted(q: Any, k: Any, v: Any, *rest: Any, **given: Any) -> Any:
        products.append(q.shape[-2] * k.shape[-2] * (q.shape[-1] + v.shape[-1]))
        return original(q, k, v, *rest, **given)

    monkeypatch.setattr(sampled_rows, "sampled_attention", generic)
    monkeypatch.setattr(module, "block_attention", counted)
    q, k, v = np.random.default_rng(0).standard_normal((3, 4096, 64), dtype=np.float32)
    subquad.estimate_error("window", q, k, v, left=8)
    assert len(products) == 2
    assert 0.03 < sum(products) / (4096**2 * 128) < 0.036


def test_bounds_of_many_numbers_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of all bounds of one number of rows, which is kept, and the bounds that are found one by one."""
    q, k, v = np.random.default_rng(4).standard_normal((3, 7, 500, D))
    read = subquad.estimate_error("window", q, k, v, left=80, tolerance=0.5)
    monkeypatch.setattr(estimate, "MOST_TABLED", 0)
    np.testing.assert_array_equal(read.bound, subquad.estimate_error("window", q, k, v, left=80, tolerance=0.5).bound)
    assert np.unique(read.bound).size > 1


def test_overall_is_the_error_of_the_joined_outputs() -> None:
    q, k, v = (np.random.default_rng(4).standard_normal((2, 3, 200, D)) for _ in range(3))
    v *= np.array([1.0, 5.0, 0.2])[:, None, None]
    found = subquad.estimate_error("window", q, k, v, left=20, rows=200).overall
    out, exact = (subquad.attention(q, k, v, m, **o) for m, o in (("window", {"left": 20}), ("exact", {})))
    assert found.error == pytest.approx(np.linalg.norm(out - exact) / np.linalg.norm(exact), rel=1e-12)
    assert found.rows == 1200
    assert found.norm == pytest.approx(np.linalg.norm(exact), rel=1e-12)
    assert found.error.shape == found.bound.shape == ()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_stay_in_the_range_of_float32(size: float) -> None:
    q, k, v = (np.random.default_rng(5).standard_normal((100, D)).astype("float32") for _ in range(3))
    plain, scaled = (subquad.estimate_error("window", q, k, x, left=9) for x in (v, v * np.float32(size)))
    assert scaled.error == pytest.approx(float(plain.error), rel=1e-4)
    assert scaled.overall.error == pytest.approx(float(plain.error), rel=1e-4)


def test_half_precision_is_compared_in_float32() -> None:
    """The error of exact attention is the rounding of its output, which lies below half a unit of the last place."""
    drawn = CASES["n=257"].draw()
    for dtype, least, most in (("bfloat16", 2**-11, 2**-8), ("float16", 2**-14, 2**-11)):
        q, k, v = (Torch().array(drawn[name], dtype) for name in ("q", "k", "v"))
        found = subquad.estimate_error("exact", q, k, v)
        assert Torch().dtype_name(found.error) == "float32"
        assert least < float(found.error) < most


EMPTY = ["no-batch", "no-queries", "no-keys", "n=1"]


@pytest.mark.parametrize("name", EMPTY)
def test_of_nothing(eager: Library, name: str) -> None:
    case = CASES[name]
    found = eager.call(lambda q, k, v: list(subquad.estimate_error("exact", q, k, v))[:-1],
                       *(case.draw()[x] for x in ("q", "k", "v")), dtype="float32")  # fmt: skip
    assert all(tuple(x.shape) == case.q[:-2] for x in found)
    error, _, _, bound, *_, rows, _ = map(eager.numpy, found)
    if name == "n=1":
        assert (error, bound, rows) == (0, 0, 1)
    else:
        assert np.isnan(error).all()
        assert np.all(bound == 1)
        assert np.all(rows == 0)


def test_of_values_without_channels(eager: Library) -> None:
    q, k = np.ones((2, 2, 40, 4))
    found = eager.call(lambda *x: list(subquad.estimate_error("exact", *x))[:-1], q, k, k[..., :0], dtype="float32")
    error, _, share, *_, effective, _, rows, norm = map(eager.numpy, found)
    assert [x.tolist() for x in (error, share, effective.round(4), rows, norm)] == [2 * [x] for x in (0, 0, 40, 40, 0)]


def test_a_row_that_misses_an_infinite_value_is_above_any_tolerance(eager: Library) -> None:
    """All rows see the value, and a window only near it."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 40, 4))
    v[20, 0] = np.inf

    def share(*x: Any) -> Any:
        return subquad.estimate_error(subquad.Window(left=2, right=2), *x, tolerance=1e3).share_above

    assert eager.numpy(eager.call(share, q, k, v, dtype="float32")) == 1


def test_prints_as_a_table() -> None:
    q, k, v = (np.random.default_rng(6).standard_normal((2, 12, 150, D)) for _ in range(3))
    found = subquad.estimate_error("window", q, k, v, left=20)
    lines = str(found).splitlines()
    assert lines[0].split("  ")[0] == "head"
    assert "above 0.05" in lines[0]
    assert len(lines) == 1 + estimate.SHOWN + 1 + 1  # of 24 heads, with one line for those left out
    assert lines[1].startswith("0,0 ")
    assert lines[-2].startswith("1,11 ")
    assert lines[-1].split()[:2] == ["all", f"{found.overall.error:.3g}"]
    assert len(str(subquad.estimate_error("window", q[0, 0], k[0, 0], v[0, 0])).splitlines()) == 2
    for name in EMPTY:
        drawn = CASES[name].draw()
        assert str(subquad.estimate_error("exact", drawn["q"], drawn["k"], drawn["v"])).startswith("head")


def test_a_traced_estimate_has_no_table(jax_library: Jax) -> None:
    import jax

    texts = []

    def look(q: Any) -> Any:
        found = subquad.estimate_error("exact", q, q, q)
        texts.append(str(found))
        return found

    found = jax.jit(look)(jax_library.array(np.ones((9, D)), "float32"))
    assert texts[0].startswith("ErrorEstimate(")
    assert isinstance(found, subquad.ErrorEstimate)  # a pytree: it comes out of the compiled program
    assert str(found).startswith("head")


@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_estimate_of_torch(masked: bool) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.asarray(x) for x in np.random.default_rng(0).standard_normal((3, 2, 200, 4)))
    mask = torch.arange(200) % 3 > 0 if masked else None

    def estimate(q: Any, k: Any, v: Any) -> list[Any]:
        return list(subquad.estimate_error("window", q, k, v, left=20, key_mask=mask, rows=32))[:-1]

    torch.compiler.reset()
    found = torch.compile(estimate, fullgraph=True, backend="aot_eager")(q, k, v)
    for got, expected in zip(found, estimate(q, k, v), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_a_poor_approximation_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    rng = np.random.default_rng(7)
    q, k, v = (rng.standard_normal((500, D)) for _ in range(3))
    peaked = 6 * q
    with pytest.warns(subquad.PoorApproximation, match="Favor has a relative error of .*mean of the visible values"):
        subquad.estimate_error("favor", peaked, k, v, num_features=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subquad.estimate_error("favor", peaked, k, v, num_features=8)  # the second time
        subquad.estimate_error("exact", peaked, k, v)
        subquad.estimate_error("window", 0 * q, k, np.ones_like(v), left=3)  # as good as the mean, within the tolerance
        with pytest.raises(subquad.PoorApproximation):
            subquad.estimate_error("window", q, k, v, left=0)
    estimate.WARNED.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", subquad.PoorApproximation)
        subquad.estimate_error("favor", peaked, k, v, num_features=8)
    assert not caught


x = np.zeros((6, 4))
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "rows": (ValueError, "rows must be at least 1, got 0", lambda: subquad.estimate_error("exact", x, x, x, rows=0)),
    "rows-float": (TypeError, "rows must be an integer", lambda: subquad.estimate_error("exact", x, x, x, rows=0.1)),
    "seed": (TypeError, "seed must be an integer", lambda: subquad.estimate_error("exact", x, x, x, seed=None)),
    "tolerance": (ValueError, "tolerance must be positive", lambda: subquad.estimate_error("exact", x, x, x, tolerance=0)),
    "method": (ValueError, "unknown method 'exat'; did you mean 'exact'", lambda: subquad.estimate_error("exat", x, x, x)),
    "option": (TypeError, "'exact' has no option 'left'", lambda: subquad.estimate_error("exact", x, x, x, left=3)),
    "options": (TypeError, "put them into it", lambda: subquad.estimate_error(subquad.Window(), x, x, x, left=3)),
    "causal": (NotImplementedError, "no causal form", lambda: subquad.estimate_error("nystrom", x, x, x, causal=True)),
    "visible": (NotImplementedError, "cannot take visible", lambda: subquad.estimate_error("nystrom", x, x, x, visible=np.zeros(6, int))),
    "list": (TypeError, "q is a list", lambda: subquad.estimate_error("exact", [[1.0]], x, x)),
    "width": (ValueError, "q has 4 channels", lambda: subquad.estimate_error("exact", x, x[:, :2], x)),
    "channels": (ValueError, "channels must be at least 1", lambda: subquad.estimate_scan_error(x, x, x[:4], x, x, channels=0)),
    "scan": (TypeError, "u is a list", lambda: subquad.estimate_scan_error([[1.0]], x, x[:4], x, x)),
    "flag": (TypeError, "reverse must be True or False", lambda: subquad.estimate_scan_error(x, x, x[:4], x, x, reverse=1)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_says_what_is_wrong(case: str) -> None:
    error, message, call = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def of_scan(scan: Scan, given: dict[str, Any], **more: Any) -> subquad.ScanErrorEstimate:
    return subquad.estimate_scan_error(
        *(given.get(name) for name in ("u", "delta", "A", "B", "C", "D")),
        **{name: given.get(name) for name in ("z", "delta_bias", "initial_state")},
        delta_softplus=scan.softplus, reverse=scan.reverse, **more,
    )  # fmt: skip


@scans(*(scan.name for scan in SCANS))
def test_error_of_a_scan(scan: Scan) -> None:
    """float32 against float64, channel by channel, in every form; the same channels as the whole scan has."""
    drawn = scan.draw(200)
    single = {name: x.astype("complex64" if np.iscomplexobj(x) else "float32") for name, x in drawn.items()}
    double = {name: x.astype("complex128" if np.iscomplexobj(x) else "float64") for name, x in single.items()}
    y, exact = (scan.call(return_state=False)(given) for given in (single, double))
    found = of_scan(scan, single, channels=4, seed=1)
    axes = tuple(range(y.ndim - 1))
    off, size = ((z**2).sum(axis=axes, dtype="float64")[found.channels] for z in (y - exact, exact))
    np.testing.assert_allclose(found.error, (off / size) ** 0.5, rtol=0.1)  # two orders of rounding in float64
    assert found.overall == pytest.approx((off.sum() / size.sum()) ** 0.5, rel=0.1)
    assert found.largest == found.error.max()
    assert 0 < found.largest < 1e-5
    assert found.channels.shape == (4,)


def test_error_of_a_channel_that_is_zero() -> None:
    """0 / 0 counts as exact, in one channel and in all."""
    rng = np.random.default_rng(0)
    u = rng.standard_normal((20, 2)).astype(np.float32)
    u[:, 1] = 0
    rest = np.abs(u) + 1, -np.ones((2, 3), np.float32), *rng.standard_normal((2, 20, 3)).astype(np.float32)
    found = subquad.estimate_scan_error(u, *rest)
    assert 0 < found.error[0] < 1e-6
    assert found.error[1] == 0
    assert subquad.estimate_scan_error(u * 0, *rest).overall == 0


def test_error_of_a_scan_on_every_library() -> None:
    scan = next(scan for scan in SCANS if scan.name == "gated")
    drawn = scan.draw(100)
    expected = of_scan(scan, {name: x.astype("float32") for name, x in drawn.items()})
    torch = Torch()
    found = of_scan(scan, torch.arrays(drawn, "float32"))
    assert torch.dtype_name(found.error) == "float32"
    assert np.array_equal(torch.numpy(found.channels), expected.channels)
    assert np.all(torch.numpy(found.error) < 1e-6)
    half = of_scan(scan, torch.arrays(drawn, "bfloat16"))
    assert 2**-11 < float(half.overall) < 2**-8
    assert str(half).splitlines()[-2].startswith("largest")
    assert np.all(of_scan(scan, drawn).error < 1e-14)


def test_error_of_a_scan_of_documents_with_padding_and_limits() -> None:
    """Both scans, in the dtypes given and in float64, have the same steps: their difference is rounding."""
    scan = next(scan for scan in SCANS if scan.name == "gated")
    drawn, torch = scan.draw(100), Torch()
    steps = {"segments": np.arange(100) // 30, "mask": np.random.default_rng(1).random((2, 100)) < 0.7}
    for library in (NumPy(), torch):
        given = library.arrays(steps, "float32")
        found = of_scan(scan, library.arrays(drawn, "float32"), **given, delta_limits=(0.1, 0.5))
        assert np.all(library.numpy(found.error) < 1e-6)
    with pytest.raises(TypeError, match="mask has dtype"):
        of_scan(scan, drawn, mask=np.ones(100))


def test_error_of_a_scan_that_is_traced(jax_library: Jax) -> None:
    with pytest.raises(ValueError, match="have no values to compare: call estimate_scan_error outside of it"):
        jax_library.call(lambda u: subquad.estimate_scan_error(u, u, u[0, :4], u, u), x[None], dtype="float32")


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_without_channels_of_values_have_no_error(causal: bool) -> None:
    q, k, v = (np.ones(shape, np.float32) for shape in ((2, 4, 40, 8), (2, 2, 40, 8), (2, 2, 40, 0)))
    found = subquad.estimate_error("exact", q, k, v, rows=7, causal=causal)
    assert np.array_equal(found.error, np.zeros((2, 4)))
    assert np.array_equal(found.rows, np.full((2, 4), 7))


def test_rows_are_those_of_the_seed_in_every_call_of_a_signature(rng: np.random.Generator) -> None:
    """They are kept for the last seed; a recorded call after others gives gradients, and no warning."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(rng.standard_normal((2, 300, 8), dtype=np.float32)) for _ in range(3))

    def error(seed: int, rows: int = 64) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", subquad.PoorApproximation)
            return subquad.estimate_error("window", q, k, v, left=4, seed=seed, rows=rows).error

    with torch.inference_mode():
        first = [error(0), error(1), error(0), error(0, 32)]
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[3])
    assert torch.equal(error(0), first[0])
    q.requires_grad_()
    recorded = error(0)
    recorded.sum().backward()
    assert torch.allclose(recorded, first[0], rtol=1e-5)
    assert bool(torch.isfinite(q.grad).all())
