"""The scan against the arrays that the reference implementation of Mamba computed: outputs, states, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracle import SCANS, UPDATES, channels_last, expected_gradients, inputs_of, load
from rows.libraries import Jax, Library, Torch, relative_error

import subquad

# the reference itself computes in float32
TOLERANCE = 2e-5


def scan(inputs: dict[str, Any], *, softplus: bool) -> Any:
    return subquad.selective_scan(
        *(inputs.get(name) for name in ("u", "delta", "A", "B", "C", "D")),
        z=inputs.get("z"),
        delta_bias=inputs.get("delta_bias"),
        delta_softplus=softplus,
        return_state=True,
    )


def test_the_arrays_are_there() -> None:
    assert len(SCANS) == 10
    assert len(UPDATES) == 3


@pytest.mark.parametrize("name", SCANS)
def test_scan_equals_the_reference(eager: Library, name: str) -> None:
    if isinstance(eager, Jax) and "L257" not in name:
        pytest.skip("compiling the long ones is enough")
    given = load(name)
    call = lambda inputs: scan(inputs, softplus=bool(given["delta_softplus"]))  # noqa: E731
    y, state = eager.call(call, inputs_of(given), dtype="float32")
    assert relative_error(eager.numpy(y), channels_last("out", given["out"], given)) <= TOLERANCE
    assert relative_error(eager.numpy(state), given["last_state"]) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in SCANS if not name.endswith("L7")])
def test_torch_gradient_equals_the_reference(name: str) -> None:
    torch = pytest.importorskip("torch")
    given = load(name)
    inputs = {key: Torch().array(x, "float32").requires_grad_() for key, x in inputs_of(given).items()}
    y, _ = scan(inputs, softplus=bool(given["delta_softplus"]))
    y.backward(torch.from_numpy(channels_last("out", given["grad_out"], given).copy()))
    for key, expected in expected_gradients(given).items():
        assert relative_error(inputs[key].grad.resolve_conj().numpy(), expected) <= TOLERANCE, key


@pytest.mark.parametrize("name", [name for name in SCANS if name.endswith("L257")])
def test_jax_gradient_equals_the_reference(jax_library: Jax, name: str) -> None:
    import jax

    given = load(name)
    weights = jax_library.array(channels_last("out", given["grad_out"], given), "float32")

    def loss(inputs: dict[str, Any]) -> Any:
        return (scan(inputs, softplus=bool(given["delta_softplus"]))[0] * weights).sum()

    gradients = jax.jit(jax.grad(loss))(jax_library.arrays(inputs_of(given), "float32"))
    for key, expected in expected_gradients(given).items():
        # of a complex input, JAX gives the conjugate of torch's
        assert relative_error(np.conj(np.asarray(gradients[key])), expected) <= TOLERANCE, key


@pytest.mark.parametrize("name", UPDATES)
def test_step_equals_the_reference(eager: Library, name: str) -> None:
    """With heads (batch, heads, channels), heads × channels are our channels and the groups are the same."""
    given = load(name)
    heads = given["x"].ndim == 3

    def flat(x: np.ndarray, axes: int) -> np.ndarray:
        return x.reshape(*x.shape[:axes], -1, *x.shape[axes + 2 :]) if heads else x

    tree = {
        "state": flat(given["state_in"], 1), "u": flat(given["x"], 1), "delta": flat(given["dt"], 1),
        "A": flat(given["A"], 0), "B": given["B"], "C": given["C"],
        "D": flat(given["D"], 0) if "D" in given else None, "z": flat(given["z"], 1) if "z" in given else None,
        "delta_bias": flat(given["dt_bias"], 0) if "dt_bias" in given else None,
    }  # fmt: skip

    def step(t: dict[str, Any]) -> Any:
        positional = [t[key] for key in ("state", "u", "delta", "A", "B", "C", "D")]
        softplus = bool(given["dt_softplus"])
        return subquad.selective_scan_step(*positional, z=t["z"], delta_bias=t["delta_bias"], delta_softplus=softplus)

    y, state = eager.call(step, tree, dtype="float32")
    assert relative_error(eager.numpy(y), flat(given["out"], 1)) <= TOLERANCE
    assert relative_error(eager.numpy(state), flat(given["state_out"], 1)) <= TOLERANCE


def test_scan_equals_state_space_duality() -> None:
    """Mamba-2's algorithm, in float64: one rate per head, so A = −1, Δ = −(Δ A) and u = X / Δ on its channels."""
    given = load("ssd_L64_block16")
    batch, n, heads, width = given["X"].shape
    delta = np.repeat(-given["A"], width, axis=-1)
    u = given["X"].reshape(batch, n, heads * width) / delta
    rates = np.full((heads * width, given["B"].shape[-1]), -1.0)
    y, state = subquad.selective_scan(u, delta, rates, given["B"], given["C"], return_state=True)
    assert relative_error(y, given["out"].reshape(batch, n, -1)) < 1e-12
    assert relative_error(state, given["final_state"].reshape(state.shape)) < 1e-12


def test_ssd_equals_the_reference(eager: Library) -> None:
    """In float64, with its final state; the reference's X is Δ x and its A is Δ A."""
    given = load("ssd_L64_block16")
    names = ("X", "A", "B", "C")
    ones = np.ones(given["A"].shape[-1])

    def scan(X: Any, A: Any, B: Any, C: Any, ones: Any) -> Any:
        return subquad.ssd(X / -A[..., None], -A, -ones, B, C, return_state=True)

    y, state = eager.call(scan, *(given[name] for name in names), ones, dtype="float64")
    assert relative_error(eager.numpy(y), given["out"]) < 1e-12
    assert relative_error(eager.numpy(state), given["final_state"]) < 1e-12


def test_torch_gradient_of_ssd_equals_the_reference() -> None:
    torch = pytest.importorskip("torch")
    given = load("ssd_L64_block16")
    X, A, B, C = (torch.from_numpy(given[name]).requires_grad_() for name in ("X", "A", "B", "C"))
    y = subquad.ssd(X / -A[..., None], -A, -torch.ones(A.shape[-1], dtype=A.dtype), B, C)
    y.backward(torch.from_numpy(given["grad_out"]))
    for name, x in {"X": X, "A": A, "B": B, "C": C}.items():
        assert relative_error(x.grad.numpy(), given[f"grad_{name}"]) < 1e-12
