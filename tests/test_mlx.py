"""MLX: every method and scan equals its definition, streams, has PyTorch's gradients, compiles and vectorises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from rows.libraries import Mlx
from rows.other_library import OtherLibrary

mx = pytest.importorskip("mlx.core")
from subquad_mlx import array_api  # noqa: E402  needs MLX


class TestMlx(OtherLibrary):
    library = Mlx()
    transforms: ClassVar = {"compile": mx.compile, "vmap": mx.vmap}

    def value_and_grad(self, function: Callable[..., Any], args: list[Any]) -> tuple[Any, list[Any]]:
        value, slope = mx.value_and_grad(function, argnums=tuple(range(len(args))))(*args)
        return value, list(slope)

    def concat(self, arrays: list[Any], axis: int) -> Any:
        return mx.concatenate(arrays, axis=axis)


def test_the_number_of_the_largest_entry_of_no_row() -> None:
    """MLX itself refuses, even along an axis that has entries."""
    for find in (array_api.argmax, array_api.argmin):
        assert find(mx.zeros((3, 0, 4)), axis=-1).shape == (3, 0)
        assert find(mx.zeros((3, 0, 4)), axis=0, keepdims=True).shape == (1, 0, 4)
        with pytest.raises(ValueError, match="zero size"):
            find(mx.zeros((3, 0, 4)), axis=1)
