"""Equal inputs and equal random directions give outputs equal to those of other packages, which run here too."""

from __future__ import annotations

import importlib.resources
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Library, NumPy, Strict, Torch, relative_error
from rows.methods import Case, D

import subquad
from asv_benchmarks.peers.attention import PEERS, Peer, errors_of

torch = pytest.importorskip("torch")
N = 96
SEVERAL = [NumPy(), Torch(), Strict(), Jax()]  # two ways to an override; the generic form, eager and traced
EXACT = [peer for peer in PEERS if peer.method == "exact"]


def drawn(heads: int = 3, batch: int = 2) -> list[Any]:
    shape = (batch, heads, N, D)
    inputs = Case(shape, shape, shape).draw()
    return [torch.from_numpy(inputs[name]) for name in ("q", "k", "v")]


@pytest.mark.parametrize("causal", [False, True])
def test_favor_equals_performer_pytorch(causal: bool) -> None:
    """Its ε is set to 0: it changes the answer."""
    peer = pytest.importorskip("performer_pytorch.performer_pytorch")
    q, k, v = drawn()
    omega = torch.from_numpy(subquad.draw_omega("orthogonal", 20, D, 0).copy())
    phi_q, phi_k = (
        peer.softmax_kernel(x, projection_matrix=omega, is_query=is_query, eps=0.0)
        for x, is_query in ((q, True), (k, False))
    )
    theirs = (
        peer.causal_linear_attention_noncuda(phi_q, phi_k, v, eps=0.0)
        if causal
        else peer.linear_attention(phi_q, phi_k, v)
    )
    ours = subquad.attention(q, k, v, "favor", omega=omega, causal=causal)
    assert relative_error(ours.numpy(), theirs.numpy()) < 1e-12


def test_generalised_favor_equals_performer_pytorch() -> None:
    peer = pytest.importorskip("performer_pytorch.performer_pytorch")
    q, k, v = drawn()
    omega = torch.from_numpy(subquad.draw_omega("orthogonal", 20, D, 0).copy())
    phi_q, phi_k = (peer.generalized_kernel(x, projection_matrix=omega) for x in (q, k))
    ours = subquad.attention(q, k, v, "favor", omega=omega, features="relu", kernel_epsilon=1e-3)
    assert relative_error(ours.numpy(), peer.linear_attention(phi_q, phi_k, v).numpy()) < 1e-12


def test_nystrom_equals_nystrom_attention() -> None:
    """One head and one item, since its start value is shared by the batch. Its masks differ: it lets landmarks of
    nothing but padding into the pseudo-inverse."""
    peer = pytest.importorskip("nystrom_attention")
    q, k, v = (x[:1, :1] for x in drawn())
    module = peer.NystromAttention(
        3 * D, dim_head=D, heads=1, num_landmarks=12, residual_conv_kernel=5, eps=0.0
    ).double()
    module.to_qkv, module.to_out = torch.nn.Identity(), torch.nn.Identity()
    weights = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)
    with torch.no_grad():
        module.res_conv.weight.copy_(weights[None, None, :, None])
        theirs = module(torch.cat([q, k, v], -1)[0])
    ours = subquad.attention(q, k, v, "nystrom", num_landmarks=12, conv_weights=weights)
    # its identity matrix is float32, exactly 1 and 0
    assert relative_error(ours[0, 0].numpy(), theirs[0].numpy()) < 1e-12


def test_nystrom_equals_transformers() -> None:
    """With segment_means_seq_len = num_landmarks, its default, it would be exact attention."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.nystromformer.modeling_nystromformer")
    heads = 3
    config = transformers.NystromformerConfig(
        hidden_size=heads * D, num_attention_heads=heads, num_landmarks=12, segment_means_seq_len=N, conv_kernel_size=7,
        attention_probs_dropout_prob=0.0, inv_coeff_init_option=False,
    )  # fmt: skip
    module = modeling.NystromformerSelfAttention(config).double().eval()
    module.init_option = "exact"  # a start value for each matrix; "original" takes one for the batch
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, N, heads * D)))
    with torch.no_grad():
        theirs = module(x)[0]

        def split(y: Any) -> Any:
            return y.reshape(2, N, heads, D).transpose(1, 2)

        q, k, v = (split(linear(x)) for linear in (module.query, module.key, module.value))
        weights = module.conv.weight[:, 0, :, 0]
        ours = subquad.attention(q, k, v, "nystrom", num_landmarks=12, conv_weights=weights)
    assert relative_error(ours.transpose(1, 2).reshape(2, N, -1).numpy(), theirs.numpy()) < 1e-12


def test_linformer_equals_linformer() -> None:
    """Learnt projections of which shorter inputs take a part; one pair serves all heads."""
    peer = pytest.importorskip("linformer")
    layer = peer.LinformerSelfAttention(dim=3 * D, seq_len=N + 20, k=12, heads=3).double()
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, N, 3 * D)))
    with torch.no_grad():
        theirs = layer(x)
        q, k, v = (to(x).reshape(2, N, 3, D).transpose(1, 2) for to in (layer.to_q, layer.to_k, layer.to_v))
        E, F = layer.proj_k[:N].T, layer.proj_v[:N].T
        ours = subquad.attention(q, k, v, "linformer", projection=(E, F))
        ours = layer.to_out(ours.transpose(1, 2).reshape(2, N, 3 * D))
    assert relative_error(ours.numpy(), theirs.numpy()) < 1e-12


def test_exact_equals_torch() -> None:
    q, k, v = drawn()
    for causal in (False, True):
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        for implementation in ("auto", "generic"):
            ours = subquad.attention(q, k, v, "exact", causal=causal, implementation=implementation)
            assert relative_error(ours.numpy(), theirs.numpy()) < 1e-12


@pytest.mark.parametrize("peer", EXACT, ids=lambda peer: peer.name)
def test_exact_rows_compute_the_same(peer: Peer) -> None:
    """So that their times may be compared."""
    pytest.importorskip(peer.library)
    arrays = [peer.bench.asarray(x.numpy(), dtype="float32") for x in drawn()]
    out, theirs = (peer.bench.to_numpy(call()) for call in peer.calls(*arrays))
    theirs = theirs if peer.library == "torch" else np.moveaxis(theirs, 2, 1)  # sequence before heads
    assert relative_error(out, theirs) < 1e-6


@pytest.mark.parametrize("peer", EXACT, ids=lambda peer: peer.name)
def test_errors_of_exact_rows_are_those_of_rounding(peer: Peer) -> None:
    """The definition hides what the calls hide."""
    pytest.importorskip(peer.library)
    real_activations()  # skips where there are none
    errors = errors_of(peer)
    assert max(errors["error_ours"], errors["error_theirs"]) < 1e-6
    assert errors["error_mean"] > 0.1


def test_scan_equals_mambapy() -> None:
    pscan = pytest.importorskip("mambapy.pscan")
    rng = np.random.default_rng(0)
    n, d, d_state = 40, 6, 4
    u, delta = rng.standard_normal((2, n, d)), rng.uniform(0.1, 1, (2, n, d))
    A, B, C = -rng.uniform(0.5, 2, (d, d_state)), *rng.standard_normal((2, 2, n, d_state))
    decay = torch.from_numpy(np.exp(delta[..., None] * A))
    added = torch.from_numpy((delta * u)[..., None] * B[:, :, None, :])
    h = pscan.pscan(decay, added)
    theirs = (h * torch.from_numpy(C)[:, :, None, :]).sum(-1)
    assert relative_error(subquad.selective_scan(u, delta, A, B, C), theirs.numpy()) < 1e-12


def real_activations() -> list[np.ndarray]:
    file = importlib.resources.files("subquad") / "data" / "sample.npz"
    if not file.is_file():
        pytest.skip("no sample data in this installation")
    with np.load(file) as stored:
        return [stored[name].astype(np.float32) for name in ("q", "k", "v")]


def stretched(n: int, stretch: float) -> list[np.ndarray]:
    """Real queries and keys; longer than they are, for heads with larger logits than this one."""
    q, k, v = (x[:, :n] for x in real_activations())
    return [q * stretch**0.5, k * stretch, v]


@pytest.mark.parametrize(("order", "stretch"), [("told", 1), ("told", 4), ("shuffled", 3), ("shuffled", 6)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
@pytest.mark.parametrize("library", SEVERAL, ids=str)
def test_favor_on_real_keys_keeps_float32(
    library: Library, features: str, causal: bool, order: str, stretch: float
) -> None:
    """Trained keys differ so much in length that a maximum over all of them underflows to 0/0, as the peer's below.

    Exponents of size E carry a rounding error of E 2⁻²⁴ into every weight: E reaches 1000 here, so 6·10⁻⁵, and room.
    """
    q, k, v = stretched(300, stretch)
    if order == "shuffled":  # the longest key, the first token's, no longer comes first
        q, k, v = (x[:, np.random.default_rng(0).permutation(300)] for x in (q, k, v))
    omega = subquad.draw_omega("orthogonal", 64, 64, 0)
    method = subquad.Favor(num_features=64, features=features)
    out = library.numpy(library.call(lambda *x: method(*x, causal=causal), q, k, v, dtype="float32"))
    assert relative_error(out, in_logarithms(q, k, v, omega, features, causal)) < 1e-4


@pytest.mark.parametrize("outliers", [1, 2, 40])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("library", SEVERAL, ids=str)
def test_favor_after_keys_like_no_other(library: Library, causal: bool, outliers: int) -> None:
    """The first tokens of a sequence: next to them the features of other keys are lost, one way round or the other."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 90, 64)).astype(np.float32)
    k[:, :outliers] *= 8
    omega = subquad.draw_omega("orthogonal", 64, 64, 0)
    method = subquad.Favor(num_features=64)
    expected = in_logarithms(q, k, v, omega, "positive", causal)
    out = library.numpy(library.call(lambda *x: method(*x, causal=causal), q, k, v, dtype="float32"))
    assert relative_error(out, expected) < 1e-4
    if causal and type(library) is NumPy:
        for size in (1, 7):
            state, outs = None, []
            for i in range(0, 90, size):
                out, state = method.step(*(x[:, i : i + size] for x in (q, k, v)), state)
                outs.append(out)
            assert relative_error(np.concatenate(outs, axis=-2), expected) < 1e-4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("library", SEVERAL, ids=str)
def test_favor_with_a_common_offset_keeps_float32(library: Library, causal: bool) -> None:
    """Keys around c and queries around −c: what a query weighs most is where every key is smallest.

    One maximum for all features would lose just those: ω·c goes from −80 to 80, and exp(−104) is 0 in float32. The
    exponents reach |c|²/2 ≈ 480, a rounding error of 480 · 2⁻²⁴ = 3·10⁻⁵.
    """
    rng = np.random.default_rng(0)
    offset = 12 * rng.standard_normal(64)
    q, k, v = rng.standard_normal((3, 1, 100, 64))
    q, k, v = (x.astype(np.float32) for x in (q - offset, k + offset, v))
    method = subquad.Favor(num_features=64)
    out = library.numpy(library.call(lambda *x: method(*x, causal=causal), q, k, v, dtype="float32"))
    expected = in_logarithms(q, k, v, subquad.draw_omega("orthogonal", 64, 64, 0), "positive", causal)
    assert relative_error(out, expected) < 1e-4


def in_logarithms(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, omega: np.ndarray, features: str, causal: bool
) -> np.ndarray:
    """The definition in float64 for long vectors: the logarithm of every weight is a log-sum-exp over the features."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    root = q.shape[-1] ** -0.25

    def log_phi(x: np.ndarray) -> np.ndarray:
        projected, half = root * x @ omega.T, (root * x) ** 2 / 2
        projected = np.concatenate([projected, -projected], -1) if features == "hyperbolic" else projected
        return projected - half.sum(-1, keepdims=True)

    outs = []
    for head in q:
        log_q, log_k = log_phi(head), log_phi(k[0])
        log_weights = np.stack([np.logaddexp.reduce(row + log_k, axis=-1) for row in log_q])
        if causal:
            log_weights[np.triu_indices(len(head), 1)] = -np.inf
        weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
        outs.append(weights / weights.sum(axis=1, keepdims=True) @ v[0])
    return np.stack(outs)


def test_a_peers_maximum_fails_on_real_keys() -> None:
    """Why the sums are stabilised per feature: without its ε, the peer's maximum over all keys leaves rows of 0/0."""
    peer = pytest.importorskip("performer_pytorch.performer_pytorch")
    q, k, v = (torch.from_numpy(x)[None] for x in stretched(300, 4))
    omega = torch.from_numpy(subquad.draw_omega("orthogonal", 64, 64, 0).astype(np.float32))
    phi_q, phi_k = (
        peer.softmax_kernel(x, projection_matrix=omega, is_query=is_query, eps=0.0)
        for x, is_query in ((q, True), (k.expand_as(q), False))
    )
    assert not bool(torch.isfinite(peer.linear_attention(phi_q, phi_k, v.expand_as(q))).all())
    assert bool(torch.isfinite(subquad.attention(q, k, v, "favor", omega=omega)).all())


ONE_DEFINITION = [peer for peer in PEERS if peer.method in ("window", "linformer") and "all keys" not in peer.name]


@pytest.mark.parametrize("peer", [x for x in ONE_DEFINITION if not x.gradient], ids=lambda peer: peer.name)
def test_windows_and_projections_are_those_of_their_peers(peer: Peer) -> None:
    """On the sample, where both sides have one error only if they have one output."""
    for package in (peer.library, "transformers", "local_attention"):
        pytest.importorskip(package)
    if "compile" in peer.name:
        pytest.skip("compiling takes long; the benchmark shows both errors")
    real_activations()
    errors = errors_of(peer)
    assert errors["error_ours"] == pytest.approx(errors["error_theirs"], rel=1e-4)
    assert errors["error_ours"] > 0.1
