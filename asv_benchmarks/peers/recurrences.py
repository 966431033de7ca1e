"""Peers of other recurrences: Mamba-2, gated delta rule, gated linear attention, RWKV, convolutions, fixed SSMs.

A case is one entry of `PEERS`: inputs, the call of a peer and that of subquad, on one library. Results are held against
each other, so that what is timed computes one thing.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import subquad
from asv_benchmarks import harness
from subquad.cli.definitions import relative_error

N = 4096
PACKAGES = ("numpy", "llvmlite", "torch", "transformers", "jax", "fla-core")
LOOP = 1024  # steps of a loop in Python: its time for each step does not depend on their number
Arrays = tuple[Any, ...]


@dataclass(frozen=True)
class Peer:
    """One case: `draw(rng, n)` makes the arrays of both calls; with `gradient`, gradients by all arrays come along."""

    name: str
    draw: Callable[[np.random.Generator, int], Arrays]
    theirs: Callable[..., Any]
    ours: Callable[..., Any]
    library: str = "torch"
    gradient: bool = False
    steps: int | None = None  # in place of n

    def calls(self, n: int) -> tuple[harness.Run, harness.Run]:
        """(call of subquad, call of the peer) on equal arrays."""
        arrays = tuple(x.astype(np.float32) for x in self.draw(np.random.default_rng(0), self.steps or n))
        target = harness.target(self.library)
        ours, theirs = (
            harness.Prepared(target, f, arrays, gradient=self.gradient).run for f in (self.ours, self.theirs)
        )
        return ours, theirs


def measure(n: int, repeat: int, peers: Sequence[Peer]) -> tuple[str, list[dict[str, Any]]]:
    """(title, rows): times, after a check that both calls of a case agree."""
    rows = []
    for peer in peers:
        ours, theirs = peer.calls(n)
        outs = (out if isinstance(out, tuple) else (out,) for out in (ours(), theirs()))
        apart = max(relative_error(np.asarray(a), np.asarray(b)) for a, b in zip(*outs, strict=True))
        assert apart < 1e-3, f"{peer.name} computes something else: {apart}"
        rows.append(harness.compare(peer.name, ours, theirs, repeat))
    return f"recurrences, batch 1, n = {n}, float32; loops over {LOOP} steps", rows


HEADS, P, STATES = 24, 64, 128  # of Mamba-2
WIDTH = 128  # of keys and values of the delta rule and gated linear attention, 8 heads


def mamba2_inputs(rng: np.random.Generator, n: int) -> Arrays:
    """x, delta, A, B and C of a Mamba-2 layer of 24 heads."""
    delta = rng.uniform(0.001, 0.1, (1, n, HEADS))
    B, C = rng.standard_normal((2, 1, n, 1, STATES))
    return rng.standard_normal((1, n, HEADS, P)), delta, -rng.uniform(1, 16, HEADS), B, C


def delta_inputs(rng: np.random.Generator, n: int) -> Arrays:
    """q, k (of length 1), v, beta and g of 8 heads."""
    q, k, v = rng.standard_normal((3, 1, 8, n, WIDTH))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    return q, k, v, rng.uniform(0, 1, (1, 8, n)), -rng.uniform(0, 0.1, (1, 8, n, 1))


def gla_inputs(rng: np.random.Generator, n: int) -> Arrays:
    """q, k, v and the decay of each channel, of 8 heads."""
    return *rng.standard_normal((3, 1, 8, n, WIDTH)), -rng.uniform(0, 0.1, (1, 8, n, WIDTH))


def conv_inputs(rng: np.random.Generator, n: int) -> Arrays:
    """The convolution of a Mamba layer, 1536 channels."""
    return rng.standard_normal((1, n // 2, 1536)), rng.standard_normal((1536, 4)), rng.standard_normal(1536)


def lti_inputs(rng: np.random.Generator, n: int) -> Arrays:
    """u and the parameters of an S4D layer of 64 channels with 32 states, real."""
    A, B, C = -rng.uniform(0.5, 32, (64, 32)), *rng.standard_normal((2, 64, 32))
    return rng.standard_normal((n, 64)), A, B, C, rng.uniform(0.001, 0.1, 64)


def rwkv_inputs(version: int, rng: np.random.Generator, n: int) -> Arrays:
    """r, k, v, w and what a version has beside them, of 12 heads of 64 channels."""
    r, k, v = 0.3 * rng.standard_normal((3, 12, n, 64))
    w = -rng.uniform(0.01, 0.6, (12, n, 64))
    if version == 6:
        return r, k, v, w, rng.standard_normal((12, 64))
    b = rng.standard_normal((12, n, 64))
    b /= np.linalg.norm(b, axis=-1, keepdims=True)
    return r, k, v, w, -b, 0.5 * b


def chunked_mamba2(size: int, x: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
    """The scan that transformers' Mamba-2 runs without CUDA, in chunks of `size`."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    out = mamba2_chunk_scan(x, delta, A, B, C, chunk_size=size)
    return out[0] if isinstance(out, tuple) else out


def chunked_delta_rule(q: Any, k: Any, v: Any, beta: Any, g: Any) -> Any:
    """The gated delta rule that transformers' Qwen3-Next runs without CUDA; it has the sequence before the heads."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    turned = (x.transpose(1, 2) for x in (q, k, v, g[..., 0], beta))
    return torch_chunk_gated_delta_rule(*turned)[0].transpose(1, 2)


def naive_gla(q: Any, k: Any, v: Any, g: Any) -> Any:
    """The recurrence of gated linear attention in the package fla, which has the sequence before the heads."""
    turned = (x.transpose(1, 2) for x in (q, k, v, g))
    return fla_module("gla/naive.py").naive_recurrent_gla(*turned)[0].transpose(1, 2)


@functools.cache
def fla_module(path: str) -> Any:
    """A file of fla's operators by itself, since the package needs Triton at its import."""
    spec = importlib.util.find_spec("fla")
    assert spec is not None
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "ops" / path
    loaded = importlib.util.spec_from_file_location(f"fla_{file.stem}", file)
    assert loaded is not None
    assert loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return module


def torch_conv(x: Any, weight: Any, bias: Any) -> Any:
    """The convolution by PyTorch's own functions, with silu, as Mamba blocks write it."""
    from torch.nn.functional import conv1d, silu

    out = conv1d(x.transpose(1, 2), weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[-1])
    return silu(out[..., : x.shape[1]]).transpose(1, 2)


def fft_filter(kernel: np.ndarray, u: np.ndarray, *_: Any) -> np.ndarray:
    """The convolution of u with a kernel that is given, by NumPy's FFT."""
    n = u.shape[0]
    spectrum = np.fft.rfft(u, 2 * n, axis=0) * np.fft.rfft(kernel, 2 * n, axis=0)
    return np.fft.irfft(spectrum, 2 * n, axis=0)[:n]


def fft_lti(u: np.ndarray, A: np.ndarray, B: np.ndarray, C: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """A fixed SSM by NumPy's FFT; its kernel is made once."""
    return fft_filter(_kernel(u.shape[0], A.tobytes(), B.tobytes(), C.tobytes(), delta.tobytes()), u)


@functools.lru_cache(maxsize=1)
def _kernel(n: int, *given: bytes) -> np.ndarray:
    """The kernel Σ_s C Ā^t B̄ of a fixed SSM, zero-order hold."""
    A, B, C = (np.frombuffer(x, np.float32).reshape(64, 32).astype(float) for x in given[:3])
    delta = np.frombuffer(given[3], np.float32)[:, None].astype(float)
    decay = np.exp(A * delta)
    drive, kernel = (decay - 1) / A * B, np.empty((n, 64))
    state = np.ones_like(A)
    for t in range(n):
        kernel[t] = np.sum(C * state * drive, axis=1)
        state *= decay
    return kernel.astype(np.float32)


def rwkv_loop(r: Any, k: Any, v: Any, w: Any, *more: Any) -> Any:
    """RWKV-6 (with u) and RWKV-7 (with a and b) as a loop over time in NumPy."""
    state = np.zeros((r.shape[0], r.shape[2], v.shape[2]), np.float32)
    out = np.empty_like(v)
    decay = np.exp(w)
    for t in range(r.shape[1]):
        kv = k[:, t, :, None] * v[:, t, None, :]
        if len(more) == 1:
            out[:, t] = (r[:, t, None] @ (state + more[0][..., None] * kv))[:, 0]
            state = decay[:, t, :, None] * state + kv
        else:
            a, b = more
            turned = (a[:, t, None] @ state) * b[:, t, :, None]
            state = decay[:, t, :, None] * state + turned + kv
            out[:, t] = (r[:, t, None] @ state)[:, 0]
    return out


def ssd_ours(x: Any, delta: Any, A: Any, B: Any, C: Any) -> Any:
    """Our scan of Mamba-2."""
    return subquad.ssd(x, delta, A, B, C)


PEERS = (
    *(
        Peer(f"transformers' Mamba-2 scan{more}, chunks of {size} (torch)", mamba2_inputs,
             functools.partial(chunked_mamba2, size), ssd_ours, gradient=bool(more))
        for more in ("", ", forward + backward") for size in (256, 64)
    ),
    Peer("transformers' gated delta rule (torch)", delta_inputs, chunked_delta_rule, subquad.delta_rule),
    Peer("fla's recurrence of GLA (torch)", gla_inputs, naive_gla, subquad.gated_linear_attention, steps=LOOP),
    Peer("F.conv1d and silu, n / 2 steps (torch)", conv_inputs, torch_conv,
         functools.partial(subquad.causal_conv1d, activation="silu")),
    Peer("a fixed SSM by FFT, its kernel given, n = 65,536 (NumPy)", lti_inputs, fft_lti,
         lambda u, A, B, C, delta: subquad.lti_scan(u, A, B, C, delta=delta), library="numpy", steps=2**16),
    Peer("RWKV-6 as a loop (NumPy)", functools.partial(rwkv_inputs, 6), rwkv_loop,
         lambda r, k, v, w, u: subquad.wkv(r, k, v, w, version=6, u=u), library="numpy", steps=LOOP),
    Peer("RWKV-7 as a loop (NumPy)", functools.partial(rwkv_inputs, 7), rwkv_loop,
         lambda r, k, v, w, a, b: subquad.wkv(r, k, v, w, version=7, a=a, b=b), library="numpy", steps=LOOP),
)  # fmt: skip
