"""How much is measured: SUBQUAD_BENCH_PROFILE names one of these."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Lengths of the sequences."""

    lengths: tuple[int, ...]
    gradient_lengths: tuple[int, ...]
    slope_lengths: tuple[int, ...]  # the exponent is fitted over all of them
    # exact attention takes quadratic time, and its gradient in places quadratic memory
    exact_up_to: int
    exact_gradient_up_to: int
    exact_slope_up_to: int


PROFILES = {
    "smoke": Profile((256,), (256,), (256, 512), 256, 256, 512),
    "quick": Profile((1024, 4096), (1024,), (1024, 2048, 4096), 4096, 1024, 2048),
    "full": Profile(
        (256, 1024, 4096, 16_384, 65_536),
        (256, 1024, 4096, 16_384),
        (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536),
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
