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

B, T = "batch", "n"
SIZES: dict[str, list[tuple[Any, ...]]] = {  # of the arguments of OPEN
    **{name: 3 * [(2, T, 4)] for name in ("exact", "exact causal", "favor", "linear", "linear causal")},
    "favor causal": 3 * [(B, 2, T, 4)],
    "cross": [(2, T, 4), (2, 19, 4), (2, 19, 3)],
    "masked": [(2, T, 4)],
    "linear_scan": [(B, T, 3), (B, T, 3), (B, 3)],
    "linear_scan reverse": [(T, 3), (T, 3)],
    "selective_scan": [(2, T, 4), (2, T, 4), (4, 3), (2, T, 3), (2, T, 2, 3), (4,), (2, T, 4)],
}


def attention(name: str, **options: Any) -> Any:
    options |= {"num_features": 16} if name == "favor" else {}
    return lambda q, k, v: subquad.attention(q, k, v, name, **options)


def selective(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any) -> Any:
    return subquad.selective_scan(u, delta, -abs(A), B, C, D, z=z, delta_softplus=True)


CALLS_OF_OPEN: dict[str, Any] = {
    **{f"{name}{' causal' * causal}": attention(name, causal=causal)
       for name in ("exact", "favor", "linear") for causal in (False, True)},
    "cross": attention("exact", causal=True),
    "masked": lambda x: subquad.attention(x, x, x, "favor", key_mask=x[:, :, 0] > 0, num_features=16),
    "linear_scan": lambda a, b, h: subquad.linear_scan(a, b, initial_state=h),
    "linear_scan reverse": lambda a, b: subquad.linear_scan(a, b, reverse=True),
    "selective_scan": selective,
}  # fmt: skip
OPEN = {
    name: (call, [[None if size in (B, T) else size for size in own] for own in SIZES[name]])
    for name, call in CALLS_OF_OPEN.items()
}


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
            return subquad.attention(x, x, x, "window", causal=True, left=5)

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

    @pytest.mark.parametrize("name", OPEN)
    def test_an_open_length_within_a_program(self, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        """One program for every length, fewer rows than a block and several of them; its gradient; saved and read."""
        monkeypatch.setattr("subquad_tensorflow.open_lengths.SIZE", 8)
        function, shapes = OPEN[name]
        specs = [tf.TensorSpec(shape, tf.float64) for shape in shapes]
        program = tf.function(function, input_signature=specs)
        rng = np.random.default_rng(0)
        for n in (5, 16, 21):
            sizes = [[{"n": n, "batch": 2}.get(size, size) for size in own] for own in SIZES[name]]
            arrays = [self.library.array(rng.standard_normal(own) / 3, "float64") for own in sizes]
            assert self.error(program(*arrays), function(*arrays).numpy()) <= 1e-14
        (_, slope), (_, expected) = (
            self.value_and_grad(lambda *args, f=f: half_square(f(*args)), arrays) for f in (program, function)
        )
        for one, other in zip(slope, expected, strict=True):
            assert self.error(one, other.numpy()) <= 1e-12
        if name in ("favor causal", "selective_scan"):
            module = tf.Module()
            module.program = program
            tf.saved_model.save(module, str(tmp_path))
            assert self.error(tf.saved_model.load(str(tmp_path)).program(*arrays), function(*arrays).numpy()) <= 1e-14

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
