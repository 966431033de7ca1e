"""Parameters of a Mamba-2 block as they begin."""

from __future__ import annotations

import math

import numpy as np

from subquad.backend import Array
from subquad.blocks.mamba2 import Sizes, shapes_of
from subquad.blocks.parameters import bias_of_steps, placed
from subquad.core.checks import check_count, check_seed
from subquad.random import generator

RATES = 1.0, 16.0  # range of −A at initialisation


def init_mamba2(
    d_model: int,
    *,
    d_state: int = 128,
    d_conv: int = 4,
    expand: int = 2,
    headdim: int = 64,
    groups: int = 1,
    seed: int = 0,
    like: Array | None = None,
) -> dict[str, Array]:
    """Draw the parameters of a Mamba-2 block as its authors initialise them.

        exp(A_log) ~ uniform in [1, 16],    softplus(dt_bias) ~ log-uniform in [0.001, 0.1],    D = norm.weight = 1

    Parameters
    ----------
    d_model : int
        Width of the input and output.
    d_state : int, default 128
        Number of states of a channel.
    d_conv : int, default 4
        Number of taps of the convolution.
    expand : int, default 2
        d_inner = expand · d_model channels inside.
    headdim : int, default 64
        Channels p of a head; it must divide d_inner.
    groups : int, default 1
        Number of groups of heads that share B and C; it must divide the number of heads.
    seed : int, default 0
        Seed of the weights. The numbers are the same on every library.
    like : array, optional
        The parameters are arrays of its library, dtype and device. Default: NumPy, float32.

    Returns
    -------
    dict of array
        The parameters by the keys that `mamba2` takes, with ``conv1d.bias`` and ``norm.weight`` and without the other
        optional ones.

    Raises
    ------
    TypeError, ValueError
        For sizes or a seed that are no integers, too small or do not divide one another, and if `like` is no array of a
        real floating dtype.

    See Also
    --------
    mamba2 : The block.
    check_mamba : Tell what was lost of these values since.

    Notes
    -----
    Weights are uniform in ±1/√(inputs), as in mamba-ssm.

    References
    ----------
    .. [1] T. Dao, A. Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
       Space Duality", 2024, section 7.

    Examples
    --------
    >>> import subquad
    >>> params = subquad.init_mamba2(64, headdim=32)
    >>> params["in_proj.weight"].shape, params["A_log"].shape
    ((516, 64), (4,))
    """
    d_model, expand = check_count("d_model", d_model), check_count("expand", expand)
    d_inner, headdim, groups = expand * d_model, check_count("headdim", headdim), check_count("groups", groups)
    if d_inner % headdim:
        msg = f"headdim is {headdim}, expected a divisor of d_inner = expand · d_model = {d_inner}"
        raise ValueError(msg)
    heads = d_inner // headdim
    if heads % groups:
        msg = f"groups is {groups}, expected a divisor of the number of heads d_inner / headdim = {heads}"
        raise ValueError(msg)
    states, seed = check_count("d_state", d_state), check_seed(seed)
    sizes = Sizes(d_model, d_inner, check_count("d_conv", d_conv), groups, states, heads)
    drawn = {}
    for i, (name, shape) in enumerate(shapes_of(sizes).items()):
        rng = generator(seed, i)
        if name in ("in_proj.bias", "out_proj.bias"):
            continue
        if name == "dt_bias":
            drawn[name] = bias_of_steps(rng, shape)
        elif name == "A_log":
            drawn[name] = np.log(rng.uniform(*RATES, shape))
        elif name in ("D", "norm.weight"):
            drawn[name] = np.ones(shape)
        else:
            inputs = sizes.width if name.startswith("conv1d") else math.prod(shape[1:])
            drawn[name] = rng.uniform(-1, 1, shape) * inputs**-0.5
    return placed(drawn, like)
