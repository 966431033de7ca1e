"""TensorFlow backend: the array namespace, and what eager and traced tensors need."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import tensorflow as tf

from subquad.backend import Array, Backend
from subquad_tensorflow import array_api, open_lengths
from subquad_tensorflow.lengths import OPEN
from subquad_tensorflow.lengths import at_any_length as at_any_length
from subquad_tensorflow.products import Computing

COMPUTING = Computing()


class TensorFlowBackend(Backend):
    """TensorFlow: tensors that are computed at once, or recorded by ``tf.function``."""

    library = "tensorflow"

    def namespace(self, array: Array) -> ModuleType:
        return array_api if isinstance(array, (tf.Tensor, tf.Variable)) else super().namespace(array)

    def refuses(self, array: Array) -> str | None:
        """That it is a variable, which lacks what arrays have, or that sizes of a traced tensor are open."""
        if isinstance(array, tf.Variable):
            return "a tf.Variable; pass the tensor in it, tf.convert_to_tensor(x), through which gradients reach it"
        return None if array.shape.is_fully_defined() else OPEN.format(array.shape)

    def whole_call(self, name: str, function: Any, arrays: Any, options: Any) -> Any:
        """A call in which a length is open, by loops over blocks; of variables there is none."""
        given = (*arrays.values(), *options.values())
        if any(isinstance(x, tf.Variable) for x in given):
            return NotImplemented
        return open_lengths.whole_call(name, function, arrays, options)

    def device_of(self, array: Array) -> str | None:
        """The name of the device; None for a traced tensor that has none yet."""
        return array.device or None

    def place_of(self, array: Array) -> str | None:
        return self.device_of(array) if tf.executing_eagerly() else None

    def device_kind(self, array: Array) -> str:
        kind = (array.device or "CPU").rpartition("device:")[2].partition(":")[0]
        return {"GPU": "cuda"}.get(kind, kind.lower())

    def is_concrete(self, *arrays: Array | None) -> bool:
        """Whether values can be read: not inside of a ``tf.function``."""
        return tf.executing_eagerly()

    def constant(self, x: Any) -> Any:
        return tf.stop_gradient(x)

    def computing(self, like: Array) -> Computing:
        """The context in which products of matrices have equal batches; see `products`."""
        return COMPUTING

    def where_any(self, condition: Any, change: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        """`change(*given)` where the condition holds, else `given`, by `tf.cond`."""
        return tf.cond(condition, lambda: tuple(change(*given)), lambda: given)


with suppress(ImportError):
    # AutoGraph rewrites every function that a traced one calls; here none branches on a tensor, and each takes time
    from tensorflow.python.autograph.core import config

    config.CONVERSION_RULES = (config.DoNotConvert("subquad"), *config.CONVERSION_RULES)

BACKEND = TensorFlowBackend()
