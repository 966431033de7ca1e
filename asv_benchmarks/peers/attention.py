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
PACKAGES = ("numpy", "numba", "torch", "transformers", "jax", "performer-pytorch", "nystrom-attention")
Make = Callable[[Any, Any, Any], Run]  # function of arrays q, k, v


@dataclass(frozen=True)
class Peer:
    """One peer: `theirs(q, k, v)` makes its call; `method`, `options` and `causal` define the call of subquad.

    `seeds` is the number of draws of random features, over which the error is a median (0: not random); `repeat` is the
    maximum number of pairs that are timed. With `gradient`, both calls also compute the gradients by q, k and v, in
    PyTorch. With `padded`, the last quarter of the keys is hidden.
    """

    name: str
    theirs: Make
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    causal: bool = False
    library: str = "torch"
    seeds: int = 0
    repeat: int | None = None
    gradient: bool = False
    padded: bool = False

    @property
    def bench(self) -> Any:
        """The module of the peer's library that makes arrays and waits for them."""
        return harness.target(self.library).bench

    def ours(self, *qkv: Any, **options: Any) -> Run:
        """The call of subquad, compiled if the library compiles."""
        bench, method = self.bench, subquad.METHODS[self.method](**self.options, **options)
        mask = {"key_mask": bench.asarray(real_keys(qkv[1].shape[-2]))} if self.padded else {}
        attend = bench.compile(lambda q, k, v: subquad.attention(q, k, v, method, causal=self.causal, **mask))

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
            return torch.autograd.grad(out, inputs, torch.ones_like(out))

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
            rows.append(row if peer.gradient else row | errors_of(peer))
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
    Peer("torch scaled_dot_product_attention", torch_sdpa, method="exact"),
    Peer("torch scaled_dot_product_attention, causal", torch_sdpa_causal, method="exact", causal=True),
    Peer("torch scaled_dot_product_attention, padded keys", torch_sdpa_padded, method="exact", padded=True),
    Peer("jax.nn.dot_product_attention", jax_attention, method="exact", library="jax", repeat=3),
)
