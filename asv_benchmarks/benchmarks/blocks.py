"""The Mamba blocks at initialisation, with 256 channels: time and memory of a sequence and its gradient, one token."""

from typing import Any

import numpy as np

import subquad
from asv_benchmarks import harness

from .profiles import PROFILE

BLOCKS = {
    "mamba": (subquad.mamba, lambda: subquad.init_mamba(256)),
    "mamba2": (subquad.mamba2, lambda: subquad.init_mamba2(256)),
}


def problem(block: str, n: int, **options: Any) -> harness.Problem:
    """A call of a block with n tokens, whose arrays are x and the parameters."""
    function, draw = BLOCKS[block]
    x = np.random.default_rng(0).standard_normal((1, n, 256), dtype=np.float32)

    def run(x: Any, /, **params: Any) -> Any:
        return function(x, params, **options)

    return harness.Problem(run, {"x": x, **draw()}, {})


class Block(harness.PerOperator):
    """One call, until its result is complete; with `gradient`, also the gradients of ½‖out‖² by x and the parameters.

    A library without gradients gives n/a.
    """

    timeout = 120.0
    number = 1  # calls in one sample: 1, since a call takes milliseconds
    repeat = (3, 20, 2.0)  # min samples, max samples, max seconds
    rounds = 1
    warmup_time = 0.1
    param_names = ("backend", "block", "gradient", "n")

    @property
    def params(self) -> tuple[list[Any], ...]:
        """The libraries, the blocks, with or without gradient, and the lengths of the profile."""
        return harness.backends(), list(BLOCKS), [False, True], list(PROFILE.lengths)

    def setup(self, backend: str, block: str, gradient: bool, n: int) -> None:
        """Make the arrays on their device, compile the call, and run it once."""
        if gradient and n > PROFILE.gradient_up_to:
            msg = f"the gradient of {block} is not measured at n = {n}: it would take too long"
            raise NotImplementedError(msg)
        self.prepared = harness.prepare(backend, problem(block, n), gradient=gradient)

    def time_call(self, *_params: Any) -> None:
        """Run one call."""
        self.prepared.run()

    def track_extra_memory(self, *_params: Any) -> float:
        """Peak memory beyond inputs and results; NaN if the library cannot tell."""
        peak = self.prepared.extra_memory()
        return float("nan") if peak is None else peak

    track_extra_memory.unit = "bytes"  # type: ignore[attr-defined]


class BlockStep(harness.PerOperator):
    """One token of decoding, which gives the output and the new state."""

    number, repeat, rounds, warmup_time = 50, (3, 20, 1.0), 1, 0.05
    param_names = ("backend", "block")

    @property
    def params(self) -> tuple[list[str], ...]:
        """The libraries and the blocks."""
        return harness.backends(), list(BLOCKS)

    def setup(self, backend: str, block: str) -> None:
        """Prepare a state and the array of one token."""
        function, draw = BLOCKS[block]
        x = np.random.default_rng(0).standard_normal((1, 1, 256), dtype=np.float32)
        params = draw()
        _, state = function(x, params, return_state=True)
        names = list(state)

        def run(x: Any, /, **arrays: Any) -> Any:
            before = {name: arrays.pop(f"state_{name}") for name in names}
            out, after = function(x, arrays, state=before, return_state=True)
            return (out, *after.values())

        given = {"x": x, **{f"state_{name}": state[name] for name in names}, **params}
        self.prepared = harness.prepare(backend, harness.Problem(run, given, {}))

    def time_step(self, _backend: str, _block: str) -> None:
        """Run one step."""
        self.prepared.run()
