"""Hugging Face transformers: attention of models by any method, a plan for each layer, and faster recurrent layers."""

from subquad_torch.transformers.versions import check_version

check_version()

from subquad_torch.transformers.accelerate import accelerate, restore  # noqa: E402
from subquad_torch.transformers.options import configure  # noqa: E402
from subquad_torch.transformers.plan import apply  # noqa: E402
from subquad_torch.transformers.registration import register  # noqa: E402
from subquad_torch.transformers.report import Layer, ModelExplanation, explain  # noqa: E402

__all__ = ["Layer", "ModelExplanation", "accelerate", "apply", "configure", "explain", "register", "restore"]
