"""Paddle backend: the array namespace, and what tensors and the values of programs need."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import paddle

from subquad.backend import Array, Backend
from subquad_paddle import array_api


class PaddleBackend(Backend):
    """Paddle: tensors that are computed at once, or recorded by ``paddle.jit.to_static``."""

    library = "paddle"

    def namespace(self, array: Array) -> ModuleType:
        return array_api if isinstance(array, array_api.TENSORS) else super().namespace(array)

    def device_of(self, array: Array) -> Any:
        """The place of a tensor; None for a value of a program, which has none yet."""
        return array.place if paddle.in_dynamic_mode() else None

    def device_kind(self, array: Array) -> str:
        kind = paddle.device.get_device().partition(":")[0]
        if paddle.in_dynamic_mode():
            kind = "cpu" if array.place.is_cpu_place() else "gpu" if array.place.is_gpu_place() else kind
        return {"gpu": "cuda"}.get(kind, kind)

    def is_concrete(self, *arrays: Array | None) -> bool:
        """Whether values can be read: not while a static program is built."""
        return paddle.in_dynamic_mode()

    def constant(self, x: Any) -> Any:
        return x.detach()

    def where_any(self, condition: Any, change: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        """`change(*given)` where the condition holds, else `given`, by a branch of the program."""
        return paddle.static.nn.cond(condition, lambda: tuple(change(*given)), lambda: given)


# functions of subquad are recorded as they are: none has a branch that `to_static` would have to rewrite
paddle.jit.ignore_module([sys.modules[name] for name in ("subquad", __name__)])

BACKEND = PaddleBackend()
