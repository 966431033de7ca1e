"""The parameters of a language model: names, shapes and tree, whatever file they come from.

A name here is that of mamba-ssm without "backbone."; the tree has a dict for each layer:

    {"embedding.weight", "layers": ({"norm.weight", "mixer": {…}}, …), "norm_f.weight", "lm_head.weight"}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from subquad.blocks.mamba import Sizes as MambaSizes
from subquad.blocks.mamba import shapes_of as mamba_shapes
from subquad.blocks.mamba2 import Sizes as Mamba2Sizes
from subquad.blocks.mamba2 import shapes_of as mamba2_shapes
from subquad.models.config import ModelConfig

Params = Mapping[str, Any]
MATRICES = ("embedding", "lm_head", "in_proj", "x_proj", "dt_proj", "out_proj")  # whose weights are most of a model


def mixer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of the block of a layer."""
    c = config
    if c.kind == "mamba":
        shapes = mamba_shapes(MambaSizes(c.d_model, c.d_inner, c.d_conv, c.d_state, c.dt_rank))
    else:
        shapes = mamba2_shapes(Mamba2Sizes(c.d_model, c.d_inner, c.d_conv, c.groups, c.d_state, c.heads))
        if c.D_has_hdim:
            shapes["D"] = (c.d_inner,)
        if not c.gated_norm:
            del shapes["norm.weight"]
    absent = [] if c.bias else ["in_proj.bias", "out_proj.bias"]
    absent += [] if c.conv_bias else ["conv1d.bias"]
    return {name: shape for name, shape in shapes.items() if name not in absent}


def outer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter that is in no layer."""
    table = (config.vocab_size, config.d_model)
    head = {} if config.tied else {"lm_head.weight": table}
    return {"embedding.weight": table, "norm_f.weight": (config.d_model,), **head}


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its name."""
    mixer, shapes = mixer_shapes(config), outer_shapes(config)
    for i in range(config.n_layers):
        shapes[f"layers.{i}.norm.weight"] = (config.d_model,)
        shapes |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixer.items()}
    return shapes


def is_matrix(name: str) -> bool:
    """Whether a parameter is a matrix that activations are multiplied with, or a table of these."""
    *_, owner, kind = name.split(".")
    return kind == "weight" and owner in MATRICES


def tree_of(config: ModelConfig, read: Callable[[str], Any]) -> Params:
    """The tree of parameters; `read(name)` gives each, one after the other."""
    names = mixer_shapes(config)
    first = {name: read(name) for name in outer_shapes(config)}
    layers = tuple(
        {
            "norm.weight": read(f"layers.{i}.norm.weight"),
            "mixer": {name: read(f"layers.{i}.mixer.{name}") for name in names},
        }
        for i in range(config.n_layers)
    )
    return {**first, "layers": layers}
