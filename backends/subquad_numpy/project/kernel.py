"""y = x Wᵀ + bias for few rows of x: W goes through the registers once, a few of its rows at a time.

A task is a block of outputs. Each output is the same sum in the same order for any number of threads.
"""

from functools import cache
from typing import Any

from subquad_numpy.codegen import pointer
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.dots import STORED, multiply
from subquad_numpy.runtime.arguments import fields

# sizes, arrays (`bias` may have the address 0), and the result
RECORD = fields(dict.fromkeys(("rows", "inputs", "outputs", "block")), dict.fromkeys(("x", "W", "bias", "y"), 0))


@cache
def project_kernel(dtype: str, stored: str) -> Any:
    """Compile `project(first, last, records)` for rows of a real `dtype` and weights of the dtype `stored`."""
    _, _, zero = element(dtype)
    weight = STORED[stored]

    @compiled(f"project {dtype} by {stored}", RECORD)
    def project(first: int, last: int, records: Any) -> int:
        f = records[0]
        x, W, y, bias = pointer(f.x, zero), pointer(f.W, weight), pointer(f.y, zero), pointer(f.bias, zero)
        start, stop = first * f.block, min(f.outputs, last * f.block)
        multiply(x, f.inputs, f.rows, W, f.inputs, start, stop, y, f.outputs, bias, f.bias != 0)
        return DONE

    return project
