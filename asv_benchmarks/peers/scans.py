"""The selective scan's peers: what runs Mamba where there is no CUDA.

Each peer makes a call of no arguments from a `Problem`; with `gradient`, the call returns the gradients of
Σ y · weight by all inputs. Peers keep their own layout, prepared outside the timed call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from asv_benchmarks.peers.timing import Run


@dataclass(frozen=True)
class Problem:
    """Inputs of a scan as NumPy float32: u, delta (batch, n, d), A (d, d_state), B, C (batch, n, d_state), D (d,)."""

    u: np.ndarray
    delta: np.ndarray
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray
    weight: np.ndarray

    @classmethod
    def draw(cls, batch: int, n: int, d: int, d_state: int) -> Problem:
        """Like Mamba's own: A = −(1 … d_state), step sizes between 0.001 and 0.1."""
        rng = np.random.default_rng(0)
        u, weight = rng.standard_normal((2, batch, n, d), dtype=np.float32)
        delta = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (batch, n, d))).astype(np.float32)
        A = np.tile(-np.arange(1, d_state + 1, dtype=np.float32), (d, 1))
        B, C = rng.standard_normal((2, batch, n, d_state), dtype=np.float32)
        return cls(u, delta, A, B, C, rng.standard_normal(d).astype(np.float32), weight)

    def wide(self) -> Problem:
        """The same problem in float64."""
        return Problem(*(x.astype(np.float64) for x in (*self.inputs(), self.weight)))

    def inputs(self) -> tuple[np.ndarray, ...]:
        return self.u, self.delta, self.A, self.B, self.C, self.D


def _torch_run(scan: Callable[..., Any], p: Problem, gradient: bool, turn: bool = False) -> Run:
    """`scan` of tensors; `turn` hands it channels before time, as mamba-ssm has them, and turns back what returns."""
    import torch

    def tensor(x: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(np.swapaxes(x, 1, 2) if turn and x.ndim == 3 else x))

    inputs, weight = [tensor(x).requires_grad_(gradient) for x in p.inputs()], tensor(p.weight)

    def back(x: Any) -> Any:  # a view: costs nothing
        return x.transpose(1, 2) if turn and x.ndim == 3 else x

    def run() -> Any:
        if not gradient:
            with torch.no_grad():
                return back(scan(*inputs))
        return [back(x) for x in torch.autograd.grad((scan(*inputs) * weight).sum(), inputs)]

    return run


def ours_torch(p: Problem, gradient: bool) -> Run:
    import subquad

    return _torch_run(subquad.selective_scan, p, gradient)


def reference_loop(p: Problem, gradient: bool) -> Run:
    """mamba-ssm's formula as its reference writes it: (batch, d, n, d_state) tensors, slices and einsum per step."""
    import torch

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
        decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
        drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
        state, ys = torch.zeros_like(decay[:, :, 0]), []
        if gradient:  # unbind: indexing in the loop makes autograd quadratic, and would be no fair peer
            for a, b, c in zip(decay.unbind(2), drive.unbind(2), C.unbind(2), strict=True):
                state = a * state + b
                ys.append(torch.einsum("bdn,bn->bd", state, c))
        else:
            for t in range(u.shape[-1]):
                state = decay[:, :, t] * state + drive[:, :, t]
                ys.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
        return torch.stack(ys, dim=2) + u * D[:, None]

    return _torch_run(scan, p, gradient, turn=True)


def transformers_slow_path(p: Problem, gradient: bool) -> Run:
    """The scan of transformers' Mamba block where no CUDA kernel is installed, alone: no projections around it."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return _torch_run(mamba_selective_scan, p, gradient, turn=True)


def mambapy(p: Problem, gradient: bool) -> Run:
    """mambapy's parallel scan, in the lines around it that its block has."""
    from mambapy.pscan import pscan

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
        decay = (delta.unsqueeze(-1) * A).exp()
        drive = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
        return (pscan(decay, drive) @ C.unsqueeze(-1)).squeeze(3) + D * u

    return _torch_run(scan, p, gradient)


def _jax_run(scan: Callable[..., Any], p: Problem, gradient: bool) -> Run:
    import jax
    import jax.numpy as jnp

    inputs, weight = [jnp.asarray(x) for x in p.inputs()], jnp.asarray(p.weight)
    function = jax.jit(scan)
    if gradient:
        function = jax.jit(jax.grad(lambda *x: (scan(*x) * weight).sum(), argnums=tuple(range(len(inputs)))))
    return lambda: jax.block_until_ready(function(*inputs))


def ours_jax(p: Problem, gradient: bool) -> Run:
    import subquad

    return _jax_run(subquad.selective_scan, p, gradient)


def lax_scan(p: Problem, gradient: bool) -> Run:
    """`jax.lax.scan` over time."""
    import jax
    import jax.numpy as jnp

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
        def step(state: Any, row: Any) -> Any:
            u, delta, B, C = row
            state = jnp.exp(delta[..., None] * A) * state + (delta * u)[..., None] * B[:, None, :]
            return state, jnp.einsum("bdn,bn->bd", state, C)

        start = jnp.zeros((u.shape[0], *A.shape), u.dtype)
        _, y = jax.lax.scan(step, start, tuple(jnp.moveaxis(x, 1, 0) for x in (u, delta, B, C)))
        return jnp.moveaxis(y, 0, 1) + D * u

    return _jax_run(scan, p, gradient)


def associative_scan(p: Problem, gradient: bool) -> Run:
    """`jax.lax.associative_scan` over pairs (decay, drive)."""
    import jax
    import jax.numpy as jnp

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
        decay = jnp.exp(delta[..., None] * A)
        drive = (delta * u)[..., None] * B[:, :, None, :]

        def join(left: Any, right: Any) -> Any:
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, states = jax.lax.associative_scan(join, (decay, drive), axis=1)
        return jnp.einsum("bldn,bln->bld", states, C) + D * u

    return _jax_run(scan, p, gradient)


@dataclass(frozen=True)
class ScanPeer:
    """One peer of the scan, ours on the same library, and whether gradients are compared."""

    name: str
    theirs: Callable[[Problem, bool], Run]
    ours: Callable[[Problem, bool], Run]
    gradient: bool = False


SCAN_PEERS = (
    ScanPeer("mamba-ssm's reference loop (torch)", reference_loop, ours_torch),
    ScanPeer("transformers' Mamba, slow path (torch)", transformers_slow_path, ours_torch),
    ScanPeer("mambapy (torch)", mambapy, ours_torch),
    ScanPeer("autograd of the loop over unbind (torch)", reference_loop, ours_torch, gradient=True),
    ScanPeer("mambapy, forward + backward (torch)", mambapy, ours_torch, gradient=True),
    ScanPeer("jax.lax.scan", lax_scan, ours_jax),
    ScanPeer("jax.lax.associative_scan", associative_scan, ours_jax),
    ScanPeer("jax.grad of jax.lax.scan", lax_scan, ours_jax, gradient=True),
)
