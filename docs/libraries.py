"""Run every method and scan on arrays of other libraries, and write what comes out to docs/libraries.json.

    python docs/libraries.py marray mparray     # or all that are installed, without a name

Each library is run where it is installed; the rows of others stay as they are in the file. Numbers are compared with
those of NumPy in float64, of the same inputs. A mask of keys is given in every call, and a causal call is made wherever
a method has one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import subquad
from subquad.registry import SCANS

FILE = Path(__file__).with_suffix(".json")
sys.path.append(str(FILE.parents[1] / "tests"))

from rows.libraries import relative_error  # noqa: E402
from rows.other_library import OPTIONS  # noqa: E402
from rows.times import drawn  # noqa: E402

N = 21
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A library: how an array of NumPy becomes one of it, and back; in which dtype it computes, to which error.

    Without `run`, a function is called on such arrays. `given` changes the inputs, where it cannot hold all of them.
    """

    module: str
    make: Callable[[Any, np.ndarray], Any]
    read: Callable[[Any, Any], Any] = lambda _, x: np.asarray(x)
    run: Callable[[Callable[[Arrays], Any], Arrays], Any] = lambda call, arrays: call(arrays)
    given: Callable[[np.ndarray], np.ndarray] = lambda x: x
    dtype: str = "float64"
    tolerance: float = 3e-15
    package: str = ""  # its name among distributions, if another one
    note: str = ""


def floats(x: np.ndarray, real: Any, other: Any) -> np.ndarray:
    """Numbers in another precision; integers and bool stay."""
    return x.astype(real if x.dtype.kind == "f" else other) if x.dtype.kind in "fc" else x


def single(x: np.ndarray) -> np.ndarray:
    return floats(x, np.float32, np.complex64)


def of_units(package: str) -> Callable[[Any, np.ndarray], Any]:
    def make(module: Any, x: np.ndarray) -> Any:
        if x.dtype.kind != "f":
            return x
        return {"pint": lambda: module.Quantity(x, ""), "astropy": lambda: x << module.dimensionless_unscaled,
                "unyt": lambda: module.unyt_array(x, "")}[package]()  # fmt: skip

    return make


def of_mpmath(_: Any, x: Any) -> np.ndarray:
    kind = complex if "complex" in str(x.dtype) else float
    return np.reshape([kind(x[i]) for i in np.ndindex(x.shape)], x.shape)


def recorded(length: int | None) -> Callable[[Callable[[Arrays], Any], Arrays], Any]:
    """Outputs of a file of ONNX, recorded at this length of the sequence, or at an unknown one."""

    def run(call: Callable[[Arrays], Any], arrays: Arrays) -> Any:
        import onnxruntime

        import subquad_ndonnx

        given = {name: x for name, x in arrays.items() if x is not None}
        shapes = {name: tuple(length if size == N else size for size in x.shape) for name, x in given.items()}
        dtypes = {name: x.dtype.name for name, x in given.items()}
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "function.onnx")
            subquad_ndonnx.export(lambda **x: call({n: x.get(n) for n in arrays}), shapes, path, dtype=dtypes)
            return onnxruntime.InferenceSession(path).run(None, given)

    return run


@cache
def masked(module: Any) -> Any:
    """The one namespace of masked arrays of NumPy."""
    return module.masked_namespace(np)


ROWS: dict[str, Row] = {
    "numpy": Row("numpy", lambda _, x: x),
    "longdouble": Row("numpy", lambda np, x: floats(x, np.longdouble, np.clongdouble), package="numpy",
                      note="NumPy's long double, computed in it"),
    "ml_dtypes": Row("ml_dtypes", lambda m, x: floats(x, m.bfloat16, np.complex64), dtype="bfloat16", tolerance=2e-2,
                     note="bfloat16 in arrays of NumPy, computed in float32"),
    "torch": Row("torch", lambda m, x: m.from_numpy(x.copy())),
    "jax": Row("jax", lambda m, x: m.numpy.asarray(x)),
    "mlx": Row("mlx.core", lambda m, x: m.array(single(x)), dtype="float32", tolerance=1e-6),
    "tensorflow": Row("tensorflow", lambda m, x: m.convert_to_tensor(x), package="tensorflow-cpu"),
    "paddle": Row("paddle", lambda m, x: m.to_tensor(x.copy()), package="paddlepaddle"),
    "ndonnx": Row("ndonnx", lambda m, x: m.asarray(x), lambda _, x: x.unwrap_numpy(), given=np.real,
                  note="arrays with values; ONNX has no complex numbers, so that lti_scan is given real ones"),
    "ndonnx, traced": Row("ndonnx", lambda _, x: x, run=recorded(N), given=np.real,
                          note="a file that `export` writes, in ONNX Runtime"),
    "ndonnx, any n": Row("ndonnx", lambda _, x: x, run=recorded(None), given=np.real,
                         note="a file for sequences of any length, in ONNX Runtime"),
    "dask": Row("dask.array", lambda m, x: m.from_array(x, chunks=tuple(10 if n == N else n for n in x.shape)),
                note="in chunks of 10 along the sequence"),
    "cubed": Row("cubed", lambda m, x: m.from_array(x, chunks=tuple(10 if n == N else n for n in x.shape)),
                 note="in chunks of 10 along the sequence"),
    "array_api_strict": Row("array_api_strict", lambda m, x: m.asarray(x), package="array-api-strict"),
    "marray": Row("marray", lambda m, x: masked(m).asarray(x), lambda _, x: np.asarray(x.data),
                  note="nothing masked"),
    "mparray": Row("mparray", lambda m, x: m.asarray(x), of_mpmath,
                   note="53 bits"),
    "pint": Row("pint", of_units("pint"), lambda _, x: x.magnitude, package="Pint"),
    "astropy": Row("astropy.units", of_units("astropy"), lambda _, x: x.value, package="astropy"),
    "unyt": Row("unyt", of_units("unyt"), lambda _, x: x.value),
}  # fmt: skip


def inputs() -> Arrays:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, N, 4))
    return {"q": q, "k": k, "v": v, "key_mask": rng.random((2, N)) < 0.8}


def calls() -> dict[str, tuple[Arrays, Callable[[Arrays], list[Any]]]]:
    """Function → (its arrays, a call that returns the outputs to compare)."""

    def attend(name: str) -> Callable[[Arrays], list[Any]]:
        def call(x: Arrays) -> list[Any]:
            method = subquad.METHODS[name](**OPTIONS.get(name, {}))
            forms = (False, True) if method.causal is True else (False,)
            return [method(x["q"], x["k"], x["v"], key_mask=x["key_mask"], causal=causal) for causal in forms]

        return call

    def stream(name: str) -> Callable[[Arrays], list[Any]]:
        def call(x: Arrays) -> list[Any]:
            method, state, outs = subquad.METHODS[name](**OPTIONS.get(name, {})), None, []
            for rows in (slice(0, 10), slice(10, 11), slice(11, N)):
                out, state = method.step(*(x[key][..., rows, :] for key in "qkv"), state)
                outs.append(out)
            return outs

        return call

    found = {name: (inputs(), attend(name)) for name in subquad.METHODS}
    found |= {f"{name}, in steps": (inputs(), stream(name)) for name in ("favor", "linear")}
    for name, row in SCANS.items():
        arrays, options = drawn(name, N)
        found[name] = arrays, lambda x, row=row, options=options: [row.call(x, options)]
    return found


def run(row: Row) -> dict[str, Any]:
    """What each function does: {"error": …} or {"raises": …}."""
    module = importlib.import_module(row.module)
    found: dict[str, Any] = {}
    for name, (drawn_arrays, call) in calls().items():
        arrays = {key: x if x is None else row.given(x) for key, x in drawn_arrays.items()}
        rounded = {key: x if x is None else as_read(row, module, x) for key, x in arrays.items()}
        want = call(rounded)
        try:
            got = row.run(call, {key: x if x is None else row.make(module, x) for key, x in arrays.items()})
            read = [np.asarray(row.read(module, x)).astype(y.dtype) for x, y in zip(got, want, strict=True)]
            errors = [relative_error(x, y) for x, y in zip(read, want, strict=True)]
            found[name] = {"error": float(f"{max(errors):.1e}")}
        except Exception as error:
            found[name] = {"raises": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(f"{row.module:16} {name:24} {found[name]}", flush=True)
    return found


def as_read(row: Row, module: Any, x: np.ndarray) -> np.ndarray:
    """The numbers that an array of the library holds, in double precision."""
    if row.dtype == "float64":
        return x
    made = row.make(module, x)
    if x.dtype.kind not in "fc":
        return x
    return np.asarray(np.asarray(made), dtype=np.float64 if x.dtype.kind == "f" else np.complex128)


def version(row: Row) -> str:
    return importlib.metadata.version(row.package or row.module.partition(".")[0])


def main(names: list[str]) -> None:
    added: dict[str, Any] = {}
    for name in names or ROWS:
        row = ROWS[name]
        try:
            found = version(row)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed")
            continue
        if name == "jax":
            importlib.import_module("jax").config.update("jax_enable_x64", True)
        added[name] = {"version": found, "dtype": row.dtype, "tolerance": row.tolerance, "note": row.note,
                         "functions": run(row)}  # fmt: skip
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    content |= added
    ordered: Mapping[str, Any] = {name: content[name] for name in ROWS if name in content}
    FILE.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
