"""Parameters of a whole language model as they begin, for tests, measurements and training."""

from __future__ import annotations

from typing import Any

import numpy as np

from subquad.backend import Array
from subquad.blocks import init_mamba, init_mamba2
from subquad.blocks.parameters import placed
from subquad.core.checks import check_seed
from subquad.models.config import ModelConfig
from subquad.models.parameters import Params, mixer_shapes, outer_shapes, tree_of
from subquad.random import generator

SPREAD = 0.02  # standard deviation of an embedding at initialisation


def init_params(config: ModelConfig, *, seed: int = 0, like: Array | None = None) -> Params:
    """Draw the parameters of a language model as its authors initialise them.

        embedding ~ normal(0, 0.02),    norms = 1,    mixers by `init_mamba` or `init_mamba2`, biases added as 0

    Parameters
    ----------
    config : ModelConfig
        The sizes and options.
    seed : int, default 0
        Seed of the weights. The numbers are the same on every library.
    like : array, optional
        The parameters are arrays of its library, dtype and device. Default: NumPy, float32.

    Returns
    -------
    mapping
        The parameters, as `mamba_logits` takes them.

    Raises
    ------
    TypeError, ValueError
        If the seed is no integer of 0 or more, or d_inner no multiple of d_model.

    See Also
    --------
    subquad.init_mamba, subquad.init_mamba2 : The parameters of one block.

    Notes
    -----
    The weights that end a residual block, out_proj, are divided by √n_layers, as in mamba-ssm.

    Examples
    --------
    >>> from subquad.models import ModelConfig, init_params
    >>> config = ModelConfig("mamba", d_model=16, n_layers=2, vocab_size=50, d_inner=32, d_state=4, d_conv=4, dt_rank=1)
    >>> params = init_params(config)
    >>> params["embedding.weight"].shape, len(params["layers"])
    ((50, 16), 2)
    """
    seed, c = check_seed(seed), config
    if c.d_inner % c.d_model:
        msg = f"config has d_inner = {c.d_inner}, expected a multiple of d_model = {c.d_model}"
        raise ValueError(msg)
    outer = outer_shapes(c)
    mixers: dict[int, dict[str, Any]] = {}

    def draw(name: str) -> Array:
        if name == "norm_f.weight" or (name.endswith(".norm.weight") and ".mixer." not in name):
            values = np.ones(c.d_model)
        elif name in outer:
            values = generator(seed, list(outer).index(name)).standard_normal(outer[name]) * SPREAD
        else:
            _, layer, _, key = name.split(".", 3)
            if int(layer) not in mixers:
                mixers.clear()
                mixers[int(layer)] = _mixer(c, int(generator(seed, len(outer) + int(layer)).integers(2**62)))
            values = mixers[int(layer)][key]
        return placed({name: values}, like)[name]

    return tree_of(c, draw)


def _mixer(config: ModelConfig, seed: int) -> dict[str, Any]:
    """The parameters of one block in float64, with and without those that the config adds and leaves out."""
    c, like = config, np.empty(0)
    sizes: dict[str, Any] = {"d_state": c.d_state, "d_conv": c.d_conv, "expand": c.d_inner // c.d_model, "seed": seed}
    if c.kind == "mamba":
        drawn = init_mamba(c.d_model, dt_rank=c.dt_rank, like=like, **sizes)
    else:
        drawn = init_mamba2(c.d_model, headdim=c.d_inner // c.heads, groups=c.groups, like=like, **sizes)
    drawn["out_proj.weight"] = drawn["out_proj.weight"] * c.n_layers**-0.5
    if c.D_has_hdim:
        drawn["D"] = np.ones(c.d_inner)
    return {name: drawn[name] if name in drawn else np.zeros(shape) for name, shape in mixer_shapes(c).items()}
