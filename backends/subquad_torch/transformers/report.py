"""What each layer of a model runs, as a table."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.nn import Module

from subquad_torch.transformers.accelerate.model import family_of
from subquad_torch.transformers.model_check import asks_registry, computes_attention
from subquad_torch.transformers.options import PREFIX, choice


class Layer(NamedTuple):
    """A layer that mixes tokens.

    Attributes
    ----------
    name : str
        Name of the module in the model.
    kind : str
        Class of the module.
    runs : str
        What computes its output.
    """

    name: str
    kind: str
    runs: str


class ModelExplanation(tuple[Layer, ...]):
    """What each layer runs: a tuple of `Layer`, whose text is a table."""

    __slots__ = ()

    def __str__(self) -> str:
        widths = [max((len(layer[i]) for layer in self), default=0) for i in range(2)]
        return "\n".join(f"{x.name:{widths[0]}}  {x.kind:{widths[1]}}  {x.runs}" for x in self)


def explain(model: Module) -> ModelExplanation:
    """Say what each attention layer, and each layer that `accelerate` replaced, runs.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.

    Returns
    -------
    ModelExplanation
        A tuple of rows (name, kind, runs) that prints as a table. Attention that never asks transformers' registry, and
        layers that `accelerate` would replace, are there too, and say so.

    See Also
    --------
    subquad.explain : Which compiled kernel a call of a method uses.

    Examples
    --------
    >>> import transformers, subquad_torch.transformers
    >>> config = transformers.BertConfig(
    ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = transformers.BertModel(config)
    >>> model.set_attn_implementation("eager")
    >>> print(subquad_torch.transformers.explain(model))
    encoder.layer.0.attention.self  BertSelfAttention  transformers: eager
    """
    rows = ((name, type(module).__name__, _runs(module)) for name, module in model.named_modules())
    return ModelExplanation(Layer(name, kind, runs) for name, kind, runs in rows if runs is not None)


def _runs(module: Any) -> str | None:
    """What a module runs; None if it mixes no tokens."""
    own = getattr(module, "subquad_runs", None)
    if own is not None:
        return f"subquad: {own}"
    if asks_registry(type(module)):
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if not str(implementation).startswith(PREFIX):
            return f"transformers: {implementation}"
        method, options = choice(module, implementation)
        return "subquad: " + ", ".join([method, *(f"{name}={value!r}" for name, value in options.items())])
    if family_of(module) is not None and not any(map(family_of, list(module.modules())[1:])):
        return "transformers: code of its own, which accelerate(model) replaces"
    if computes_attention(type(module)):
        return "transformers: code of its own, which never asks the registry"
    return None
