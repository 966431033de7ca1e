"""NumPy's namespace of the standard: what array_api_compat's gives, without what that imports."""

from __future__ import annotations

import array_api_compat.numpy as compat
import numpy as np
import pytest
from interpreter import python

from subquad_numpy import array_api


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("axis", [0, -1])
def test_argsort(axis: int, descending: bool) -> None:
    x = np.random.default_rng(0).integers(0, 4, (5, 40))
    order = {"axis": axis, "descending": descending, "stable": True}
    assert np.array_equal(array_api.argsort(x, **order), compat.argsort(x, **order))


def test_functions_that_differ_from_numpy() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    assert array_api.clip(x, max=0.5).dtype == np.float32
    assert np.array_equal(array_api.clip(x, -0.5, 0.5), compat.clip(x, -0.5, 0.5))
    places = np.argsort(x, axis=-1)
    assert np.array_equal(array_api.take_along_axis(x, places), np.sort(x, axis=-1))
    assert array_api.astype(x, np.float64, copy=False).dtype == np.float64
    assert array_api.astype(x, np.float32, copy=False) is x
    with pytest.raises(ValueError, match="device must be 'cpu'"):
        array_api.astype(x, np.float64, device="cuda")
    assert array_api.asarray([1.0], dtype=np.float32, copy=True).dtype == np.float32
    for name in array_api.OTHER:
        assert getattr(array_api, name) is getattr(compat, name)


def test_a_call_imports_no_tools_of_numpy() -> None:
    assert (
        python("""
        import sys
        import numpy as np, subquad
        x = np.ones((1, 40, 8))
        for method in ("favor", "nystrom", "clustered", "exact"):
            subquad.attention(x, x, x, method)
        subquad.linear_scan(x, x)
        print({"numpy.f2py", "array_api_compat.numpy"} & sys.modules.keys())
    """)
        == "set()"
    )
