"""The table of array libraries: how to make arrays, how to run a function under hard conditions, how to read results.

Each row catches mistakes that the others let pass: read-only inputs catch in-place writes, the strict library a wrong
device, dtype or index, no_float64 an accidental double, meta tensors a read value, JAX under `jit` a branch on data.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

AS_PRECISE = {
    "complex128": "float64",
    "complex64": "float32",
    "float128": "float64",
}  # long doubles are read as doubles
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def tolerance(dtype: str, n: int = 128) -> float:
    """The maximum of max|y − ref| / max|ref| that rounding explains, for sums of `n` terms.

    Roundings of n terms add up as √n; the factor allows for sums of sums, and for exponents of ten and more. Half
    precision is computed in float32, but inputs and outputs are rounded to it.
    """
    epsilon = EPSILON[AS_PRECISE.get(dtype, dtype)]
    return 2.5 * epsilon if epsilon > EPSILON["float32"] else 16 * math.sqrt(n) * epsilon


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` of every array in nested dicts, tuples and lists; None stays."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {name: tree_map(function, x) for name, x in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(tree_map(function, x) for x in tree)
    return function(tree)


class Library:
    """The row of NumPy, and the base of the other rows."""

    dtypes: tuple[str, ...] = ("float64", "float32")
    known_dtypes: tuple[str, ...] = ("float64", "float32", "float16")  # that its arrays may have
    has_values = True

    def __str__(self) -> str:
        return type(self).__name__.lower()

    def array(self, x: np.ndarray, dtype: str) -> Any:
        return x.astype(self.target(x, dtype))

    def target(self, x: np.ndarray, dtype: str) -> str:
        """The dtype that `x` gets: `dtype` if real, complex of equal precision if complex, its own if neither."""
        if x.dtype.kind == "f":
            return dtype
        if x.dtype.kind == "c":
            return "complex128" if dtype == "float64" else "complex64"
        return x.dtype.name

    def arrays(self, tree: Any, dtype: str) -> Any:
        """The arrays of this library for a tree of NumPy arrays."""
        return tree_map(lambda x: self.array(x, dtype), tree)

    def rounded(self, tree: Any, dtype: str) -> Any:
        """The values that `arrays` holds, as NumPy arrays in double precision: what a reference must be given."""
        return tree_map(lambda x: self.numpy(self.array(x, dtype)), tree)

    def numpy(self, x: Any) -> np.ndarray:
        """`x` as a NumPy array, floats in double precision."""
        x = self.host(x)
        return x if x.dtype.kind in "bi" else x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)

    def host(self, x: Any) -> np.ndarray:
        return np.asarray(x)

    def context(self, dtype: str) -> Any:
        return contextlib.nullcontext()

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as this library runs it."""
        return function

    def call(self, function: Callable[..., Any], *trees: Any, dtype: str) -> Any:
        """The result of `function`, called on NumPy trees converted to this library: arrays of this library."""
        return self.calls(function, trees, dtype=dtype)[0]

    def calls(self, function: Callable[..., Any], *several: Any, dtype: str) -> list[Any]:
        """The results of `function` for several lists of NumPy trees, in one program if their shapes agree."""
        program, found = self.program(function), []
        with self.context(dtype):
            example = self.array(np.zeros(1), dtype)
            for trees in several:
                found.append(program(*self.arrays(trees, dtype)))
                tree_map(lambda x: self.check_kin(x, example), found[-1])
        return found

    def check_kin(self, x: Any, example: Any) -> None:
        """Assert that an array is of this library, and on the device of the inputs."""
        assert isinstance(x, type(example)), f"{type(x)} came out of {type(example)}"
        assert self.device(x) == self.device(example)

    def device(self, x: Any) -> Any:
        return x.device

    def dtype_name(self, x: Any) -> str:
        return str(x.dtype).rpartition(".")[2]


class NumPy(Library):
    """NumPy with the bfloat16 of ml_dtypes, which supports less than NumPy's own dtypes."""

    dtypes = ("float64", "float32", "bfloat16") if importlib.util.find_spec("ml_dtypes") else Library.dtypes

    def array(self, x: np.ndarray, dtype: str) -> Any:
        if dtype == "bfloat16":
            import ml_dtypes  # noqa: F401  NumPy knows the name from now on
        return super().array(x, dtype)


class NumPyReadOnly(Library):
    """NumPy with read-only inputs: a write to an input raises."""

    def array(self, x: np.ndarray, dtype: str) -> Any:
        x = super().array(x, dtype).copy()
        x.setflags(write=False)
        return x


class Strict(Library):
    """array-api-strict on a device that is not the default, with nothing beyond the standard."""

    where = "device1"

    def array(self, x: np.ndarray, dtype: str) -> Any:
        xp = pytest.importorskip("array_api_strict")
        return xp.asarray(super().array(x, dtype), device=xp.Device(self.where))

    def host(self, x: Any) -> np.ndarray:
        xp = pytest.importorskip("array_api_strict")
        return np.asarray(xp.asarray(x, device=xp.Device("CPU_DEVICE")))

    def context(self, dtype: str) -> Any:
        xp = pytest.importorskip("array_api_strict")
        return xp.ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False)


class StrictNoFloat64(Strict):
    """array-api-strict on a device without double precision: an accidental float64 raises."""

    dtypes = ("float32",)
    where = "no_float64"


class Torch(Library):
    dtypes = ("float64", "float32", "bfloat16")
    known_dtypes = ("float64", "float32", "float16", "bfloat16")

    def array(self, x: np.ndarray, dtype: str) -> Any:
        torch = pytest.importorskip("torch")
        return torch.from_numpy(x.copy()).to(getattr(torch, self.target(x, dtype)))

    def host(self, x: Any) -> np.ndarray:
        torch = pytest.importorskip("torch")
        x = x.detach()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


class TorchCuda(Torch):
    """PyTorch with tensors on a GPU."""

    def array(self, x: np.ndarray, dtype: str) -> Any:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return super().array(x, dtype).cuda()

    def host(self, x: Any) -> np.ndarray:
        return super().host(x.cpu())


class TorchMeta(Torch):
    """PyTorch with meta tensors, which have no values: shapes and dtypes must not depend on values."""

    dtypes = ("float32",)
    has_values = False

    def array(self, x: np.ndarray, dtype: str) -> Any:
        return super().array(x, dtype).to("meta")


class Jax(Library):
    """JAX under `jit`, where every array is a tracer; double precision is switched on for float64 alone."""

    dtypes = ("float64", "float32", "bfloat16")
    known_dtypes = ("float64", "float32", "float16", "bfloat16")

    def array(self, x: np.ndarray, dtype: str) -> Any:
        jnp = pytest.importorskip("jax.numpy")
        with self.context(dtype):
            return jnp.asarray(x, dtype=self.target(x, dtype))

    @contextlib.contextmanager
    def context(self, dtype: str) -> Iterator[None]:
        jax = pytest.importorskip("jax")
        # float32 is compiled as a user's program is; the rest only half as long
        jax.config.update("jax_disable_most_optimizations", dtype != "float32")
        try:
            with jax.enable_x64(dtype == "float64"):
                yield
        finally:
            jax.config.update("jax_disable_most_optimizations", False)

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        jax = pytest.importorskip("jax")
        return jax.jit(lambda *traced: function(*traced))

    def host(self, x: Any) -> np.ndarray:
        return np.asarray(x.astype("float32") if str(x.dtype) == "bfloat16" else x)


class CuPy(Library):
    def array(self, x: np.ndarray, dtype: str) -> Any:
        cupy = pytest.importorskip("cupy")
        if not cupy.is_available():
            pytest.skip("no CUDA device")
        return cupy.asarray(super().array(x, dtype))

    def host(self, x: Any) -> np.ndarray:
        return x.get()


class Mlx(Library):
    """MLX on the CPU; its float64 has exponentials of float32, so that all is judged as float32."""

    dtypes = ("float32", "bfloat16")

    def array(self, x: np.ndarray, dtype: str) -> Any:
        mx = pytest.importorskip("mlx.core")
        return mx.array(x, dtype=getattr(mx, self.target(x, dtype).replace("bool", "bool_")))

    def host(self, x: Any) -> np.ndarray:
        mx = pytest.importorskip("mlx.core")
        return np.asarray(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)

    def device(self, x: Any) -> None:
        return None


class TensorFlow(Library):
    """TensorFlow, eager."""

    dtypes = ("float64", "float32", "bfloat16")

    def array(self, x: np.ndarray, dtype: str) -> Any:
        tf = pytest.importorskip("tensorflow")
        return tf.cast(tf.convert_to_tensor(x), self.target(x, dtype))

    def host(self, x: Any) -> np.ndarray:
        return x.numpy()

    def dtype_name(self, x: Any) -> str:
        return x.dtype.name


class Paddle(Library):
    """Paddle, eager."""

    dtypes = ("float64", "float32", "bfloat16")

    def array(self, x: np.ndarray, dtype: str) -> Any:
        paddle = pytest.importorskip("paddle")
        return paddle.to_tensor(x.copy()).astype(self.target(x, dtype))

    def host(self, x: Any) -> np.ndarray:
        return (x.astype("float32") if self.dtype_name(x) == "bfloat16" else x).numpy()

    def device(self, x: Any) -> Any:
        return x.place


LIBRARIES = [
    pytest.param(row, id=str(row), marks=[pytest.mark.gpu] if isinstance(row, CuPy) else [])
    for row in (NumPy(), NumPyReadOnly(), Strict(), StrictNoFloat64(), Torch(), TorchMeta(), Jax(), CuPy())
]
# for properties of values, where one row of each library is enough
EAGER = [param for param in LIBRARIES if type(param.values[0]) in (NumPy, Strict, Torch, Jax, CuPy)]


def relative_error(got: np.ndarray, reference: np.ndarray) -> float:
    """max|got − reference| / max|reference|; infinite if shapes differ, or if got has a NaN that reference has not."""
    if got.shape != reference.shape:
        return float("inf")
    if got.size == 0:
        return 0.0
    error = float(np.max(np.abs(got - reference))) / (float(np.max(np.abs(reference))) or 1.0)
    return error if error == error else float("inf")
