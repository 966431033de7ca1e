"""MLX: every method and scan equals its definition, streams, has PyTorch's gradients, compiles and vectorises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from rows.libraries import Mlx
from rows.other_library import OtherLibrary

mx = pytest.importorskip("mlx.core")


class TestMlx(OtherLibrary):
    library = Mlx()
    transforms: ClassVar = {"compile": mx.compile, "vmap": mx.vmap}

    def value_and_grad(self, function: Callable[..., Any], args: list[Any]) -> tuple[Any, list[Any]]:
        value, slope = mx.value_and_grad(function, argnums=tuple(range(len(args))))(*args)
        return value, list(slope)

    def concat(self, arrays: list[Any], axis: int) -> Any:
        return mx.concatenate(arrays, axis=axis)
