"""A masked key has no influence: not its value, not its presence, not even if it is NaN."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from rows.libraries import Library, Torch, relative_error
from rows.methods import CAUSAL, MAIN, METHODS, Case, D, Row, named, rows, seeing

N = 37
WHOLE = Case((2, N, D), (2, N, D), (2, N, 5))


def padded(side: str, garbage: float, rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
    """(inputs, inputs with 20 rows of padding that hold `garbage`, mask of the real rows)."""
    inputs = WHOLE.draw()
    keep = np.zeros(N + 20, dtype=bool)
    places = {"left": np.arange(20, N + 20), "right": np.arange(N)}
    keep[places.get(side, np.sort(rng.permutation(N + 20)[:N]))] = True
    wide: dict[str, Any] = {"key_mask": keep}
    for name in ("q", "k", "v"):
        x = np.full((2, N + 20, inputs[name].shape[-1]), garbage)
        x[:, keep, :] = inputs[name]
        wide[name] = x
    return inputs, wide, keep


def arguments(drawn: dict[str, Any]) -> list[Any]:
    return [drawn[name] for name in ("q", "k", "v", "key_mask")]


# options that have one value per row of the unpadded sequence
POSITIONAL = {"nystrom-query-mask", "nystrom-convolution", "nystrom-long-convolution", "nystrom-kmeans-query-mask", "linformer-random",
              "linformer-random-seed", "linformer-arrays"}  # fmt: skip


@pytest.mark.parametrize("garbage", [1e3, np.nan])
@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@rows([row for row in seeing(METHODS, "nothing", "place") if row.name not in POSITIONAL])
def test_padding_changes_nothing(row: Row, side: str, garbage: float, rng: np.random.Generator) -> None:
    if row.by == "place" and side == "scattered":
        return  # it moves rows apart
    inputs, wide, keep = padded(side, garbage, rng)
    arrays = row.arrays(WHOLE)
    for causal in row.forms:
        expected = row.call(causal=causal)(*arguments(inputs), arrays)
        got = row.call(causal=causal)(*arguments(wide), arrays)[:, keep, :]
        # the same sums, cut into other blocks: rounding alone may differ
        assert relative_error(got, expected) < 1e-12


@rows([row for row in seeing(MAIN, "nothing") if row.name not in POSITIONAL])
def test_padding_changes_nothing_elsewhere(eager: Library, row: Row, rng: np.random.Generator) -> None:
    """The same on every library, where overrides and traced branches take other ways."""
    inputs, wide, keep = padded("scattered", np.nan, rng)
    arrays = row.arrays(WHOLE)
    causal = row.causal
    expected = row.call(causal=causal)(*arguments(inputs), arrays)
    got = eager.numpy(eager.call(row.call(causal=causal), *arguments(wide), arrays, dtype="float64"))
    assert relative_error(got[:, keep, :], expected) < 1e-12


def test_convolution_does_not_see_padding() -> None:
    """The convolution runs over positions: a masked value counts as 0 there."""
    inputs = WHOLE.draw()
    mask = np.ones(N, dtype=bool)
    mask[10:13] = False
    weights = np.array([0.2, 0.5, -0.3])
    row = named("nystrom")[0]
    with_garbage = {**inputs, "key_mask": mask, "v": np.where(mask[:, None], inputs["v"], np.nan)}
    with_zeros = {**inputs, "key_mask": mask, "v": np.where(mask[:, None], inputs["v"], 0.0)}
    out = [row.call()(*arguments(x), {"conv_weights": weights}) for x in (with_garbage, with_zeros)]
    assert np.array_equal(*out)
    plain = row.call()(*arguments(with_zeros), {})
    v = np.pad(with_zeros["v"], ((0, 0), (1, 1), (0, 0)))
    expected = weights[0] * v[:, :-2] + weights[1] * v[:, 1:-1] + weights[2] * v[:, 2:]
    assert relative_error(out[1] - plain, expected) < 1e-12


@rows(METHODS)
def test_rows_without_a_visible_key_are_zero(row: Row) -> None:
    others = [] if row.by == "hash" else [slice(None)]  # that all the rest meet a key is chance
    inputs = WHOLE.draw()
    mask = np.ones((2, N), dtype=bool)
    mask[1] = False
    mask[0, :5] = False
    arrays = row.arrays(WHOLE)
    out = row.call()(inputs["q"], inputs["k"], inputs["v"], mask, arrays)
    assert np.all(out[1] == 0)
    assert all(np.all(np.any(out[0, x] != 0, axis=-1)) for x in others)
    if row.causal:
        out = row.call(causal=True)(inputs["q"], inputs["k"], inputs["v"], mask, arrays)
        assert np.all(out[0, :5] == 0)
        assert all(np.all(np.any(out[0, 5:][x] != 0, axis=-1)) for x in others)


def gradients(library: Library, function: Any, *arrays: np.ndarray) -> list[np.ndarray]:
    """Gradient of Σ sin(function) by each array, in float64, by torch or JAX."""
    if isinstance(library, Torch):
        torch = pytest.importorskip("torch")
        tensors = [library.array(x, "float64").requires_grad_() for x in arrays]
        torch.sin(function(*tensors)).sum().backward()
        return [x.grad.numpy() for x in tensors]
    jax = pytest.importorskip("jax")
    with library.context("float64"):
        traced = [library.array(x, "float64") for x in arrays]
        grad = jax.grad(lambda *x: jax.numpy.sum(jax.numpy.sin(function(*x))), argnums=tuple(range(len(arrays))))
        return [np.asarray(x) for x in jax.jit(grad)(*traced)]


DIFFERENTIABLE = named("exact", "exact-generic", "favor-seed", "favor-trigonometric", "favor-relu", "linear", "linformer", "linformer-random", "nystrom",
                       "nystrom-ridge", "nystrom-kmeans", "nystrom-ridge-fit", "clustered", "clustered-bare")  # fmt: skip


@pytest.mark.parametrize("garbage", [1.0, np.nan])
@rows(DIFFERENTIABLE)
def test_masked_keys_get_no_gradient(row: Row, garbage: float) -> None:
    check_gradient_under_mask(Torch(), row, row.causal, garbage)


@rows(named("exact", "exact-generic", "favor-seed", "linformer", "nystrom"))
def test_masked_keys_get_no_gradient_jax(jax_library: Library, row: Row) -> None:
    check_gradient_under_mask(jax_library, row, row.causal, np.nan)


def check_gradient_under_mask(library: Library, row: Row, causal: bool, garbage: float) -> None:
    """One item without any key, one with hidden keys and rows that see none; everything hidden is `garbage`."""
    n = 11
    inputs = Case((2, n, D), (2, n, D), (2, n, 3)).draw()
    mask = np.ones((2, n), dtype=bool)
    mask[1] = False
    mask[0, :3] = False
    k, v = (np.where(mask[..., None], inputs[name], garbage) for name in ("k", "v"))
    arrays = library.arrays(row.arrays(WHOLE), "float64")
    function = functools.partial(call_masked, library, row, causal, mask, arrays)
    grad_q, grad_k, grad_v = gradients(library, function, inputs["q"], k, v)
    hidden = ~mask
    assert np.all(grad_k[hidden] == 0)
    assert np.all(grad_v[hidden] == 0)
    assert np.all(grad_q[1] == 0)
    if causal:
        assert np.all(grad_q[0, :3] == 0)
    for gradient in (grad_q, grad_k, grad_v):
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient[0] != 0)


def call_masked(library: Library, row: Row, causal: bool, mask: np.ndarray, arrays: Any, q: Any, k: Any, v: Any) -> Any:
    return row.call(causal=causal)(q, k, v, library.array(mask, "float64"), arrays)


def test_query_mask_broadcasts_as_a_key_mask_does() -> None:
    """One entry for all queries: those of an item are all landmarks, or none are."""
    inputs, row = WHOLE.draw(), named("nystrom")[0]
    few = np.array([[True], [False]])
    got, expected = (row.call()(*arguments(inputs), {"query_mask": mask}) for mask in (few, np.repeat(few, N, axis=-1)))
    assert np.array_equal(got, expected)


@rows(CAUSAL)
def test_mask_of_all_true_is_no_mask(row: Row) -> None:
    inputs = WHOLE.draw()
    arrays = row.arrays(WHOLE)
    for causal in (False, True):
        plain = row.call(causal=causal)(*arguments(inputs), arrays)
        for shape in ((N,), (1, N), (2, 1)):
            inputs["key_mask"] = np.ones(shape, dtype=bool)
            assert relative_error(row.call(causal=causal)(*arguments(inputs), arrays), plain) < 1e-14
        inputs["key_mask"] = None


def test_a_row_that_is_not_finite_stays_out_of_the_centers() -> None:
    """It spoils its own row of the output alone, though the mean of the rows is subtracted from all."""
    import subquad

    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 30, 8))
    q[0, 5] = np.nan
    out = subquad.attention(q, k, v, "favor", num_features=8, center=True)
    assert np.isnan(out[0, 5]).all()
    assert np.isfinite(np.delete(out[0], 5, axis=0)).all()
    assert np.isfinite(out[1]).all()
