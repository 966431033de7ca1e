"""Rules of imports: no library before its first array, no import against the order of packages, no private name."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from interpreter import python

import subquad

PACKAGE = Path(subquad.__file__).parent
ROOT = PACKAGE.parent
FRAMEWORKS = ("torch", "jax", "jaxlib", "cupy", "numba", "dask", "tensorflow")


def test_import_loads_no_framework_and_starts_no_thread() -> None:
    code = f"""
import sys, threading, subquad
print([name for name in {FRAMEWORKS!r} + ("matplotlib", "rich") if name in sys.modules], threading.active_count(),
      [name for name in sys.modules if name.startswith("subquad_")])
"""
    assert python(code) == "[] 1 []"


def test_import_loads_next_to_nothing() -> None:
    """What `import subquad` adds to NumPy is a number of modules that does not depend on the machine's load."""
    code = """
import sys, numpy
before = set(sys.modules)
import subquad
print(sorted(set(sys.modules) - before))
"""
    assert python(code) == "['subquad']"


def test_every_public_name_has_a_home_and_stays_what_it_is() -> None:
    """Type checkers read the imports, users the table; a module of a function's name does not take its place."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    code = """
import pickle, numpy, subquad.attention.favor, subquad.explain, subquad
import subquad.attention as attention
assert attention is subquad.attention and callable(attention) and callable(subquad.explain)
assert set(subquad.__all__) <= set(dir(subquad))
assert pickle.loads(pickle.dumps(subquad.attention)) is subquad.attention
assert callable(subquad.kernels.nearest)
for name in (*subquad.__all__, "nothing"):
    print(name, subquad.__getattr__(name) is getattr(subquad, name))
"""
    with pytest.raises(AssertionError, match="has no attribute 'nothing'"):
        python(code)
    for name in subquad.__all__:
        assert getattr(importlib.import_module(typed[name]), name) is getattr(subquad, name)


def test_numpy_arrays_load_no_other_framework() -> None:
    """A call on NumPy arrays loads nothing of the other libraries, nor Numba."""
    code = """
import sys, numpy, subquad
q = numpy.ones((2, 5, 4))
for method in subquad.METHODS: subquad.attention(q, q, q, method)
subquad.selective_scan(q, q, -numpy.ones((4, 2)), q[..., :2], q[..., :2])
subquad.linear_scan(q, q)
names = ["torch", "jax", "cupy"]
print([name for name in names + ["numba"] + ["subquad_" + name for name in names] if name in sys.modules])
"""
    assert python(code) == "[]"


@pytest.mark.parametrize("package", ["subquad_numpy", "subquad_torch", "subquad_jax"])
def test_a_backend_does_not_import_llvm(package: str) -> None:
    """It comes with the first call that is compiled."""
    if package != "subquad_numpy":
        pytest.importorskip(package.removeprefix("subquad_"))
    assert python(f"import sys, subquad, {package}; print('llvmlite' in sys.modules)") == "False"


# imports point from later rooms to earlier ones; names of one room may know each other
ROOMS = [
    {"backend", "core", "random"},
    {"kernels"},
    {"chunks"},
    {"registry"},
    {"attention", "scans"},
    {"blocks"},
    {"models"},
    {"explain"},
    {"__init__"},
    {"cli", "__main__", "tasks"},
]


def imported(tree: ast.AST) -> list[str]:
    """Names of all modules that a file imports, also inside functions; relative ones begin with a dot."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def modules(root: Path) -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(root.rglob("*.py"))]


def room_of(name: str) -> int:
    return next(i for i, room in enumerate(ROOMS) if name in room)


def test_imports_point_one_way() -> None:
    for path, tree in modules(PACKAGE):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported(tree):
            parts = name.split(".")
            assert parts[0], f"{path} imports {name}: in this package imports are absolute"
            if parts[0] != "subquad":
                continue
            there = parts[1] if len(parts) > 1 and any(parts[1] in room for room in ROOMS) else "__init__"
            assert room_of(there) <= room_of(here), f"{path} imports {name}"
            if room_of(there) == room_of(here) == ROOMS.index({"attention", "scans"}):
                assert there == here, f"{path} imports {name}: attention and scans do not know each other"


def code_strings(tree: ast.AST) -> list[str]:
    """String constants that are not docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    return [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
    ]


def test_no_framework_is_named_in_the_algorithms() -> None:
    """In `subquad/`: not imported, not asked for by name, not even in a message."""
    for path, tree in modules(PACKAGE):
        for name in imported(tree):
            assert name.split(".")[0] not in FRAMEWORKS, path
        for text in code_strings(tree):
            assert not any(framework in text.lower() for framework in FRAMEWORKS), f"{path}: {text!r}"


INTEGRATIONS = ("transformers", "subquad_xarray")  # which call what users call
ENGINES = ("subquad_numpy", "subquad_cupy")  # whose compiled kernels other libraries share
PUBLISHED = (("subquad_torch", "mamba_ssm"), ("subquad_torch", "causal_conv1d"))  # scans by other packages' names


def test_backends_know_their_own_library_and_the_lower_rooms() -> None:
    """A backend may use the kernels of an engine, and names no other library."""
    if not (ROOT / "backends").is_dir():
        pytest.skip("installed without its source tree")
    others = {"torch", "jax", "cupy"}
    for path, tree in modules(ROOT / "backends"):
        own = path.relative_to(ROOT / "backends").parts[0].removeprefix("subquad_")
        for name in imported(tree):
            first, *rest = name.split(".")
            assert first not in others - {own}, f"{path} imports {name}"
            assert not (first.startswith("subquad_") and first not in (f"subquad_{own}", *ENGINES)), f"{path}: {name}"
            if first == "subquad" and not set(INTEGRATIONS).intersection(path.parts):
                assert rest, f"{path} imports all of subquad"
                rooms = {
                    "backend",
                    "core",
                    "kernels",
                    "chunks",
                    *(["blocks"] if path.name == "mamba_blocks.py" else []),  # modules of blocks
                    *(["scans"] if path.relative_to(ROOT / "backends").parts[:2] in PUBLISHED else []),
                }
                assert rest[0] in rooms, f"{path} imports {name}"


OURS = re.compile(r"^(subquad|subquad_\w+|asv_benchmarks|rows|cuda_shim)$")  # packages, those of the tests too
IN_TEXT = re.compile(
    r"\b(subquad\w*|asv_benchmarks)(?:\.\w+)*\._(?!_)"  # a path to a private name
    r"|\bfrom (subquad\w*|asv_benchmarks)[\w.]* import [^\n]*\b_(?!_)\w"
)


OF_NAMED_TUPLES = ("_fields", "_replace", "_asdict", "_make")  # which are public


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_NAMED_TUPLES


def private_names(tree: ast.Module, own: str) -> list[str]:
    """Private names of other packages of ours: imported, read as attributes of a module, or told in a text of code."""
    modules_by_name, found = {}, []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for alias in node.names:
            name = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            first, *rest = name.split(".")
            if OURS.match(first) and first != own:
                modules_by_name[alias.asname or (alias.name if isinstance(node, ast.ImportFrom) else first)] = name
                found += [name] if any(map(is_private, rest)) else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in modules_by_name:
                found.append(f"{modules_by_name[root.id]} … {node.attr}")
    for text in code_strings(tree):
        found += [match[0] for match in IN_TEXT.finditer(text) if own not in match.groups()]
    return found


def test_no_private_name_crosses_a_package_border() -> None:
    """Also in tests, benchmarks and docs: an underscore says that a name may change without a word to others."""
    found = []
    for folder in ("subquad", "backends", "tests", "asv_benchmarks", "docs"):
        for path, tree in modules(ROOT / folder):
            if path.name == Path(__file__).name:  # whose texts are the examples below
                continue
            own = path.relative_to(ROOT / folder).parts[0] if folder == "backends" else folder
            found += [f"{path.relative_to(ROOT)}: {name}" for name in private_names(tree, own)]
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.rst"))):
        if path.is_file():
            found += [f"{path.relative_to(ROOT)}: {x[0]}" for x in IN_TEXT.finditer(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "from subquad.core import _hidden",
        "import subquad._hidden",
        "from subquad_numpy._hidden import x",
        "import subquad.core.kernel as kernel\nkernel._chosen",
        "from subquad.core import loading\nloading.of._x.y",
        "run('import subquad; subquad.core._x = 1')",
        "run('from subquad_numpy import a, _b')",
    ],
)
def test_a_private_name_is_seen(code: str) -> None:
    assert len(private_names(ast.parse(code), "tests")) == 1
    assert not private_names(ast.parse("from subquad import __main__, attention\nattention.__name__"), "tests")


def test_bounds_have_the_names_of_the_standard() -> None:
    """Of `clip`, in every namespace that has its own, also of libraries that are not installed."""
    found = 0
    for file in (ROOT / "backends").glob("*/array_api.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "clip":
                assert [argument.arg for argument in node.args.args][-2:] == ["min", "max"], file
                found += 1
    assert found >= 4
