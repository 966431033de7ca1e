"""DataArrays: axes by name in any order, coordinates kept, blocks of Dask kept lazy, misfits named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows.libraries import relative_error
from rows.other_library import OPTIONS

import subquad

xr = pytest.importorskip("xarray")
subquad_xarray = pytest.importorskip("subquad_xarray")
rng = np.random.default_rng(0)
SIZES = {"station": 3, "head": 2, "time": 40, "channel": 8, "state": 4}
LABELS = {"station": list("abc"), "time": np.arange(40) * 10, "channel": list("abcdefgh")}
AXES = {"dim": "time", "feature_dim": "channel"}


def drawn(*dims: str, **sizes: int) -> Any:
    """A DataArray with these dimensions, labelled where they have their full length."""
    shape = [sizes.get(dim, SIZES.get(dim)) for dim in dims]
    labels = {dim: LABELS[dim] for dim in dims if dim in LABELS and dim not in sizes}
    return xr.DataArray(rng.standard_normal(shape), dims=dims, coords=labels)


def plain(x: Any, *dims: str) -> np.ndarray:
    return x.transpose(*dims).values


@pytest.mark.parametrize("method", subquad.METHODS)
def test_axes_in_any_order(method: str) -> None:
    """The numbers of the plain call, and labels of q along its sequence, of v along its channels."""
    q, k = drawn("channel", "station", "time", "head"), drawn("time", "head", "channel", "station", time=30)
    v = drawn("head", "time", "channel", time=30, channel=5).assign_coords(channel=list("uvwxy"))
    keep = xr.DataArray(rng.random((30, 3)) < 0.8, dims=("time", "station"), coords={"station": list("abc")})
    q = q.assign_coords(zone=("time", np.arange(40) // 7), height=("station", [1.0, 2.0, 3.0]))
    k = k.assign_coords(zone=("time", np.arange(30)), unit=("channel", list("abcdefgh")))
    out = subquad_xarray.attention(q, k, v, method, **AXES, key_mask=keep, **OPTIONS.get(method, {}))
    order = ("station", "head", "time", "channel")
    want = subquad.attention(
        plain(q, *order), plain(k, *order), plain(v, *order[1:]), method, key_mask=plain(keep, "station", "time")[:, None],
        **OPTIONS.get(method, {}),
    )  # fmt: skip
    assert relative_error(plain(out, *order), want) <= 3e-15
    assert list(out.channel) == list("uvwxy")
    assert "unit" not in out.coords
    for name in ("time", "zone", "station", "height"):
        assert out.coords[name].equals(q.coords[name]), name


def test_names_and_attributes_as_xarray_keeps_them() -> None:
    q, k, v = (drawn("time", "channel").assign_attrs(source="x", part=name) for name in "qkv")
    out = subquad_xarray.attention(q, k, v, "exact", **AXES)
    assert out.name is None
    want = xr.apply_ufunc(lambda x, y, z: x, q, k, v)
    assert out.attrs == want.attrs
    same = subquad_xarray.attention(*(x.rename("wind") for x in (q, k, v)), "exact", **AXES)
    assert same.name == "wind"


def test_two_names_restrictions_and_groups() -> None:
    """Queries and keys by two names, along which a mask and a bias lie; a dimension of q alone groups its heads."""
    q, k, v = drawn("time", "head", "group", "channel", group=3), drawn("head", "key", "channel", key=30), None
    v = drawn("key", "head", "value", key=30, value=5)
    see = xr.DataArray(rng.random((30, 40)) < 0.7, dims=("key", "time"))
    bias = drawn("key", "time", "head", key=30)
    names = {"dim": ("time", "key"), "feature_dim": ("channel", "value")}
    out, lse = subquad_xarray.attention(q, k, v, "exact", **names, mask=see, bias=bias, return_lse=True)
    want, other = subquad.attention(
        plain(q, "head", "group", "time", "channel"), plain(k, "head", "key", "channel")[:, None],
        plain(v, "head", "key", "value")[:, None], "exact", mask=plain(see, "time", "key"),
        bias=plain(bias, "head", "time", "key")[:, None], return_lse=True,
    )  # fmt: skip
    assert relative_error(plain(out, "head", "group", "time", "value"), want) <= 3e-15
    assert relative_error(plain(lse, "head", "group", "time"), other) <= 3e-15
    parts = xr.DataArray(np.repeat([0, 1], 20), dims="time")
    x = drawn("channel", "time")
    packed = subquad_xarray.attention(x, x, x, "favor", **AXES, causal=True, segments=parts)
    first = x.isel(time=slice(20))
    alone = subquad_xarray.attention(first, first, first, "favor", **AXES, causal=True)
    assert relative_error(packed.isel(time=slice(20)).values, alone.values) <= 1e-12


def test_dask_inside_stays_lazy() -> None:
    pytest.importorskip("dask")
    x, a = drawn("station", "time", "channel"), drawn("time", "station") / 3
    lazy = x.chunk(time=10)
    out = subquad_xarray.attention(lazy, lazy, lazy, "favor", **AXES, causal=True)
    h = subquad_xarray.linear_scan(a.chunk(time=7), x.chunk(time=10), dim="time")
    assert out.chunks is not None
    assert h.chunks is not None
    assert relative_error(out.values, subquad_xarray.attention(x, x, x, "favor", **AXES, causal=True).values) <= 3e-15
    assert relative_error(h.values, subquad_xarray.linear_scan(a, x, dim="time").values) <= 3e-15
    with pytest.raises(TypeError, match="q is an array of dask but k is an array of numpy"):
        subquad_xarray.attention(lazy, x, x, "favor", **AXES)


@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan(reverse: bool) -> None:
    a, b, start = drawn("time", "station") / 3, drawn("channel", "time"), drawn("station")
    keep = xr.DataArray(rng.random((3, 40)) < 0.8, dims=("station", "time"))
    h, state = subquad_xarray.linear_scan(
        a, b, dim="time", initial_state=start, mask=keep, reverse=reverse, return_state=True
    )
    want = subquad.linear_scan(
        plain(a, "station", "time")[..., None] * np.ones(8), plain(b, "time", "channel"), mask=plain(keep, "station", "time"),
        initial_state=plain(start, "station")[:, None] * np.ones(8), reverse=reverse, return_state=True,
    )  # fmt: skip
    assert relative_error(plain(h, "station", "time", "channel"), want[0]) <= 3e-15
    assert relative_error(plain(state, "station", "channel"), want[1]) <= 3e-15
    assert h.time.equals(b.time)
    assert state.station.equals(start.station)
    line, end = subquad_xarray.linear_scan(xr.ones_like(b[0]), b[0], dim="time", return_state=True)  # time alone
    assert np.allclose(line, np.cumsum(b[0]))
    assert end.dims == ()


@pytest.mark.parametrize("constant", [False, True])
def test_selective_scan(constant: bool) -> None:
    u, delta = drawn("time", "station", "channel"), abs(drawn("channel", "time"))
    A, D, start = -abs(drawn("state", "channel")), drawn("channel"), drawn("state", "station", "channel")
    B = drawn("state", "channel") if constant else drawn("time", "state", "station")
    C, z = drawn("state", "time"), drawn("station", "channel", "time")
    names = {"dim": "time", "feature_dim": "channel", "state_dim": "state"}
    y, state = subquad_xarray.selective_scan(
        u, delta, A, B, C, D, **names, z=z, initial_state=start, return_state=True, delta_softplus=True
    )
    rows, matrix = ("station", "time", "channel"), ("channel", "state")
    want = subquad.selective_scan(
        plain(u, *rows), plain(delta, "time", "channel"), plain(A, *matrix),
        plain(B, *matrix) if constant else plain(B, "station", "time", "state"), plain(C, "time", "state")[None],
        D.values, z=plain(z, *rows), initial_state=plain(start, "station", *matrix), return_state=True,
        delta_softplus=True,
    )  # fmt: skip
    assert relative_error(plain(y, *rows), want[0]) <= 3e-15
    assert relative_error(plain(state, "station", *matrix), want[1]) <= 3e-15
    assert y.time.equals(u.time)


def attend(**changed: Any) -> Any:
    x = drawn("time", "channel")
    given = {"q": x, "k": x, "v": x, **AXES, **changed}
    return subquad_xarray.attention(given.pop("q"), given.pop("k"), given.pop("v"), "exact", **given)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: subquad.attention(x, x, x, "exact"), TypeError, r"^q is a DataArray of xarray.*subquad_xarray\.attention\("),
        (lambda x: subquad.linear_scan(x.values, x), TypeError, r"^b is a DataArray of xarray.*subquad_xarray\.linear_scan"),
        (lambda x: attend(k=x.values), TypeError, "^k is a ndarray, expected a DataArray with the dimensions 'time' and 'channel'"),
        (lambda x: attend(v=x.to_dataset(name="x")), TypeError, "^v is a Dataset, .*one of its variables"),
        (lambda x: attend(dim="tme"), ValueError, "^q has no dimension 'tme'; did you mean 'time'"),
        (lambda x: attend(v=x.isel(time=slice(5))), ValueError, "cannot align .*time of k and v"),
        (lambda x: attend(k=x.assign_coords(channel=range(8))), ValueError, "cannot align .*channel of q and k"),
        (lambda x: attend(mask=x > 0), ValueError, r"^mask has one dimension of queries and one of keys: give dim="),
        (lambda x: attend(key_mask=x.isel(channel=0)), TypeError, "^key_mask has dtype float64"),
        (lambda x: attend(dim=("time", "key")), ValueError, "^k has no dimension 'key'"),
        (lambda x: attend(feature_dim=("channel", "value", "x")), ValueError, "^feature_dim is .*expected the name of a dim"),
        (lambda x: attend(num_features=3), TypeError, "has no option 'num_features'"),
        (lambda x: subquad_xarray.linear_scan(x, x, dim="time", initial_state=x), ValueError, "^initial_state has the dimension 'time'"),
        (lambda x: subquad_xarray.linear_scan(x, x.isel(channel=slice(3)), dim="time"), ValueError, "cannot align"),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(drawn("time", "channel"))
