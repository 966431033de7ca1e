"""Products with weights as they are stored: exact conversion, no copy, equal bits for any rows and threads."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Library, NumPy, Torch

import subquad
from subquad.blocks.mamba_layers import step_layers
from subquad.kernels import project
from subquad.models import ModelConfig, init_params

ml_dtypes = pytest.importorskip("ml_dtypes")
pytest.importorskip("llvmlite")

HALF = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
Array = np.ndarray


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def all_numbers(dtype: np.dtype[Any]) -> Array:
    """Every number of 16 bits but NaN, 256 in a row."""
    numbers = np.arange(2**16, dtype=np.uint16).view(dtype)
    return np.where(np.isnan(numbers.astype(np.float32)), dtype.type(1), numbers).reshape(256, 256)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("rows", [1, 7])
def test_every_number_of_half_precision_is_widened_exactly(name: str, rows: int) -> None:
    """A row that is 1 at one place selects a column; infinities are apart, since 0 · ∞ is NaN."""
    W = all_numbers(HALF[name])
    W = np.where(np.isinf(W.astype(np.float32)), HALF[name].type(-2), W)
    for first in range(0, 256 - rows, 50):
        x = np.eye(256, dtype=np.float32)[first : first + rows]
        y = project(x, W, None, implementation="compiled")
        assert np.array_equal(y, W[:, first : first + rows].astype(np.float32).T)
    ones = np.full((3, 20), np.inf, HALF[name])
    assert np.array_equal(project(np.ones((rows, 20), np.float32), ones, None), np.full((rows, 3), np.inf))


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_a_row_has_the_same_bits_alone_and_among_others(dtype: str) -> None:
    x, W, bias = normal(19, 75), normal(70, 75, seed=1).astype(HALF.get(dtype, dtype)), normal(70, seed=2)
    together = project(x, W, bias, implementation="compiled")
    for i in range(19):
        assert np.array_equal(project(x[i : i + 1], W, bias, implementation="compiled")[0], together[i])


def test_threads_do_not_change_a_bit() -> None:
    from subquad_numpy.project.calls import project as compiled

    given = [normal(3, 700), normal(500, 700, seed=1), None]
    (one,), _ = compiled(given, {}, threads=1)
    (many,), _ = compiled(given, {}, threads=4)
    assert np.array_equal(one, many)
    assert np.allclose(one, given[0] @ given[1].T, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("implementation", ["auto", "generic"])
def test_weights_of_half_precision_are_not_copied(rows: int, implementation: str) -> None:
    x, W = normal(rows, 512), normal(8192, 512).astype(HALF["bfloat16"])
    project(x, W, None, implementation=implementation)
    tracemalloc.start()
    project(x, W, None, implementation=implementation)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * (rows * 8192 * 4) + W.size  # a copy in float32 would take 4 · W.size


def half_block(second: bool) -> dict[str, Array]:
    params = subquad.init_mamba2(64, headdim=16, d_state=16) if second else subquad.init_mamba(64)
    return {name: x.astype(HALF["bfloat16"]) if name.endswith("proj.weight") else x for name, x in params.items()}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("n", [1, 40])
def test_a_block_keeps_weights_as_they_are(second: bool, n: int) -> None:
    """The output is that with the weights converted, and no copy of them is made."""
    block, params = (subquad.mamba2 if second else subquad.mamba), half_block(second)
    x, wide = normal(2, n, 64), {name: x.astype(np.float32) for name, x in params.items()}
    assert np.allclose(block(x, params), block(x, wide), atol=1e-6, rtol=1e-4)
    tracemalloc.start()
    _, state = block(x[:, :1], params, return_state=True)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    block(x[:, :1], params, state=state, return_state=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 2 * params["in_proj.weight"].size + sum(x.nbytes for x in state.values())


@pytest.mark.parametrize("library", [Torch(), Jax()], ids=str)
def test_gradients_by_half_weights(library: Library) -> None:
    """∂x and ∂W of a loss, in the dtypes of x and W."""
    x, W = normal(3, 40), normal(20, 40, seed=1)
    by = normal(3, 20, seed=2)
    with library.context("float32"):
        given, stored = library.array(x, "float32"), library.array(W, "bfloat16")
        weight = library.array(by, "float32")
        if isinstance(library, Jax):
            import jax

            of_x, of_W = jax.grad(lambda x, W: (project(x, W, None) * weight).sum(), argnums=(0, 1))(given, stored)
        else:
            given.requires_grad_()
            stored.requires_grad_()
            (project(given, stored, None) * weight).sum().backward()
            of_x, of_W = given.grad, stored.grad
        assert library.dtype_name(of_W) == "bfloat16"
        assert library.dtype_name(of_x) == "float32"
        rounded = library.numpy(stored.detach() if hasattr(stored, "detach") else stored)
        assert np.allclose(library.numpy(of_x), by @ rounded, atol=1e-4)
        assert np.allclose(library.numpy(of_W), by.T @ x, atol=0.05)


CONFIG = ModelConfig("mamba", d_model=16, n_layers=3, vocab_size=20, d_inner=32, d_state=5, d_conv=4, dt_rank=2)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("n", [1, 3])
def test_a_compiled_block_with_half_weights_is_one_graph(name: str, n: int) -> None:
    torch = pytest.importorskip("torch")
    params = subquad.init_mamba(16, seed=1, like=torch.ones(1))
    params = {key: w.to(getattr(torch, name)) if key.endswith("proj.weight") else w for key, w in params.items()}
    x = torch.from_numpy(normal(2, n, 16))

    def call(x: Any) -> Any:
        return subquad.mamba(x, params)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), call(x), atol=1e-6)


@pytest.mark.parametrize("library", [NumPy(), Torch(), Jax()], ids=str)
def test_a_step_through_layers_is_block_after_block(library: Library) -> None:
    with library.context("float64"):
        layers = init_params(CONFIG, like=library.array(np.zeros(1), "float64"))["layers"]
        x = library.array(normal(2, 1, 16), "float64")
        states = [subquad.mamba(x, layer["mixer"], return_state=True)[1] for layer in layers]
        out, after = step_layers(x, layers, states, 1e-5)
        expected = x
        for layer, state, found in zip(layers, states, after, strict=True):
            mean = (expected * expected).mean(-1)[..., None]
            normed = expected / (mean + 1e-5) ** 0.5 * layer["norm.weight"]
            mixed, new = subquad.mamba(normed, layer["mixer"], state=state, return_state=True, implementation="generic")
            expected = expected + mixed
            for name in new:
                assert np.allclose(library.numpy(found[name]), library.numpy(new[name]), atol=1e-12)
        assert np.allclose(library.numpy(out), library.numpy(expected), atol=1e-12)


def test_a_step_through_layers_checks_each_layer() -> None:
    layers = init_params(CONFIG)["layers"]
    x = normal(2, 1, 16)
    states = [subquad.mamba(x, layer["mixer"], return_state=True)[1] for layer in layers]
    bad = (*layers[:2], {**layers[2], "norm.weight": np.ones(15, np.float32)})
    with pytest.raises(ValueError, match=r"norm.weight has shape \(15,\), expected \(16,\)"):
        step_layers(x, bad, states, 1e-5)
    with pytest.raises(ValueError, match=r"state\['ssm'\] has shape \(2, 32, 4\)"):
        step_layers(x, layers, [*states[:2], {**states[2], "ssm": states[2]["ssm"][..., :4]}], 1e-5)
