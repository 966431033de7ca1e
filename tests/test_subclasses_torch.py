"""Tensors of a subclass that a package of the user defines: they are of PyTorch, as the plain ones beside them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

import subquad

torch = pytest.importorskip("torch")


class Own(torch.Tensor):  # type: ignore[misc, name-defined]
    """A subclass with no operations of its own."""


@pytest.mark.parametrize("name", ["exact", "linear", "favor", "window", "nystrom"])
def test_a_subclass_joins_with_plain_tensors(name: str) -> None:
    rows: Any = torch.randn(3, 2, 40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"left": 5} if name == "window" else {}
    expected = subquad.attention(*rows, method=name, **options)
    for own in product([False, True], repeat=3):
        given = [x.as_subclass(Own) if is_own else x for x, is_own in zip(rows, own, strict=True)]
        got = subquad.attention(*given, method=name, **options)
        assert isinstance(got, Own) == any(own)
        torch.testing.assert_close(got.as_subclass(torch.Tensor), expected, rtol=0, atol=1e-13)


def test_arrays_of_two_libraries_are_still_refused() -> None:
    x = torch.ones(4, 8)
    with pytest.raises(TypeError, match="k is an array of numpy"):
        subquad.attention(x.as_subclass(Own), x.numpy(), x, method="exact")
