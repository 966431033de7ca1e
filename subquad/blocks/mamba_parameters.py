"""Parameters of a Mamba block: how they begin, and what has been done to them since."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from subquad.backend import Array
from subquad.blocks.mamba import OPTIONAL, REQUIRED, Sizes, check_parameters, shapes_of
from subquad.blocks.mamba2 import OPTIONAL as OPTIONAL_2
from subquad.blocks.mamba2 import REQUIRED as REQUIRED_2
from subquad.blocks.mamba2 import check_parameters as check_parameters_2
from subquad.blocks.parameters import bias_of_steps, placed, take_parameters
from subquad.core.checks import check_arrays, check_count, check_floating, check_seed
from subquad.core.host import to_host
from subquad.core.loading import backend_of
from subquad.random import generator

LONGEST = 0.3  # step size that the median channel stays below in training; softplus(0) = 0.69 is not


def init_mamba(
    d_model: int,
    *,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int = 2,
    dt_rank: int | None = None,
    seed: int = 0,
    like: Array | None = None,
) -> dict[str, Array]:
    """Draw the parameters of a Mamba block as its authors initialise them.

        A_log[c, s] = log(s + 1),    D = 1,    softplus(dt_proj.bias) ~ log-uniform in [0.001, 0.1]

    Parameters
    ----------
    d_model : int
        Width of the input and output.
    d_state : int, default 16
        Number of states of a channel.
    d_conv : int, default 4
        Number of taps of the convolution.
    expand : int, default 2
        d_inner = expand · d_model channels inside.
    dt_rank : int, optional
        Rank of the map to the step sizes. Default: d_model / 16, rounded up.
    seed : int, default 0
        Seed of the weights. The numbers are the same on every library.
    like : array, optional
        The parameters are arrays of its library, dtype and device. Default: NumPy, float32.

    Returns
    -------
    dict of array
        The parameters by the keys that `mamba` takes, with ``conv1d.bias`` and without the other optional biases.

    Raises
    ------
    TypeError, ValueError
        For sizes or a seed that are no integers or too small, and if `like` is no array of a real floating dtype.

    See Also
    --------
    mamba : The block.
    check_mamba : Tell what was lost of these values since.

    Notes
    -----
    Weights are uniform in ±1/√(inputs), that of ``dt_proj`` in ±1/√(dt_rank), as in mamba-ssm. A is S4D-Real: the rates
    1 … d_state, in every channel. A framework that initialises a model's linear layers anew must leave ``dt_proj`` out.

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.6.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> params = subquad.init_mamba(64)
    >>> steps = np.log1p(np.exp(params["dt_proj.bias"]))
    >>> bool(steps.min() >= 0.0009 and steps.max() <= 0.1001), params["A_log"].shape
    (True, (128, 16))
    """
    d_model, expand = check_count("d_model", d_model), check_count("expand", expand)
    rank = math.ceil(d_model / 16) if dt_rank is None else check_count("dt_rank", dt_rank)
    sizes = Sizes(d_model, expand * d_model, check_count("d_conv", d_conv), check_count("d_state", d_state), rank)
    drawn, seed = {}, check_seed(seed)
    for i, (name, shape) in enumerate(shapes_of(sizes).items()):
        if name in ("in_proj.bias", "out_proj.bias"):
            continue
        rng = generator(seed, i)
        if name == "A_log":
            drawn[name] = np.tile(np.log(np.arange(1.0, sizes.d_state + 1)), (sizes.d_inner, 1))
        elif name == "D":
            drawn[name] = np.ones(shape)
        elif name == "dt_proj.bias":
            drawn[name] = bias_of_steps(rng, shape)
        else:
            inputs = sizes.width if name == "conv1d.bias" else math.prod(shape[1:])
            drawn[name] = rng.uniform(-1, 1, shape) * inputs**-0.5
    return placed(drawn, like)


def check_mamba(params: Mapping[str, Array], /, *, groups: int = 1) -> tuple[str, ...]:
    """Tell what is unlike the parameters of a Mamba or Mamba-2 block in their values, new or trained.

    Frameworks that initialise all linear layers of a model anew, or load only a part of a checkpoint, leave a block
    that runs, and that learns badly.

    Parameters
    ----------
    params : mapping of str to array
        Parameters by the keys that `mamba` takes, or `mamba2`, which has "dt_bias". Their values must be readable: not
        while a program is traced.
    groups : int, default 1
        Number of groups of a Mamba-2 block.

    Returns
    -------
    tuple of str
        A sentence for each finding, which names the parameter, what it holds and what is expected; empty if there is
        none:

        - a number that is not finite;
        - step sizes softplus(dt_proj.bias), of Mamba-2 softplus(dt_bias), that are all equal, or above 0.3 in most
          channels: the bias was set to 0, which makes the step 0.69 and the memory a token long;
        - rates exp(A_log) that are the same for all states of every channel, or for all heads of Mamba-2, as of normal
          numbers near 0;
        - a skip connection ``D`` that is 0 in all channels;
        - a weight that is 0 everywhere.

    Raises
    ------
    TypeError
        If `params` is no mapping, or holds what is no array of a real floating dtype.
    ValueError
        If a key is missing or unknown, shapes do not fit, or the arrays are traced: then the block does not run.

    See Also
    --------
    init_mamba : The values as they should begin.

    Examples
    --------
    >>> import subquad
    >>> params = subquad.init_mamba(64)
    >>> subquad.check_mamba(params)
    ()
    >>> params["dt_proj.bias"] = 0 * params["dt_proj.bias"]
    >>> print(*subquad.check_mamba(params))
    dt_proj.bias is 0 in all channels, so that their steps are 0.69; expected softplus of it from 0.001 to 0.1 at ...
    """
    second = isinstance(params, Mapping) and "dt_bias" in params
    keys = (REQUIRED_2, OPTIONAL_2) if second else (REQUIRED, OPTIONAL)
    given = take_parameters(params, *keys)
    named: dict[str, Any] = {f"params[{name!r}]": x for name, x in given.items() if x is not None}
    xp = check_arrays(**named)
    check_floating(xp, **named)
    if second:
        check_parameters_2(given, check_count("groups", groups))
    else:
        check_parameters(given)
    if not backend_of(xp).is_concrete(*named.values()):
        msg = "the parameters of a program that is traced have no values to check: call check_mamba outside of it"
        raise ValueError(msg)
    values = {name: to_host(x, np.float64).astype(np.float64) for name, x in given.items() if x is not None}
    found = [f"{name} has {(~np.isfinite(x)).sum()} numbers that are not finite" for name, x in values.items()
             if not np.isfinite(x).all()]  # fmt: skip
    found += [f"{name} is 0 everywhere" for name, x in values.items() if name.endswith("weight") and not x.any()]
    expected = "expected softplus of it from 0.001 to 0.1 at initialisation, as init_mamba draws it"
    name = "dt_bias" if second else "dt_proj.bias"
    bias = values[name]
    with np.errstate(all="ignore"):  # what is not finite has been found
        steps, rates = np.logaddexp(0, bias), np.exp(values["A_log"])
    if bias.size > 1 and np.all(bias == bias[0]):
        held = f"{bias[0] + 0:.3g} in all channels, so that their steps are {steps[0]:.2g}"  # + 0: of −0, 0
        found.append(f"{name} is {held}; {expected}")
    elif np.median(steps) > LONGEST:
        found.append(f"{name} makes the median step {np.median(steps):.2g}; {expected}")
    if (
        not second
        and rates.shape[1] > 1
        and np.median(rates.max(axis=1) / rates.min(axis=1)) < 1 + 0.1 * (rates.shape[1] - 1)
    ):
        found.append("A_log gives the states of a channel nearly the same rate; expected log(1), …, log(d_state)")
    if second and rates.size > 1 and rates.max() < 1.5 * rates.min():
        found.append("A_log gives all heads nearly the same rate; expected log of 1 to 16 at initialisation")
    if not values["D"].any():
        found.append("D is 0 in all channels: there is no skip connection; expected 1 at initialisation")
    return tuple(found)
