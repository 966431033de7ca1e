"""The types of arrays inside `jax.shard_map`: along which axes of the mesh the shards of an array differ.

JAX casts these types for its own operations. The carry of a loop, and the results of a foreign call, need casts here.
"""

from __future__ import annotations

from typing import Any

import jax


def axes_of(tree: Any) -> frozenset[Any]:
    """The axes along which any array of the tree varies; none in a JAX version without `manual_axis_type`."""
    types = [getattr(getattr(x, "aval", x), "manual_axis_type", None) for x in jax.tree.leaves(tree)]
    return frozenset[Any]().union(*(kind.varying for kind in types if kind is not None))


def vary(tree: Any, axes: frozenset[Any]) -> Any:
    """The tree, with every array cast to vary along the axes."""

    def cast(x: Any) -> Any:
        missing = tuple(axes - axes_of(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def inside() -> bool:
    """Whether arrays are shards of a `jax.shard_map`, where loops and conditions want types that agree."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)
