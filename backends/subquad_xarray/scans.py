"""Scans along a named dimension."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import xarray as xr

import subquad
from subquad_xarray.named import aligned, check, check_apart, ranked, without

scans: Any = subquad  # whose overloads know nothing of arrays by name


def linear_scan(
    a: xr.DataArray,
    b: xr.DataArray,
    /,
    *,
    dim: Hashable,
    initial_state: xr.DataArray | None = None,
    return_state: bool = False,
    reverse: bool = False,
    segments: xr.DataArray | None = None,
    mask: xr.DataArray | None = None,
    implementation: str = "auto",
) -> Any:
    """Compute h[t] = a[t] h[t−1] + b[t] along a named dimension; all others broadcast by name.

    Parameters
    ----------
    a, b : DataArray
        Factors and terms, with dimensions in any order.
    dim : name
        The dimension of time.
    initial_state : DataArray, optional
        The state before the first step, without `dim`.
    return_state : bool, default False
        Whether to return (h, state).
    reverse, implementation
        As in `subquad.linear_scan`.
    segments, mask : DataArray, optional
        As in `subquad.linear_scan`, along `dim`.

    Returns
    -------
    DataArray or pair of DataArray
        h, with the dimensions of `a` and `b`, their coordinates, and name and attributes as xarray keeps them; with
        `return_state` also the last state, without `dim`.

    Raises
    ------
    TypeError, ValueError
        As `subquad.linear_scan`; also for what is no DataArray, a dimension that is missing, and labels that differ.

    Examples
    --------
    >>> import xarray as xr, subquad_xarray
    >>> rain = xr.DataArray([1.0, 0.0, 0.0, 2.0], dims="day", coords={"day": [1, 2, 3, 4]})
    >>> subquad_xarray.linear_scan(0.5 * xr.ones_like(rain), rain, dim="day").values
    array([1.   , 0.5  , 0.25 , 2.125])
    """
    given = {"a": a, "b": b, "initial_state": initial_state, "segments": segments, "mask": mask}
    arrays = check(given, {"a": (dim,), "b": (dim,), "initial_state": (), "segments": (dim,), "mask": (dim,)})
    check_apart({name: x for name, x in arrays.items() if name == "initial_state"}, dim, "which a state has not")
    arrays = aligned(arrays)
    steps = xr.broadcast(arrays["a"], arrays["b"])
    arrays |= dict(zip(("a", "b"), steps, strict=True))
    channel = [name for name in steps[1].dims if name != dim][-1:]  # one of the batch is the kernel's last axis
    if "initial_state" in arrays and channel and channel[0] not in arrays["initial_state"].dims:
        one = steps[0].isel({dim: 0}, drop=True)[{name: 0 for name in steps[0].dims if name not in (dim, *channel)}]
        arrays["initial_state"] = arrays["initial_state"].broadcast_like(one)
    core = {"a": [dim, *channel], "b": [dim, *channel], "initial_state": channel, "segments": [dim], "mask": [dim]}
    rank = len({name for x in arrays.values() for name in x.dims} - {dim, *channel})

    def call(*blocks: Any) -> Any:
        own = {name: ranked(x, rank + len(core[name])) for name, x in zip(arrays, blocks, strict=True)}
        if not channel:
            own |= {name: own[name][..., None] for name in ("a", "b", "initial_state") if name in own}
        found = scans.linear_scan(
            own.pop("a"), own.pop("b"), return_state=return_state, reverse=reverse, implementation=implementation, **own
        )
        if channel:
            return found
        return tuple(x[..., 0] for x in found) if return_state else found[..., 0]

    return xr.apply_ufunc(
        call,
        *arrays.values(),
        input_core_dims=[core[name] for name in arrays],
        output_core_dims=[[dim, *channel], channel][: 1 + bool(return_state)],
        join="exact",
        dask="allowed",
    )


def selective_scan(
    u: xr.DataArray,
    delta: xr.DataArray,
    A: xr.DataArray,
    B: xr.DataArray,
    C: xr.DataArray,
    D: xr.DataArray | None = None,
    *,
    dim: Hashable,
    feature_dim: Hashable,
    state_dim: Hashable,
    z: xr.DataArray | None = None,
    delta_bias: xr.DataArray | None = None,
    initial_state: xr.DataArray | None = None,
    segments: xr.DataArray | None = None,
    mask: xr.DataArray | None = None,
    return_state: bool = False,
    **options: Any,
) -> Any:
    """Compute the selective scan along a named dimension; all dimensions but three are batch, and broadcast by name.

    Parameters
    ----------
    u, delta, z : DataArray
        Inputs, step sizes and gate, along `dim` and `feature_dim`.
    A : DataArray
        Along `feature_dim` and `state_dim`.
    B, C : DataArray
        Along `state_dim` and either `dim` or, constant in time, `feature_dim`.
    D, delta_bias : DataArray, optional
        Along `feature_dim`.
    dim, feature_dim, state_dim : name
        The dimensions of time, of channels, and of the state of a channel.
    initial_state : DataArray, optional
        Along `feature_dim` and `state_dim`.
    segments, mask : DataArray, optional
        As in `subquad.selective_scan`, along `dim`.
    return_state : bool, default False
        Whether to return (y, state).
    **options
        Further options of `subquad.selective_scan`, such as ``delta_softplus=True``.

    Returns
    -------
    DataArray or pair of DataArray
        y, with the dimensions of the batch, `dim` and `feature_dim`, the coordinates of the inputs, and name and
        attributes as xarray keeps them.

    Raises
    ------
    TypeError, ValueError
        As `subquad.selective_scan`; also for what is no DataArray, a dimension that is missing, and labels that differ.
    """
    rows, matrix = (dim, feature_dim), (feature_dim, state_dim)
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias,
             "initial_state": initial_state, "segments": segments, "mask": mask}  # fmt: skip
    core: dict[str, tuple[Hashable, ...]] = {
        "u": rows, "delta": rows, "A": matrix, "D": (feature_dim,), "z": rows, "delta_bias": (feature_dim,),
        "initial_state": matrix, "segments": (dim,), "mask": (dim,),
    }  # fmt: skip
    for name in ("B", "C"):
        core[name] = (feature_dim if feature_dim in getattr(given[name], "dims", ()) else dim, state_dim)
    arrays = check(given, core)
    check_apart({name: x for name, x in arrays.items() if feature_dim in core[name] and dim not in core[name]},
                dim, "along which it is constant")  # fmt: skip
    arrays = aligned(arrays)
    if not return_state:
        arrays = without(arrays, state_dim)
    axes = {name for x in arrays.values() for name in x.dims} - {dim, feature_dim, state_dim}
    constant = {name for name in arrays if dim not in core[name] and name != "initial_state"}
    for name in constant:
        for one in axes.intersection(arrays[name].dims):
            msg = f"{name} has the dimension {one!r} beside {feature_dim!r}; what is constant in time has no batch"
            raise ValueError(msg)
    rank = len(axes) + 1  # one more than there is, so that no axis of the batch is taken for one of channels

    def call(*blocks: Any) -> Any:
        own = {
            name: x if name in constant else ranked(x, rank + len(core[name]))
            for name, x in zip(arrays, blocks, strict=True)
        }
        by_position = [own.pop(name) for name in ("u", "delta", "A", "B", "C")]
        found = scans.selective_scan(*by_position, own.pop("D", None), **own, return_state=return_state, **options)
        return tuple(x[0] for x in found) if return_state else found[0]

    return xr.apply_ufunc(
        call,
        *arrays.values(),
        input_core_dims=[core[name] for name in arrays],
        output_core_dims=[rows, matrix][: 1 + bool(return_state)],
        join="exact",
        dask="allowed",
    )
