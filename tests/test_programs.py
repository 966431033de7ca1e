"""Recorded programs: of any length and mixed precision, saved, lazy, differentiated; and the memory that they need."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from interpreter import python
from rows.libraries import relative_error

import subquad


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", ["exact", "favor", "linear", "nystrom"])
def test_mixed_precision_compiles_in_silence(method: str, causal: bool) -> None:
    torch = pytest.importorskip("torch")
    if causal and method == "nystrom":
        pytest.skip("not causal")
    q, v = torch.rand(2, 70, 8).bfloat16(), torch.rand(2, 70, 8)
    options = {"num_landmarks": 8} if method == "nystrom" else {}

    def attend(q: Any, v: Any) -> Any:
        return subquad.attention(q, q, v, method, causal=causal, **options)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        got = torch.compile(attend, fullgraph=True, backend="eager")(q, v)
    assert got.dtype == attend(q, v).dtype == torch.float32
    assert torch.allclose(got, attend(q, v), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "causal"),
    [(subquad.Window(left=30), True), (subquad.BigBird(block_size=20), True), (subquad.BigBird(block_size=20), False),
     (subquad.LSH(bucket_size=20, num_rounds=2), True), (subquad.Linformer(rank=20), False)], ids=str,
)  # fmt: skip
def test_sparse_methods_compile_whole(method: subquad.Method, causal: bool) -> None:
    """In one graph, with gradients, and once more for another length; the numbers are those of the eager call."""
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: method(q, k, v, causal=causal), fullgraph=True, backend="aot_eager")
    for n in (200, 140):
        given = [torch.tensor(x) for x in np.random.default_rng(n).standard_normal((3, 2, n, 8))]
        found = []
        for function in (method, compiled):
            leaves = [x.clone().requires_grad_() for x in given]
            out = function(*leaves, causal=causal) if function is method else function(*leaves)
            out.square().sum().backward()
            found.append([out.detach(), *(x.grad for x in leaves)])
        for got, expected in zip(*found, strict=True):
            assert relative_error(got.numpy(), expected.numpy()) < 1e-12


def test_scans_of_mixed_precision_compile_in_silence() -> None:
    torch = pytest.importorskip("torch")
    u, B, A = torch.rand(2, 40, 3).bfloat16(), torch.rand(2, 40, 2).bfloat16(), -torch.rand(3, 2)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        y = torch.compile(lambda u, B: subquad.selective_scan(u, u, A, B, B), fullgraph=True, backend="eager")(u, B)
        h = torch.compile(lambda a: subquad.linear_scan(a, a.float()), fullgraph=True, backend="eager")(u)
    assert torch.equal(y, subquad.selective_scan(u, u, A, B, B))
    assert torch.equal(h, subquad.linear_scan(u, u.float()))


DYNAMIC = {
    "exact": ("exact", {}), "exact causal": ("exact", {"causal": True}),
    "generic": ("exact", {"implementation": "generic"}),
    "generic causal": ("exact", {"implementation": "generic", "causal": True}),
    "favor": ("favor", {}), "favor causal": ("favor", {"causal": True}),
    "relu causal": ("favor", {"causal": True, "features": "relu", "num_features": 8}),
    "linear": ("linear", {}), "linear causal": ("linear", {"causal": True}),
    "linformer": ("linformer", {"rank": 16}),
    "nystrom": ("nystrom", {"num_landmarks": 16}),
    "kmeans": ("nystrom", {"num_landmarks": 16, "landmarks": "kmeans", "pinv": "ridge"}),
    "ridge-fit": ("nystrom", {"num_landmarks": 16, "landmarks": "kmeans", "pinv": "ridge-fit"}),
    "uniform": ("nystrom", {"num_landmarks": 16, "landmarks": "uniform", "pinv": "ridge"}),
}  # fmt: skip


@pytest.mark.parametrize("name", DYNAMIC)
def test_one_exported_program_serves_every_length(name: str) -> None:
    torch = pytest.importorskip("torch")
    method, options = DYNAMIC[name]

    class Module(torch.nn.Module):
        def forward(self, q: Any) -> Any:
            return subquad.attention(q, q, q, method, **options)

    length = torch.export.Dim("length", min=20, max=4096)
    program = torch.export.export(Module(), (torch.rand(2, 100, 8),), dynamic_shapes={"q": {1: length}}).module()
    for n in (20, 100, 144, 700):
        x = torch.rand(2, n, 8)
        assert torch.allclose(program(x), Module()(x), atol=1e-5)


@pytest.mark.parametrize("method", ["exact", "favor", "linear", "nystrom"])
def test_symbolic_sizes_are_recorded(method: str) -> None:
    torch = pytest.importorskip("torch")
    from torch.fx.experimental.proxy_tensor import make_fx

    options = {"num_landmarks": 16} if method == "nystrom" else {}

    def attend(q: Any) -> Any:
        return subquad.attention(q, q, q, method, **options)

    program = make_fx(attend, tracing_mode="symbolic")(torch.rand(2, 100, 8))
    x = torch.rand(2, 180, 8)
    assert torch.allclose(program(x), attend(x), atol=1e-5)


def test_nystrom_compiles_once_more_for_other_lengths() -> None:
    torch = pytest.importorskip("torch")

    def attend(q: Any) -> Any:
        return subquad.attention(q, q, q, "nystrom", num_landmarks=16)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for n in (100, 140, 160, 333):
        x = torch.rand(2, n, 8)
        assert torch.allclose(compiled(x), attend(x), atol=1e-5)
    torch._dynamo.reset()


def test_a_saved_program_loads_in_a_fresh_process(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")

    class Module(torch.nn.Module):
        def forward(self, u: Any) -> Any:
            scanned = subquad.selective_scan(u, u, -torch.ones(8, 2), u[..., :2], u[..., :2])
            return subquad.attention(scanned, u, u, "favor", causal=True)

    torch.manual_seed(0)
    x = torch.rand(2, 50, 8)
    torch.export.save(torch.export.export(Module(), (x,)), tmp_path / "saved.pt2")
    torch.save((x, Module()(x)), tmp_path / "values.pt")
    code = f"""
        import torch, subquad
        x, right = torch.load({str(tmp_path / "values.pt")!r})
        program = torch.export.load({str(tmp_path / "saved.pt2")!r}).module()
        assert torch.allclose(program(x), right, atol=1e-6)
        print("done")
    """
    assert "done" in python(code)


@pytest.mark.parametrize("method", ["exact", "favor", "linear", "nystrom"])
def test_dask_reads_nothing_while_a_graph_is_built(method: str) -> None:
    da = pytest.importorskip("dask.array")
    from dask.callbacks import Callback

    read = []
    x = np.random.default_rng(0).standard_normal((2, 700, 16))
    q = da.from_array(x, chunks=(2, 256, 16))
    for causal in (False, True):
        if causal and method == "nystrom":
            continue
        with Callback(pretask=lambda *_: read.append(1)):
            out = subquad.attention(q, q, q, method, causal=causal)
        assert not read
        assert relative_error(out.compute(), subquad.attention(x, x, x, method, causal=causal)) < 1e-11


@pytest.mark.parametrize("scan", ["linear_scan", "selective_scan"])
def test_forward_mode_of_scans_in_jax(scan: str) -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.linspace(0.1, 0.9, 15).reshape(5, 3)

    def function(x: Any, implementation: str = "auto") -> Any:
        if scan == "linear_scan":
            return subquad.linear_scan(x, x, implementation=implementation)
        return subquad.selective_scan(x, x, -jax.numpy.ones((3, 2)), x[:, :2], x[:, :2], implementation=implementation)

    # what the definition gives is one program: its operations one by one would each be compiled
    right = jax.jit(jax.jacfwd(lambda x: function(x, "generic")))(x)
    assert np.allclose(jax.jacfwd(function)(x), right, atol=1e-6)
    assert np.allclose(jax.jacrev(function)(x), right, atol=1e-6)
    for _, tangent in (jax.jvp(function, (x,), (x,)), jax.jit(lambda x: jax.jvp(function, (x,), (x,)))(x)):
        assert np.allclose(tangent, np.einsum("abcd,cd->ab", right, x), atol=1e-6)
    curved, expected = (jax.hessian(lambda x, i=i: function(x, i).sum()) for i in ("auto", "generic"))
    assert np.allclose(curved(x), jax.jit(expected)(x), atol=1e-5)


@pytest.mark.parametrize("form", ["narrow", "wide", "strided", "masked", "gradient", "off"])
@pytest.mark.parametrize("causal", [False, True])
def test_exact_attention_on_torch_holds_no_matrix_of_logits(form: str, causal: bool) -> None:
    """PyTorch forms all logits silently where a condition of its fused kernel does not hold; 4096² floats are 67 MB."""
    torch = pytest.importorskip("torch")
    from subquad_torch.bench import peak_extra_memory

    n = 4096
    q, k, v = torch.rand(3, 1, n, 64)
    widths = {"narrow": 32, "wide": 96}
    if form in widths:
        v = torch.rand(1, n, widths[form])
    if form == "strided":
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    mask = torch.arange(n) % 3 > 0 if form == "masked" and not causal else None
    if form == "gradient":
        v = v[..., :32].clone().requires_grad_()

    def attend() -> Any:
        out = subquad.attention(q, k, v, "exact", causal=causal, key_mask=mask)
        return torch.autograd.grad(out.sum(), v)[0] if form == "gradient" else out

    torch.backends.cuda.enable_flash_sdp(form != "off")
    try:
        assert peak_extra_memory(attend) < (40e6 if form == "off" else 16e6)
        right = subquad.attention(*(x[:, :300].double() for x in (q, k, v)), "exact", causal=causal)
        got = subquad.attention(*(x[:, :300] for x in (q, k, v)), "exact", causal=causal)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert relative_error(got.detach().double().numpy(), right.detach().numpy()) < 1e-5


@pytest.mark.parametrize(("method", "causal", "options"), [
    ("exact", False, {}), ("exact", False, {"implementation": "generic"}), ("exact", True, {}),
    ("favor", False, {"features": "relu", "num_features": 32}), ("favor", True, {"features": "relu", "num_features": 32}),
])  # fmt: skip
def test_vmap_of_jax_plans_the_memory_of_a_batch(method: str, causal: bool, options: dict[str, Any]) -> None:
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((32, 1024, 16))

    def attend(q: Any) -> Any:
        return subquad.attention(q, q, q, method, causal=causal, **options)

    def planned(function: Any) -> int:
        return jax.jit(function).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert planned(jax.vmap(attend)) <= 1.3 * planned(attend) + 1e6
    assert planned(lambda x: jax.vmap(jax.vmap(attend))(x[None])) <= 2 * planned(attend)


@pytest.mark.parametrize("features", ["elu", "relu"])
def test_compiled_causal_memory_grows_with_n(features: str) -> None:
    """The largest tensor of a compiled program grows as n at most, not as n²; it may be a block of 256 rows by itself."""
    torch = pytest.importorskip("torch")
    largest = []

    def attend(q: Any) -> Any:
        method = subquad.Linear() if features == "elu" else subquad.Favor(features="relu", num_features=16)
        return method(q, q, q, causal=True)

    for n in (512, 2048):
        sizes: list[int] = []

        def look(graph: Any, _: Any, sizes: list[int] = sizes) -> Any:
            values = [node.meta.get("example_value") for node in graph.graph.nodes]
            sizes.extend(x.numel() for x in values if isinstance(x, torch.Tensor))
            return graph.forward

        torch._dynamo.reset()
        torch.compile(attend, backend=look, fullgraph=True)(torch.rand(1, n, 16))
        largest.append(max(sizes))
    torch._dynamo.reset()
    assert largest[1] <= 4 * largest[0]


@pytest.mark.parametrize("name", ["exact", "favor", "linear", "nystrom", "exact grad"])
def test_products_of_jax_have_the_highest_precision(name: str) -> None:
    """Whatever the program's setting, which is bfloat16 on a TPU and TF32 on a GPU unless it is said."""
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((2, 64, 8))
    method, _, grad = name.partition(" ")
    options = {"num_landmarks": 8} if method == "nystrom" else {}
    options |= {"features": "relu", "num_features": 8} if method == "favor" else {}

    def attend(q: Any) -> Any:
        return subquad.attention(q, q, q, method, **options)

    function = jax.jit(attend)
    if grad:
        function = jax.grad(lambda q: jax.jit(attend)(q).sum())
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(function).lower(x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert all("[HIGHEST, HIGHEST]" in line for line in products)
    assert products or method == "linear"
