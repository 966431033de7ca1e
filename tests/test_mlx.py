"""MLX: every method and scan equals its definition, streams, has PyTorch's gradients, compiles and vectorises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import Mlx, relative_error, tolerance
from rows.methods import CASES, METHODS, Case, D, Row, rows
from rows.times import drawn

import subquad
from subquad.registry import SCANS

mx = pytest.importorskip("mlx.core")
MLX = Mlx()
TOLERANCE = tolerance("float32")
N = 70
OPTIONS: dict[str, dict[str, Any]] = {  # by which short inputs are cut, clustered, projected
    "bigbird": {"block_size": 8},
    "clustered": {"cluster_size": 4, "opened": 2, "chunk": 16, "window": 2},
    "favor": {"num_features": 32},
    "linformer": {"rank": 8},
    "lsh": {"bucket_size": 8, "num_rounds": 2},
    "nystrom": {"num_landmarks": 8},
    "window": {"left": 5},
}
CALLS = [(name, causal) for name, x in subquad.METHODS.items() for causal in (False, True)[: 1 + (x.causal is True)]]
calls = pytest.mark.parametrize(("name", "causal"), CALLS)


def qkv() -> list[np.ndarray]:
    case = Case((3, 4, N, D), (3, 2, N, D), (3, 2, N, 5), mask="heads")
    return [case.draw()[name] for name in ("q", "k", "v", "key_mask")]


def attend(name: str, causal: bool) -> Any:
    return lambda q, k, v, mask: subquad.attention(q, k, v, name, causal=causal, key_mask=mask, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("case", ["n=63", "n<n_kv", "grouped"])
@rows(METHODS)
def test_methods_equal_their_definitions(row: Row, case: str) -> None:
    if not row.fits(CASES[case]):
        pytest.skip("the row has no such shapes")
    given, arrays = CASES[case].draw(), row.arrays(CASES[case])
    for causal in row.forms:
        args = [given[name] for name in ("q", "k", "v", "key_mask")]
        out = MLX.call(row.call(causal=causal), *args, arrays, dtype="float32")
        rounded, own = MLX.rounded(given, "float32"), MLX.rounded(arrays, "float32")
        want = row.call(causal=causal)(*(rounded[name] for name in ("q", "k", "v", "key_mask")), own)
        # ridges and pseudo-inverses multiply rounding by their condition numbers
        assert relative_error(MLX.numpy(out), want) <= TOLERANCE * (20 if row.method == "nystrom" else 1)


@pytest.mark.parametrize("name", SCANS)
def test_scans_equal_their_definitions(name: str) -> None:
    row, (arrays, options) = SCANS[name], drawn(name, 63)
    for dtype in MLX.dtypes:
        out = MLX.call(lambda given: row.call(given, options), arrays, dtype=dtype)
        assert MLX.dtype_name(out) == dtype
        expected = row.reference(MLX.rounded(arrays, dtype), options)
        assert relative_error(MLX.numpy(out), expected) <= tolerance(dtype)


@calls
def test_transforms(name: str, causal: bool) -> None:
    """A compiled program, and one that MLX vectorises, give the numbers of NumPy."""
    args, call = MLX.arrays(qkv(), "float32"), attend(name, causal)
    want = call(*MLX.rounded(qkv(), "float32"))
    for function in (call, mx.compile(call), mx.vmap(call)):
        assert relative_error(MLX.numpy(function(*args)), want) <= TOLERANCE


@calls
def test_gradients_are_those_of_torch(name: str, causal: bool) -> None:
    torch = pytest.importorskip("torch")
    *given, mask = qkv()
    call = attend(name, causal)
    tensors = [torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in given]
    call(*tensors, torch.tensor(mask)).square().sum().backward()
    args = MLX.arrays(given, "float32")
    found = mx.grad(lambda *args: call(*args, mx.array(mask)).square().sum(), argnums=(0, 1, 2))(*args)
    for got, x in zip(found, tensors, strict=True):
        assert relative_error(MLX.numpy(got), x.grad.double().numpy()) <= 1e-5


@pytest.mark.parametrize("name", ["clustered", "favor", "linear", "window"])
def test_steps_are_the_causal_call(name: str) -> None:
    *given, _ = qkv()
    args, method = MLX.arrays(given, "float32"), subquad.METHODS[name](**OPTIONS.get(name, {}))
    state, outs = None, []
    for a, b in ((0, 10), (10, 11), (11, N)):
        out, state = method.step(*(x[..., a:b, :] for x in args), state)
        outs.append(out)
    assert relative_error(MLX.numpy(mx.concatenate(outs, axis=-2)), method(*given, causal=True)) <= TOLERANCE


def test_a_mamba_block_learns() -> None:
    """A step against the gradient makes the loss smaller, by what the gradient says."""
    params = subquad.init_mamba(8, like=mx.zeros(1))
    x = mx.array(np.random.default_rng(0).standard_normal((2, 20, 8)), dtype=mx.float32)

    def loss(params: dict[str, Any]) -> Any:
        return (subquad.mamba(x, params) - x).square().mean()

    value, slope = mx.value_and_grad(loss)(params)
    length = sum(g.square().sum() for g in slope.values())
    rate = 1e-2 / length
    after = loss({name: p - rate * slope[name] for name, p in params.items()})
    assert float(value - after) == pytest.approx(1e-2, rel=0.2)


def test_what_does_not_fit_is_named() -> None:
    q = mx.zeros((2, 5, 4))
    with pytest.raises(TypeError, match="q is an array of mlx but k is an array of numpy"):
        subquad.attention(q, np.zeros((2, 5, 4)), q, "exact")
    with pytest.raises(TypeError, match=r"q has dtype mlx.core.int32, expected a real floating dtype"):
        subquad.attention(q.astype(mx.int32), q, q, "exact")
