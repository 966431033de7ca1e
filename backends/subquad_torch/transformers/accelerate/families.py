"""The table of classes of transformers whose modules are swapped, by name, and the class that computes for each."""

from __future__ import annotations

from subquad_torch.transformers.accelerate.mamba import JambaMixer, MambaMixer
from subquad_torch.transformers.accelerate.swap import Swapped

FAMILIES: dict[str, type[Swapped]] = {
    "MambaMixer": MambaMixer,
    "FalconMambaMixer": JambaMixer,
    "JambaMambaMixer": JambaMixer,
}
