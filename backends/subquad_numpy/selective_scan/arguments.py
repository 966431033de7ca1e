"""The inputs of a scan on NumPy arrays as its compiled kernels take them, and the frame that tells a kernel of them."""

from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np

from subquad.kernels.selective_scan import Inputs
from subquad_numpy.runtime.arguments import frame_of

Array = np.ndarray


@dataclass
class Problem:
    """Inputs as the kernels take them: contiguous, of one precision, B and C as complex as A."""

    arrays: dict[str, Array | None]
    flags: dict[str, int]

    @classmethod
    def of(cls, given: Inputs, delta_softplus: bool, reverse: bool, **more: Array | None) -> "Problem":
        arrays: dict[str, Array | None] = {**given._asdict(), **more}
        real, is_complex = given.u.dtype, np.iscomplexobj(given.A)
        for name in ("B", "C", "initial_state"):
            if (array := arrays[name]) is not None and np.iscomplexobj(array) and not is_complex:
                msg = f"{name} is complex but A is real; expected real numbers, or a complex A"
                raise TypeError(msg)
        state = np.dtype(np.result_type(real, np.complex64)) if is_complex else real
        of_state = {"A", "B", "C", "initial_state", "grad_state"}
        kept = {
            name: None if array is None else np.ascontiguousarray(array, state if name in of_state else real)
            for name, array in arrays.items()
        }
        groups = lcm(*[array.shape[2] for name in ("B", "C") if (array := kept[name]) is not None and array.ndim == 4])
        for name in ("B", "C"):
            array = kept[name]
            if array is not None and array.ndim == 4 and array.shape[2] < groups:
                kept[name] = np.repeat(array, groups // array.shape[2], axis=2)
        return cls(kept, {"delta_softplus": int(delta_softplus), "reverse": int(reverse)})

    def __getattr__(self, name: str) -> Any:
        return self.arrays[name]

    @property
    def kind(self) -> tuple[str, bool, bool, bool]:
        """What the kernels are specialised for."""
        return self.u.dtype.name, np.iscomplexobj(self.A), self.B.ndim == 2, self.C.ndim == 2

    @property
    def groups(self) -> int:
        """Groups of channels that share B and C; 1 where both are constant."""
        return max([array.shape[2] for array in (self.B, self.C) if array.ndim == 4], default=1)

    def frame(self, order: tuple[str, ...], **more: Any) -> Array:
        """Sizes, flags and addresses in the order a kernel expects."""
        batch, n, d = self.u.shape
        sizes = {"batch": batch, "n": n, "d": d, "groups": self.groups, "d_state": self.A.shape[1]}
        steps = {f"{name}_step": _batch_step(self.arrays[name]) for name in ("B", "C")}
        values = {**dict.fromkeys(order), **sizes, **self.flags, **steps, **self.arrays, **more}
        return frame_of(order, values)


def _batch_step(array: Array | None) -> int:
    """Real numbers from one batch item to the next."""
    if array is None or array.ndim != 4 or array.shape[0] == 1:
        return 0
    return int(array[0].size) * (2 if np.iscomplexobj(array) else 1)
