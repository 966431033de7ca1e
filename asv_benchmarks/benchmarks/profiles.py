"""Profiles, which say at what lengths benchmarks run; SUBQUAD_BENCH_PROFILE names one of them."""

import os
from dataclasses import dataclass

from asv_benchmarks.harness import Case
from subquad.cli.cases import is_quadratic


@dataclass(frozen=True)
class Profile:
    """Lengths of the sequences: `lengths` for time and memory, `slope_lengths` for the fit of the exponent.

    `gradient_up_to` is the maximum length with gradients. The three `quadratic_…` fields are maxima for operators of
    quadratic time, whose gradients may also take quadratic memory.
    """

    lengths: tuple[int, ...]
    slope_lengths: tuple[int, ...]
    gradient_up_to: int
    quadratic_up_to: int
    quadratic_gradient_up_to: int
    quadratic_slope_up_to: int

    def longest(self, case: Case, *, gradient: bool = False) -> int:
        """The maximum length at which time and memory of a case are measured."""
        if not is_quadratic(case):
            return self.gradient_up_to if gradient else self.lengths[-1]
        return self.quadratic_gradient_up_to if gradient else self.quadratic_up_to

    def slope(self, case: Case) -> list[int]:
        """The lengths over which the exponent of a case is fitted."""
        return [n for n in self.slope_lengths if not is_quadratic(case) or n <= self.quadratic_slope_up_to]


PROFILES = {
    "smoke": Profile((256,), (256, 512), 256, 256, 256, 512),
    "quick": Profile((1024, 4096), (1024, 2048, 4096), 1024, 4096, 1024, 2048),
    "full": Profile(
        (256, 1024, 4096, 16_384, 65_536),
        (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536),
        16_384,
        16_384,
        4096,
        8192,
    ),
}
NAME = os.environ.get("SUBQUAD_BENCH_PROFILE", "quick")
if NAME not in PROFILES:
    msg = f"SUBQUAD_BENCH_PROFILE is {NAME!r}; there are {', '.join(PROFILES)}"
    raise ValueError(msg)
PROFILE = PROFILES[NAME]
