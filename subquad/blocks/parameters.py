"""Parameters of a block: a mapping from the keys of a checkpoint to arrays, and what blocks compute with them."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from subquad.backend import Array
from subquad.core.beside import namespace_of, place_of
from subquad.core.checks import check_arrays, check_floating
from subquad.core.spelling import nearest
from subquad.kernels.causal_conv1d import causal_conv1d
from subquad.kernels.project import project as product
from subquad.scans.causal_conv1d import pass_over

STEPS = 1e-3, 1e-1  # range of the step sizes at initialisation


def take_parameters(params: Any, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Array | None]:
    """The arrays by key, None for an optional one that is absent.

    TypeError if `params` is no mapping, ValueError for a key that is missing or unknown.
    """
    if not isinstance(params, Mapping):
        msg = f"params is a {type(params).__name__}, expected a dict from the keys of a checkpoint to arrays"
        raise TypeError(msg)
    for name in params:
        if name not in required and name not in optional:
            msg = f"params holds {name!r}; {nearest(str(name), (*required, *optional))}"
            raise ValueError(msg)
    missing = [name for name in required if params.get(name) is None]
    if missing:
        msg = f"params lacks {', '.join(map(repr, missing))}; a checkpoint's prefix must be cut off its keys"
        raise ValueError(msg)
    return {name: params.get(name) for name in (*required, *optional)}


def check_shapes(arrays: Mapping[str, Array | None], shapes: Mapping[str, tuple[int, ...]], why: str) -> None:
    """Raise ValueError unless each array that is given has its shape."""
    for name, shape in shapes.items():
        x = arrays[name]
        if x is not None and tuple(x.shape) != shape:
            msg = f"params[{name!r}] has shape {tuple(x.shape)}, expected {shape}: {why}"
            raise ValueError(msg)


def project(x: Array, weight: Array, bias: Array | None = None, *, implementation: str = "auto") -> Array:
    """x weightᵀ + bias of x (batch, n, ·), as one product of two matrices; the weight is read as it is stored.

    `implementation` is that of a block: one by name takes few rows, and the block may have many.
    """
    batch, n, width = x.shape
    xp, implementation = namespace_of(x), "generic" if implementation == "generic" else "auto"
    out = product(xp.reshape(x, (batch * n, width)), weight, bias, implementation=implementation)
    return xp.reshape(out, (batch, n, weight.shape[0]))


def convolve(
    xp: ModuleType, u: Array, taps: Array, bias: Array | None, state: Array, resets: Array | None, mask: Array | None,
    implementation: str,
) -> tuple[Array, Array]:  # fmt: skip
    """(silu(causal_conv1d(u)), the last inputs); steps that the mask hides are passed over."""

    def run(u: Array, state: Any, resets: Array | None) -> tuple[Array, Array]:
        return causal_conv1d(u, taps, bias, state, resets, silu=True, reverse=False, implementation=implementation)

    return run(u, state, resets) if mask is None else pass_over(xp, run, u, mask, state, resets, reverse=False)


def bias_of_steps(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Biases whose softplus lies between the step sizes `STEPS`, evenly in the logarithm."""
    low, high = np.log(STEPS)
    return np.log(np.expm1(np.exp(rng.uniform(low, high, shape))))


def placed(drawn: Mapping[str, Any], like: Array | None) -> dict[str, Array]:
    """NumPy arrays as arrays of the library, dtype and device of `like`; without it, of NumPy in float32."""
    if like is None:
        return {name: x.astype(np.float32) for name, x in drawn.items()}
    xp = check_arrays(like=like)
    check_floating(xp, like=like)
    return {name: xp.asarray(x, dtype=like.dtype, device=place_of(like)) for name, x in drawn.items()}
