"""TensorFlow: every method and scan equals its definition, streams, has PyTorch's gradients, is traced and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from rows.libraries import TensorFlow
from rows.other_library import OtherLibrary

tf = pytest.importorskip("tensorflow")


class TestTensorFlow(OtherLibrary):
    library = TensorFlow()
    transforms: ClassVar = {"function": tf.function, "xla": lambda call: tf.function(call, jit_compile=True)}
    slow_transforms: ClassVar = {
        "xla": ("bigbird", "clustered", "favor", "lsh", "nystrom")
    }  # XLA compiles them for seconds

    def value_and_grad(self, function: Callable[..., Any], args: list[Any]) -> tuple[Any, list[Any]]:
        with tf.GradientTape() as tape:
            tape.watch(args)
            value = function(*args)
        return value, tape.gradient(value, args)

    def concat(self, arrays: list[Any], axis: int) -> Any:
        return tf.concat(arrays, axis)
