"""What the kernel of a step reads: the head of its argument record, then the addresses of each block in turn."""

from collections.abc import Mapping, Sequence
from typing import Any

# Numbers: `eps` has the bits of a float64; `give_way` is the address of a function that yields to other threads, or 0.
SIZES = ("layers", "batch", "d_model", "d_inner", "d_state", "dt_rank", "width", "eps", "give_way")
# scratch that threads share: numbers, and counters of int64, zeros at first; then the input and the output
SHARED = ("work", "counters", "x", "out")
HEAD = (*SIZES, *SHARED)
INPUTS = (
    "norm", "in_proj", "in_bias", "taps", "taps_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D", "out_proj",
    "out_bias", "conv", "ssm",
)  # fmt: skip
(
    NORM, IN_PROJ, IN_BIAS, TAPS, TAPS_BIAS, X_PROJ, DT_PROJ, DT_BIAS, A_LOG, D_SKIP, OUT_PROJ, OUT_BIAS, CONV, SSM,
    NEW_CONV, NEW_SSM, OF_LAYER,
) = range(17)  # fmt: skip
MATRICES = (IN_PROJ, X_PROJ, DT_PROJ, OUT_PROJ)  # they may have half precision, and then all have it
BLOCK, SMALL_BLOCK = 32, 8  # outputs of a task: of the large matrices, of x_proj; BLOCK is a multiple of the lanes
PHASES = 4  # each has two counters, tasks taken and tasks finished


def record_of(layers: int) -> dict[str, int | None]:
    """The record type of a step through so many blocks, as `runtime.arguments` describes it."""
    of_layers = [f"{name} {i}" for i in range(layers) for name in (*INPUTS, "new_conv", "new_ssm")]
    return dict.fromkeys(SIZES) | dict.fromkeys((*SHARED, *of_layers), 0)


def layers_of(arrays: Sequence[Any]) -> list[Sequence[Any]]:
    """The arrays of each block, of those of a call, the first of which is x."""
    count = len(INPUTS)
    return [arrays[i : i + count] for i in range(1, len(arrays), count)]


def scratch_of(sizes: Mapping[str, int]) -> int:
    """Numbers of scratch: u and z before the convolution; u, later y; C · h; Δ, later the output; delta, B, C."""
    d_inner, low = sizes["d_inner"], sizes["dt_rank"] + 2 * sizes["d_state"]
    return sizes["batch"] * (4 * d_inner + max(d_inner, sizes["d_model"]) + low)
