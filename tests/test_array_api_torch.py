"""PyTorch's namespace of the standard: what array_api_compat's gives, in a form that compilers follow in silence."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
import array_api_compat.torch as compat  # noqa: E402  needs PyTorch

from subquad_torch import array_api  # noqa: E402


@pytest.mark.parametrize("include_initial", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (1, 0)])
def test_cumulative_sum(shape: tuple[int, ...], dtype: Any, include_initial: bool) -> None:
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
    options = {"dtype": dtype, "include_initial": include_initial}
    for axis in range(-len(shape), len(shape)):
        if shape[axis]:  # what has no row, array_api_compat cannot sum with an initial 0
            got, expected = (xp.cumulative_sum(x, axis=axis, **options) for xp in (array_api, compat))
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)
    if len(shape) == 1:
        assert torch.equal(array_api.cumulative_sum(x), compat.cumulative_sum(x, axis=0))


def test_cumulative_sum_of_no_rows() -> None:
    x = torch.ones(3, 0)
    assert array_api.cumulative_sum(x, axis=1).shape == (3, 0)
    assert torch.equal(array_api.cumulative_sum(x, axis=1, include_initial=True), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="axis must be given for an array of 2 axes"):
        array_api.cumulative_sum(x)


def test_all_other_names_are_those_of_array_api_compat() -> None:
    for name in set(compat.__all__) - {"cumulative_sum"}:
        assert getattr(array_api, name) is getattr(compat, name)
