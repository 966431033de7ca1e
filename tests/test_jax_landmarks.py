"""Nyström attention under JAX: one kernel where no gradient is taken, the kernels that it is made of where one is."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import pytest
from interpreter import TWO_DEVICES, python
from rows.libraries import relative_error

import subquad
from subquad.kernels import landmark_attention

pytest.importorskip("llvmlite")
jax = pytest.importorskip("jax")

# (n, n_kv, d, d_v, m): short; keys in one and in several chunks, with segments of two lengths; more landmarks than a tile
# has rows, and of few queries; fewer queries than a tile
SIZES = [
    (64, 64, 32, 32, 16),
    (70, 133, 19, 37, 7),
    (1000, 9001, 32, 37, 65),
    (3000, 133, 64, 16, 100),
    (16, 20000, 8, 5, 16),
]
LONG = SIZES[2]


def rows(n: int, n_kv: int, d: int, d_v: int, dtype: Any = np.float32) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((2, 3, n, d), (3, n_kv, d), (2, 1, n_kv, d_v))]


def of_kernel(m: int, **options: Any) -> Any:
    return partial(landmark_attention, m=m, iterations=6, scale=0.2, **options)


def of_parts(m: int) -> Any:
    return partial(landmark_attention.parts, m=m, iterations=6, scale=0.2)  # type: ignore[arg-type]


def loss(function: Any, *arrays: Any) -> Any:
    return jax.numpy.sin(function(*arrays)).sum()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_numbers_are_those_of_numpy(sizes: tuple[int, ...], dtype: Any) -> None:
    arrays, function = rows(*sizes[:4], dtype), of_kernel(sizes[4], implementation="compiled")
    with jax.enable_x64(dtype == np.float64):
        found = function(*map(jax.numpy.asarray, arrays))
        assert found.dtype == dtype
        assert relative_error(np.asarray(found), function(*arrays)) < (1e-5 if dtype == np.float32 else 1e-13)
        assert np.array_equal(found, jax.jit(function)(*arrays))


@pytest.mark.parametrize("n_kv", [64, 9001])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", range(3))
def test_numbers_that_are_not_finite_reach_the_same_rows(number: float, place: int, n_kv: int) -> None:
    arrays = rows(64, n_kv, 32, 32)
    arrays[place][(0, 0, 10, 3)[-arrays[place].ndim :]] = number
    found = of_kernel(16, implementation="compiled")(*map(jax.numpy.asarray, arrays))
    with np.errstate(all="ignore"):
        expected = of_kernel(16)(*arrays)
    assert not np.isfinite(expected).all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_memory_is_read_once_for_the_means_of_keys() -> None:
    """Keys are an operand of one kernel, and of nothing else."""
    program = jax.jit(of_kernel(LONG[4])).lower(*rows(*LONG[:4])).as_text()
    kernels = "means", "block_attention", "join", "pinv", "attend"
    calls = re.findall(r"custom_call @(\w*_kernel_)", program)
    assert all(call.endswith(f"_{name}_kernel_") for call, name in zip(calls, kernels, strict=True))
    readers = [line for line in program.splitlines() if "3x9001x32" in line and " = stablehlo." in line]
    assert len(readers) == 1
    assert "block_attention_kernel" in readers[0]


def test_calls_that_go_by_parts() -> None:
    q, k, v = (jax.numpy.zeros((1, 200, 8)), *jax.numpy.zeros((2, 1, 400, 8)))

    def chosen(*arrays: Any, **options: Any) -> list[str]:
        report = subquad.explain(subquad.attention, *arrays, "nystrom", **{"num_landmarks": 16} | options)
        return [f"{choice.kernel} {choice.implementation}" for choice in report.choices]

    assert chosen(q, k, v) == ["landmark_attention compiled"]
    parts = ["softmax_attention compiled", "iterative_pinv compiled", "softmax_attention dot_product_attention"]
    assert chosen(q, k, v, key_mask=jax.numpy.arange(400) < 300) == parts
    assert chosen(*(x.astype("bfloat16") for x in (q, k, v))) == ["landmark_attention compiled"]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)])
def test_gradients_are_those_of_the_parts(wanted: tuple[int, ...]) -> None:
    """To the bit, and no other ones are computed."""
    arrays = rows(*LONG[:4])
    one, other = (jax.value_and_grad(partial(loss, f), wanted) for f in (of_kernel(LONG[4]), of_parts(LONG[4])))
    found, expected = (jax.tree.leaves(jax.jit(f)(*arrays)) for f in (one, other))
    assert all(map(np.array_equal, found, expected))
    texts = [str(jax.make_jaxpr(f)(*arrays)) for f in (one, other)]
    for operation in (" mul ", "ffi_call", "reduce_sum"):
        assert texts[0].count(operation) == texts[1].count(operation) > 0


def test_gradients_and_transforms_of_gradients() -> None:
    with jax.enable_x64(True):
        q, k, v = map(jax.numpy.asarray, rows(40, 90, 8, 6, np.float64))
        one, other = (partial(loss, f) for f in (of_kernel(16), of_parts(16)))
        k = k + 0 * q[:, :, :1]  # an item for each of q

        def in_order(f: Any) -> Any:
            return lambda *x: jax.lax.scan(lambda total, x: (total + jax.checkpoint(f)(*x), None), 0.0, x)[0]

        def twice(f: Any) -> Any:
            return lambda q, k, v: (jax.grad(f, 1)(q, k, v) ** 2).sum()

        def alone(f: Any) -> Any:
            return lambda *x: jax.vmap(f, (0, None, 0))(x[0], x[1][0], x[2]).sum()

        for form in (in_order, twice, alone):
            gradient, of = (jax.grad(form(f), (0, 1, 2)) for f in (one, other))
            for x, y, z in zip(*(f(q, k, v) for f in (gradient, jax.jit(gradient), of)), strict=True):
                assert relative_error(x, z) < 1e-11
                assert relative_error(y, z) < 1e-11


def test_forward_mode_goes_by_the_generic_form() -> None:
    with jax.enable_x64(True):
        arrays = tuple(map(jax.numpy.asarray, rows(40, 90, 8, 6, np.float64)))
        found, expected = (jax.jvp(f, arrays, arrays)[1] for f in (of_kernel(16), of_parts(16)))
        assert relative_error(found, expected) < 1e-11
        along = jax.jvp(jax.grad(partial(loss, of_kernel(16))), arrays, arrays)[1]
        assert relative_error(along, jax.jvp(jax.grad(partial(loss, of_parts(16))), arrays, arrays)[1]) < 1e-11


def test_vmap_runs_the_kernel_once() -> None:
    q, k, v = rows(*LONG[:4])
    each = jax.jit(jax.vmap(of_kernel(LONG[4]), (0, None, 0)))
    assert "while" not in each.lower(q, k, v).as_text()
    assert relative_error(np.asarray(each(q, k, v)), of_kernel(LONG[4])(q, k, v)) < 1e-5


KEPT = """
import jax, numpy as np, subquad
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
q, k, v = (np.random.default_rng(0).standard_normal((3, 1, 9001, 8)).astype("float32"))
attend = jax.jit(lambda q, k, v: subquad.attention(q, k, v, "nystrom", num_landmarks=16))
found, expected = attend(q, k, v), subquad.attention(q, k, v, "nystrom", num_landmarks=16)
assert np.max(np.abs(found - expected)) < 1e-5
print(len(hits) > 0)
"""


def test_a_program_that_is_kept_runs_in_another_process(tmp_path: Any) -> None:
    """It has no address of a kernel."""
    options = {"COMPILATION_CACHE_DIR": tmp_path, "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0}
    environment = {f"JAX_{name}": str(x) for name, x in options.items()}
    assert [python(KEPT, **environment) for _ in range(2)] == ["False", "True"]


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, subquad
from jax.sharding import Mesh, PartitionSpec as P
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((2, 4, 140, 8)), "float32") for _ in range(3))
attend = lambda q, k, v: subquad.attention(q, k, v, "nystrom", num_landmarks=16)
mesh, batch = Mesh(np.array(jax.devices()), "x"), P("x")
for given, parts in (((q, k, v), (batch, batch, batch)), ((q, k[:1], v), (batch, P(), batch))):
    shards = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=parts, out_specs=batch))
    assert np.max(np.abs(shards(*given) - attend(*given))) < 1e-5
    found = [jax.jit(jax.grad(lambda given: (f(*given) ** 2).sum()))(given) for f in (shards, attend)]
    for got, expected in zip(*found):
        assert np.max(np.abs(got - expected)) < 2e-5 * np.max(np.abs(expected))
print("done")
"""


def test_shards() -> None:
    if not hasattr(jax, "shard_map"):
        pytest.skip("this JAX has it elsewhere")
    assert python(SHARDED, **TWO_DEVICES) == "done"
