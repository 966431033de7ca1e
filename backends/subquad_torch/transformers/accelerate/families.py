"""The table of classes of transformers whose modules are swapped, by name, and the class that computes for each."""

from __future__ import annotations

from subquad_torch.transformers.accelerate.bigbird import BigBirdAttention, BigBirdWhole
from subquad_torch.transformers.accelerate.delta import Qwen3NextMixer, Qwen35Mixer
from subquad_torch.transformers.accelerate.longformer import LongformerAttention
from subquad_torch.transformers.accelerate.mamba import MambaMixer, NormedMixer
from subquad_torch.transformers.accelerate.mamba2 import BambaModel, FalconH1Mixer, Mamba2Mixer
from subquad_torch.transformers.accelerate.nystromformer import NystromformerAttention
from subquad_torch.transformers.accelerate.reformer import ReformerAttention
from subquad_torch.transformers.accelerate.swap import Swapped

FAMILIES: dict[str, type[Swapped]] = {
    "MambaMixer": MambaMixer,
    "FalconMambaMixer": NormedMixer,
    "JambaMambaMixer": NormedMixer,
    "Mamba2Mixer": Mamba2Mixer,
    "BambaMixer": Mamba2Mixer,
    "BambaModel": BambaModel,
    "Zamba2MambaMixer": Mamba2Mixer,
    "NemotronHMamba2Mixer": Mamba2Mixer,
    "GraniteMoeHybridMambaLayer": Mamba2Mixer,
    "FalconH1Mixer": FalconH1Mixer,
    "Qwen3NextGatedDeltaNet": Qwen3NextMixer,
    "Qwen3_5GatedDeltaNet": Qwen35Mixer,
    "Qwen3_5MoeGatedDeltaNet": Qwen35Mixer,
    "NystromformerSelfAttention": NystromformerAttention,
    "LongformerSelfAttention": LongformerAttention,
    "BigBirdBlockSparseAttention": BigBirdAttention,
    "BigBirdModel": BigBirdWhole,
    "LSHSelfAttention": ReformerAttention,
}
