"""Hugging Face transformers: attention of models by any method, a plan for each layer, and faster mixers."""

from subquad_torch.transformers.versions import check_version

check_version()

__all__: list[str] = []
