"""Types inside `jax.shard_map`: along which axes of the mesh the shards of an array differ.

JAX adds the casts of its own operations itself; not those of a loop's carry, nor of what a call of XLA returns.
"""

from __future__ import annotations

from typing import Any

import jax


def axes_of(tree: Any) -> frozenset[Any]:
    """The axes along which any array of the tree varies. A JAX that has no `manual_axis_type` has no such types."""
    types = [getattr(getattr(x, "aval", x), "manual_axis_type", None) for x in jax.tree.leaves(tree)]
    return frozenset[Any]().union(*(kind.varying for kind in types if kind is not None))


def vary(tree: Any, axes: frozenset[Any]) -> Any:
    """The tree with every array varying along the axes."""

    def cast(x: Any) -> Any:
        missing = tuple(axes - axes_of(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def inside() -> bool:
    """Whether arrays are shards of a `jax.shard_map`, where loops and conditions want types that agree."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
