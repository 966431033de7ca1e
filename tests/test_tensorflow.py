"""TensorFlow: every method and scan equals its definition, streams, has PyTorch's gradients, is traced and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from rows.libraries import TensorFlow, tolerance
from rows.other_library import OtherLibrary, half_square

import subquad

tf = pytest.importorskip("tensorflow")
subquad_tensorflow = pytest.importorskip("subquad_tensorflow")


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

    def test_an_open_length_is_named_or_run_outside(self) -> None:
        def mix(x: Any) -> Any:
            return subquad.attention(x, x, x, "favor", causal=True, num_features=16)

        spec = tf.TensorSpec([None, None, 8], tf.float64)
        with pytest.raises(TypeError, match=r"q is a tensor of shape \(None, None, 8\), of which a size is open"):
            tf.function(mix, input_signature=[spec])(tf.zeros([2, 5, 8], tf.float64))
        program = tf.function(subquad_tensorflow.at_any_length(mix, spec), input_signature=[spec])
        for n in (5, 40):
            x = self.library.array(np.random.default_rng(n).standard_normal((2, n, 8)), "float64")
            (got, (slope,)), (want, (expected,)) = (
                self.value_and_grad(lambda x, f=f: half_square(f(x)), [x]) for f in (program, mix)
            )
            assert program(x).shape == (2, n, 8)
            assert float(got) == pytest.approx(float(want), rel=1e-14)
            assert self.error(slope, expected.numpy()) <= 1e-14

    def test_a_variable_is_refused_with_the_way_out(self) -> None:
        x = tf.Variable(np.zeros((2, 20, 8)))
        with pytest.raises(TypeError, match=r"q is a tf.Variable; pass the tensor in it, tf.convert_to_tensor\(x\)"):
            subquad.attention(x, x, x, "linear")
        with tf.GradientTape() as tape:
            q = tf.convert_to_tensor(x)
            loss = tf.reduce_sum(subquad.attention(q, q, q + 1, "linear"))
        assert tape.gradient(loss, x).shape == x.shape

    def test_autograph_leaves_subquad_as_it_is(self, caplog: pytest.LogCaptureFixture) -> None:
        x = self.library.array(np.zeros((2, 20, 8)), "float32")
        tf.function(lambda x: subquad.attention(x, x, x, "lsh", bucket_size=4))(x)
        assert not [record for record in caplog.records if "AutoGraph" in record.getMessage()]

    @pytest.mark.parametrize("name", ["clustered", "favor", "lsh", "nystrom"])
    def test_one_head(self, name: str) -> None:
        """Batches that broadcast, within calls of subquad."""
        x = np.random.default_rng(0).standard_normal((2, 1, 70, 8))
        args, rounded = self.library.arrays([x] * 3, "float32"), self.library.rounded([x] * 3, "float32")
        assert self.error(subquad.attention(*args, name), subquad.attention(*rounded, name)) <= tolerance("float32")

    def test_products_elsewhere_are_those_of_tensorflow(self) -> None:
        x, y = tf.ones((3, 2, 4, 5)), tf.ones((5, 2))
        program = tf.function(lambda: x @ y).get_concrete_function()
        assert "BatchMatMulV2" in [node.type for node in program.graph.get_operations()]
