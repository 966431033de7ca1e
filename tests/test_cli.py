"""The command line: what `subquad compare` and `subquad info` print, write and refuse."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interpreter import PATIENCE

import subquad
from subquad.cli import cases, compare, definitions, libraries, main, measure
from subquad.cli.inputs import read_npz, read_sample
from subquad.core import loading
from subquad.registry import METHODS, SCANS

FAST = ["--backends", "numpy", "--n", "16,40", "--repeat", "2"]


@pytest.fixture
def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Four query heads over two key heads, 48 tokens, d_v ≠ d."""
    shapes = {"q": (4, 48, 8), "k": (2, 48, 8), "v": (2, 48, 6)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def file(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """The arrays as users bring them."""
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    return path


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text(encoding="utf-8"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a wrong request; return its message, which is one line on stderr."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


def test_compare_writes_every_method_and_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *FAST, "--out", str(tmp_path / "new" / "folder")]) == 0
    facts = report(tmp_path / "new" / "folder")
    rows = facts["results"]
    names = ["exact", "auto", "bigbird 16", "bigbird 64", "window 64", "window 256", "clustered 4", "clustered 16",
             "favor 64", "favor 256", "linear", "linformer 64", "linformer 256", "lsh 1", "lsh 4", "nystrom 32",
             "nystrom 64", *SCANS]  # fmt: skip
    assert [(row["n"], row["label"]) for row in rows] == [(n, name) for n in (16, 40) for name in names]
    assert facts["complete"] is True
    assert facts["inputs"]["shapes"] == {"q": [3, 1024, 64], "k": [1, 1024, 64], "v": [1, 1024, 64]}
    assert {"subquad", "python", "numpy"} <= facts["versions"].keys()
    assert set(facts["units"]) == {"n", "error", "time", "times", "extra_memory"}
    for row in rows:
        assert row["failure"] is None
        assert row["implementation"]
        assert len(row["times"]) == 2
        assert row["time"] == pytest.approx(np.median(row["times"]))
        assert row["extra_memory"] >= 0
    shown = capsys.readouterr().out
    for word in ("n = 16", "n = 40", "selective_scan", "favor 256", "numpy", "ms", "MB", "compare.png"):
        assert word in shown


def test_errors_are_those_of_the_method(tmp_path: Path) -> None:
    """Exact attention and the scan are right to rounding; landmarks for every token are exact; few are not."""
    methods = "exact,nystrom:num_landmarks=40,nystrom:num_landmarks=2,linear_scan,selective_scan"
    assert main(["compare", *FAST, "--methods", methods, "--out", str(tmp_path)]) == 0
    error = {row["label"]: row["error"] for row in report(tmp_path)["results"] if row["n"] == 40}
    assert error["exact"] < 2e-6
    assert error["nystrom 40"] < 2e-6
    assert error["selective_scan"] < 2e-6
    assert error["linear_scan"] < 2e-6
    assert error["nystrom 2"] > 0.05


def test_mean_of_v_is_the_yardstick(tmp_path: Path, file: Path, arrays: dict[str, np.ndarray]) -> None:
    """With q = 0 exact attention is the mean of the visible values: the yardstick's error is 0."""
    np.savez(file, **(arrays | {"q": np.zeros_like(arrays["q"])}))
    for flags in ([], ["--causal"]):
        assert main(["compare", str(file), *FAST, "--methods", "exact", "--out", str(tmp_path), *flags]) == 0
        assert all(entry["error"] < 1e-12 for entry in report(tmp_path)["error_of_mean_of_v"])


def test_picture_is_a_picture(tmp_path: Path) -> None:
    """Pixels of several colours, in the size that three panels need."""
    assert main(["compare", *FAST, "--out", str(tmp_path)]) == 0
    data = (tmp_path / "compare.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", data[16:24])
    assert min(width, height) > 600
    from matplotlib.image import imread

    pixels = imread(tmp_path / "compare.png")[..., :3]
    assert len(np.unique((pixels * 255).astype(int).reshape(-1, 3), axis=0)) > 20


def test_no_two_methods_look_alike() -> None:
    from subquad.cli.plot import colour_of, fill_of

    names = [*METHODS, *SCANS]
    assert len({(colour_of(name), fill_of(name)) for name in names}) == len(names)


@pytest.mark.parametrize("method", ["exact", "favor:num_features=8"])
def test_picture_without_one_of_its_axes(tmp_path: Path, method: str) -> None:
    """Only exact methods, or only approximations."""
    assert main(["compare", *FAST, "--methods", method, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_every_library_gives_the_same_error(tmp_path: Path, file: Path) -> None:
    """Same seed, same numbers: errors of approximations agree between libraries to rounding."""
    usable = [name for name, library in libraries.find().items() if library.reason is None]
    argv = ["compare", str(file), "--n", "48", "--repeat", "1", "--methods", "favor:num_features=16,exact"]
    assert main([*argv, "--backends", ",".join(usable), "--out", str(tmp_path)]) == 0
    rows = report(tmp_path)["results"]
    assert [row["backend"] for row in rows] == [name for name in usable for _ in range(2)]
    errors = [row["error"] for row in rows if row["method"] == "favor"]
    assert errors == pytest.approx([errors[0]] * len(errors), rel=1e-4)


def test_causal_leaves_out_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *FAST, "--causal", "--out", str(tmp_path)]) == 0
    facts = report(tmp_path)
    methods = {"exact", "auto", "bigbird", "clustered", "favor", "linear", "lsh", "window", *SCANS}
    assert {row["method"] for row in facts["results"]} == methods
    assert any(note.startswith("nystrom 32, nystrom 64 left out: ") for note in facts["notes"])
    assert max(row["error"] for row in facts["results"] if row["method"] == "exact") < 2e-6
    assert "left out" in capsys.readouterr().out
    message = refused(capsys, "compare", *FAST, "--causal", "--methods", "nystrom", "--out", str(tmp_path))
    assert "'nystrom' with --causal" in message


def test_options_aliases_and_seed_reach_the_method(tmp_path: Path, file: Path) -> None:
    methods = "performer:num_features=16:seed=3,favor:num_features=16,favor:num_features=16:projection='iid'"
    argv = ["compare", str(file), *FAST, "--methods", methods, "--out", str(tmp_path)]
    assert main(argv) == 0
    rows = [row for row in report(tmp_path)["results"] if row["n"] == 40]
    assert [row["label"] for row in rows] == ["favor 16 seed=3", "favor 16", "favor 16 projection=iid"]
    assert len({row["error"] for row in rows}) == 3
    assert main([*argv, "--seed", "3"]) == 0
    again = [row for row in report(tmp_path)["results"] if row["n"] == 40]
    assert again[0]["error"] == again[1]["error"] == rows[0]["error"]


def test_a_choice_is_made_before_the_calls_that_are_measured(file: Path) -> None:
    """A compiled call has no values to choose by."""
    pytest.importorskip("jax")
    inputs = read_npz(file)
    options = {"ladder": (subquad.Window(left=2), subquad.Window(left=20)), "crossover": 1, "tolerance": 9.0}
    case = cases.find_case("auto", options, causal=True)
    problem, target = case.real(inputs), libraries.targets("jax")[0][0]
    found = measure.measure(case, target, inputs.n, problem, case.reference(problem), 1)
    assert found.failure is None
    assert 0.01 < found.error < 9


def test_interrupt_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = []

    def measured(*args: Any) -> Any:
        if len(finished) == 3:
            raise KeyboardInterrupt
        finished.append(original(*args))
        return finished[-1]

    original = compare.measure
    monkeypatch.setattr(compare, "measure", measured)
    assert main(["compare", *FAST, "--out", str(tmp_path)]) == 130
    facts = report(tmp_path)
    assert facts["complete"] is False
    assert [row["label"] for row in facts["results"]] == ["exact", "auto", "bigbird 16"]
    assert "interrupted" in capsys.readouterr().out


def test_one_broken_method_costs_only_its_own_row(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """omega of the wrong width is only seen with the data; the others are measured, and the exit code tells."""
    methods = "exact,favor:omega=3"
    code = main(["compare", str(file), *FAST, "--methods", methods, "--out", str(tmp_path)])
    if code == 2:  # refused at once, which is as good
        assert "omega" in capsys.readouterr().err
        return
    assert code == 1
    failures = {row["label"]: row["failure"] for row in report(tmp_path)["results"]}
    assert failures["exact"] is None
    assert failures["favor omega=3"]
    assert "favor omega=3 failed on numpy, n = 16" in " ".join(capsys.readouterr().out.split())


def test_causal_question_leaves_other_faults_to_the_measurement(tmp_path: Path, file: Path) -> None:
    """It is asked on NumPy: what is wrong there may be right elsewhere, and becomes a row where it is wrong."""
    pytest.importorskip("torch")
    methods = "exact:implementation=sdpa,exact:implementation=foo,favor:omega=5"
    argv = ["compare", str(file), "--n", "16", "--repeat", "1", "--methods", methods, "--out", str(tmp_path)]
    for flags in ([], ["--causal"]):
        assert main([*argv, "--backends", "torch,numpy", *flags]) == 1
        failures = [(row["backend"], row["label"], row["failure"]) for row in report(tmp_path)["results"]]
        assert failures[0] == ("torch", "exact implementation=sdpa", None)
        assert [bool(failure) for *_, failure in failures[1:]] == [True] * 5
        assert "implementation is 'foo'" in failures[1][2]
        assert "omega is a int" in failures[2][2]


def test_sample_is_small_real_and_grouped() -> None:
    sample = read_sample()
    assert (sample.q.shape, sample.k.shape) == ((3, 1024, 64), (1, 1024, 64))
    packaged = Path(sys.modules["subquad"].__path__[0]) / "data" / "sample.npz"
    assert packaged.stat().st_size <= 700_000
    assert "Apache" in (packaged.parent / "README.md").read_text(encoding="utf-8")
    keys_as_values = np.eye(1024)[None]
    weights = definitions.attention(sample.q, sample.k, keys_as_values, causal=False)
    assert (weights.mean(axis=-2).argmax(axis=-1) == 0).all()  # the sink that README.md speaks of


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_are_read_as_float32(tmp_path: Path, arrays: dict[str, np.ndarray], dtype: str) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **{name: x.astype(dtype) for name, x in arrays.items()})
    inputs = read_npz(path)
    assert {x.dtype.name for x in (inputs.q, inputs.k, inputs.v)} == {"float32"}
    np.testing.assert_array_equal(inputs.q, arrays["q"].astype(dtype).astype(np.float32))


def test_two_axes_are_one_head(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **{name: x[0] for name, x in arrays.items()})
    methods = "exact,selective_scan"
    assert main(["compare", str(path), *FAST, "--methods", methods, "--out", str(tmp_path)]) == 0
    assert all(row["error"] < 2e-6 for row in report(tmp_path)["results"])


Edit = Callable[[dict[str, np.ndarray]], dict[str, Any]]
BAD_ARRAYS: list[tuple[str, Edit, list[str]]] = [
    ("no-k", lambda a: {"q": a["q"], "w": a["k"]}, ["has no k, v", "it holds q, w", "numpy.savez"]),
    ("int", lambda a: a | {"k": a["k"].astype(int)}, ["k is int64", "float32", "k.astype('float32')"]),
    ("object", lambda a: a | {"q": np.array([None, {}])}, ["q cannot be read"]),
    ("nan", lambda a: a | {"v": np.where(a["v"] > 2, np.nan, a["v"])}, ["v holds", "NaN or infinite"]),
    ("overflow", lambda a: a | {"v": a["v"].astype(float) * 1e300}, ["v holds", "NaN or infinite in float32"]),
    ("1-d", lambda a: {name: x[0, 0] for name, x in a.items()}, ["q is (8,)", "at least two"]),
    ("axes", lambda a: a | {"q": a["q"][None]}, ["q is (1, 4, 48, 8)", "same number of axes"]),
    ("d", lambda a: a | {"k": a["k"][..., :5]}, ["k is (2, 48, 5)", "differ in d, 8 and 5"]),
    ("n", lambda a: a | {"k": a["k"][:, :5]}, ["k is (2, 5, 8)", "numbers of tokens n differ"]),
    ("heads", lambda a: a | {"q": a["q"][:3]}, ["2 key heads cannot be shared equally by 3 heads"]),
    ("v-heads", lambda a: a | {"v": a["v"][:1]}, ["k and v differ in their heads"]),
    ("empty", lambda a: {name: x[:, :0] for name, x in a.items()}, ["no axis may be empty"]),
]


@pytest.mark.parametrize(("edit", "words"), [case[1:] for case in BAD_ARRAYS], ids=[case[0] for case in BAD_ARRAYS])
def test_file_of_wrong_arrays(
    file: Path, arrays: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str], edit: Edit, words: list[str]
) -> None:
    np.savez(file, **edit(arrays))
    message = refused(capsys, "compare", str(file))
    for word in ["mine.npz", *words]:
        assert word in message


def test_file_that_cannot_be_read(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.npz"
    text.write_text("q k v")
    single = tmp_path / "single.npy"
    np.save(single, np.zeros(3))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(file.read_bytes()[:-200])
    spoilt = tmp_path / "spoilt.npz"
    data = bytearray(file.read_bytes())
    data[400] ^= 0xFF
    spoilt.write_bytes(bytes(data))
    for path, word in [
        (tmp_path / "absent.npz", "there is no such file"),
        (tmp_path, "is a directory"),
        (text, "is not an .npz file"),
        (single, "is not an .npz file"),
        (cut, "is not an .npz file"),
        (spoilt, "q cannot be read"),
    ]:
        message = refused(capsys, "compare", str(path))
        assert str(path) in message
        assert word in message


BAD_ARGUMENTS = [
    (["--methods", "favour"], ["no method is called 'favour'", "did you mean 'favor'"]),
    (["--methods", "zzz"], ["no method is called 'zzz'", "Known: ", "selective_scan"]),
    (["--methods", "favor:num_feature=8"], ["has no option 'num_feature'", "'num_features'"]),
    (["--methods", "favor:64"], ["'64' is no option", "name=value"]),
    (["--methods", "favor:num_features=8,seed=3"], ["'seed=3'", "joined to their method by colons"]),
    (["--methods", "favor:num_features=0"], ["favor:num_features=0", "num_features"]),
    (["--methods", "favor:num_features=many"], ["favor:num_features=many", "num_features"]),
    (["--methods", "selective_scan:d_state=3"], ["selective_scan takes no options here"]),
    (["--backends", "nunpy"], ["no backend is called 'nunpy'", "did you mean 'numpy'"]),
    (["--backends", "numpy:cuda:7"], ["numpy has no device 'cuda:7' here; it has cpu"]),
    (["--n", "1025"], ["--n holds 1025", "has 1024 tokens"]),
    (["--n", "0,5"], ["--n holds 0", "at least 1"]),
    (["--n", "many"], ["--n is 'many'", "whole numbers"]),
    (["--repeat", "0"], ["--repeat is 0"]),
    (["--seed", "-1"], ["--seed is -1"]),
]


@pytest.mark.parametrize(("argv", "words"), BAD_ARGUMENTS, ids=[" ".join(case[0]) for case in BAD_ARGUMENTS])
def test_wrong_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    message = refused(capsys, "compare", *argv, "--out", str(tmp_path / "out"))
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "compare", *FAST, "--out", str(file))
    assert f"--out {file}: cannot be made a folder" in message


@pytest.mark.parametrize("argv", [[], ["compar"], ["compare", "--metods", "favor"]], ids=" ".join)
def test_wrong_command_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(argv)
    assert leave.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_table_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import subquad.cli

    for module in ("table", "plot"):
        monkeypatch.delitem(sys.modules, f"subquad.cli.{module}", raising=False)
        monkeypatch.delattr(subquad.cli, module, raising=False)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert 'rich, which is not installed: pip install "subquad[cli]"' in refused(capsys, "compare", *FAST)


def test_warmup_compiles_what_operators_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    names = ["linear_scan", "linear", "linear_scan"]
    request = [
        sys.executable,
        "-m",
        "subquad",
        "warmup",
        "--method",
        *names,
        "--dtype",
        "float64",
        "--backends",
        "numpy",
    ]
    done = subprocess.run(request, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert "3 calls are compiled" in done.stdout  # linear attention, causal too, and the scan once
    kept = {path.name.partition(".")[0] for path in tmp_path.rglob("*.o")}
    kernels = ("linear_scan", "whole", "summarize", "attend", "step")  # for short and for long calls
    expected = {f"{name}_float64{'' if name == 'linear_scan' else '_elu'}" for name in kernels}
    assert expected <= kept or not has_compiler()


def test_warmup_without_a_compiler_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And counts no call as compiled."""
    monkeypatch.setattr("subquad_numpy.bench.why_not_compiled", lambda: "there is none")
    assert main(["warmup", "--method", "linear", "--backends", "numpy"]) == 0
    told = capsys.readouterr().out
    assert "numpy: nothing is compiled for the CPU, since there is none" in told
    assert "0 calls are compiled" in told


def test_warmup_of_what_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no method is called 'favour'" in refused(capsys, "warmup", "--method", "favour", "--backends", "numpy")


def has_compiler() -> bool:
    return importlib.util.find_spec("llvmlite") is not None


def test_info_lists_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert f"NumPy {np.__version__}" in shown
    for name in loading.names():
        assert f"\n{name}" in shown


def test_info_and_compare_survive_broken_backends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A backend that raises, one whose library is missing, one without its bench module, and the default run."""
    for name, text in {
        "raising": "raise RuntimeError('half\\ninstalled')",
        "lacking": "import a_library_that_nobody_has",
        "benchless": "from subquad.backend import Backend\n\nBACKEND = Backend()",
    }.items():
        package = tmp_path / f"subquad_{name}"
        package.mkdir()
        (package / "__init__.py").write_text(text + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = {name: f"subquad_{name}" for name in ("raising", "lacking", "benchless", "numpy")}
    monkeypatch.setattr(loading, "names", lambda: names)
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "fails when imported: RuntimeError: half installed" in shown
    assert "a_library_that_nobody_has is not installed" in shown
    assert "no module subquad_benchless.bench" in shown
    assert "usable" in shown
    assert main(["compare", "--n", "16", "--methods", "exact", "--out", str(tmp_path)]) == 0
    assert [row["backend"] for row in report(tmp_path)["results"]] == ["numpy"]
    assert "raising left out" in " ".join(capsys.readouterr().out.split())
    assert "raising cannot be used" in refused(capsys, "compare", "--backends", "raising")


def test_python_m_runs_the_command(tmp_path: Path) -> None:
    """In a process of its own, from elsewhere, with nothing imported before."""
    argv = [sys.executable, "-m", "subquad", "compare", *FAST, "--methods", "exact"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False, env=env, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert report(tmp_path)["results"][0]["error"] < 2e-6
    assert "n = 40" in done.stdout
