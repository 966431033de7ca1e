"""One kernel for attention through features: the numbers of the two kernels that it stands for, and who is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import subquad
from subquad.kernels import feature_whole
from subquad.kernels.feature_map import Elu, Exponential

pytest.importorskip("llvmlite")
PARTS = ["feature_summarize", "feature_attend"]
SIZES = [(64, 64, 32, 32, 256), (70, 300, 19, 37, 50), (1, 5, 8, 80, 12), (17, 1, 33, 3, 40), (5, 0, 8, 4, 6)]


def _normal(*shapes: tuple[int, ...], dtype: str = "float32") -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("features", ["elu", "exponential", "centred"])
@pytest.mark.parametrize("hidden", ["no key", "some keys", "all keys"])
def test_numbers_are_those_of_the_two_kernels_to_the_bit(
    sizes: tuple[int, ...], dtype: str, features: str, hidden: str
) -> None:
    n, n_kv, d, d_v, m = sizes
    q, k, v, draw = _normal((2, 3, n, d), (2, 3, n_kv, d), (2, 3, n_kv, d_v), (2, 3, n_kv), dtype=dtype)
    W, *centers = _normal((d, m), (2, 3, 1, d), (2, 3, 1, d), dtype="float64" if dtype == "float64" else "float32")
    weights = {"elu": (), "exponential": (W / 3, -W / 3), "centred": (W / 3, W / 3, *centers)}[features]
    phi = Elu(0.7, -1.3) if features == "elu" else Exponential(d**-0.5)
    mask = {"no key": None, "some keys": draw > 0, "all keys": draw > 9}[hidden]
    with np.errstate(all="ignore"):
        found = feature_whole(q, k, v, *weights, phi=phi, key_mask=mask, implementation="compiled")
        expected = feature_whole.parts(q, k, v, *weights, phi=phi, key_mask=mask)  # type: ignore[misc]
    assert found.dtype == expected.dtype == q.dtype
    assert np.array_equal(found, expected)


def _chosen(q: Any, k: Any, **options: Any) -> list[str]:
    return [choice.kernel for choice in subquad.explain(subquad.attention, q, k, k, "favor", **options).choices]


def test_short_calls_take_it_and_others_the_two_kernels() -> None:
    q, k = _normal((2, 40, 8), (2, 50, 8))
    assert _chosen(q, k) == ["feature_whole"]
    assert _chosen(np.zeros((2, 1025, 8)), k.astype(float)) == PARTS
    assert _chosen(q, np.zeros((2, 8192, 8), np.float32)) == PARTS
    assert _chosen(q, k, num_features=257) == PARTS
    assert _chosen(np.stack([q, q]), k) == PARTS  # queries of two items read the same keys


def test_recorded_calls_of_pytorch_take_the_two_kernels() -> None:
    torch = pytest.importorskip("torch")
    q, k = (torch.tensor(x) for x in _normal((2, 40, 8), (2, 50, 8)))
    assert _chosen(q, k) == ["feature_whole"]
    assert _chosen(q.requires_grad_(), k) == PARTS
    plain = subquad.attention(q.detach(), k, k, "linear")
    assert torch.equal(subquad.attention(q, k, k, "linear").detach(), plain)
