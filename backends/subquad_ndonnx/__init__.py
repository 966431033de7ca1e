"""ndonnx backend: graphs of ONNX. `export` writes a function of subquad to a file that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import spox.opset.ai.onnx.v21 as op
from ndonnx import Array as NdonnxArray

from subquad.backend import Array, Backend, Conditions
from subquad.core.block_loop import row_count
from subquad_ndonnx import array_api
from subquad_ndonnx.export import export
from subquad_ndonnx.graph import Graph, graph, has_values
from subquad_ndonnx.loops import leaves, scan
from subquad_ndonnx.nodes import OVERRIDES
from subquad_ndonnx.sizes import Open

__all__ = ["BACKEND", "export"]


class NdonnxBackend(Backend):
    """ndonnx: every operation is a node of a graph, and sizes may be left open."""

    library = "ndonnx"
    overrides = OVERRIDES
    loops_any_length = True

    def namespace(self, array: Array) -> ModuleType:
        return array_api if isinstance(array, NdonnxArray) else super().namespace(array)

    def device_of(self, array: Array) -> None:
        """None: what runs a graph chooses the device."""
        return

    def refuses(self, array: Array) -> str | None:
        if isinstance(array, Graph) or None not in array.shape:
            return None
        return (
            "an array of ndonnx with an unknown length; trace the function by subquad_ndonnx.export, "
            "which has sizes for these, or give the length"
        )

    def is_concrete(self, *arrays: Array | None) -> bool:
        """False: a graph has no values yet."""
        return all(x is None for x in arrays)

    def conditions(self, arrays: Sequence[Array | None]) -> Conditions:
        return Conditions(tracing=True)

    def softmax(self, xp: Any, x: Array) -> Array:
        return graph(op.softmax(x.unwrap_spox(), axis=-1), x.shape)

    def mean_rows(self, xp: Any, x: Array) -> Array:
        """One node; how its sum is made is the runtime's affair."""
        return xp.mean(x, axis=-2)

    def holds(self, condition: Any) -> bool:
        return False if isinstance(condition, Open) else bool(condition)

    def run_sizes(self, n: Any, longest: int, *, chunks: bool = False) -> tuple[Any, Any]:
        """One run of all steps, as one loop over them is one node; chunks of the longest size."""
        if chunks:
            return super().run_sizes(n, longest, chunks=True) if isinstance(n, int) else (-(-n // longest), longest)
        return 1, n

    def fold_blocks(
        self, step: Callable[..., Any], carry: Any, arrays: Sequence[Array | None], size: int, *, exact: bool = False
    ) -> tuple[Any, Array | None]:
        if not exact:
            return step(carry, *arrays)
        n = row_count(arrays)
        if isinstance(n, int) and n <= size:
            return step(carry, *arrays)
        if has_values(*leaves(carry), *arrays):
            return super().fold_blocks(step, carry, arrays, size, exact=True)
        return scan(step, carry, arrays)


BACKEND = NdonnxBackend()
