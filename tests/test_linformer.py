"""What Linformer attention has and other methods have not: its projections, their draws, and chunks with their columns."""

from __future__ import annotations

import functools
import inspect
import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from rows import definitions
from rows.libraries import Jax, Library, Torch, relative_error
from rows.methods import Case, D, named

import subquad
from subquad.attention.linformer import COLUMNS, columns_on_host

N, M = 70, 6
CASE = Case((2, N, D), (2, N, D), (2, N, 5), mask="random")
GROUPED = Case((2, 4, N, D), (2, 2, N, D), (2, 2, N, 5), mask="heads")
RNG = np.random.default_rng(0)


def pair(*batch: int, rows: int = M, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    E, F = np.random.default_rng(1).standard_normal((2, *batch, rows, n)) / 4
    return E, F


def drawn(case: Case = CASE) -> list[Any]:
    return list(case.draw().values())


def test_projections_that_change_nothing_are_exact(eager: Library) -> None:
    q, k, v, _ = drawn()
    out = eager.call(lambda q, k, v, E: subquad.attention(q, k, v, "linformer", projection=(E, E)), q, k, v, np.eye(N), dtype="float64")  # fmt: skip
    assert relative_error(eager.numpy(out), subquad.attention(q, k, v, "exact")) < 1e-12


@pytest.mark.parametrize("visible", [0, 1, 4, 5, 6])
def test_as_many_visible_keys_as_segments_are_exact(eager: Library, visible: int) -> None:
    q, k, v, _ = drawn()
    mask = np.random.default_rng(0).permutation(N) < visible
    k = np.where(mask[:, None], k, np.nan)

    def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return subquad.attention(q, k, v, "linformer", rank=5, key_mask=mask)

    got = eager.numpy(eager.call(attend, q, k, v, mask, dtype="float64"))
    exact = subquad.attention(q, k, v, "exact", key_mask=mask)
    assert (relative_error(got, exact) < 1e-12) == (visible <= 5)


def test_the_mean_is_nearer_than_the_mean_of_all_values() -> None:
    """On keys that follow one another smoothly, and nearer still with more segments."""
    t = np.linspace(0, 6, 400)[:, None]
    q = k = 2 * np.sin(t + np.arange(8))
    v = np.cos(3 * t + np.arange(3))
    exact = subquad.attention(q, k, v, "exact")
    errors = [np.linalg.norm(subquad.attention(q, k, v, "linformer", rank=m) - exact) for m in (1, 10, 50, 200)]
    assert errors[0] == pytest.approx(np.linalg.norm(v.mean(axis=0) - exact))
    assert errors[1] < errors[0] / 2
    # a mean of h neighbours errs as h²: factors of 25 and 16, of which ends cost some
    assert errors[2] < errors[1] / 12
    assert errors[3] < errors[2] / 8


# Draws ----------------------------------------------------------------------------------------------------------------


def read_projection(n: int, **options: Any) -> np.ndarray:
    """R (rank, n): with scale 0 the output is the mean of the rows of F v; that of one row is the row."""
    q = np.zeros((1, 1))
    return subquad.attention(q, np.zeros((n, 1)), np.eye(n), "linformer", projection="random", scale=0, **options)


def test_the_draw_is_that_of_the_definition_and_its_first_columns_stay() -> None:
    for seed in (0, 5):
        long = read_projection(3 * COLUMNS + 7, rank=1, seed=seed)
        assert np.array_equal(long, definitions.gaussian_columns(1, 3 * COLUMNS + 7, seed))
        for n in (1, COLUMNS, COLUMNS + 1):
            assert np.array_equal(read_projection(n, rank=1, seed=seed), long[:, :n])
    assert np.max(np.abs(long[:, :COLUMNS] - long[:, COLUMNS : 2 * COLUMNS])) > 0.1


def test_golden_values() -> None:
    """The promise of a seed: these numbers stay."""
    assert np.allclose(read_projection(3, rank=1), [[1.443691, -0.895946, 0.735956]], atol=1e-6)


def test_entries_have_the_variance_of_the_paper() -> None:
    """Gaussian with variance 1/m: 65536 entries, so the mean square is within 5 √(2/65536) = 2.8 % of 1/m."""
    columns = np.concatenate([columns_on_host(16, 3, block, 64) for block in range(16)])
    assert columns.shape == (16 * COLUMNS, 16)
    assert abs(16 * np.mean(columns**2) - 1) < 0.028
    assert abs(np.mean(columns)) < 5 / 4 / 256
    assert abs(np.mean(columns**4) / np.mean(columns**2) ** 2 - 3) < 5 * np.sqrt(96 / 65536)


def test_the_same_draw_on_every_library(eager: Library) -> None:
    q, k, v = np.random.default_rng(1).standard_normal((3, 2, COLUMNS + 40, D))
    method = subquad.Linformer(rank=9, projection="random", seed=4)
    for dtype, bound in (("float64", 1e-12), ("float32", 2e-5)):
        out = eager.numpy(eager.call(method, q, k, v, dtype=dtype))
        assert relative_error(out, method(q, k, v)) < bound


def test_padding_behind_the_keys_changes_nothing_in_a_random_projection() -> None:
    q, k, v, _ = drawn()
    wide = [np.concatenate([x, np.full((2, 300, x.shape[-1]), np.nan)], axis=1) for x in (k, v)]
    method = subquad.Linformer(rank=9, projection="random")
    assert relative_error(method(q, *wide, key_mask=np.arange(N + 300) < N), method(q, k, v)) < 1e-13


def test_hidden_columns_have_no_influence(eager: Library) -> None:
    """Not even NaN in the projection itself."""
    q, k, v, _ = drawn()
    E, F = pair()
    keep = np.arange(N) % 3 > 0
    attend = functools.partial(subquad.attention, method="linformer")

    def call(q: Any, k: Any, v: Any, mask: Any, E: Any, F: Any) -> Any:
        return attend(q, k, v, projection=(E, F), key_mask=mask)

    expected = call(q, np.where(keep[:, None], k, 0), np.where(keep[:, None], v, 0), None, E, F)
    dirty = (q, np.where(keep[:, None], k, np.nan), np.where(keep[:, None], v, np.inf), keep, *(np.where(keep, x, np.nan) for x in (E, F)))  # fmt: skip
    assert relative_error(eager.numpy(eager.call(call, *dirty, dtype="float64")), expected) < 1e-13


def test_the_projection_never_exists_as_a_whole() -> None:
    """131072 keys: R alone would be 268 MB in float64, that of the pooling as well."""
    k = np.ones((2**17, 4), dtype=np.float32)
    mask = np.arange(2**17) % 5 > 0
    for options in ({"projection": "random"}, {}):
        subquad.attention(k[:300], k[:300], k[:300], "linformer", **options)
        tracemalloc.start()
        subquad.attention(k[:10], k, k, "linformer", key_mask=mask, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40e6


# Chunks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [None, 2, 4])
def test_chunks_with_their_columns_are_the_whole(eager: Library, heads: int | None) -> None:
    """Without heads, and with a projection for each key head or each query head of grouped queries."""
    q, k, v, mask = drawn(CASE if heads is None else GROUPED)
    E, F = pair(*([] if heads is None else [heads]))

    def stream(q: Any, k: Any, v: Any, mask: Any, E: Any, F: Any) -> Any:
        method, state, edges = subquad.Linformer(projection=(E, F)), None, (0, 1, 30, N)
        for a, b in itertools.pairwise(edges):
            columns = E[..., a:b], F[..., a:b]
            part = method.summarize(k[..., a:b, :], v[..., a:b, :], columns=columns, key_mask=mask[..., a:b])
            state = method.merge(state, part)
        return method.attend(q, state, scale=0.3), state["keys"], state["values"]

    out, keys, values = (eager.numpy(x) for x in eager.call(stream, q, k, v, mask, E, F, dtype="float64"))
    whole = subquad.attention(q, k, v, "linformer", projection=(E, F), key_mask=mask, scale=0.3)
    reference = definitions.over_heads(definitions.linformer, q, k, v, mask, projection=(E, F), scale=0.3)
    assert relative_error(whole, reference) < 1e-12
    assert relative_error(out, whole) < 1e-12
    assert (keys.shape[-2:], values.shape[-2:]) == ((M, D), (M, 5))
    assert keys.shape[:-2] == ((2,) if heads is None else (2, heads))


def test_states_are_kept_in_float32_and_have_an_identity() -> None:
    q, k, v, _ = drawn()
    E, F = pair()
    method = subquad.Linformer(projection=(E, F))
    state = method.summarize(k, v, columns=(E, F))
    nothing = method.summarize(k[:, :0], v[:, :0], columns=(E[:, :0], F[:, :0]))
    hidden = method.summarize(k, v, columns=(E, F), key_mask=np.zeros(N, dtype=bool))
    for other in (None, nothing, hidden):
        assert all(np.array_equal(method.merge(state, other)[name], state[name]) for name in state)
    assert np.all(method.attend(q, nothing) == 0)
    half = method.summarize(k.astype(np.float16), v.astype(np.float16), columns=(E, F))
    assert {x.dtype.name for x in half.values()} == {"float32"}
    assert method.attend(q.astype(np.float16), half).dtype == np.float16


def test_the_signature_of_summarize_is_that_of_methods_and_columns() -> None:
    own, base = (inspect.signature(x.summarize).parameters for x in (subquad.Linformer, subquad.Method))
    assert set(own) - set(base) == {"columns"}
    assert all(own[name].kind == base[name].kind for name in base)


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_torch_gradcheck_of_the_projection(masked: bool) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x / 2).requires_grad_() for x in drawn(Case((5, D), (7, D), (7, 2)))[:3])
    E, F = (torch.from_numpy(x).requires_grad_() for x in pair(rows=3, n=7))
    mask = torch.arange(7) % 3 > 0 if masked else None

    def attend(q: Any, k: Any, v: Any, E: Any, F: Any) -> Any:
        return subquad.attention(q, k, v, "linformer", projection=(E, F), key_mask=mask)

    assert torch.autograd.gradcheck(attend, (q, k, v, E, F))
    attend(q, k, v, E, F).sin().sum().backward()
    assert all(bool((x.grad != 0).any()) for x in (q, k, v, E, F))
    if masked:
        assert not bool(E.grad[:, ~mask].any())
        assert not bool(F.grad[:, ~mask].any())


def test_torch_gradient_through_chunks_is_that_of_the_whole() -> None:
    torch = pytest.importorskip("torch")
    found = []
    for edges in ((0, N), (0, 20, N)):
        q, k, v = (torch.from_numpy(x).requires_grad_() for x in drawn()[:3])
        E, F = (torch.from_numpy(x).requires_grad_() for x in pair())
        method, state = subquad.Linformer(projection=(E, F)), None
        for a, b in itertools.pairwise(edges):
            columns = E[:, a:b], F[:, a:b]
            state = method.merge(state, method.summarize(k[:, a:b], v[:, a:b], columns=columns))
        out = method.attend(q, state) if len(edges) > 2 else method(q, k, v)
        out.sin().sum().backward()
        found.append([x.grad.numpy() for x in (q, k, v, E, F)])
    assert all(relative_error(*both) < 1e-11 for both in zip(*found, strict=True))


def test_jax_check_grads_of_the_projection(jax_library: Jax) -> None:
    import jax
    from jax.test_util import check_grads

    with jax_library.context("float64"):
        given = [
            jax_library.array(x, "float64") for x in (*drawn(Case((5, D), (7, D), (7, 2)))[:3], *pair(rows=3, n=7))
        ]

        def attend(q: Any, k: Any, v: Any, E: Any, F: Any) -> Any:
            return subquad.attention(q, k, v, "linformer", projection=(E, F))

        check_grads(jax.jit(attend), tuple(given), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_float32_and_bfloat16_projections_serve_each_other() -> None:
    """They are taken in the dtype that is computed in: float32 for half precision."""
    torch = pytest.importorskip("torch")
    q, k, v = (Torch().array(x, "bfloat16") for x in drawn()[:3])
    E, F = (Torch().array(x, "float32") for x in pair())
    got = subquad.attention(q, k, v, "linformer", projection=(E, F))
    assert got.dtype == torch.bfloat16
    expected = subquad.attention(q.float(), k.float(), v.float(), "linformer", projection=(E, F))
    assert relative_error(got.float().numpy(), expected.numpy()) < 2e-2


# Errors ---------------------------------------------------------------------------------------------------------------

x = np.zeros((6, 4))
E = np.zeros((3, 6))
given = subquad.Linformer(projection=(E, E))
REFUSED: dict[str, tuple[type[Exception], str, Any]] = {
    "rank": (ValueError, "rank must be at least 1, got 0", lambda: subquad.Linformer(rank=0)),
    "rank-float": (TypeError, "rank must be an integer, got 2.0", lambda: subquad.Linformer(rank=2.0)),
    "projection": (ValueError, "projection is 'learnt', expected one of 'mean', 'random'", lambda: subquad.Linformer(projection="learnt")),
    "array": (TypeError, r"projection must be one of .* or a pair \(E, F\) of arrays, got ndarray", lambda: subquad.Linformer(projection=E)),
    "none": (TypeError, r"projection\[1\] \(F\) is a NoneType, not an array", lambda: subquad.Linformer(projection=(E, None))),
    "seed": (ValueError, 'seed=3 would have no effect: only projection="random"', lambda: subquad.Linformer(seed=3)),
    "seed-arrays": (ValueError, "seed=3 would have no effect", lambda: subquad.Linformer(projection=(E, E), seed=3)),
    "seed-negative": (ValueError, "seed must be at least 0", lambda: subquad.Linformer(projection="random", seed=-1)),
    "causal": (NotImplementedError, "no causal form: a projected key mixes", lambda: subquad.attention(x, x, x, "linformer", causal=True)),
    "columns": (ValueError, r"projection has 5 columns for 6 keys.*E\[\.\.\., :n_kv\]",
                lambda: subquad.attention(x, x, x, "linformer", projection=(E[:, :5], E[:, :5]))),
    "rows": (ValueError, r"projection\[1\] \(F\) has shape \(2, 6\), expected \(\.\.\., 3, 6\)",
             lambda: subquad.attention(x, x, x, "linformer", projection=(E, E[:2]))),
    "widths": (ValueError, r"projection\[1\] \(F\) has shape \(3, 5\), expected \(\.\.\., 3, 6\)",
               lambda: subquad.attention(x, x, x, "linformer", projection=(E, E[:, :5]))),
    "other-rank": (ValueError, r"projection\[0\] \(E\) has shape \(3, 6\), expected \(\.\.\., 4, 6\)",
                   lambda: subquad.attention(x, x, x, "linformer", projection=(E, E), rank=4)),
    "one-axis": (ValueError, r"projection\[0\] \(E\) has shape \(6,\), expected \(\.\.\., m, n_kv\)",
                 lambda: subquad.attention(x, x, x, "linformer", projection=(E[0], E[0]))),
    "no-rows": (ValueError, r"\(E\) has shape \(0, 6\)", lambda: subquad.attention(x, x, x, "linformer", projection=(E[:0], E[:0]))),
    "integers": (TypeError, r"projection\[0\] \(E\) has dtype int64", lambda: subquad.attention(x, x, x, "linformer", projection=(E.astype(int), E))),
    "list": (TypeError, r"projection\[1\] \(F\) is a list", lambda: subquad.attention(x, x, x, "linformer", projection=(E, E.tolist()))),
    "batch": (ValueError, r"do not broadcast: q \[2\].*E \[3\]",
              lambda: subquad.attention(*3 * [np.zeros((2, 6, 4))], "linformer", projection=2 * (np.zeros((3, 3, 6)),))),
    "stream-mean": (NotImplementedError, "no summarize with projection=\"mean\": the segments", lambda: subquad.Linformer().summarize(x, x)),
    "stream-random": (NotImplementedError, "no attend with projection=\"random\": its columns belong to positions",
                      lambda: subquad.Linformer(projection="random").attend(x, {})),
    "merge-mean": (NotImplementedError, "no merge", lambda: subquad.Linformer().merge(None, None)),
    "step": (NotImplementedError, "^Linformer has no step: Linformer attention has no causal form", lambda: given.step(x, x, x)),
    "no-columns": (TypeError, r"needs columns=\(E, F\)", lambda: given.summarize(x, x)),
    "columns-type": (TypeError, r"columns must be a pair \(E, F\) of arrays, got ndarray", lambda: given.summarize(x, x, columns=E)),
    "columns-width": (ValueError, r"columns\[0\] \(E\) has shape \(3, 5\), expected \(\.\.\., 3, 6\)",
                      lambda: given.summarize(x, x, columns=(E[:, :5], E))),
    "columns-rows": (ValueError, r"columns\[1\] \(F\) has shape \(2, 6\), expected \(\.\.\., 3, 6\)",
                     lambda: given.summarize(x, x, columns=(E, E[:2]))),
    "scale": (ValueError, "scale=0.5 would have no effect.*attend", lambda: given.summarize(x, x, columns=(E, E), scale=0.5)),
    "state-rows": (ValueError, r"state\['keys'\] ends in \(3, 4\), expected \(2, 4\)",
                   lambda: subquad.Linformer(projection=(E[:2], E[:2])).attend(x, given.summarize(x, x, columns=(E, E)))),
    "state-width": (ValueError, r"state\['keys'\] ends in \(3, 4\), expected \(3, 2\)",
                    lambda: given.attend(x[:, :2], given.summarize(x, x, columns=(E, E)))),
    "state-of-others": (ValueError, "state holds .* expected 'keys', 'values'", lambda: given.attend(x, subquad.Linear().summarize(x, x))),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    error, words, call = REFUSED[case]
    with pytest.raises(error, match=words):
        call()


def test_repr_shows_what_is_in_force() -> None:
    assert repr(subquad.Linformer()) == "Linformer(rank=256, projection='mean')"
    assert repr(subquad.Linformer(rank=3, projection="random")) == "Linformer(rank=3, projection='random', seed=0)"
    assert repr(given) == "Linformer(projection=(<(3, 6) float64>, <(3, 6) float64>))"
    assert given == subquad.Linformer(projection=(E.copy(), E.copy()))
    assert named("linformer")[0].object() == subquad.Linformer(rank=8)
