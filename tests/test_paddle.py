"""Paddle: every method and scan equals its definition, streams, and has PyTorch's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rows.libraries import Paddle
from rows.other_library import OtherLibrary

paddle = pytest.importorskip("paddle")


class TestPaddle(OtherLibrary):
    library = Paddle()

    def value_and_grad(self, function: Callable[..., Any], args: list[Any]) -> tuple[Any, list[Any]]:
        args = [x.detach() for x in args]
        for x in args:
            x.stop_gradient = False
        value = function(*args)
        return value, paddle.grad(value, args)

    def concat(self, arrays: list[Any], axis: int) -> Any:
        return paddle.concat(arrays, axis)
