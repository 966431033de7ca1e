"""Peers of attention: packages that compute what one of subquad's methods computes.

A peer is one entry of `PEERS`: how the package is called on (batch, heads, n, d) arrays of its library, and the call of
subquad that computes an equal output. Times are measured on random numbers, errors on real activations.
"""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import subquad
from asv_benchmarks import harness
from asv_benchmarks.harness import Run
from subquad.cli import definitions
from subquad.cli.inputs import read_sample

N = 8192
PACKAGES = (
    *("numpy", "llvmlite", "torch", "transformers", "jax", "performer-pytorch", "nystrom-attention"),
    *("reformer-pytorch", "local-attention"),
)
WINDOW, ROUNDS, RANK = 256, 4, 256  # keys to each side of a query; rounds of hashing; rows of Linformer's projections
Make = Callable[[Any, Any, Any], Run]  # function of arrays q, k, v


@dataclass(frozen=True)
class Peer:
    """One peer: `theirs(q, k, v)` makes its call; `method`, `options` and `causal` define the call of subquad.

    `seeds` is the number of draws of random features, over which the error is a median (0: not random); `repeat` is the
    maximum number of pairs that are timed. With `gradient`, both calls also compute the gradients by q, k and v, in
    PyTorch. With `padded`, the last quarter of the keys is hidden. With `shared`, the queries are the keys, on both
    sides, and no error is given: the definition is not exact attention. `options` may be a function of q, k and v.
    """

    name: str
    theirs: Make
    method: str
    options: Mapping[str, Any] | Callable[[Any, Any, Any], Mapping[str, Any]] = field(default_factory=dict)
    causal: bool = False
    library: str = "torch"
    seeds: int = 0
    repeat: int | None = None
    gradient: bool = False
    padded: bool = False
    shared: bool = False

    @property
    def bench(self) -> Any:
        """The module of the peer's library that makes arrays and waits for them."""
        return harness.target(self.library).bench

    def ours(self, *qkv: Any, **options: Any) -> Run:
        """The call of subquad, compiled if the library compiles."""
        own = self.options(*qkv) if callable(self.options) else self.options
        bench, method = self.bench, subquad.METHODS[self.method](**own, **options)
        mask = {"key_mask": bench.asarray(real_keys(qkv[1].shape[-2]))} if self.padded else {}
        attend = bench.compile(
            lambda q, k, v: subquad.attention(q, q if self.shared else k, v, method, causal=self.causal, **mask)
        )

        def run() -> Any:
            out = attend(*qkv)
            bench.synchronize(out)
            return out

        return run

    def calls(self, *qkv: Any) -> tuple[Run, Run]:
        """(call of subquad, call of the peer), as they are timed."""
        if not self.gradient:
            return self.ours(*qkv), self.theirs(*qkv)
        qkv = tuple(x.detach().requires_grad_() for x in qkv)
        return _differentiated(self.ours, qkv), _differentiated(self.theirs, qkv)


def _differentiated(make: Callable[..., Run], inputs: tuple[Any, ...]) -> Run:
    import torch

    with torch.enable_grad():  # the peer may transpose its inputs here, which must be recorded
        run = make(*inputs)

    def differentiate() -> Any:
        with torch.enable_grad():
            out = run()
            return torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)

    return differentiate


def measure(n: int, repeat: int, peers: Sequence[Peer]) -> tuple[str, list[dict[str, Any]]]:
    """(title, rows): times on random numbers at length n, errors on the sample of real activations."""
    import torch

    host = np.random.default_rng(0).standard_normal((3, 1, 8, n, 64), dtype=np.float32)
    rows = []
    with torch.no_grad():
        for peer in peers:
            calls = peer.calls(*(peer.bench.asarray(x) for x in host))
            row = harness.compare(peer.name, *calls, min(repeat, peer.repeat or repeat))
            rows.append(row if peer.gradient or peer.shared else row | errors_of(peer))
    return f"attention, (1, 8, {n}, 64) float32", rows


def errors_of(peer: Peer) -> dict[str, float]:
    """The relative errors of both sides against exact attention in float64, at equal m; medians over draws.

    "error_mean" is the error of the mean of v as an answer, which ignores the queries. A method whose error is not
    below it is of no use on these activations.
    """
    import torch

    sample = read_sample()
    shared_by = sample.q.shape[0] // sample.k.shape[0]
    host = [sample.q, *(np.repeat(x, shared_by, axis=0) for x in (sample.k, sample.v))]
    seen = real_keys(sample.n) if peer.padded else slice(None)
    exact = definitions.attention(host[0], *(x[:, seen] for x in host[1:]), causal=peer.causal)
    arrays = [peer.bench.asarray(x[None]) for x in host]
    errors: dict[str, list[float]] = {"error_ours": [], "error_theirs": []}
    for seed in range(max(1, peer.seeds)):
        torch.manual_seed(seed)
        calls = peer.ours(*arrays, **({"seed": seed} if peer.seeds else {})), peer.theirs(*arrays)
        for values, call in zip(errors.values(), calls, strict=True):
            out = peer.bench.to_numpy(call())[0]
            if out.shape != exact.shape:  # (n, heads · d) or (n, heads, d)
                out = np.swapaxes(out.reshape(out.shape[0], exact.shape[0], -1), 0, 1)
            values.append(definitions.relative_error(out, exact))
    mean = definitions.mean_of_values(host[0], host[2][:, seen], causal=peer.causal)
    mean = mean[:, :1] if peer.padded else mean  # all rows are equal; one row broadcasts to any number of queries
    found = {name: statistics.median(values) for name, values in errors.items()}
    return found | {"error_mean": definitions.relative_error(mean, exact)}


def performer(q: Any, k: Any, v: Any) -> Run:
    from performer_pytorch import FastAttention

    layer = FastAttention(q.shape[-1], nb_features=256).eval()
    return lambda: layer(q, k, v)


def performer_bare(q: Any, k: Any, v: Any) -> Run:
    """A call of performer-pytorch with ε = 0: without the constant that it adds to each feature."""
    from performer_pytorch import FastAttention
    from performer_pytorch.performer_pytorch import linear_attention, softmax_kernel

    omega = FastAttention(q.shape[-1], nb_features=256).projection_matrix

    def run() -> Any:
        phi_q, phi_k = (softmax_kernel(x, projection_matrix=omega, is_query=x is q, eps=0.0) for x in (q, k))
        return linear_attention(phi_q, phi_k, v)

    return run


def performer_causal(q: Any, k: Any, v: Any) -> Run:
    from performer_pytorch import FastAttention
    from performer_pytorch.performer_pytorch import causal_linear_attention_noncuda

    with contextlib.redirect_stdout(io.StringIO()):  # the package prints a line when it finds no CUDA code
        layer = FastAttention(q.shape[-1], nb_features=256, causal=True).eval()
    layer.causal_linear_fn = causal_linear_attention_noncuda
    return lambda: layer(q, k, v)


def transformers_nystrom(q: Any, k: Any, v: Any) -> Run:
    """A call of the attention core of the layer: its projections return q, k and v, and there is no convolution."""
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    heads, n, d = q.shape[1:]
    config = NystromformerConfig(
        hidden_size=heads * d, num_attention_heads=heads, num_landmarks=64, segment_means_seq_len=n
    )
    layer = NystromformerSelfAttention(config).eval()
    layer.conv_kernel_size = None
    bypass(layer, query=heads_last(q), key=heads_last(k), value=heads_last(v))
    hidden = heads_last(q)
    return lambda: layer(hidden)[0]


def nystrom_attention(q: Any, k: Any, v: Any) -> Run:
    """A call of the attention core of the layer: without projections and without convolution."""
    import torch
    from nystrom_attention import NystromAttention

    heads, _, d = q.shape[1:]
    layer = NystromAttention(dim=heads * d, dim_head=d, heads=heads, num_landmarks=64, residual=False).eval()
    bypass(layer, to_qkv=torch.cat([heads_last(x) for x in (q, k, v)], dim=-1))
    layer.to_out = torch.nn.Identity()
    hidden = heads_last(q)
    return lambda: layer(hidden)


def transformers_longformer(q: Any, k: Any, v: Any) -> Run:
    """A call of the attention core of the layer, without global tokens.

    The layer divides its queries in place, so each call copies them.
    """
    import torch
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    heads, n, d = q.shape[1:]
    config = LongformerConfig(hidden_size=heads * d, num_attention_heads=heads, attention_window=[2 * WINDOW])
    layer = LongformerSelfAttention(config, 0).eval()
    queries, keys, values = (heads_last(x).transpose(0, 1).contiguous() for x in (q, k, v))
    bypass(layer, query=queries, key=keys, value=values)
    object.__setattr__(layer, "query", lambda _: queries.clone())
    hidden = heads_last(q).detach()
    visible, nothing = torch.zeros(1, n), torch.zeros(1, n, dtype=torch.bool)
    masks: dict[str, Any] = {"attention_mask": visible, "is_index_masked": nothing, "is_index_global_attn": nothing}
    return lambda: layer(hidden, is_global_attn=False, **masks)[0]


def local_attention(q: Any, k: Any, v: Any) -> Run:
    from local_attention import LocalAttention

    layer = LocalAttention(
        window_size=WINDOW, causal=True, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True
    ).eval()
    return lambda: layer(q, k, v)


def flex_window(q: Any, k: Any, v: Any) -> Run:
    """A compiled call of PyTorch's attention with a mask of blocks, which leaves blocks outside of the window out."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(_batch: Any, _head: Any, i: Any, j: Any) -> Any:
        return (i - j).abs() <= WINDOW

    n = q.shape[-2]
    mask = create_block_mask(near, None, None, n, n, device="cpu")
    attend = torch.compile(flex_attention)
    return lambda: attend(q, k, v, block_mask=mask)


def torch_sdpa_window(q: Any, k: Any, v: Any) -> Run:
    """A call with a mask of n × n pairs: PyTorch's function has no window."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    place = torch.arange(q.shape[-2])
    mask = (place[:, None] - place).abs() <= WINDOW
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def jax_window(q: Any, k: Any, v: Any) -> Run:
    """A call on arrays (batch, n, heads, d), the layout that JAX's function takes."""
    import jax

    arrays = [jax.numpy.moveaxis(x, 1, 2) for x in (q, k, v)]
    function = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, local_window_size=WINDOW))
    return lambda: jax.block_until_ready(function(*arrays))


def transformers_bigbird(q: Any, k: Any, v: Any, *, training: bool = False) -> Run:
    """A call of the attention core of the layer; in evaluation it reads block 0 in place of every random block."""
    import torch
    from transformers import BigBirdConfig, BigBirdModel
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

    heads, n, d = q.shape[1:]
    config = BigBirdConfig(hidden_size=heads * d, num_attention_heads=heads, block_size=64, num_random_blocks=3)
    layer = BigBirdBlockSparseAttention(config, seed=torch.initial_seed() % 2**32).train(training)
    bypass(layer, query=heads_last(q), key=heads_last(k), value=heads_last(v))
    hidden, seen = heads_last(q).detach(), torch.ones(1, n)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(seen, 64)
    return lambda: layer(hidden, band, rows, columns, blocked, blocked)[0]


def transformers_bigbird_training(q: Any, k: Any, v: Any) -> Run:
    """A call in training, with random blocks that are drawn anew in each call."""
    return transformers_bigbird(q, k, v, training=True)


def reformer(q: Any, _k: Any, v: Any) -> Run:
    """A call on (batch · heads, n, d), queries being keys; a pair that meets twice counts twice, its default."""
    from reformer_pytorch import LSHAttention

    layer = LSHAttention(bucket_size=64, n_hashes=ROUNDS).eval()
    qk, values = (x.flatten(0, 1) for x in (q, v))
    return lambda: layer(qk, values)[0].unflatten(0, q.shape[:2])


def linformer_formula(q: Any, k: Any, v: Any) -> Run:
    """softmax(q (E k)ᵀ / √d) (F v) as it stands, by PyTorch's fused attention."""
    from torch.nn.functional import scaled_dot_product_attention

    E, F = projections(q, k, v)["projection"]
    return lambda: scaled_dot_product_attention(q, E @ k, F @ v)


def linformer_plain(q: Any, k: Any, v: Any) -> Run:
    """softmax(q (E k)ᵀ / √d) (F v) as it stands, in plain calls."""
    import torch

    E, F = projections(q, k, v)["projection"]
    return lambda: torch.softmax((q * q.shape[-1] ** -0.5) @ (E @ k).mT, dim=-1) @ (F @ v)


def projections(_q: Any, k: Any, _v: Any) -> dict[str, Any]:
    """The means of RANK segments as arrays E and F, which the product does not know to be mostly 0."""
    import torch

    n = k.shape[-2]
    segment = torch.arange(n) * RANK // n
    E = (segment == torch.arange(RANK)[:, None]).to(k.dtype)
    E = E / E.sum(dim=-1, keepdim=True)
    return {"projection": (E, E.clone())}


def torch_sdpa(q: Any, k: Any, v: Any) -> Run:
    from torch.nn.functional import scaled_dot_product_attention

    return lambda: scaled_dot_product_attention(q, k, v)


def torch_sdpa_causal(q: Any, k: Any, v: Any) -> Run:
    from torch.nn.functional import scaled_dot_product_attention

    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)


def torch_sdpa_padded(q: Any, k: Any, v: Any) -> Run:
    """A call with a mask (1, 1, 1, n_kv), the shape that encoders pass."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    mask = torch.from_numpy(real_keys(k.shape[-2]))[None, None, None]
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def jax_attention(q: Any, k: Any, v: Any) -> Run:
    """A call on arrays (batch, n, heads, d), the layout that JAX's function takes."""
    import jax

    arrays = [jax.numpy.moveaxis(x, 1, 2) for x in (q, k, v)]
    function = jax.jit(jax.nn.dot_product_attention)
    return lambda: jax.block_until_ready(function(*arrays))


def real_keys(n: int) -> np.ndarray:
    """A mask (n,) that is True except for the last quarter, which is padding."""
    return np.arange(n) < n - n // 4


def heads_last(x: Any) -> Any:
    """Reshape (batch, heads, n, d) to (batch, n, heads · d)."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def bypass(layer: Any, **values: Any) -> None:
    """Replace projections of a layer by functions that return these values, whatever their input."""
    for name, value in values.items():
        layer._modules.pop(name)
        object.__setattr__(layer, name, lambda _, value=value: value)


FAVOR: dict[str, Any] = {"method": "favor", "options": {"num_features": 256}, "seeds": 15}
CENTRED = FAVOR | {"options": {"num_features": 256, "center": True}}
NYSTROM: dict[str, Any] = {"method": "nystrom", "options": {"num_landmarks": 64}}
LONGFORMER: dict[str, Any] = {"method": "window", "options": {"left": WINDOW}}
BIGBIRD: dict[str, Any] = {"method": "bigbird", "seeds": 5}
REFORMER: dict[str, Any] = {
    "method": "lsh",
    "options": {"num_rounds": ROUNDS, "shared_qk": True, "unit_keys": True, "allow_self": False},
    "shared": True,
}
LINFORMER: dict[str, Any] = {"method": "linformer", "options": projections}

PEERS = (
    Peer("performer-pytorch FastAttention", performer, **FAVOR),
    Peer("performer-pytorch FastAttention, ε = 0", performer_bare, **FAVOR),
    Peer("performer-pytorch FastAttention; ours centred", performer, **CENTRED),
    Peer("performer-pytorch causal (no CUDA)", performer_causal, causal=True, repeat=2, **FAVOR),
    Peer("transformers Nyströmformer core", transformers_nystrom, **NYSTROM),
    Peer("nystrom-attention core", nystrom_attention, **NYSTROM),
    Peer("performer-pytorch, forward + backward", performer, gradient=True, **FAVOR),
    Peer("transformers Nyströmformer core, forward + backward", transformers_nystrom, gradient=True, **NYSTROM),
    Peer("nystrom-attention core, forward + backward", nystrom_attention, gradient=True, **NYSTROM),
    Peer("transformers Longformer core", transformers_longformer, **LONGFORMER),
    Peer("torch.compile of flex_attention, window", flex_window, **LONGFORMER),
    Peer("torch scaled_dot_product_attention, mask of a window", torch_sdpa_window, **LONGFORMER),
    Peer("torch scaled_dot_product_attention, all keys; ours window", torch_sdpa, **LONGFORMER),
    Peer("local-attention, exact window, causal", local_attention, causal=True, **LONGFORMER),
    Peer("jax.nn.dot_product_attention, window", jax_window, library="jax", repeat=3, **LONGFORMER),
    Peer("transformers BigBird core, evaluation", transformers_bigbird, **BIGBIRD),
    Peer("transformers BigBird core, training", transformers_bigbird_training, **BIGBIRD),
    Peer("reformer-pytorch LSHAttention", reformer, **REFORMER),
    Peer("Linformer's formula (torch)", linformer_formula, **LINFORMER),
    Peer("Linformer's formula in plain calls (torch)", linformer_plain, **LINFORMER),
    Peer("transformers Longformer core, forward + backward", transformers_longformer, gradient=True, **LONGFORMER),
    Peer("transformers BigBird core, forward + backward", transformers_bigbird_training, gradient=True, **BIGBIRD),
    Peer("reformer-pytorch LSHAttention, forward + backward", reformer, gradient=True, **REFORMER),
    Peer("Linformer's formula (torch), forward + backward", linformer_formula, gradient=True, **LINFORMER),
    Peer("Linformer's formula in plain calls (torch), forward + backward", linformer_plain, gradient=True, **LINFORMER),
    Peer("torch scaled_dot_product_attention", torch_sdpa, method="exact"),
    Peer("torch scaled_dot_product_attention, causal", torch_sdpa_causal, method="exact", causal=True),
    Peer("torch scaled_dot_product_attention, padded keys", torch_sdpa_padded, method="exact", padded=True),
    Peer("jax.nn.dot_product_attention", jax_attention, method="exact", library="jax", repeat=3),
)
