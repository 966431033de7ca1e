"""y = x Wᵀ + bias for few rows of x: W goes through the registers once, a few of its rows at a time.

Those few rows of W, some kilobytes, stay in the first cache while all rows of x pass by. A task is a block of outputs.
Each output is the same sum in the same order for any number of threads.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray

from subquad_numpy.codegen import pointer
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.project.tile import MANY, ONE, dot_tile
from subquad_numpy.runtime.arguments import fields

# sizes, arrays (`bias` may have the address 0), and the result
RECORD = fields(dict.fromkeys(("rows", "inputs", "outputs", "block")), dict.fromkeys(("x", "W", "bias", "y"), 0))
STORED = {"float16": np.uint16(0), "bfloat16": np.uint16(0), "float32": np.float32(0), "float64": np.float64(0)}
"""A number of the type that memory holds weights in, by their dtype."""


@cache
def project_kernel(dtype: str, stored: str) -> Any:
    """Compile `project(first, last, records)` for rows of a real `dtype` and weights of the dtype `stored`."""
    _, _, zero = element(dtype)
    weight, one, many = STORED[stored], dot_tile(*ONE, stored), dot_tile(*MANY, stored)
    outputs_of_one, (rows_of_many, outputs_of_many) = ONE[1], MANY

    @compiled(f"project {dtype} by {stored}", RECORD)
    def project(first: int, last: int, records: Any) -> int:
        f = carray(records, 1)[0]
        rows, inputs, outputs, block = f.rows, f.inputs, f.outputs, f.block
        x, W, y, bias, has_bias = (
            pointer(f.x, zero), pointer(f.W, weight), pointer(f.y, zero), pointer(f.bias, zero), f.bias != 0,
        )  # fmt: skip
        for task in range(first, last):
            start, stop = task * block, min(outputs, (task + 1) * block)
            if rows == 1:
                for j in range(start, stop, outputs_of_one):
                    one(x, W, inputs, 0, 0, j, stop - 1, y, outputs, bias, has_bias)
            else:
                for j in range(start, stop, outputs_of_many):
                    for r in range(0, rows, rows_of_many):
                        many(x, W, inputs, r, rows - 1, j, stop - 1, y, outputs, bias, has_bias)
        return DONE

    return project
