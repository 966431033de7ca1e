"""Language models of Mamba and Mamba-2 blocks with published weights, on any array library."""

from subquad.models.config import ModelConfig
from subquad.models.forward import mamba_logits
from subquad.models.init import init_params
from subquad.models.language_model import LanguageModel
from subquad.models.loading import load_model

__all__ = ["LanguageModel", "ModelConfig", "init_params", "load_model", "mamba_logits"]
