"""The form of a call of a block: checks of x, parameters and state, and the shapes and dtypes they are brought to."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from subquad.backend import Array
from subquad.core.checks import check_arrays, check_floating, check_given
from subquad.core.dtypes import compute_dtype
from subquad.core.shapes import broadcast_batch
from subquad.scans.call import Form, Target, flat_target


def check_block(x: Array, params: Mapping[str, Array | None], state: Mapping[str, Array]) -> ModuleType:
    """The namespace of the arrays of a call of a block, after checks that no size enters."""
    check_given(x=x)
    everything: dict[str, Any] = {"x": x, **{f"params[{name!r}]": a for name, a in params.items()}, **state}
    xp = check_arrays(**everything)
    check_floating(xp, **everything)
    return xp


def block_form(
    xp: ModuleType, x: Array, params: Mapping[str, Array | None], state: Mapping[str, Array], d_model: int, named: str,
    tails: Mapping[str, tuple[int, ...]],
) -> Form:  # fmt: skip
    """The form of a call of a block, after checks of the shapes of x and of the state.

    The parameter `named` shows d_model; `tails` has the shape of each array of the state after its batch axes.
    """
    if x.ndim < 2 or x.shape[-1] != d_model:
        msg = f"x has shape {tuple(x.shape)}, expected (..., n, {d_model}): d_model as {named} has"
        raise ValueError(msg)
    given = {name: state[f"state[{name!r}]"] for name in tails if state}
    for name, a in given.items():
        if tuple(a.shape[a.ndim - len(tails[name]) :]) != tails[name]:
            expected = ", ".join(map(str, tails[name]))
            msg = f"state[{name!r}] has shape {tuple(a.shape)}, expected (..., {expected})"
            raise ValueError(msg)
    batches = {f"state[{name!r}]": tuple(a.shape[: a.ndim - len(tails[name])]) for name, a in given.items()}
    batch = broadcast_batch(x=tuple(x.shape[:-2]), **batches)
    compute = compute_dtype(xp, x, *(a for a in (*params.values(), *state.values()) if a is not None))
    targets = (
        flat_target(x, compute, batch, tuple(x.shape[-2:])),
        *(_weight_target(name, a, compute) for name, a in params.items()),
        *(flat_target(given.get(name), compute, batch, tail) for name, tail in tails.items()),
    )
    outs = (Target(compute, None, (*batch, *tail)) for tail in tails.values())
    return Form(xp, targets, (Target(x.dtype, None, (*batch, *x.shape[-2:])), *outs))


def _weight_target(name: str, x: Array | None, dtype: Any) -> Target | None:
    """What a parameter is brought to: a matrix of a product stays as it is stored, anything else gets `dtype`."""
    return None if x is None or name.endswith("proj.weight") else Target(dtype)
