"""Attention along named dimensions."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import xarray as xr

import subquad
from subquad_xarray.named import aligned, check, check_apart, pair, ranked, without

Dim = Hashable | tuple[Hashable, Hashable]


def attention(
    q: xr.DataArray,
    k: xr.DataArray,
    v: xr.DataArray,
    /,
    method: Any,
    *,
    dim: Dim,
    feature_dim: Dim,
    causal: bool = False,
    key_mask: xr.DataArray | None = None,
    scale: float | None = None,
    segments: xr.DataArray | None = None,
    visible: xr.DataArray | None = None,
    return_lse: bool = False,
    mask: xr.DataArray | None = None,
    bias: xr.DataArray | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Any:
    """Compute attention along a named dimension; all dimensions but two are batch, and broadcast by name.

    Parameters
    ----------
    q, k, v : DataArray
        Queries, keys and values, with dimensions in any order. Dimensions of one name must have equal labels. A
        dimension that q has alone, such as "group", makes grouped queries.
    method : str or method object
        As in `subquad.attention`.
    dim : name, or a pair of names
        The dimension of the sequence. Queries and keys may differ in length and labels; with a pair, (of q, of k and
        v), in name too.
    feature_dim : name, or a pair of names
        The dimension of channels; a pair is (of q and k, of v).
    causal : bool, default False
        As in `subquad.attention`.
    key_mask : DataArray of bool, optional
        True = keep; along the dimension of keys, and any others.
    scale : float, optional
        As in `subquad.attention`.
    segments : DataArray of int, optional
        Documents of a packed sequence, along the one `dim` of q, k and v.
    visible : DataArray of int, optional
        How many keys each query sees, along the dimension of q.
    return_lse : bool, default False
        Whether to return (out, lse).
    mask, bias : DataArray, optional
        Along both dimensions of a pair `dim`.
    softcap : float, optional
        As in `subquad.attention`.
    **options
        Options of the method; arrays among them are plain arrays.

    Returns
    -------
    DataArray or pair of DataArray
        The output, with the dimensions of the batch, then that of q, then that of v's channels; with the coordinates
        of q along `dim`, those of v along `feature_dim`, and name and attributes as xarray keeps them. Blocks of Dask
        stay lazy.

    Raises
    ------
    TypeError, ValueError
        As `subquad.attention`; also for what is no DataArray, for a dimension that is missing, and for labels that
        differ.

    Examples
    --------
    >>> import numpy as np, xarray as xr, subquad_xarray
    >>> x = xr.DataArray(np.ones((4, 50, 3)), dims=("channel", "time", "station"), coords={"station": ["a", "b", "c"]})
    >>> out = subquad_xarray.attention(x, x, x, "favor", dim="time", feature_dim="channel")
    >>> out.dims, out.station.values.tolist()
    (('station', 'time', 'channel'), ['a', 'b', 'c'])
    """
    of_q, of_k = pair("dim", dim, "that of q and that of k and v")
    of_qk, of_v = pair("feature_dim", feature_dim, "that of q and k and that of v")
    if of_q == of_k and not (mask is None and bias is None):
        name = "bias" if mask is None else "mask"
        msg = f"{name} has one dimension of queries and one of keys: give dim=(that of q, that of k and v), not {dim!r}"
        raise ValueError(msg)
    given = {"q": q, "k": k, "v": v, "key_mask": key_mask, "segments": segments, "visible": visible,
             "mask": mask, "bias": bias}  # fmt: skip
    dims = {"q": (of_q, of_qk), "k": (of_k, of_qk), "v": (of_k, of_v), "key_mask": (of_k,), "segments": (of_q,),
            "visible": (of_q,), "mask": (of_q, of_k), "bias": (of_q, of_k)}  # fmt: skip
    arrays = check(given, dims)
    if of_qk != of_v:
        check_apart({name: x for name, x in arrays.items() if name != "v"}, of_v, "which is that of v's channels")
    if of_q != of_k:
        check_apart({name: arrays[name] for name in ("k", "v")}, of_q, "which is that of queries")
        check_apart({"q": arrays["q"]}, of_k, "which is that of keys")
    # what the output lacks gets names of its own, so that q and k may have one name
    keys, channels = f"{of_k} of k and v", f"{of_qk} of q and k"
    renamed = {"q": {of_qk: channels}, "k": {of_k: keys, of_qk: channels}}
    renamed |= {name: {of_k: keys} for name in ("v", "key_mask", "mask", "bias")}
    for name in renamed.keys() & arrays.keys():
        arrays[name] = arrays[name].rename(renamed[name])
    core = {name: [renamed.get(name, {}).get(one, one) for one in dims[name]] for name in arrays}
    arrays = without(aligned(arrays), keys, channels)
    rank = len({one for x in arrays.values() for one in x.dims} - {of_q, of_v, keys, channels})
    tails = {name: len(core[name]) for name in arrays}

    def call(*blocks: Any) -> Any:
        own = {name: ranked(x, rank + tails[name]) for name, x in zip(arrays, blocks, strict=True)}
        q, k, v = (own.pop(name) for name in ("q", "k", "v"))
        return subquad.attention(
            q, k, v, method, causal=causal, scale=scale, return_lse=return_lse, softcap=softcap, **own, **options
        )

    return xr.apply_ufunc(
        call,
        *arrays.values(),
        input_core_dims=[core[name] for name in arrays],
        output_core_dims=[[of_q, of_v], [of_q]][: 1 + bool(return_lse)],
        join="exact",
        dask="allowed",
    )
