"""Promises of single overrides: ranges, memory, and the calls that they leave to the generic form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.kernels import OVERRIDES
from rows.libraries import Jax, Library, NumPy, Torch, TorchMeta, relative_error, tolerance

import subquad
from subquad import kernels
from subquad.backend import Override

pinv_overrides = pytest.mark.parametrize(
    ("library", "override"), [param for param in OVERRIDES if param.values[1].kernel == "iterative_pinv"]
)


def draw_stochastic(*shape: int) -> np.ndarray:
    """Matrices as Nyström attention has them: rows are positive and add up to 1."""
    weights = np.exp(np.random.default_rng(0).standard_normal(shape))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("library", [NumPy(), Torch(), Jax()], ids=str)
def test_pseudo_inverses_of_nothing(library: Library) -> None:
    """Whatever takes them."""
    assert tuple(kernels.iterative_pinv(library.array(np.zeros((0, 4, 4)), "float32"), iterations=6).shape) == (0, 4, 4)


@pinv_overrides
def test_pinv_override_of_any_scale_and_strides(library: Library, override: Override) -> None:
    """‖A‖₁ is not ‖A‖_∞ where A is no weights; a matrix of zeros is its own pseudo-inverse and spoils no other."""
    host = draw_stochastic(4, 5, 5) * np.asarray([0.0, 1e-4, -3.0, 1e4])[:, None, None] * np.arange(1, 6)
    with library.context("float64"):
        a = library.array(host, "float64").mT
        call = kernels.iterative_pinv
        fast, generic = (library.numpy(call(a, iterations=30, implementation=x)) for x in (override.name, "generic"))
    # each of 30 steps rounds, and a rounding grows by the condition number in A Z and once more in Z
    tolerance = 30 * np.finfo(float).eps * np.linalg.cond(host[1:]).max() ** 2
    assert np.abs(fast[1:] @ np.matrix_transpose(host)[1:] - np.eye(5)).max() <= tolerance
    assert not fast[0].any()
    for got, expected in zip(fast[1:], generic[1:], strict=True):
        assert relative_error(got, expected) <= tolerance


@pinv_overrides
def test_pinv_override_leaves_large_matrices(library: Library, override: Override) -> None:
    a = library.array(draw_stochastic(257, 257), "float32")
    with pytest.raises(ValueError, match=f"{override.name}.* cannot take this call: .*cache"):
        kernels.iterative_pinv(a, iterations=1, implementation=override.name)


def test_pinv_override_has_the_gradient_of_its_iteration() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("llvmlite")
    a = torch.asarray(draw_stochastic(8, 8) * np.arange(8, 16)).requires_grad_()  # the largest sums are unique
    assert torch.autograd.gradcheck(lambda a: kernels.iterative_pinv(a, iterations=6, implementation="compiled"), [a])
    with torch.no_grad():
        assert not kernels.iterative_pinv(a, iterations=6, implementation="compiled").requires_grad


@pytest.mark.parametrize("center", [False, True])
def test_compiled_product_leaves_recorders_the_generic_form(center: bool) -> None:
    """A graph of operations or a count of them would miss what happens outside torch."""
    torch = pytest.importorskip("torch")
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.flop_counter import FlopCounterMode

    def favor(q: Any, k: Any, v: Any) -> Any:
        return subquad.attention(q, k, v, "favor", num_features=12, center=center)

    draw = torch.Generator().manual_seed(0)
    first, second = (torch.randn(3, 2, 20, 8, generator=draw).unbind() for _ in range(2))
    traced = make_fx(favor)(*first)
    torch.testing.assert_close(traced(*second), favor(*second))
    with FlopCounterMode(display=False) as counter:
        favor(*first)
    assert counter.get_total_flops() > 0


def test_compiled_attention_takes_one_dtype() -> None:
    """The door casts; a kernel called by itself is not at its mercy."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 600, 8))
    expected = kernels.softmax_attention(q, k, v, scale=0.3)
    for single in range(3):
        mixed = [x.astype(np.float32) if i == single else x for i, x in enumerate((q, k, v))]
        assert relative_error(kernels.softmax_attention(*mixed, scale=0.3), expected) <= tolerance("float32")


@pytest.mark.parametrize(
    ("library", "name", "causal", "queries", "masked"),
    [(TorchMeta(), "sdpa", True, 64, True), (Jax(), "dot_product_attention", False, 1, False)],
    ids=str,
)
def test_memory_of_all_items_counts(
    library: Library, name: str, causal: bool, queries: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one item may hold, 64 may not: the mask's of torch, the logits' of JAX, whichever array brings them in."""
    if isinstance(library, Jax):
        monkeypatch.setattr("subquad_jax.dot_product_attention.FEW_ROWS", 10**6)
    mask = np.ones((64, 2048), dtype=bool) if masked else None
    for batch, taken in ((1, True), (64, False)):
        q, k = (library.array(np.zeros((min(n, batch), 2048, 4)), "float32") for n in (queries, 64))
        key_mask = None if mask is None else library.array(mask[:batch], "float32")
        explanation = subquad.explain(subquad.attention, q, k, k, "exact", causal=causal, key_mask=key_mask)
        assert (explanation.implementation == name) is taken, explanation
        assert (name in dict(explanation.declined)) is not taken, explanation


@pytest.mark.parametrize(("library", "taken"), [(Torch(), False), (TorchMeta(), True)], ids=str)
def test_what_torch_attention_loses_on_a_cpu_is_declined_there_alone(library: Library, taken: bool) -> None:
    """Digits, in sums over very many keys for few queries; and all logits at once, without flash attention."""
    torch = pytest.importorskip("torch")
    few, some = (library.array(np.zeros((n, 4)), "float32") for n in (4, 40))
    many = few.expand(2**15 // 4 + 1, 4, 4).reshape(-1, 4)
    assert is_sdpa(few, many) is taken
    assert is_sdpa(some, many)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert is_sdpa(some, some) is taken
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def is_sdpa(q: Any, k: Any) -> bool:
    """Whether PyTorch's own attention takes a call."""
    try:
        subquad.explain(subquad.attention, q, k, k, "exact", implementation="sdpa")
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("slow", [False, True])
def test_a_short_call_of_torch_is_compiled_unless_it_is_recorded(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the choice for arrays of these shapes is remembered; a long call goes to PyTorch's own attention, unless
    PyTorch's products are slow on this processor."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("llvmlite")
    monkeypatch.setattr("subquad_torch.sdpa.products_are_slow", lambda: slow)
    monkeypatch.setattr(kernels.softmax_attention, "chosen", {})
    short, long = torch.ones(64, 4), torch.ones(1024, 4)
    recorded, both = torch.ones(64, 4, requires_grad=True), torch.ones(1024, 4, requires_grad=True)
    by_speed = "compiled" if slow else "sdpa"
    for _ in range(2):
        for x, name in ((short, "compiled"), (recorded, "sdpa"), (long, by_speed), (both, by_speed)):
            assert subquad.explain(subquad.attention, x, x, x, "exact").implementation == name
            out = subquad.attention(x, x, x, "exact")
            assert out.requires_grad is x.requires_grad
            assert torch.allclose(out, torch.ones_like(out))


@pytest.mark.parametrize("form", ["plain", "causal", "mask"])
def test_memory_of_torch_attention_grows_no_faster_than_n(form: str) -> None:
    """A mask of the keys is not spread over the queries; without one nothing is copied."""
    torch = pytest.importorskip("torch")
    from subquad_torch.bench import peak_extra_memory

    def attend(q: Any, k: Any, v: Any) -> Any:
        mask = torch.arange(len(k)) < len(k) - 9 if form == "mask" else None
        return subquad.attention(q, k, v, "exact", causal=form == "causal", key_mask=mask, implementation="sdpa")

    peaks = [peak_extra_memory(attend, *torch.zeros(3, n, 64)) for n in (2048, 8192)]
    assert peaks[1] < 5 * peaks[0]
    copies = 2 if form == "mask" else 0  # of k and v, with zeros for what is hidden
    assert peaks[1] - peaks[0] <= (copies + 1) * (8192 - 2048) * 64 * 4


def test_jax_override_runs(jax_library: Jax) -> None:
    """It wants d_v = d, which the table of cases avoids."""
    q, k, v = (jax_library.array(x, "float32") for x in np.random.default_rng(0).standard_normal((3, 2, 9, 4)))
    mask = jax_library.array(np.arange(9) % 3 > 0, "float32")
    explanation = subquad.explain("attention", q, k, v, method="exact", key_mask=mask)
    assert explanation.implementation == "dot_product_attention"
    fast, generic = (subquad.attention(q, k, v, "exact", key_mask=mask, implementation=choice)
                     for choice in ("dot_product_attention", "generic"))  # fmt: skip
    assert relative_error(np.asarray(fast), np.asarray(generic)) <= tolerance("float32")


def test_jax_override_leaves_doubles_to_the_generic_form(jax_library: Jax) -> None:
    """It takes its softmax in float32, where logits overflow that a double holds."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 9, 4))
    expected = subquad.attention(1e20 * q, 1e20 * k, v, "exact")
    with jax_library.context("float64"):
        q, k, v = (jax_library.array(x, "float64") for x in (1e20 * q, 1e20 * k, v))
        declined = subquad.explain("attention", q, k, v, method="exact").declined
        assert [name for name, reason in declined if "float32" in reason] == ["dot_product_attention"]
        got = np.asarray(subquad.attention(q, k, v, "exact"))
    assert relative_error(got, expected) <= tolerance("float64")


def test_jax_override_leaves_an_empty_mask_to_the_generic_form(jax_library: Jax) -> None:
    """Its batch axes broadcast with those of q, k and v."""
    q = jax_library.array(np.ones((1, 9, 4)), "float32")
    out = subquad.attention(q, q, q, "exact", key_mask=jax_library.array(np.ones((0, 9), bool), "float32"))
    assert out.shape == (0, 9, 4)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("n", [9, 12, 20])
def test_torch_attention_tells_which_causal_rows_reach_a_value_that_is_not_finite(
    batch: tuple[int, ...], n: int
) -> None:
    """Of any number of axes, and of more or fewer rows than keys."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q, k, v = (torch.asarray(rng.standard_normal((*batch, rows, 4))) for rows in (n, 12, 12))
    v[..., 5, 1] = torch.inf
    out, want = (subquad.attention(q, k, v, "exact", causal=True, implementation=x) for x in ("sdpa", "generic"))
    assert torch.equal(out.isnan(), want.isnan())
    torch.testing.assert_close(out.nan_to_num(), want.nan_to_num())
