"""The Mamba block: transformers' mixer, one pass, chunks, tokens; documents and padding; parameters and their checks."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Strict, StrictNoFloat64, Torch, relative_error, tolerance

import subquad

Array = np.ndarray
D_MODEL = 10


def drawn(n: int, dtype: str = "float64", **sizes: int) -> tuple[Array, dict[str, Array]]:
    """(x, params) with all biases, and weights that are not those at initialisation."""
    rng = np.random.default_rng(1)
    params = subquad.init_mamba(D_MODEL, like=np.ones(1, dtype), **sizes)
    d_inner = params["D"].shape[0]
    params |= {"in_proj.bias": np.zeros(2 * d_inner), "out_proj.bias": np.zeros(D_MODEL)}
    params = {name: (x + 0.3 * rng.standard_normal(x.shape)).astype(dtype) for name, x in params.items()}
    return rng.standard_normal((2, n, D_MODEL)).astype(dtype), params


def by_loop(x: Array, p: dict[str, Array]) -> Array:
    """One item, token by token, in the words of the paper."""
    d_inner, _, width = p["conv1d.weight"].shape
    rank, d_state = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
    A, h, past, outs = -np.exp(p["A_log"]), np.zeros((d_inner, d_state)), np.zeros((width, d_inner)), []
    for token in x:
        u, z = np.split(p["in_proj.weight"] @ token + p["in_proj.bias"], 2)
        past = np.concatenate([past[1:], u[None]])
        u = (past * p["conv1d.weight"][:, 0].T).sum(0) + p["conv1d.bias"]
        u = u / (1 + np.exp(-u))
        low = p["x_proj.weight"] @ u
        B, C = low[rank : rank + d_state], low[rank + d_state :]
        delta = np.log1p(np.exp(p["dt_proj.weight"] @ low[:rank] + p["dt_proj.bias"]))
        h = np.exp(delta[:, None] * A) * h + (delta * u)[:, None] * B
        y = (h @ C + p["D"] * u) * z / (1 + np.exp(-z))
        outs.append(p["out_proj.weight"] @ y + p["out_proj.bias"])
    return np.stack(outs)


@pytest.mark.parametrize("implementation", ["auto", "generic"])
@pytest.mark.parametrize(
    ("n", "sizes"), [(1, {}), (40, {"d_state": 3, "d_conv": 2}), (40, {"expand": 1, "dt_rank": 5})]
)
def test_equals_the_loop_over_tokens(n: int, sizes: dict[str, int], implementation: str) -> None:
    x, params = drawn(n, **sizes)
    out = subquad.mamba(x, params, implementation=implementation)
    assert relative_error(out, np.stack([by_loop(item, params) for item in x])) <= tolerance("float64")


@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_mixer_of_transformers(bias: bool) -> None:
    """One pass, chunks and single tokens against its one pass; its cache is no reference, since chunks go wrong there."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    torch.manual_seed(0)
    mixer = MambaMixer(MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=1, use_bias=bias), 0).eval()
    with torch.no_grad():
        for x in mixer.parameters():
            x.add_(0.1 * torch.randn_like(x))
        x = torch.randn(2, 41, 32)
        expected = mixer(x).numpy()
    params = {name: x.numpy() for name, x in mixer.state_dict().items()}
    for chunk in (41, 9, 1):
        state, outs = None, []
        for start in range(0, 41, chunk):
            out, state = subquad.mamba(x.numpy()[:, start : start + chunk], params, state=state, return_state=True)
            outs.append(out)
        assert np.abs(np.concatenate(outs, axis=1) - expected).max() <= 1e-5


def test_the_module_has_the_mixers_state_dict() -> None:
    torch = pytest.importorskip("torch")
    nn = pytest.importorskip("subquad_torch.nn")
    layer = nn.Mamba(D_MODEL, bias=True)
    x, params = drawn(12, "float32")
    assert {name: tuple(a.shape) for name, a in layer.state_dict().items()} == {
        name: a.shape for name, a in params.items()
    }
    layer.load_state_dict({name: torch.from_numpy(a) for name, a in params.items()})
    assert relative_error(layer(torch.from_numpy(x)).detach().numpy(), subquad.mamba(x, params)) <= tolerance("float32")
    fresh = nn.Mamba(D_MODEL, seed=3)
    for name, a in subquad.init_mamba(D_MODEL, seed=3).items():
        assert np.array_equal(fresh.state_dict()[name].numpy(), a)
    assert nn.Mamba(D_MODEL, dtype=torch.float64).A_log.dtype == torch.float64


def test_a_module_learns_under_compile() -> None:
    """Every parameter has a gradient, and the compiled one is that of the plain call."""
    torch = pytest.importorskip("torch")
    nn = pytest.importorskip("subquad_torch.nn")
    torch._dynamo.reset()
    layer, x = nn.Mamba(D_MODEL, dtype=torch.float64), torch.randn(2, 20, D_MODEL, dtype=torch.float64)
    gradients = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        call(x).square().sum().backward()
        gradients.append({name: a.grad.clone() for name, a in layer.named_parameters()})
    for name, plain in gradients[0].items():
        assert plain.any(), name
        assert relative_error(gradients[1][name].numpy(), plain.numpy()) <= 4 * tolerance("float64")


def test_torch_gradcheck() -> None:
    torch = pytest.importorskip("torch")
    x, params = drawn(5, d_state=2)
    names = list(params)
    tensors = [torch.from_numpy(a).requires_grad_() for a in (x, *params.values())]

    def block(x: Any, *given: Any) -> Any:
        out, state = subquad.mamba(x, dict(zip(names, given, strict=True)), return_state=True)
        return out, *state.values()

    assert torch.autograd.gradcheck(block, tensors, fast_mode=True)


@pytest.mark.parametrize("library", [Strict(), StrictNoFloat64(), Torch(), Jax()], ids=str)
def test_every_library_and_dtype(library: Any) -> None:
    x, params = drawn(9)
    for dtype in library.dtypes:
        rounded = Torch() if dtype == "bfloat16" else library
        expected = subquad.mamba(rounded.rounded(x, dtype), rounded.rounded(params, dtype))
        found = library.call(lambda x, p: subquad.mamba(x, p), x, params, dtype=dtype)
        assert library.dtype_name(found) == dtype
        assert relative_error(library.numpy(found), expected) <= 2 * tolerance(dtype)


def test_jax_grad_and_vmap(jax_library: Jax) -> None:
    with jax_library.context("float64"):
        import jax

        x, params = drawn(9)
        x, params = jax_library.arrays((x, params), "float64")

        def loss(p: Any, implementation: str) -> Any:
            return (subquad.mamba(x, p, implementation=implementation) ** 2).sum()

        one, other = (jax.jit(jax.grad(loss), static_argnums=1)(params, name) for name in ("auto", "generic"))
        for name in params:
            assert relative_error(np.asarray(one[name]), np.asarray(other[name])) <= 8 * tolerance("float64")
        mapped = jax.vmap(lambda x: subquad.mamba(x, params))(x)
        assert relative_error(np.asarray(mapped), np.asarray(subquad.mamba(x, params))) <= tolerance("float64")


def test_documents_and_padding() -> None:
    """Longer than the steps that go through the block together."""
    n, rng = 1100, np.random.default_rng(0)
    x, params = drawn(n, d_state=2)
    mask = rng.random((2, n)) < 0.8
    segments = np.zeros((2, n), int)
    segments[:, 3:], segments[0, 1024:] = 1, 2  # one document begins where a block of steps does
    out, state = subquad.mamba(
        np.where(mask[..., None], x, np.nan), params, mask=mask, segments=segments, return_state=True
    )
    for i in range(2):
        for segment in np.unique(segments[i]):
            here = mask[i] & (segments[i] == segment)
            alone, after = subquad.mamba(x[i][here], params, return_state=True)
            assert relative_error(out[i][here], alone) <= tolerance("float64")
        assert not out[i][~mask[i]].any()
        for name, a in after.items():
            assert relative_error(state[name][i], a) <= tolerance("float64")


def test_the_state_is_a_dict_of_two_arrays() -> None:
    x, params = drawn(6)
    _, state = subquad.mamba(x, params, return_state=True)
    assert {name: a.shape for name, a in state.items()} == {"conv": (2, 3, 20), "ssm": (2, 20, 16)}
    out, same = subquad.mamba(x[:, :0], params, state=state, return_state=True)
    assert out.shape == (2, 0, D_MODEL)
    assert all(np.array_equal(same[name], a) for name, a in state.items())


def test_is_explained() -> None:
    x, params = drawn(6)
    found = subquad.explain("mamba", x, params)
    assert [choice.kernel for choice in found.choices] == ["project", "causal_conv1d", "selective_scan"]
    assert [choice.kernel for choice in subquad.explain("mamba", x[:, :1], params).choices] == ["mamba_step"]


def test_initial_parameters_are_those_of_the_authors() -> None:
    params = subquad.init_mamba(96, d_state=5, seed=7)
    steps = np.log1p(np.exp(params["dt_proj.bias"].astype("f8")))
    assert 0.001 <= steps.min() * 1.0001 < 0.002
    assert 0.05 < steps.max() <= 0.1001
    assert 0.004 < np.median(steps) < 0.025  # log-uniform: the median is 0.01
    assert np.allclose(np.exp(params["A_log"]), [1, 2, 3, 4, 5])
    assert np.array_equal(params["D"], np.ones(192))
    assert params["dt_proj.weight"].shape == (192, 6)
    for name, inputs in (("in_proj", 96), ("x_proj", 192), ("dt_proj", 6), ("conv1d", 4), ("out_proj", 192)):
        size = np.abs(params[f"{name}.weight"]).max() * inputs**0.5
        assert 0.95 < size <= 1.0001, name
    assert all(x.dtype == np.float32 for x in params.values())
    assert not np.array_equal(params["in_proj.weight"], subquad.init_mamba(96, d_state=5, seed=8)["in_proj.weight"])


@pytest.mark.parametrize("library", [Strict(), Torch(), Jax()], ids=str)
def test_initial_parameters_are_the_same_on_every_library(library: Any) -> None:
    like = library.array(np.ones(1), "float32")
    expected = subquad.init_mamba(D_MODEL)
    for name, x in subquad.init_mamba(D_MODEL, like=like).items():
        library.check_kin(x, like)
        assert np.array_equal(library.numpy(x), expected[name].astype("f8"))


def broken(name: str, change: Any) -> dict[str, Array]:
    params = subquad.init_mamba(24)
    return params | {name: change(params[name])}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dt_proj.bias", np.zeros_like, "dt_proj.bias is 0 in all channels, so that their steps are 0.69"),
        ("dt_proj.bias", lambda x: x + 4, "dt_proj.bias makes the median step"),
        ("A_log", lambda x: 0.02 * np.random.default_rng(0).standard_normal(x.shape), "nearly the same rate"),
        ("A_log", lambda x: np.zeros_like(x) + np.linspace(0, np.log(2.4), 16), "nearly the same rate"),
        ("D", np.zeros_like, "D is 0 in all channels"),
        ("x_proj.weight", np.zeros_like, "x_proj.weight is 0 everywhere"),
        ("A_log", lambda x: np.where(x > 2, np.nan, x), "A_log has 432 numbers that are not finite"),
    ],
)
def test_check_tells_what_is_broken(name: str, change: Any, message: str) -> None:
    assert subquad.check_mamba(subquad.init_mamba(24)) == ()
    found = subquad.check_mamba(broken(name, change))
    assert len(found) == 1
    assert message in found[0]


def test_check_wants_rates_that_differ_by_a_tenth_for_each_state() -> None:
    params = subquad.init_mamba(24, d_state=4)
    for ratio, count in ((1.2, 1), (1.4, 0)):
        assert len(subquad.check_mamba(params | {"A_log": params["A_log"] * 0 + [0, 0, 0, np.log(ratio)]})) == count


def test_check_reads_tensors() -> None:
    torch = pytest.importorskip("torch")
    nn = pytest.importorskip("subquad_torch.nn")
    layer = nn.Mamba(D_MODEL)
    assert subquad.check_mamba(dict(layer.named_parameters())) == ()
    for x in layer.modules():  # as a framework does that knows linear layers alone
        if isinstance(x, torch.nn.Linear) and x.bias is not None:
            torch.nn.init.zeros_(x.bias)
    assert len(subquad.check_mamba(layer.state_dict())) == 1


X, P = drawn(5)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "params is a list, expected a dict", lambda: subquad.mamba(X, [P])),
        (ValueError, "params lacks 'D'", lambda: subquad.mamba(X, {k: v for k, v in P.items() if k != "D"})),
        (ValueError, "params holds 'in_proj.wait'; did you mean 'in_proj.weight'", lambda: subquad.mamba(X, P | {"in_proj.wait": X})),
        (TypeError, "params['D'] is a list", lambda: subquad.mamba(X, P | {"D": [1.0]})),
        (ValueError, "params['conv1d.weight'] has shape (20, 4), expected 3 axes",
         lambda: subquad.mamba(X, P | {"conv1d.weight": P["conv1d.weight"][:, 0]})),
        (ValueError, "params['x_proj.weight'] has shape (20, 33), expected (33, 20): d_model = 10",
         lambda: subquad.mamba(X, P | {"x_proj.weight": P["x_proj.weight"].T})),
        (ValueError, "x has shape (2, 5, 4), expected (..., n, 10)", lambda: subquad.mamba(X[..., :4], P)),
        (TypeError, "x is a NoneType", lambda: subquad.mamba(None, P)),
        (TypeError, "state is a tuple, expected the dict", lambda: subquad.mamba(X, P, state=(X, X))),
        (ValueError, "state holds 'conv', expected 'conv', 'ssm'", lambda: subquad.mamba(X, P, state={"conv": X})),
        (ValueError, "state['ssm'] has shape (2, 16, 20), expected (..., 20, 16)",
         lambda: subquad.mamba(X, P, state={"conv": np.ones((2, 3, 20)), "ssm": np.ones((2, 16, 20))})),
        (ValueError, "mask has shape (2, 4), expected (..., 5)", lambda: subquad.mamba(X, P, mask=np.ones((2, 4), bool))),
        (TypeError, "d_model must be an integer", lambda: subquad.init_mamba(4.0)),
        (ValueError, "dt_rank must be at least 1", lambda: subquad.init_mamba(4, dt_rank=0)),
        (TypeError, "like is a type, not an array", lambda: subquad.init_mamba(4, like=np.float32)),
        (ValueError, "params lacks", lambda: subquad.check_mamba({})),
    ],
)  # fmt: skip
def test_errors(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
