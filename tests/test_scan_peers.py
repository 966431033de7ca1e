"""Scans with a matrix state equal the functions of other packages, which run here too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows.libraries import relative_error

import subquad

torch = pytest.importorskip("torch")
TOLERANCE = 2e-5  # the peers compute in float32


def naive(path: str) -> Any:
    """A file of flash-linear-attention, apart from the package, which needs Triton."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        pytest.skip("fla-core is not installed")
    file = Path(found.submodule_search_locations[0]) / "ops" / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


def test_gated_linear_attention_equals_fla() -> None:
    """Their arrays are (batch, n, heads, d)."""
    q, k, v, g, start = drawn(*[(2, 50, 3, 8)] * 2, (2, 50, 3, 5), (2, 50, 3, 8), (2, 3, 8, 5))
    g = torch.nn.functional.logsigmoid(g) / 16
    theirs, last = naive("gla/naive.py").naive_recurrent_gla(q, k, v, g, start, output_final_state=True)
    heads_first = [x.transpose(1, 2) for x in (q, k, v, g)]
    o, state = subquad.gated_linear_attention(*heads_first, initial_state=start, return_state=True)
    assert relative_error(o.transpose(1, 2).numpy(), theirs.numpy()) < TOLERANCE
    assert relative_error(state.numpy(), last.numpy()) < TOLERANCE


def test_retention_equals_fla() -> None:
    q, k, v = drawn(*[(2, 3, 70, 8)] * 2, (2, 3, 70, 5))
    theirs = naive("retention/naive.py").naive_retention(q, k, v)
    g = torch.log1p(-(2.0 ** (-5 - torch.arange(3.0))))[:, None, None].expand(3, 70, 1)
    assert relative_error(subquad.gated_linear_attention(q, k, v, g).numpy(), theirs.numpy()) < TOLERANCE


def test_rwkv6_equals_fla() -> None:
    """With their gradients, which they compute by hand."""
    peer = naive("rwkv6/recurrent_naive.py")
    q, k, v, w, u, start, by_o = drawn(
        *[(2, 3, 40, 8)] * 2, (2, 3, 40, 5), (2, 3, 40, 8), (3, 8), (2, 3, 8, 5), (2, 3, 40, 5)
    )
    w = -torch.exp(w)
    theirs, last = peer.naive_recurrent_rwkv6(q, k, v, w, u, 1.0, start, output_final_state=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, w, u, start)]
    o, state = subquad.gated_linear_attention(
        *leaves[:4], bonus=leaves[4], scale=1.0, initial_state=leaves[5], return_state=True
    )
    assert relative_error(o.detach().numpy(), theirs.numpy()) < TOLERANCE
    assert relative_error(state.detach().numpy(), last.numpy()) < TOLERANCE
    ours = torch.autograd.grad(o, leaves, by_o)
    expected = peer.naive_recurrent_rwkv6_bwd(q, k, v, w, u, theirs, by_o, start)
    for name, x, y in zip("qkvwuh", ours, expected, strict=True):
        if name != "w":  # they leave out the state before the first step
            assert relative_error(x.numpy(), y.numpy()) < TOLERANCE, name


@pytest.mark.parametrize("groups", [1, 2])
def test_ssd_equals_transformers(groups: int) -> None:
    peer = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    if not hasattr(peer, "mamba2_chunk_scan"):
        pytest.skip("transformers has no function of the scan before 5.20")
    x, dt, D, bias, start = drawn((2, 70, 4, 8), (2, 70, 4), (4,), (4,), (2, 4, 8, 6))
    B, C = drawn(*[(2, 70, groups, 6)] * 2, seed=1)
    A = -torch.rand(4)
    theirs, last = peer.mamba2_chunk_scan(
        x, dt, A, B, C, 16, D=D, dt_bias=bias, initial_states=start, dt_softplus=True, dt_limit=(0.1, 1.5),
        return_final_states=True,
    )  # fmt: skip
    y, state = subquad.ssd(
        x, dt, A, B, C, D, delta_bias=bias, delta_softplus=True, delta_limits=(0.1, 1.5), initial_state=start,
        return_state=True,
    )  # fmt: skip
    assert relative_error(y.numpy(), theirs.numpy()) < TOLERANCE
    assert relative_error(state.numpy(), last.numpy()) < TOLERANCE


def test_rwkv4_equals_transformers() -> None:
    """Their state has one array for each row of ours; σ(r) stands outside."""
    modeling = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    r, k, v, time_decay, time_first = drawn(*[(2, 30, 6)] * 3, (6,), (6,))
    theirs, state = modeling.rwkv_linear_attention_cpu(time_decay, time_first, 5 * k, v, return_state=True)
    w = -torch.exp(time_decay)
    o, last = subquad.wkv(r, 5 * k, v, w, version=4, u=time_first, return_state=True)
    assert relative_error(o.numpy(), (torch.sigmoid(r) * theirs).numpy()) < TOLERANCE
    sums, shift = torch.stack([x[:, 0] if x.ndim > 2 else x for x in state[:2]], dim=1), state[2]
    shift = shift[:, 0] if shift.ndim > 2 else shift
    assert relative_error((last[:, :2] * torch.exp(last[:, 2:] - shift[:, None])).numpy(), sums.numpy()) < TOLERANCE


def test_rwkv7_equals_fla() -> None:
    """Their recurrence of diagonal and rank one, whose states are the transposed of ours."""
    peer = naive("generalized_delta_rule/dplr/naive.py")
    r, k, v, kappa, rate, w, start = drawn(*[(2, 3, 40, 8)] * 2, (2, 3, 40, 5), *[(2, 3, 40, 8)] * 3, (2, 3, 8, 5))
    kappa, w = torch.nn.functional.normalize(kappa, dim=-1), -torch.exp(w)
    a, b = -kappa, kappa * torch.sigmoid(rate)
    theirs, last = peer.dplr_recurrence(r, k, v, a, b, w, initial_state=start, output_final_state=True)
    initial = start.transpose(-1, -2)
    o, state = subquad.wkv(8**-0.5 * r, k, v, w, version=7, a=a, b=b, initial_state=initial, return_state=True)
    assert relative_error(o.numpy(), theirs.numpy()) < TOLERANCE
    assert relative_error(state.transpose(-1, -2).numpy(), last.numpy()) < TOLERANCE
