"""Peers of the selective scan: implementations that run Mamba without CUDA.

A peer is one entry of `PEERS`: a function of u, delta (batch, n, d), A (d, d_state), B, C (batch, n, d_state) and
D (d,), arrays of its library. The peer and subquad are timed on one library, which compiles and differentiates both in
one way. A peer that takes channels before time gets arrays with that layout in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import subquad
from asv_benchmarks import harness
from subquad.cli.definitions import relative_error

N, WIDTH, STATES = 2048, 1536, 16
PACKAGES = ("numpy", "llvmlite", "torch", "transformers", "jax", "mambapy")
Arrays = tuple[Any, ...]


def draw(batch: int, n: int, d: int, d_state: int) -> Arrays:
    """The arrays u, Δ (after softplus), A, B, C and D of a Mamba layer."""
    layer = harness.mamba(np, (batch, n, d), d_state)
    delta = np.logaddexp(0, layer["delta"] + layer["delta_bias"]).astype(np.float32)
    return layer["u"], delta, *(layer[name] for name in ("A", "B", "C", "D"))


@dataclass(frozen=True)
class Peer:
    """One peer; with `gradient`, the gradients of ½‖y‖² by all six arrays are computed as well."""

    name: str
    scan: Callable[..., Any]
    library: str = "torch"
    gradient: bool = False
    channels_first: bool = False

    def theirs(self, arrays: Arrays) -> harness.Run:
        """The call of the peer, on arrays in its layout; `outputs` undoes the layout of the results."""
        given = tuple(map(turned, arrays)) if self.channels_first else arrays
        return harness.Prepared(harness.target(self.library), self.scan, given, gradient=self.gradient).run

    def ours(self, arrays: Arrays) -> harness.Run:
        """The call of subquad on these arrays."""
        return harness.Prepared(
            harness.target(self.library), subquad.selective_scan, arrays, gradient=self.gradient
        ).run


def turned(x: np.ndarray) -> np.ndarray:
    """`x` with the axes of time and channels exchanged, contiguous; arrays without three axes stay."""
    return np.ascontiguousarray(np.swapaxes(x, 1, 2)) if x.ndim == 3 else x


def outputs(run: harness.Run, *, channels_first: bool = False) -> list[np.ndarray]:
    """The results of a call, y or the gradients by each array, with time before channels."""
    out = run()
    found = [np.asarray(x) for x in (out if isinstance(out, tuple) else [out])]
    return [turned(x) for x in found] if channels_first else found


def measure(n: int, repeat: int, peers: Sequence[Peer]) -> tuple[str, list[dict[str, Any]]]:
    """(title, rows): times, and the maximum error of an output against the loop in float64."""
    arrays = draw(1, n, WIDTH, STATES)
    wide, exact, rows = tuple(x.astype(np.float64) for x in arrays), {}, []
    for peer in peers:
        if peer.gradient not in exact:
            loop = Peer("", unbound_loop, gradient=peer.gradient, channels_first=True)
            exact[peer.gradient] = outputs(loop.theirs(wide), channels_first=True)
        ours, theirs = peer.ours(arrays), peer.theirs(arrays)
        found = {"error_ours": outputs(ours), "error_theirs": outputs(theirs, channels_first=peer.channels_first)}
        errors = {name: max(map(relative_error, out, exact[peer.gradient])) for name, out in found.items()}
        assert max(errors.values()) < 1e-3, f"{peer.name} computes something else: {errors}"
        rows.append(harness.compare(peer.name, ours, theirs, repeat) | errors)
    return f"selective scan, batch 1, n = {n}, d = {WIDTH}, d_state = {STATES}, float32", rows


def sliced(x: Any) -> Iterable[Any]:
    """The slices of x at each time step, by indexing, as in mamba-ssm's reference."""
    return (x[:, :, t] for t in range(x.shape[2]))


def unbound(x: Any) -> Iterable[Any]:
    """The slices of x at each time step, by `unbind`: the gradient of indexing takes quadratic time, an unfair peer."""
    return x.unbind(2)


def reference_loop(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, rows: Callable[[Any], Iterable[Any]] = sliced
) -> Any:
    """The scan as mamba-ssm's reference computes it: (batch, d, n, d_state) tensors, and one einsum for each step."""
    import torch

    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state, ys = torch.zeros_like(decay[:, :, 0]), []
    for a, b, c in zip(rows(decay), rows(drive), rows(C), strict=True):
        state = a * state + b
        ys.append(torch.einsum("bdn,bn->bd", state, c))
    return torch.stack(ys, dim=2) + u * D[:, None]


unbound_loop = functools.partial(reference_loop, rows=unbound)


def transformers_slow_path(*arrays: Any) -> Any:
    """The scan that transformers' Mamba block uses without a CUDA kernel, without the projections around it."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return mamba_selective_scan(*arrays)


def mambapy(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    """The scan by mambapy's parallel scan, with the code around it copied from mambapy's block."""
    from mambapy.pscan import pscan

    decay = (delta.unsqueeze(-1) * A).exp()
    drive = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
    return (pscan(decay, drive) @ C.unsqueeze(-1)).squeeze(3) + D * u


def lax_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    """The scan by `jax.lax.scan` over time."""
    import jax
    import jax.numpy as jnp

    def step(state: Any, row: Any) -> Any:
        u, delta, B, C = row
        state = jnp.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None, :]
        return state, jnp.einsum("bdn,bn->bd", state, C)

    start = jnp.zeros((u.shape[0], *A.shape), u.dtype)
    _, y = jax.lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in (u, delta, B, C)))
    return jnp.moveaxis(y, 0, 1) + D * u


def associative_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    """The scan by `jax.lax.associative_scan` over pairs (decay, drive)."""
    import jax
    import jax.numpy as jnp

    pairs = jnp.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, None, :]
    _, states = jax.lax.associative_scan(joined, pairs, axis=1)
    return jnp.einsum("bldn,bln->bld", states, C) + D * u


def joined(left: Any, right: Any) -> Any:
    """The pair (a, b) of two adjacent stretches of h[t] = a[t] h[t−1] + b[t], joined."""
    return left[0] * right[0], right[0] * left[1] + right[1]


PEERS = (
    Peer("mamba-ssm's reference loop (torch)", reference_loop, channels_first=True),
    Peer("transformers' Mamba, slow path (torch)", transformers_slow_path, channels_first=True),
    Peer("mambapy (torch)", mambapy),
    Peer("autograd of the loop over unbind (torch)", unbound_loop, gradient=True, channels_first=True),
    Peer("mambapy, forward + backward (torch)", mambapy, gradient=True),
    Peer("jax.lax.scan", lax_scan, library="jax"),
    Peer("jax.lax.associative_scan", associative_scan, library="jax"),
    Peer("jax.grad of jax.lax.scan", lax_scan, library="jax", gradient=True),
)
