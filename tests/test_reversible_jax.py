"""Reversible layers of JAX: the gradients of plain layers, in memory that does not grow with depth."""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, relative_error, tolerance

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

import subquad_jax  # noqa: E402

D, WIDE = 16, 32
DEEP = 24
TERMS = 4 * DEEP * (D + WIDE)  # four roundings of a stream in each layer, and sums of D and of WIDE terms
CONTEXT = Jax().context


def function(params: Any, x: Any) -> Any:
    hidden = jnp.tanh(x @ params["inner"] + params["shift"])
    if "key" in params:
        hidden = jnp.where(jax.random.bernoulli(params["key"], 0.8, hidden.shape), hidden / 0.8, 0)
    return hidden @ params["outer"]


def parameters(seed: int, depth: int, dtype: str, *, dropout: bool = False) -> dict[str, Any]:
    """The parameters of `depth` functions, stacked; the keys of dropout are one of them."""
    rng = np.random.default_rng(seed)
    drawn = {
        "inner": rng.standard_normal((depth, D, WIDE)) / 4,
        "shift": rng.standard_normal((depth, WIDE)),
        "outer": rng.standard_normal((depth, WIDE, D)) / 16,
    }
    params = {name: jnp.asarray(x, dtype) for name, x in drawn.items()}
    return params | ({"key": jax.random.split(jax.random.key(seed), depth)} if dropout else {})


def streams(dtype: str, rows: int = 7) -> list[Any]:
    return list(jnp.asarray(np.random.default_rng(9).standard_normal((2, 2, rows, D)), dtype))


def take(params: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], params)


def plain(params_f: Any, params_g: Any, x1: Any, x2: Any) -> Any:
    def step(x: Any, params: Any) -> Any:
        x1 = x[0] + function(params[0], x[1])
        return (x1, x[1] + function(params[1], x1)), None

    return jax.lax.scan(step, (x1, x2), (params_f, params_g))[0]


sequence = subquad_jax.reversible_sequence(function, function)
layer = subquad_jax.reversible(function, function)


def chain(params_f: Any, params_g: Any, x1: Any, x2: Any) -> Any:
    for i in range(len(params_f["shift"])):
        x1, x2 = layer(take(params_f, i), take(params_g, i), x1, x2)
    return x1, x2


def loss(run: Callable[..., Any]) -> Callable[..., Any]:
    """The loss, of pytrees whose arrays are floating; keys come in by themselves."""

    def of(params: Any, keys: Any, x: Any) -> Any:
        y1, y2 = run(*(p | key for p, key in zip(params, keys, strict=True)), *x)
        return jnp.sum(y1 * jnp.sin(y2))

    return of


def arguments(depth: int, dtype: str, *, dropout: bool = False, rows: int = 7) -> tuple[Any, Any, Any]:
    params = [parameters(seed, depth, dtype, dropout=dropout) for seed in (1, 2)]
    keys = [{name: p.pop(name) for name in ("key",) if name in p} for p in params]
    return params, keys, streams(dtype, rows)


def worst(got: Any, expected: Any) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(relative_error(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dropout", [False, True], ids=["sure", "dropout"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("run", "depth"), [(sequence, DEEP), (chain, 3)], ids=["sequence", "chain"])
def test_gradients_equal_those_of_plain_layers(run: Any, depth: int, dtype: str, dropout: bool, jit: bool) -> None:
    with CONTEXT(dtype):
        given = arguments(depth, dtype, dropout=dropout)
        gradient = jax.grad(loss(run), (0, 2))
        got = (jax.jit(gradient) if jit else gradient)(*given)
        error = worst(got, jax.jit(jax.grad(loss(plain), (0, 2)))(*given))
    assert error < (1e-10 if dtype == "float64" else tolerance(dtype, TERMS))


def test_keys_get_the_gradient_that_jax_has_for_them() -> None:
    with CONTEXT("float32"):
        params_f, params_g = (parameters(seed, 3, "float32", dropout=True) for seed in (1, 2))
        x = streams("float32")
        grads = jax.grad(lambda p: jnp.sum(sequence(p, params_g, *x)[0]), allow_int=True)(params_f)
    assert grads["key"].dtype == jax.dtypes.float0
    assert grads["shift"].shape == params_f["shift"].shape


@pytest.mark.parametrize("run", [sequence, chain], ids=["sequence", "chain"])
def test_vmap_and_second_derivatives(run: Any) -> None:
    with CONTEXT("float64"):
        params, keys, x = arguments(2, "float64", dropout=True)
        xs = jnp.stack([jnp.stack(x), jnp.stack(x[::-1])])
        got, expected = (jax.vmap(jax.grad(loss(f), 2), (None, None, 0))(params, keys, xs) for f in (run, plain))
        assert worst(got, expected) < 1e-10

        def twice(f: Any) -> Any:
            first = jax.grad(loss(f), 2)
            return jax.grad(lambda x: sum(jnp.sum(g**2) for g in first(params, keys, x)))(x)

        assert worst(twice(run), twice(plain)) < 1e-10


def memory(run: Any, depth: int, rows: int = 256) -> int:
    """Bytes of the arrays that XLA makes between arguments and results in one compiled step."""
    with CONTEXT("float32"):
        program = jax.jit(jax.grad(loss(run), (0, 2))).lower(*arguments(depth, "float32", rows=rows)).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_memory_is_constant_in_depth() -> None:
    """A few words may differ, and no stream; plain layers need what one layer needs, about DEEP times."""
    deep, shallow = memory(sequence, DEEP), memory(sequence, DEEP // 4)
    assert abs(deep - shallow) < 1024
    assert DEEP / 2 * deep < memory(plain, DEEP)


def test_a_layer_keeps_its_outputs_and_parameters() -> None:
    with CONTEXT("float32"):
        params, _, x = arguments(1, "float32", rows=64)
        params = [take(p, 0) for p in params]
        _, pull_back = jax.vjp(layer, *params, *x)
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back))
        own = sum(leaf.nbytes for leaf in jax.tree.leaves((params, x)))
        _, pull_back = jax.vjp(lambda *given: loss(plain)(given[:2], [{}, {}], given[2:]),
                               *(jax.tree.map(lambda p: p[None], p) for p in params), *x)  # fmt: skip
        plain_kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull_back))
    assert kept == own < plain_kept


def test_second_calls_are_not_merged_with_the_first() -> None:
    """XLA would otherwise keep what f and g computed: each of them calls tanh twice, and not once."""
    with CONTEXT("float32"):
        text = jax.jit(jax.grad(loss(chain), (0, 2))).lower(*arguments(3, "float32")).compile().as_text()
    assert text.count(" tanh(") == 2 * 2 * 3


def tanh(_params: Any, x: Any) -> Any:
    return jnp.tanh(x)


ONE = np.ones((3, 4), np.float32)
OK = subquad_jax.reversible(tanh, tanh)
MANY = subquad_jax.reversible_sequence(tanh, tanh)
WRONG = [
    (TypeError, "g must be a callable", lambda: subquad_jax.reversible(tanh, 3)),
    (TypeError, "f must be a callable", lambda: subquad_jax.reversible_sequence(None, tanh)),
    (TypeError, "x2 must be an array, got list", lambda: OK(None, None, ONE, [1.0])),
    (TypeError, "x1 must be floating", lambda: OK(None, None, ONE.astype(int), ONE.astype(int))),
    (ValueError, "one shape, got .3, 4. and .4,", lambda: OK(None, None, ONE, ONE[0])),
    (ValueError, "one dtype, got float32 and float16", lambda: OK(None, None, ONE, ONE.astype(np.float16))),
    (TypeError, "f must return one array, got tuple", lambda: call(lambda _, x: (x, x), tanh)),
    (ValueError, "g must return the shape", lambda: call(tanh, lambda _, x: x[0])),
    (ValueError, "f must return float16", lambda: call(lambda _, x: x.astype(np.float32), tanh, np.float16)),
    (ValueError, "layers on their first axis", lambda: MANY(ONE, ONE[:2], ONE, ONE)),
    (ValueError, "layers on their first axis", lambda: MANY(None, None, ONE, ONE)),
    (ValueError, "layers on their first axis", lambda: MANY(1.0, ONE, ONE, ONE)),
]


def call(f: Any, g: Any, dtype: Any = np.float32) -> Any:
    return subquad_jax.reversible(f, g)(None, None, ONE.astype(dtype), ONE.astype(dtype))


@pytest.mark.parametrize(("error", "message", "wrong"), WRONG)
def test_errors(error: type[Exception], message: str, wrong: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        wrong()


def test_a_captured_array_never_loses_its_gradient() -> None:
    def of(weight: Any) -> Any:
        return subquad_jax.reversible(lambda _, x: x * weight, tanh)(None, None, ONE, ONE)[0].sum()

    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(of)(1.5)


def test_functions_without_parameters() -> None:
    got = jax.grad(lambda x: OK(None, None, x, x)[1].sum())(jnp.asarray(ONE))
    expected = jax.grad(lambda x: (x + jnp.tanh(x + jnp.tanh(x))).sum())(jnp.asarray(ONE))
    assert worst(got, expected) < tolerance("float32")


def test_the_examples_of_the_docstrings() -> None:
    done = doctest.testmod(sys.modules["subquad_jax.reversible"])
    assert done.attempted
    assert not done.failed
