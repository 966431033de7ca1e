"""What a library outside the ordinary test environment must show; a test module is a subclass and a few lines.

Every method and scan equals its definition, streams, has PyTorch's gradients, and computes the same under the library's
own transforms; two small models learn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

import subquad
from rows.libraries import Library, relative_error, tolerance
from rows.methods import CASES, METHODS, Case, D, Row, rows
from rows.times import drawn
from subquad.core.beside import namespace_of
from subquad.registry import SCANS

N = 70
OPTIONS: dict[str, dict[str, Any]] = {  # by which short inputs are cut, clustered, projected
    "bigbird": {"block_size": 8},
    "clustered": {"cluster_size": 4, "opened": 2, "chunk": 16, "window": 2},
    "favor": {"num_features": 32},
    "linformer": {"rank": 8},
    "lsh": {"bucket_size": 8, "num_rounds": 2},
    "nystrom": {"num_landmarks": 8},
    "window": {"left": 5},
}
CALLS = [(name, causal) for name, x in subquad.METHODS.items() for causal in (False, True)[: 1 + (x.causal is True)]]
calls = pytest.mark.parametrize(("name", "causal"), CALLS)


def qkv() -> list[np.ndarray]:
    case = Case((3, 4, N, D), (3, 2, N, D), (3, 2, N, 5), mask="heads")
    return [case.draw()[name] for name in ("q", "k", "v", "key_mask")]


def attend(name: str, causal: bool) -> Any:
    return lambda q, k, v, mask: subquad.attention(q, k, v, name, causal=causal, key_mask=mask, **OPTIONS.get(name, {}))


class OtherLibrary:
    """The tests, for one library. A subclass gives the row, the transforms, and what differs in the library's language.

    `transforms` maps names to functions of a function. `value_and_grad(function, args)` gives the value of a function
    of arrays and its gradients by each. `concat(arrays, axis)` joins arrays.
    """

    library: ClassVar[Library]
    transforms: ClassVar[dict[str, Callable[..., Any]]] = {}
    transformed: ClassVar[str | None] = None  # the dtype to transform calls in, if not the first that the library has
    slow_transforms: ClassVar[dict[str, tuple[str, ...]]] = {}  # transform → methods that it takes long for

    def value_and_grad(self, function: Callable[..., Any], args: list[Any]) -> tuple[Any, list[Any]]:
        raise NotImplementedError

    def concat(self, arrays: list[Any], axis: int) -> Any:
        raise NotImplementedError

    def error(self, got: Any, want: np.ndarray) -> float:
        return relative_error(self.library.numpy(got), want)

    @pytest.mark.parametrize("case", ["n=63", "n<n_kv", "grouped"])
    @rows(METHODS)
    def test_methods_equal_their_definitions(self, row: Row, case: str) -> None:
        if not row.fits(CASES[case]):
            pytest.skip("the row has no such shapes")
        library, dtype = self.library, self.library.dtypes[0]
        given, arrays = CASES[case].draw(), row.arrays(CASES[case])
        for causal in row.forms:
            args = [given[name] for name in ("q", "k", "v", "key_mask")]
            out = library.call(row.call(causal=causal), *args, arrays, dtype=dtype)
            rounded, own = library.rounded(given, dtype), library.rounded(arrays, dtype)
            want = row.call(causal=causal)(*(rounded[name] for name in ("q", "k", "v", "key_mask")), own)
            # ridges and pseudo-inverses multiply rounding by their condition numbers
            assert self.error(out, want) <= tolerance(dtype) * (20 if row.method == "nystrom" else 1)

    @pytest.mark.parametrize("name", SCANS)
    def test_scans_equal_their_definitions(self, name: str) -> None:
        row, (arrays, options) = SCANS[name], drawn(name, 63)
        for dtype in self.library.dtypes:
            out = self.library.call(lambda given: row.call(given, options), arrays, dtype=dtype)
            assert self.library.dtype_name(out) == dtype
            expected = row.reference(self.library.rounded(arrays, dtype), options)
            assert self.error(out, expected) <= tolerance(dtype)

    @calls
    def test_half_precision_and_transforms(self, name: str, causal: bool) -> None:
        """Half precision rounds inputs and output alone; a compiled or a vectorised program gives the same numbers."""
        library, call, dtype = self.library, attend(name, causal), self.library.dtypes[0]
        half = library.arrays(qkv(), "bfloat16")
        assert self.error(call(*half), call(*library.rounded(qkv(), "bfloat16"))) <= tolerance("bfloat16")
        dtype = self.transformed or dtype
        args, want = library.arrays(qkv(), dtype), call(*library.rounded(qkv(), dtype))
        for transform, change in self.transforms.items():
            if name not in self.slow_transforms.get(transform, ()):
                assert self.error(change(call)(*args), want) <= tolerance(dtype), transform

    @calls
    def test_gradients_are_those_of_torch(self, name: str, causal: bool) -> None:
        torch = pytest.importorskip("torch")
        *given, mask = qkv()
        call = attend(name, causal)
        tensors = [torch.tensor(x, requires_grad=True) for x in self.library.rounded(given, "float32")]
        (call(*tensors, torch.tensor(mask)) ** 2).sum().backward()
        keep = self.library.array(mask, "float32")
        _, found = self.value_and_grad(
            lambda *args: half_square(call(*args, keep)), self.library.arrays(given, "float32")
        )
        for got, x in zip(found, tensors, strict=True):
            assert self.error(got, x.grad.numpy() / 2) <= 1e-5

    @pytest.mark.parametrize("name", SCANS)
    def test_gradients_of_scans_are_those_of_torch(self, name: str) -> None:
        torch = pytest.importorskip("torch")
        row, (arrays, options) = SCANS[name], drawn(name, 40)
        real = [key for key, x in arrays.items() if x is not None and x.dtype.kind == "f"]
        rounded = self.library.rounded(arrays, "float32")
        tensors = {key: x if x is None else torch.tensor(x) for key, x in rounded.items()}
        for key in real:
            tensors[key].requires_grad_()
        half_square(row.call(tensors, options)).backward()
        given = self.library.arrays(arrays, "float32")

        def loss(*values: Any) -> Any:
            return half_square(row.call({**given, **dict(zip(real, values, strict=True))}, options))

        _, found = self.value_and_grad(loss, [given[key] for key in real])
        for key, got in zip(real, found, strict=True):
            assert self.error(got, tensors[key].grad.numpy()) <= 1e-5, key

    @pytest.mark.parametrize("name", ["clustered", "favor", "linear", "window"])
    def test_steps_are_the_causal_call(self, name: str) -> None:
        *given, _ = qkv()
        dtype = self.library.dtypes[0]
        args, method = self.library.arrays(given, dtype), subquad.METHODS[name](**OPTIONS.get(name, {}))
        state, outs = None, []
        for a, b in ((0, 10), (10, 11), (11, N)):
            out, state = method.step(*(x[..., a:b, :] for x in args), state)
            outs.append(out)
        want = method(*self.library.rounded(given, dtype), causal=True)
        assert self.error(self.concat(outs, -2), want) <= tolerance(dtype)

    @pytest.mark.parametrize("model", ["attention", "mamba"])
    def test_a_model_learns(self, model: str) -> None:
        """A step against the gradient makes the loss smaller, by what the gradient says."""
        rng = np.random.default_rng(0)
        x = self.library.array(rng.standard_normal((2, 20, 8)), "float32")
        if model == "mamba":
            params = subquad.init_mamba(8, like=x)
        else:
            params = {name: self.library.array(rng.standard_normal((8, 8)) / 3, "float32") for name in "qkvo"}

        def loss(*values: Any) -> Any:
            given = dict(zip(params, values, strict=True))
            if model == "mamba":
                return half_square(subquad.mamba(x, given) - x) / 320
            q, k, v = (x @ given[name] for name in "qkv")
            return half_square(subquad.attention(q, k, v, "favor", causal=True) @ given["o"] - x) / 320

        value, slope = self.value_and_grad(loss, list(params.values()))
        rate = 1e-2 / sum(float(2 * half_square(g)) for g in slope)
        after = loss(*(p - rate * g for p, g in zip(params.values(), slope, strict=True)))
        assert float(value) - float(after) == pytest.approx(1e-2, rel=0.2)

    def test_what_does_not_fit_is_named(self) -> None:
        name, numbers = str(self.library), np.zeros((2, 5, 4))
        q = self.library.array(numbers, "float32")
        with pytest.raises(TypeError, match=f"q is an array of {name} but k is an array of numpy"):
            subquad.attention(q, numbers, q, "exact")
        with pytest.raises(TypeError, match=r"q has dtype .*int32.*, expected a real floating dtype"):
            subquad.attention(self.library.array(numbers.astype(np.int32), "float32"), q, q, "exact")


def half_square(x: Any) -> Any:
    """½‖x‖², in the words of any library."""
    return 0.5 * namespace_of(x).sum(x * x)
