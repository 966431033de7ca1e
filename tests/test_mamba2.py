"""The Mamba-2 block: transformers' mixer, one pass, chunks, tokens; documents and padding; parameters and their checks."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Strict, StrictNoFloat64, Torch, relative_error, tolerance

import subquad

Array = np.ndarray
D_MODEL = 12
SIZES = {"d_state": 5, "headdim": 4}


def drawn(n: int, dtype: str = "float64", **sizes: int) -> tuple[Array, dict[str, Array]]:
    """(x, params) with all biases, and weights that are not those at initialisation."""
    rng = np.random.default_rng(1)
    params = subquad.init_mamba2(D_MODEL, like=np.ones(1, dtype), **SIZES | sizes)
    params |= {"in_proj.bias": np.zeros(params["in_proj.weight"].shape[0]), "out_proj.bias": np.zeros(D_MODEL)}
    params = {name: (x + 0.3 * rng.standard_normal(x.shape)).astype(dtype) for name, x in params.items()}
    return rng.standard_normal((2, n, D_MODEL)).astype(dtype), params


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def by_loop(
    x: Array, p: dict[str, Array], *, groups: int = 1, delta_limits: Any = None, norm_before_gate: bool = False
) -> Array:
    """One item, token by token, in the words of the paper."""
    (d_inner,), (channels, _, width), (heads,) = p["norm.weight"].shape, p["conv1d.weight"].shape, p["dt_bias"].shape
    d_state = (channels - d_inner) // (2 * groups)
    D = np.broadcast_to(p["D"].reshape(heads, -1), (heads, d_inner // heads))
    h, past, outs = np.zeros((heads, d_inner // heads, d_state)), np.zeros((width, channels)), []
    for token in x:
        z, u, delta = np.split(p["in_proj.weight"] @ token + p["in_proj.bias"], [d_inner, d_inner + channels])
        past = np.concatenate([past[1:], u[None]])
        u = silu((past * p["conv1d.weight"][:, 0].T).sum(0) + p.get("conv1d.bias", 0))
        delta = np.log1p(np.exp(delta + p["dt_bias"]))
        delta = delta if delta_limits is None else np.clip(delta, *delta_limits)
        maps = u[d_inner:].reshape(2, groups, d_state).repeat(heads // groups, axis=1)
        v = u[:d_inner].reshape(heads, -1)
        h = np.exp(-delta * np.exp(p["A_log"]))[:, None, None] * h + (delta[:, None] * v)[..., None] * maps[0][:, None]
        y = ((h * maps[1][:, None]).sum(-1) + D * v).reshape(-1)
        y = y if norm_before_gate else y * silu(z)
        parts = y.reshape(groups, -1)
        y = (parts / np.sqrt((parts**2).mean(1, keepdims=True) + 1e-5)).reshape(-1) * p["norm.weight"]
        y = y * silu(z) if norm_before_gate else y
        outs.append(p["out_proj.weight"] @ y + p["out_proj.bias"])
    return np.stack(outs)


@pytest.mark.parametrize("implementation", ["auto", "generic"])
@pytest.mark.parametrize(
    ("n", "sizes", "options"),
    [
        (1, {}, {}),
        (70, {"d_conv": 2, "groups": 3}, {"groups": 3}),
        (70, {"expand": 1}, {"norm_before_gate": True, "delta_limits": (0.1, 0.6)}),
    ],
)
def test_equals_the_loop_over_tokens(n: int, sizes: Any, options: Any, implementation: str) -> None:
    x, params = drawn(n, **sizes)
    out = subquad.mamba2(x, params, implementation=implementation, **options)
    expected = np.stack([by_loop(item, params, **options) for item in x])
    assert relative_error(out, expected) <= tolerance("float64")


def test_one_skip_connection_for_each_channel() -> None:
    x, params = drawn(9)
    params["D"] = np.linspace(-1, 1, 2 * D_MODEL)
    assert relative_error(subquad.mamba2(x, params)[0], by_loop(x[0], params)) <= tolerance("float64")


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_mixer_of_transformers(groups: int) -> None:
    """One pass, chunks and single tokens against its one pass."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": groups, "chunk_size": 16}
    mixer = Mamba2Mixer(Mamba2Config(num_hidden_layers=1, **sizes), 0).eval()
    with torch.no_grad():
        for x in mixer.parameters():
            x.add_(0.1 * torch.randn_like(x))
        x = torch.randn(2, 41, 32)
        expected = mixer(x).numpy()
    params = {name: x.numpy() for name, x in mixer.state_dict().items()}
    for chunk in (41, 9, 1):
        state, outs = None, []
        for start in range(0, 41, chunk):
            part = x.numpy()[:, start : start + chunk]
            out, state = subquad.mamba2(part, params, groups=groups, state=state, return_state=True)
            outs.append(out)
        assert np.abs(np.concatenate(outs, axis=1) - expected).max() <= 1e-5


def test_the_module_has_the_mixers_state_dict() -> None:
    torch = pytest.importorskip("torch")
    nn = pytest.importorskip("subquad_torch.nn")
    layer = nn.Mamba2(D_MODEL, bias=True, groups=3, delta_limits=(0.0, 1.0), **SIZES)
    x, params = drawn(12, "float32", groups=3)
    assert {name: tuple(a.shape) for name, a in layer.state_dict().items()} == {
        name: a.shape for name, a in params.items()
    }
    layer.load_state_dict({name: torch.from_numpy(a) for name, a in params.items()})
    expected = subquad.mamba2(x, params, groups=3, delta_limits=(0.0, 1.0))
    assert relative_error(layer(torch.from_numpy(x)).detach().numpy(), expected) <= tolerance("float32")
    fresh = nn.Mamba2(D_MODEL, seed=3, **SIZES)
    for name, a in subquad.init_mamba2(D_MODEL, seed=3, **SIZES).items():
        assert np.array_equal(fresh.state_dict()[name].numpy(), a)


def test_a_module_learns_under_compile() -> None:
    """Every parameter has a gradient, and the compiled one is that of the plain call."""
    torch = pytest.importorskip("torch")
    nn = pytest.importorskip("subquad_torch.nn")
    torch._dynamo.reset()
    layer, x = nn.Mamba2(D_MODEL, dtype=torch.float64, **SIZES), torch.randn(2, 20, D_MODEL, dtype=torch.float64)
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
        out, state = subquad.mamba2(x, dict(zip(names, given, strict=True)), return_state=True)
        return out, *state.values()

    assert torch.autograd.gradcheck(block, tensors, fast_mode=True)


@pytest.mark.parametrize("library", [Strict(), StrictNoFloat64(), Torch(), Jax()], ids=str)
def test_every_library_and_dtype(library: Any) -> None:
    x, params = drawn(9)
    for dtype in library.dtypes:
        rounded = Torch() if dtype == "bfloat16" else library
        expected = subquad.mamba2(rounded.rounded(x, dtype), rounded.rounded(params, dtype))
        found = library.call(lambda x, p: subquad.mamba2(x, p), x, params, dtype=dtype)
        assert library.dtype_name(found) == dtype
        assert relative_error(library.numpy(found), expected) <= 2 * tolerance(dtype)


def test_documents_and_padded_steps_are_on_their_own() -> None:
    n = 30
    x, params = drawn(n)
    mask = np.random.default_rng(0).random((2, n)) < 0.7
    hidden = np.where(mask[..., None], x, np.nan)
    out, state = subquad.mamba2(hidden, params, mask=mask, return_state=True, delta_limits=(0.2, 0.5))
    assert (out[~mask] == 0).all()
    for item in range(2):
        alone, last = subquad.mamba2(x[item][mask[item]], params, return_state=True, delta_limits=(0.2, 0.5))
        assert relative_error(out[item][mask[item]], alone) <= 1e-13
        for name, a in last.items():
            assert relative_error(state[name][item], a) <= 1e-13
    segments = np.repeat([4, 2, 7], [11, 1, 18])
    out = subquad.mamba2(x, params, segments=segments)
    for number in (4, 2, 7):
        assert relative_error(out[:, segments == number], subquad.mamba2(x[:, segments == number], params)) <= 1e-13
    spoilt = np.where((segments == 4)[:, None], np.nan, x)
    assert np.array_equal(subquad.mamba2(spoilt, params, segments=segments)[:, 11:], out[:, 11:])


def test_a_sequence_longer_than_a_block_of_rows() -> None:
    x, params = drawn(2500, "float32", expand=1)
    whole, state = subquad.mamba2(x, params, return_state=True)
    assert relative_error(whole[0], by_loop(x[0].astype(np.float64), params)) <= tolerance("float32", 2500)
    first, before = subquad.mamba2(x[:, :1500], params, return_state=True)
    second, last = subquad.mamba2(x[:, 1500:], params, state=before, return_state=True)
    assert relative_error(np.concatenate([first, second], axis=1), whole) <= tolerance("float32")
    assert relative_error(last["ssm"], state["ssm"]) <= tolerance("float32")


def test_without_a_norm_the_gate_remains() -> None:
    x, params = drawn(9)
    del params["norm.weight"]
    one = subquad.mamba2(x, params)
    assert np.array_equal(one, subquad.mamba2(x, params, norm_before_gate=True))
    assert not np.allclose(one, subquad.mamba2(x, params | {"norm.weight": np.ones(2 * D_MODEL)}))


def test_parameters_at_initialisation() -> None:
    params = subquad.init_mamba2(64, headdim=2)
    steps, rates = np.log1p(np.exp(params["dt_bias"])), np.exp(params["A_log"])
    assert 0.0009 < steps.min() < 0.003 < 0.03 < steps.max() < 0.1001
    assert 1 <= rates.min() < 3 < 14 < rates.max() <= 16
    assert subquad.check_mamba(params) == ()
    for name, value, words in (
        ("dt_bias", 0.0, "dt_bias is 0 in all channels"),
        ("A_log", 0.0, "A_log gives all heads nearly the same rate"),
        ("D", 0.0, "D is 0 in all channels"),
        ("norm.weight", 0.0, "norm.weight is 0 everywhere"),
        ("dt_bias", np.nan, "dt_bias has 64 numbers that are not finite"),
    ):
        assert re.search(words, " ".join(subquad.check_mamba(params | {name: np.full_like(params[name], value)})))


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"dt_bias": None}, {}, "params lacks 'dt_bias'"),
        ({"norm.wieght": np.ones(3)}, {}, "norm.weight"),
        ({}, {"groups": 4}, "groups is 4, heads"),
        ({"A_log": np.ones(5)}, {}, re.escape("params['A_log'] has shape (5,), expected (6,)")),
        ({"in_proj.weight": np.ones((3, D_MODEL))}, {}, re.escape("params['in_proj.weight'] has shape (3, 12)")),
        ({"conv1d.weight": np.ones((24, 1, 4))}, {}, "too few channels, expected d_inner.* give d_state = 0"),
        ({"conv1d.weight": np.ones((20, 1, 4))}, {}, "too few channels, expected d_inner.* give d_state = -2"),
        ({}, {"norm_eps": 0.0}, "norm_eps"),
        ({}, {"delta_limits": (2.0, 1.0)}, "delta_limits"),
        (
            {},
            {"state": {"conv": np.ones((2, 3, 34)), "ssm": np.ones((2, 6, 5, 4))}},
            re.escape("state['ssm'] has shape"),
        ),
        ({}, {"state": {"conv": np.ones((2, 3, 34))}}, "ssm"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], options: dict[str, Any], words: str) -> None:
    x, params = drawn(3)
    with pytest.raises((TypeError, ValueError), match=words):
        subquad.mamba2(x, {name: a for name, a in (params | change).items() if a is not None}, **options)
    with pytest.raises(ValueError, match="headdim is 5, expected a divisor of d_inner"):
        subquad.init_mamba2(D_MODEL, headdim=5)
    with pytest.raises(ValueError, match="groups is 4, expected a divisor"):
        subquad.init_mamba2(D_MODEL, headdim=4, groups=4)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_the_convolution_of_a_layer_called_by_itself_is_causal(name: str) -> None:
    """As code for mamba_ssm calls it: all its outputs but the last ones, which see what comes after the end."""
    torch = pytest.importorskip("torch")
    layer = getattr(pytest.importorskip("subquad_torch.nn"), name)(32)
    conv, n = layer.conv1d, 9
    x = torch.randn(2, n, conv.in_channels, generator=torch.Generator().manual_seed(0))
    expected = subquad.causal_conv1d(x, conv.weight[:, 0], conv.bias)
    torch.testing.assert_close(conv(x.mT)[..., :n].mT, expected, rtol=1e-5, atol=1e-6)
    assert conv(x.mT).shape[-1] == n + conv.kernel_size[0] - 1
