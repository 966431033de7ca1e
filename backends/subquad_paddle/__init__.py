"""Paddle backend: the array namespace."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import paddle

from subquad.backend import Array, Backend
from subquad_paddle import array_api


class PaddleBackend(Backend):
    """Paddle: tensors that are computed at once."""

    library = "paddle"

    def namespace(self, array: Array) -> ModuleType:
        return array_api if isinstance(array, paddle.Tensor) else super().namespace(array)

    def device_of(self, array: Array) -> Any:
        """The place of a tensor."""
        return array.place

    def device_kind(self, array: Array) -> str:
        return {"gpu": "cuda"}.get(kind := str(array.place)[6:-1].partition(":")[0], kind)

    def is_concrete(self, *arrays: Array | None) -> bool:
        """Whether values can be read: not while a static program is built."""
        return paddle.in_dynamic_mode()

    def constant(self, x: Any) -> Any:
        return x.detach()


BACKEND = PaddleBackend()
