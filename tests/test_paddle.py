"""Paddle: every method and scan equals its definition, streams, has PyTorch's gradients, and is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from rows.libraries import Paddle
from rows.other_library import OtherLibrary

paddle = pytest.importorskip("paddle")


def to_static(call: Callable[..., Any]) -> Callable[..., Any]:
    from subquad_paddle import bench

    return bench.compile(call)


class TestPaddle(OtherLibrary):
    library = Paddle()
    transforms: ClassVar = {"to_static": to_static}
    transformed = "float32"  # in a program, numbers of Python are rounded to it

    def value_and_grad(self, function: Callable[..., Any], args: list[Any]) -> tuple[Any, list[Any]]:
        args = [x.detach() for x in args]
        for x in args:
            x.stop_gradient = False
        value = function(*args)
        return value, paddle.grad(value, args)

    def concat(self, arrays: list[Any], axis: int) -> Any:
        return paddle.concat(arrays, axis)
