"""ONNX: one file of a method or scan for every length, run by ONNX Runtime; few nodes; constants computed at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rows.libraries import relative_error
from rows.other_library import OPTIONS as SHORT
from rows.times import drawn

import subquad
from subquad.registry import SCANS

ndx = pytest.importorskip("ndonnx")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
import subquad_ndonnx  # noqa: E402
from subquad_ndonnx.sizes import Open, Size, tracing  # noqa: E402

TOLERANCE = 1e-5  # of float32
LENGTHS = (21, 37, 1000)
NODES = {  # at most, for 64 rows and for an unknown number
    ("exact", False): (5, 5),
    ("exact", True): (16, 19),
    ("favor", False): (45, 47),
    ("favor", True): (57, 59),
    ("nystrom", False): (40, 59),
}
SCAN_NODES = {"selective_scan": 110, "linear_scan": 30}  # with all options
OPTIONS = {name: options for name, options in SHORT.items() if name != "clustered"} | {"nystrom": {"num_landmarks": 16}}
OPEN = ("exact", "favor", "linear", "linformer", "nystrom", "window")  # that run for unknown lengths
CALLS = [
    (name, causal) for name in OPTIONS.keys() | {"exact", "linear"} for causal in (False, True)
    if not causal or subquad.METHODS[name].causal is True
]  # fmt: skip


def nodes(graph: Any) -> int:
    """The nodes of a graph and of the graphs within it."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return len(graph.node) + sum(map(nodes, inner))


def run(path: Any, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(str(path)).run(None, given)


def attend(name: str, causal: bool) -> Callable[..., Any]:
    def function(q: Any, k: Any, v: Any) -> Any:
        return subquad.attention(q, k, v, name, causal=causal, **OPTIONS.get(name, {}))

    return function


def shapes(n: int | None) -> list[tuple[Any, ...]]:
    return [(2, 4, n, 8), (2, 2, n, 8), (2, 2, n, 5)]  # groups of heads


def arrays(n: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in zip("qkv", shapes(n), strict=True)}


@pytest.mark.parametrize(("name", "causal"), sorted(CALLS))
def test_a_method_as_a_file(name: str, causal: bool, tmp_path: Any) -> None:
    function, path = attend(name, causal), tmp_path / "m.onnx"
    least = subquad_ndonnx.export(function, shapes(None if name in OPEN else 37), path)
    assert least == {"nystrom": {"n": 17}, "linformer": {"n": 9}}.get(name, {})
    for n in LENGTHS if name in OPEN else (37,):
        (out,) = run(path, arrays(n))
        assert relative_error(out, function(**arrays(n))) <= TOLERANCE


@pytest.mark.parametrize(("name", "causal"), NODES)
def test_few_nodes(name: str, causal: bool, tmp_path: Any) -> None:
    """The table of the page on backends."""
    path = tmp_path / "m.onnx"
    for n, most in zip((64, None), NODES[name, causal], strict=True):
        subquad_ndonnx.export(attend(name, causal), 3 * [(2, 4, n, 8)], path)
        assert nodes(onnx.load(path).graph) <= most


@pytest.mark.parametrize("name", [name for name in SCANS if name != "lti_scan"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_as_a_file(name: str, reverse: bool, tmp_path: Any) -> None:
    row, (example, options), path = SCANS[name], drawn(name, 63), tmp_path / "m.onnx"
    keys = [key for key, x in example.items() if x is not None]
    options = {**options, "reverse": reverse, "return_state": True}

    def function(**given: Any) -> Any:
        return row.call({key: given.get(key) for key in example}, options)

    open_shapes = {key: [None if size == 63 else size for size in example[key].shape] for key in keys}
    subquad_ndonnx.export(function, open_shapes, path)
    assert nodes(onnx.load(path).graph) <= SCAN_NODES.get(name, 1000)
    for n in (63, 20, 90):
        given = {key: x.astype("float32") for key, x in drawn(name, n)[0].items() if x is not None}
        right = row.call(given, {**options, "implementation": "generic"})  # which is not compiled first
        for got, want in zip(run(path, given), right, strict=True):
            assert relative_error(got, want) <= TOLERANCE


def test_a_filter_as_a_file(tmp_path: Any) -> None:
    path, rng = tmp_path / "m.onnx", np.random.default_rng(0)

    def function(u: Any, A: Any, B: Any, delta: Any) -> Any:
        return subquad.lti_scan(u, A, B, B, delta=delta)

    subquad_ndonnx.export(function, {"u": (2, None, 4), "A": (4, 3), "B": (4, 3), "delta": (4,)}, path)
    for n in LENGTHS:
        given = {"u": (2, n, 4), "A": (4, 3), "B": (4, 3), "delta": (4,)}
        given = {key: rng.standard_normal(shape).astype("float32") for key, shape in given.items()}
        given |= {"A": -np.abs(given["A"]), "delta": np.abs(given["delta"]) / 4}
        assert relative_error(run(path, given)[0], function(**given)) <= TOLERANCE


def test_masks_two_lengths_and_float64(tmp_path: Any) -> None:
    """NaN in hidden keys, rows that see no key, and queries before the first key, in the file as in NumPy."""

    def function(q: Any, k: Any, v: Any, keep: Any) -> Any:
        return subquad.attention(q, k, v, "exact", causal=True, key_mask=keep)

    path = tmp_path / "m.onnx"
    open_shapes = {"q": (2, None, 8), "k": (2, "n_kv", 8), "v": (2, "n_kv", 8), "keep": (2, "n_kv")}
    dtypes = {"q": "float64", "k": "float64", "v": "float64", "keep": "bool"}
    assert subquad_ndonnx.export(function, open_shapes, path, dtype=dtypes) == {}
    rng = np.random.default_rng(0)
    for n, n_kv in ((5, 9), (9, 5), (7, 7)):
        given = {name: rng.standard_normal((2, n if name == "q" else n_kv, 8)) for name in "qkv"}
        given["keep"] = rng.random((2, n_kv)) < 0.6
        given["v"][0, -1, 0] = given["k"][1, -1] = given["v"][1, 0] = np.nan
        (out,) = run(path, given)
        np.testing.assert_allclose(out, function(**given), rtol=0, atol=1e-15)


def test_states_and_steps(tmp_path: Any) -> None:
    """Outputs have the names of a dict, or numbers."""
    path = tmp_path / "m.onnx"

    def function(u: Any, A: Any, B: Any, state: Any) -> Any:
        y, state = subquad.selective_scan(u, u * u, A, B, B, initial_state=state, return_state=True)
        return {"y": y, "last": state}

    subquad_ndonnx.export(function, {"u": (2, None, 4), "A": (4, 3), "B": (2, None, 3), "state": (2, 4, 3)}, path)
    rng = np.random.default_rng(0)
    given = {"u": (2, 30, 4), "A": (4, 3), "B": (2, 30, 3), "state": (2, 4, 3)}
    given = {name: rng.standard_normal(shape).astype("float32") / 4 for name, shape in given.items()}
    session = ort.InferenceSession(str(path))
    assert [out.name for out in session.get_outputs()] == ["y", "last"]
    for got, want in zip(session.run(None, given), function(**given).values(), strict=True):
        assert relative_error(got, want) <= TOLERANCE


@pytest.mark.parametrize("name", ["favor", "linear"])
def test_steps_over_parts_of_an_unknown_length(name: str, tmp_path: Any) -> None:
    path, method = tmp_path / "m.onnx", subquad.METHODS[name](**OPTIONS.get(name, {}))

    def function(q: Any, k: Any, v: Any) -> Any:
        state, outs = None, []
        for rows in (slice(0, 10), slice(10, 11), slice(11, None)):
            out, state = method.step(*(x[..., rows, :] for x in (q, k, v)), state)
            outs.append(out)
        return outs

    subquad_ndonnx.export(function, shapes(None), path)
    for n in LENGTHS:
        for got, want in zip(run(path, arrays(n)), function(**arrays(n)), strict=True):
            assert relative_error(got, want) <= TOLERANCE


def test_shorter_lengths_than_a_program_serves_are_nan(tmp_path: Any) -> None:
    path = tmp_path / "m.onnx"
    subquad_ndonnx.export(attend("nystrom", False), shapes(None), path)
    assert [np.isnan(run(path, arrays(n))[0]).all() for n in (15, 16, 17)] == [True, True, False]


def test_a_whole_block(tmp_path: Any) -> None:
    path = tmp_path / "m.onnx"
    params = {name: np.asarray(x, np.float32) for name, x in subquad.init_mamba(8, like=np.zeros(1)).items()}

    def function(x: Any) -> Any:
        made = params if isinstance(x, np.ndarray) else {name: ndx.asarray(p) for name, p in params.items()}
        return subquad.mamba(x, made)

    subquad_ndonnx.export(function, {"x": (2, None, 8)}, path)
    for n in (5, 40):
        x = np.random.default_rng(n).standard_normal((2, n, 8)).astype("float32")
        assert relative_error(run(path, {"x": x})[0], function(x)) <= TOLERANCE


@pytest.mark.parametrize(("name", "causal"), [("exact", True), ("linear", False), ("nystrom", False)])
def test_constants_are_computed_at_once(name: str, causal: bool) -> None:
    given = arrays(20, "float64")
    out = attend(name, causal)(**{key: ndx.asarray(x) for key, x in given.items()})
    assert relative_error(out.unwrap_numpy(), attend(name, causal)(**given)) <= 3e-15


def test_what_cannot_be_recorded_is_named(tmp_path: Any) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(NotImplementedError, match=r"unknown.* give (the )?lengths in shapes"):
        subquad_ndonnx.export(attend("lsh", False), shapes(None), path)
    with pytest.raises(NotImplementedError, match=r"ndonnx has no linalg.eigh; take another method"):
        subquad_ndonnx.export(lambda q, k, v: subquad.attention(q, k, v, "clustered", cluster_size=4), shapes(40), path)
    with pytest.raises(NotImplementedError, match=r"ndonnx has no linalg.pinv; take pinv=.iterative"):
        subquad_ndonnx.export(
            lambda q, k, v: subquad.attention(q, k, v, "nystrom", num_landmarks=8, pinv="exact"), shapes(40), path
        )
    with pytest.raises(TypeError, match=r"the function returned a int, expected arrays"):
        subquad_ndonnx.export(lambda q: 3, {"q": (3, 4)}, path)
    with pytest.raises(TypeError, match=r"shape of q has an entry 2\.5, expected a number, a name, or None"):
        subquad_ndonnx.export(lambda q: q, {"q": (2.5, 4)}, path)
    with pytest.raises(ValueError, match=r"shape of q has an entry 0, expected at least 1"):
        subquad_ndonnx.export(lambda q: q, {"q": (0, 4)}, path)
    with pytest.raises(ValueError, match=r"dtype of q is 'complex64', expected one of float32"):
        subquad_ndonnx.export(lambda q: q, {"q": (3, 4)}, path, dtype="complex64")
    with pytest.raises(ValueError, match=r"dtype names \['p'\], but the arguments are \['q'\]"):
        subquad_ndonnx.export(lambda q: q, {"q": (3, 4)}, path, dtype={"p": "bool"})
    with pytest.raises(ValueError, match=r"an output is called 'q', as an argument is"):
        subquad_ndonnx.export(lambda q: {"q": q * q}, {"q": (3, 4)}, path)
    with pytest.raises(ValueError, match=r"shapes has 2 entries, but the function takes the arguments \['q'\]"):
        subquad_ndonnx.export(lambda q: q, [(3, 4), (3, 4)], path)
    assert not path.exists()
    q = ndx.argument(shape=("n", 8), dtype=ndx.float32)
    with pytest.raises(TypeError, match=r"q is an array of ndonnx with an unknown length; .*subquad_ndonnx\.export"):
        subquad.attention(q, q, q, "exact")


def test_sizes_are_numbers_as_far_as_they_are_known() -> None:
    with tracing() as trace:
        n, m = (Size.input(name, lambda: None) for name in ("n", "m"))
        assert n + 4 - n == 4
        assert (2 * n * m) // m == 2 * n
        assert n >= 1
        assert not n < 1
        assert n - 1 >= 0
        assert (3 * n) % 3 == 0
        assert isinstance(n > 20, Open)
        assert isinstance(n == m, Open)
        assert (-(-n // 8)).at({"n": 17}) == 3
        assert not trace.answers
        assert n > 20  # answered for long sequences, and noted
        assert not n // 3 <= 8
        trace.inputs.add("n")
        assert trace.least("n") == 27
        for open_ in (n > m, n % 16 == 0, n - 2 * (n // 3) > 5):  # the last two do not change once
            with pytest.raises(NotImplementedError, match="lengths that are unknown"):
                bool(open_)
