"""The names of the attention functions and mask functions, put into transformers' two registries together."""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from subquad.attention import METHODS
from subquad.registry import ALIASES
from subquad_torch.transformers.attention import attention_function
from subquad_torch.transformers.mask_function import mask_pattern
from subquad_torch.transformers.model_check import watch_models
from subquad_torch.transformers.options import PLAN, PREFIX


def register() -> tuple[str, ...]:
    """Make every attention method known to transformers, as ``attn_implementation="subquad-<method>"``.

    Returns
    -------
    tuple of str
        The names: one for each method and each alias, such as "subquad-exact", "subquad-window", "subquad-longformer".

    Raises
    ------
    ValueError
        Later, when a model is built with one of the names, or gets it by ``set_attn_implementation``, whose attention
        never asks the registry.
    NotImplementedError
        Later, from a forward pass that needs what the method cannot do: the message names the method, the layer and the
        feature.

    See Also
    --------
    subquad_torch.transformers.configure : Options of a method.
    subquad_torch.transformers.apply : A method for each layer.
    subquad_torch.transformers.explain : What each layer runs.

    Notes
    -----
    A second call changes nothing, unless methods were added to `subquad.METHODS`. Two functions of transformers'
    `PreTrainedModel`, ``post_init`` and ``set_attn_implementation``, are wrapped by a check that acts on these names
    alone.

    Examples
    --------
    >>> import torch, transformers, subquad_torch.transformers
    >>> names = subquad_torch.transformers.register()
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="subquad-linear")
    >>> model(torch.arange(6)[None]).logits.shape
    torch.Size([1, 6, 50])
    """
    names = tuple(f"{PREFIX}{name}" for name in (*METHODS, *ALIASES))
    for name in (*names, PLAN):
        if name not in AttentionInterface():
            AttentionInterface.register(name, attention_function(name))
            AttentionMaskInterface.register(name, mask_pattern)
    watch_models()
    return names
