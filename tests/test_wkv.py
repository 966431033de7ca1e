"""`wkv`: each version equals its loop over time, streams, keeps documents and padded steps apart, and has gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import LIBRARIES, Library, relative_error, tolerance

import subquad
from subquad.scans.wkv import definition

VERSIONS = pytest.mark.parametrize("version", [4, 5, 6, 7])
Arrays = dict[str, Any]
HEADS, D, D_V = 2, 6, 5


def draw(version: int, n: int, batch: tuple[int, ...] = (2,), seed: int = 0) -> Arrays:
    """Inputs by name: decays from almost none to almost all, a unit removal key in version 7."""
    rng = np.random.default_rng(seed)
    rows = (*batch, n, D) if version == 4 else (*batch, HEADS, n, D)
    r, k = rng.standard_normal((2, *rows))
    v = rng.standard_normal((*rows[:-1], D if version == 4 else D_V))
    w = -np.exp(rng.uniform(-7, 2, {4: (D,), 5: (HEADS, D)}.get(version, rows)))
    drawn = {"r": r, "k": 2 * k if version == 4 else k / 2, "v": v, "w": w}
    if version < 7:
        return drawn | {"u": rng.standard_normal((D,) if version == 4 else (HEADS, D))}
    kappa = rng.standard_normal(rows)
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    return drawn | {"a": -kappa, "b": kappa * rng.random(rows)}


def call(given: Arrays, version: int, **options: Any) -> Any:
    named = {name: x for name, x in given.items() if name not in "rkvw"}
    return subquad.wkv(*(given[name] for name in "rkvw"), version=version, **named, **options)


def has_time(name: str, version: int) -> bool:
    return name in ("r", "k", "v", "a", "b") or (name == "w" and version > 5)


def cut(given: Arrays, version: int, steps: Any) -> Arrays:
    return {name: x[..., steps, :] if has_time(name, version) else x for name, x in given.items()}


@VERSIONS
@pytest.mark.parametrize("library", LIBRARIES)
def test_equals_its_definition(library: Library, version: int) -> None:
    given, n = draw(version, 37), 37
    for dtype in library.dtypes:
        out, state = library.call(lambda x: call(x, version, return_state=True), given, dtype=dtype)
        assert library.dtype_name(out) == dtype
        assert tuple(out.shape) == given["v"].shape
        expected = {4: (2, 3, D), 7: (2, HEADS, D_V, D)}.get(version, (2, HEADS, D, D_V))
        assert tuple(state.shape) == expected
        if library.has_values:
            reference = definition(library.rounded(given, dtype), {"version": version})
            assert relative_error(library.numpy(out), reference) <= tolerance(dtype, n)


@VERSIONS
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 2, 300])
def test_full_equals_chunks_equals_steps(version: int, reverse: bool, n: int) -> None:
    given = draw(version, n)
    out, last = call(given, version, reverse=reverse, return_state=True)
    expected = definition(given, {"version": version, "reverse": reverse})
    assert relative_error(out, expected) <= 1e-13
    pieces, state = [], None
    for steps in (slice(0, n // 3), slice(n // 3, n))[:: -1 if reverse else 1]:
        piece, state = call(
            cut(given, version, steps), version, reverse=reverse, initial_state=state, return_state=True
        )
        pieces.append(piece)
    assert relative_error(np.concatenate(pieces[:: -1 if reverse else 1], axis=-2), out) <= 1e-13
    assert relative_error(state, last) <= 1e-12
    state = None
    for t in reversed(range(n)) if reverse else range(n):
        one = cut(given, version, t)
        named = {name: x for name, x in one.items() if name not in "rkvw"}
        y, state = subquad.wkv_step(state, *(one[name] for name in "rkvw"), version=version, **named)
        assert relative_error(y, out[..., t, :]) <= 1e-11
    assert relative_error(state, last) <= 1e-12
    _, states = call(given, version, reverse=reverse, states_at=(0, n))
    assert states.shape == (2, *last.shape)
    assert relative_error(states[1], last) <= 1e-12


@VERSIONS
def test_documents_and_padded_steps_are_on_their_own(version: int) -> None:
    n = 40
    given, rng = draw(version, n, batch=()), np.random.default_rng(1)
    mask = rng.random(n) < 0.7
    hidden = {name: np.where(mask[:, None], x, np.nan) if has_time(name, version) else x for name, x in given.items()}
    out, state = call(hidden, version, mask=mask, return_state=True)
    alone, last = call(cut(given, version, mask), version, return_state=True)
    assert relative_error(out[..., mask, :], alone) <= 1e-13
    assert (out[..., ~mask, :] == 0).all()
    assert relative_error(state, last) <= 1e-13
    segments = np.repeat([3, 1, 2], [15, 1, 24])
    out = call(given, version, segments=segments)
    for number in (3, 1, 2):
        document = cut(given, version, segments == number)
        assert relative_error(out[..., segments == number, :], call(document, version)) <= 1e-13
    spoilt = {
        name: np.where((segments == 1)[:, None], np.nan, x) if has_time(name, version) else x
        for name, x in given.items()
    }
    fine = segments != 1
    assert np.array_equal(call(spoilt, version, segments=segments)[..., fine, :], out[..., fine, :])


@VERSIONS
def test_gradients(version: int) -> None:
    torch = pytest.importorskip("torch")
    given = {name: torch.from_numpy(x).requires_grad_() for name, x in draw(version, 9, batch=()).items()}
    names = list(given)

    def function(*arrays: Any) -> Any:
        return call(dict(zip(names, arrays, strict=True)), version)

    assert torch.autograd.gradcheck(function, tuple(given.values()), atol=1e-6)
    mask = torch.arange(9) % 4 != 1
    for name in names:
        if has_time(name, version):
            given[name] = given[name].detach().masked_fill(~mask[:, None], float("nan")).requires_grad_()
    call(given, version, mask=mask).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in given.values())


def test_large_keys_of_version_4_do_not_overflow() -> None:
    given = draw(4, 50)
    given["k"] = 300 * given["k"]
    out, state = call({name: x.astype(np.float32) for name, x in given.items()}, 4, return_state=True)
    assert np.isfinite(out).all()
    assert np.isfinite(state).all()
    shifted = given | {"k": given["k"] - np.max(given["k"])}  # a common factor of both sums
    assert relative_error(call(given, 4), call(shifted, 4)) <= 1e-12


@pytest.mark.parametrize("shift", [-3000.0, 3000.0])
def test_exponents_of_version_4_may_be_large(shift: float) -> None:
    """Only differences of exponents count, so a common shift of all keys costs no digits, of gradients neither."""
    torch = pytest.importorskip("torch")
    given = {name: torch.from_numpy(x).float() for name, x in draw(4, 100).items()}
    given["k"] = torch.round(64 * given["k"]) / 64  # the shift below rounds no key
    results = []
    for k in (given["k"], given["k"] + shift):
        leaves = {name: x.clone().requires_grad_() for name, x in (given | {"k": k}).items()}
        out = call(leaves, 4)
        (out * torch.cos(torch.arange(out.numel()).reshape(out.shape))).sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves.values())])
    for got, expected in zip(*results, strict=True):
        assert relative_error(got.numpy(), expected.numpy()) <= tolerance("float32")


@pytest.mark.parametrize("implementation", ["auto", "generic"])
def test_decays_of_version_4_that_forget_all(implementation: str) -> None:
    """exp(−∞) = 0: an output is of the present token and the one before; padded steps are passed over."""
    torch = pytest.importorskip("torch")
    given = draw(4, 9)
    given["w"] = np.where(np.arange(D) % 2 == 0, -np.inf, given["w"])
    mask = np.arange(9) % 4 != 1
    out, state = call(given, 4, mask=mask, return_state=True, implementation=implementation)
    k, v, r = (given[name][..., mask, ::2] for name in "kvr")
    weights = np.exp(given["u"][::2] + k[..., 1:, :] - k[..., :-1, :])
    expected = (v[..., :-1, :] + weights * v[..., 1:, :]) / (1 + weights) / (1 + np.exp(-r[..., 1:, :]))
    assert relative_error(out[..., mask, ::2][..., 1:, :], expected) <= 1e-14
    assert relative_error(state[..., 0, ::2] / state[..., 1, ::2], v[..., -1, :]) <= 1e-14
    leaves = {name: torch.from_numpy(x).requires_grad_() for name, x in given.items()}
    call(leaves, 4, mask=torch.from_numpy(mask), implementation=implementation).sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves.values())


def test_a_version_may_be_an_integer_of_numpy() -> None:
    given = draw(6, 3)
    assert np.array_equal(call(given, np.int64(6)), call(given, 6))


def test_version_5_takes_one_decay_for_a_head() -> None:
    given = draw(5, 20)
    one = given | {"w": given["w"][:, :1]}
    wide = given | {"w": np.broadcast_to(given["w"][:, :1], (HEADS, D))}
    assert relative_error(call(one, 5), call(wide, 5)) <= 1e-14


def test_versions_5_and_6_are_gated_linear_attention() -> None:
    given = draw(6, 20)
    other = subquad.gated_linear_attention(*(given[name] for name in "rkvw"), bonus=given["u"], scale=1.0)
    assert np.array_equal(call(given, 6), other)


def test_version_7_with_a_removal_key_is_the_delta_rule() -> None:
    given, rng = draw(7, 20), np.random.default_rng(2)
    k = rng.standard_normal(given["k"].shape)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta, g = rng.random(k.shape[:-1]), -rng.random((*k.shape[:-1], 1))
    delta = subquad.delta_rule(given["r"], k, given["v"], beta, g, scale=1.0)
    w = np.broadcast_to(g, k.shape)
    rwkv = subquad.wkv(
        given["r"], beta[..., None] * k, given["v"], w, version=7, a=np.exp(g) * k, b=-beta[..., None] * k
    )
    assert relative_error(rwkv, delta) <= 1e-13


@pytest.mark.parametrize(
    ("version", "change", "error", "words"),
    [
        (3, {}, ValueError, r"version is 3, expected one of \(4, 5, 6, 7\)"),
        ("6", {}, TypeError, "version is '6' of type str"),
        (6, {"u": None}, (TypeError, ValueError), "u"),
        (7, {"a": None}, (TypeError, ValueError), "a"),
        (7, {"u": np.ones((HEADS, D))}, ValueError, "u is given, but version 7 has no u; it needs a and b"),
        (4, {"w": np.ones(D + 1)}, ValueError, r"w has shape \(7,\), expected \(6,\) in version 4"),
        (6, {"w": np.ones((HEADS, D))}, ValueError, r"w has shape \(2, 6\), expected \(\.\.\., 5, 6\) in version 6"),
        (6, {"r": np.ones((HEADS, 4, D))}, ValueError, "r has shape"),
        (6, {"initial_state": np.ones((HEADS, D_V, D))}, ValueError, "initial_state has shape"),
        (6, {"k": np.ones((HEADS, 5, D), int)}, TypeError, "k has dtype"),
    ],
)
def test_what_does_not_fit_is_refused(version: Any, change: Arrays, error: Any, words: str) -> None:
    given = draw(version if version in (4, 5, 6, 7) else 6, 5) | change
    with pytest.raises(error, match=words):
        call({name: x for name, x in given.items() if x is not None}, version)


def test_jax_transformations() -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        for version in (4, 7):
            given = draw(version, 12, batch=(3,))
            axes = ({name: None if name in ("u", "w") and version == 4 else 0 for name in given},)
            out = jax.jit(jax.vmap(lambda x: call(x, version), in_axes=axes))(given)  # noqa: B023
            assert relative_error(np.asarray(out), call(given, version)) <= 1e-12
