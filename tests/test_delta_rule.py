"""The delta rule equals the loop that defines it, in every form; so do its gradients, its chunks and its steps."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from rows import definitions
from rows.kernels import EXAMPLES, KERNELS, Example
from rows.libraries import EPSILON, Jax, NumPy, relative_error, tolerance

import subquad

Array = np.ndarray
LENGTHS = (1, 2, 16, 63, 64, 65, 257)
implementations = pytest.mark.parametrize("implementation", ["auto", "generic"])
every_example = pytest.mark.parametrize("example", [pytest.param(x, id=x.name) for x in EXAMPLES["delta_scan"]])
gates = pytest.mark.parametrize("gate", ["none", "head", "channel"])
kernel = KERNELS["delta_scan"]


def draw(n: int, gate: str = "head", batch: tuple[int, ...] = (2, 3), d: int = 9, d_v: int = 21) -> dict[str, Array]:
    """Inputs of `delta_rule`, float64: keys of length 1, decays with memories of 1 to 100 steps."""
    rng = np.random.default_rng(5)
    q, k = rng.standard_normal((2, *batch, n, d))
    g = -np.exp(rng.uniform(-4.5, 0, (*batch, n, d if gate == "channel" else 1)))
    given = {"q": q, "k": k / np.linalg.norm(k, axis=-1, keepdims=True), "v": rng.standard_normal((*batch, n, d_v))}
    given |= {"beta": rng.uniform(0, 2, (*batch, n))} | ({} if gate == "none" else {"g": g})
    return given | {"initial_state": rng.standard_normal((*batch, d, d_v))}


def call(given: dict[str, Any], **options: Any) -> Any:
    """(o, state) of inputs by name."""
    positional = [given.get(name) for name in ("q", "k", "v", "beta", "g")]
    state = given.get("initial_state")
    return subquad.delta_rule(*positional, initial_state=state, return_state=True, **options)


def loop(given: dict[str, Array], **options: Any) -> tuple[Array, Array]:
    """(o, state) of inputs by name, by the definition."""
    batch = given["k"].shape[:-2]

    def as_kernel(x: Array | None, axes: int) -> Array | None:
        return None if x is None else x.reshape(-1, *x.shape[len(batch) :][:1], 1, *x.shape[len(batch) + 1 :][:axes])

    rows = [as_kernel(given.get(name), 1) for name in ("q", "k", "v", "g", "beta")]
    state = given.get("initial_state")
    state = None if state is None else state.reshape(-1, 1, *state.shape[-2:])
    o, last = definitions.delta_scan(*rows, initial_state=state, **{"scale": given["q"].shape[-1] ** -0.5} | options)
    return o.reshape(given["v"].shape), last.reshape(*batch, *last.shape[-2:])


def is_compiled(given: dict[str, Any]) -> bool:
    """Whether "auto" walks through time."""
    explained = subquad.explain("delta_rule", *(given.get(name) for name in ("q", "k", "v", "beta", "g")))
    return explained.implementation == "compiled"


def check_close(got: Any, expected: Any, dtype: str = "float64") -> None:
    for x, reference in zip(got, expected, strict=True):
        assert tuple(x.shape) == reference.shape
        assert relative_error(np.asarray(x, np.float64), reference) <= tolerance(dtype)


@implementations
@every_example
def test_the_kernel_equals_the_loop(example: Example, implementation: str) -> None:
    for dtype in ("float64", "float32"):
        arrays, static = example.given(NumPy(), dtype)
        expected = definitions.delta_scan(
            *(x if x is None or x.dtype == bool else x.astype(np.float64) for x in arrays), **static
        )
        check_close(kernel(*arrays, **static, implementation=implementation), expected, dtype)


@implementations
@gates
@pytest.mark.parametrize("n", LENGTHS)
def test_equals_the_loop(n: int, gate: str, implementation: str) -> None:
    for dtype in ("float64", "float32"):
        given = {name: x.astype(dtype) for name, x in draw(n, gate).items()}
        for reverse in (False, True):
            options = {"scale": 0.3, "reverse": reverse}
            expected = loop({name: x.astype(np.float64) for name, x in given.items()}, **options)
            got = call(given, **options, implementation=implementation)
            assert [x.dtype for x in got] == [dtype, dtype]
            check_close(got, expected, dtype)


@implementations
@gates
def test_long_memory(gate: str, implementation: str) -> None:
    """Decays next to 1 make no error that grows with the number of steps: their rounding would be 4096 times the same."""
    given = draw(4096, gate, batch=(1,), d=4, d_v=3)
    given |= {"beta": np.full((1, 4096), 1e-3)} | ({} if gate == "none" else {"g": np.full_like(given["g"], -1e-4)})
    given = {name: x.astype(np.float32) for name, x in given.items()}
    expected = loop({name: x.astype(np.float64) for name, x in given.items()})
    for x, reference in zip(call(given, implementation=implementation), expected, strict=True):
        assert relative_error(x, reference) <= 2e-5


@implementations
@gates
def test_decays_of_zero_forget(gate: str, implementation: str) -> None:
    """g = −∞ gives no NaN, and what was before makes no difference."""
    given = draw(70, gate if gate != "none" else "head")
    given["g"][..., 40, :] = -np.inf
    o, state = call(given, implementation=implementation)
    check_close((o, state), loop(given))
    later = {name: x[..., 40:] if name == "beta" else x[..., 40:, :] for name, x in given.items() if name[0] != "i"}
    check_close((o[..., 40:, :], state), loop(later))


@implementations
def test_keys_that_are_all_alike(implementation: str) -> None:
    """Each value replaces the one before; powers of the matrix of keys would have entries of 10^18."""
    v = np.random.default_rng(0).standard_normal((128, 5)).astype(np.float32)
    k = np.tile(np.asarray([0.6, 0.8], np.float32), (128, 1))
    o = subquad.delta_rule(k, k, v, np.ones(128, np.float32), scale=1.0, implementation=implementation)
    assert relative_error(o, v) <= 1e-5


@implementations
@gates
@pytest.mark.parametrize("chunk", [1, 7, 50, 64])
def test_full_equals_chunks(gate: str, implementation: str, chunk: int) -> None:
    """To the last bit where the scan walks through time; forward and from the end."""
    n = 130
    given = {name: x.astype(np.float32) for name, x in draw(n, gate).items()}
    for reverse in (False, True):
        full, last = call(given, reverse=reverse, implementation=implementation)
        parts, state, starts = {}, given["initial_state"], range(0, n, chunk)
        for start in reversed(starts) if reverse else starts:
            rows = slice(start, start + chunk)
            part = {name: x[..., rows] if name == "beta" else x[..., rows, :] for name, x in given.items()}
            parts[start], state = call(part | {"initial_state": state}, reverse=reverse, implementation=implementation)
        joined = np.concatenate([parts[start] for start in starts], axis=-2)
        if implementation == "auto" and is_compiled(given):
            assert np.array_equal(joined, full)
            assert np.array_equal(state, last)
        check_close((joined, state), (full, last), "float32")


@implementations
@every_example
def test_resets_are_documents_of_their_own(example: Example, implementation: str) -> None:
    """Also where the others hold NaN, to the last bit."""
    q, k, v, g, beta, a, b, state, _ = example.arrays
    n = q.shape[1]
    marks = np.zeros((2, n), bool)
    marks[:, [n // 3, n // 2]] = True
    static = dict(example.static)
    whole, last = kernel(q, k, v, g, beta, a, b, state, marks, **static, implementation=implementation)
    edges = [0, n // 3, n // 2, n]
    order = list(itertools.pairwise(edges))
    if static["reverse"]:  # a reset comes before its step, which is then the first one of its document
        edges = [0, *(m + 1 for m in edges[1:-1]), n]
        order = list(itertools.pairwise(edges))[::-1]
    order = [pair for pair in order if pair[0] < pair[1]]
    for number, (start, stop) in enumerate(order):
        parts = [None if x is None else x[:, start:stop] for x in (q, k, v, g, beta, a, b)]
        begin = (
            state
            if number == 0 and not (n == 1 or marks[:, start:stop][:, -1 if static["reverse"] else 0].any())
            else None
        )
        alone, end = kernel(*parts, begin, None, **static, implementation=implementation)
        assert relative_error(whole[:, start:stop], alone) <= 1e-13
        if number == len(order) - 1:
            assert relative_error(last, end) <= 1e-13
        dirty = [None if x is None else x.copy() for x in (q, k, v, g, beta, a, b)]
        for x in dirty:
            if x is not None:
                x[:, :start] = x[:, stop:] = np.nan
        spoilt, _ = kernel(*dirty, state if number == 0 else None, marks, **static, implementation=implementation)
        assert np.array_equal(spoilt[:, start:stop], whole[:, start:stop])


@implementations
@gates
@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "g", "initial_state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_later_steps_of_its_head(
    name: str, gate: str, value: float, implementation: str
) -> None:
    """And, in a value, no other channel; and not the last bit of any other number."""
    given = draw(70, gate)
    if name not in given:
        pytest.skip("there is no gate")
    clean, _ = call(given, implementation=implementation)
    place = {"beta": (1, 1, 40), "initial_state": (1, 1, 2, 3)}.get(
        name, (1, 1, 40, 3 if gate == "channel" or name != "g" else 0)
    )
    dirty_input = {key: x.copy() for key, x in given.items()}
    dirty_input[name][place] = value
    dirty, _ = call(dirty_input, implementation=implementation)
    reached = np.zeros(clean.shape, dtype=bool)
    columns = 3 if name in ("v", "initial_state") else slice(None)
    steps = {"q": 40, "initial_state": slice(None)}.get(name, slice(40, None))
    reached[1, 1, steps, columns] = True
    assert np.array_equal(dirty[~reached], clean[~reached])
    assert not np.isfinite(dirty[reached]).any()


@implementations
@gates
def test_item_alone_equals_item_in_batch(gate: str, implementation: str) -> None:
    given = draw(70, gate)
    whole = call(given, implementation=implementation)
    part = call({name: x[:1, 1:2] for name, x in given.items()}, implementation=implementation)
    for x, y in zip(whole, part, strict=True):
        assert np.array_equal(x[:1, 1:2], y)


@implementations
def test_batch_axes_broadcast(implementation: str) -> None:
    """One key head for three value heads, one gate for all, a state for each head."""
    given = draw(20)
    given["q"], given["k"], given["g"] = given["q"][:, :1], given["k"][:, :1], given["g"][:1, :1]
    given["initial_state"] = given["initial_state"][0]
    wide = {
        name: np.broadcast_to(x, (2, 3, *x.shape[{"initial_state": 1}.get(name, 2) :])) for name, x in given.items()
    }
    for x, y in zip(call(given, implementation=implementation), call(wide, implementation=implementation), strict=True):
        assert np.array_equal(x, y)


@implementations
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)], ids=str)
def test_empty(shape: tuple[int, ...], implementation: str) -> None:
    x, state = np.ones(shape), np.ones((shape[0], 3, 3))
    o, last = subquad.delta_rule(
        x, x, x, np.ones(shape[:-1]), initial_state=state, return_state=True, implementation=implementation
    )
    assert o.shape == shape
    assert np.array_equal(last, state)


def test_no_values() -> None:
    o = subquad.delta_rule(*np.ones((2, 4, 3)), np.ones((4, 0)), np.ones(4))
    assert o.shape == (4, 0)


def test_half_precision_is_rounded_once() -> None:
    """A key whose value grows by ones up to 2000: float16 alone would stop at 2048."""
    one = np.ones((2000, 1), np.float16)
    g = np.zeros((2000, 1), np.float32)
    state = None
    o, state = subquad.delta_rule(
        one, one * np.float16(0.5), one, np.full(2000, 1e-3, np.float16), g, scale=1.0, return_state=True
    )
    assert (o.dtype, state.dtype) == (np.float16, np.float32)
    wide = loop({"q": np.ones((1, 2000, 1)), "k": np.full((1, 2000, 1), 0.5), "v": np.ones((1, 2000, 1)),
                 "beta": np.full((1, 2000), float(np.float16(1e-3)))}, scale=1.0)  # fmt: skip
    assert relative_error(o.astype(np.float64), wide[0][0]) <= EPSILON["float16"]
    assert relative_error(state, wide[1][0]) <= 1e-5


@functools.cache
def torch_gradients(gate: str, n: int) -> list[Array]:
    """The gradients of the generic form by PyTorch's own rules."""
    torch = pytest.importorskip("torch")
    given = {name: torch.from_numpy(x).requires_grad_() for name, x in draw(n, gate).items()}
    o, state = call(given, implementation="generic")
    ((o**2).sum() + state.sum()).backward()
    return [x.grad.numpy() for x in given.values()]


@implementations
@gates
def test_torch_gradcheck(gate: str, implementation: str) -> None:
    """Of every input through o and the last state, once and twice, over two chunks."""
    torch = pytest.importorskip("torch")
    given = {name: torch.from_numpy(x).requires_grad_() for name, x in draw(18, gate, (2,), 3, 4).items()}

    def function(*tensors: Any) -> Any:
        return call(dict(zip(given, tensors, strict=True)), implementation=implementation)

    assert torch.autograd.gradcheck(function, tuple(given.values()), fast_mode=True)
    if gate == "channel":
        assert torch.autograd.gradgradcheck(function, tuple(given.values()), fast_mode=True)


@gates
@pytest.mark.parametrize("general", [False, True], ids=["delta", "general"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_tiles_of_a_task_do_not_know_each_other(
    dtype: str, general: bool, gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of all tiles of a head gives the bits that tasks of one tile give, over blocks of time and resets."""
    calls = pytest.importorskip("subquad_numpy.delta_scan.calls")
    monkeypatch.setattr(calls, "SMALL", 0)
    columns, threads, static = 75, (1, 8, 64), {"scale": 0.5, "reverse": False}
    computed = "float64" if dtype == "float64" else "float32"
    assert {calls.cut_work(6, columns, computed, count)[1] for count in threads} > {6}
    for n in (1, 32, 77):
        given = {
            name: np.moveaxis(x, 2, 1) for name, x in draw(n, gate, d_v=columns).items() if name != "initial_state"
        }
        resets = np.zeros((2, n), bool)
        resets[:, n // 2] = True
        a, b = (-given["k"], given["k"]) if general else (None, None)
        beta = None if general else given["beta"]
        state = draw(n, gate, d_v=columns)["initial_state"].astype(computed)
        arrays = [given["q"], given["k"], given["v"], given.get("g"), beta, a, b]
        rounded = [None if x is None else x.astype(dtype) for x in arrays]
        found = [calls.scan([*rounded, state, resets], static, new=np.empty, threads=count)[0] for count in threads]
        wide = [None if x is None else x.astype("f8") for x in (*rounded, state)]
        expected = definitions.delta_scan(*wide, resets, scale=0.5)
        for x, *others, exact in zip(*found, expected, strict=True):
            assert all(np.array_equal(x, other) for other in others)
            assert relative_error(x, exact) <= tolerance(x.dtype.name)


@pytest.mark.parametrize(("steps", "checkpoints"), [(4, 0), (7, 0), (7, 1 << 30)])
def test_gradient_from_checkpoints_of_one_and_two_levels(
    steps: int, checkpoints: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever states are kept: tiles and segments of some lengths, the last ones shorter."""
    torch, n = pytest.importorskip("torch"), 70
    calls = pytest.importorskip("subquad_numpy.delta_scan.calls")
    monkeypatch.setattr(calls, "STATES", steps * 9 * 32 * 8)
    monkeypatch.setattr(calls, "CHECKPOINTS", checkpoints)
    sizes = calls.cut_time((6, n, 1, 9), 21, np.dtype("float64"), 2)
    assert sizes == {"tile": steps, "segment": -(-n // steps) if checkpoints else {4: 5, 7: 4}[steps]}
    given = {name: torch.from_numpy(x).requires_grad_() for name, x in draw(n).items()}
    o, state = call(given)
    ((o**2).sum() + state.sum()).backward()
    for x, expected in zip(given.values(), torch_gradients("head", n), strict=True):
        assert relative_error(x.grad.numpy(), expected) <= tolerance("float64")


@implementations
@gates
def test_gradient_is_the_same_on_jax_and_torch(jax_library: Jax, gate: str, implementation: str) -> None:
    n = 70
    with jax_library.context("float64"):
        import jax

        given = {name: jax_library.array(x, "float64") for name, x in draw(n, gate).items()}

        def loss(given: Any) -> Any:
            o, state = call(given, implementation=implementation)
            return (o**2).sum() + state.sum()

        found = jax.jit(jax.grad(loss))(given)
    for ours, theirs in zip((found[name] for name in given), torch_gradients(gate, n), strict=True):
        assert relative_error(np.asarray(ours), theirs) <= tolerance("float64")


@implementations
def test_gradients_of_decays_of_zero_and_past_resets_are_finite(implementation: str) -> None:
    """What a reset or a decay of 0 cuts off changes no gradient, even if it is NaN."""
    torch = pytest.importorskip("torch")
    example = next(x for x in EXAMPLES["delta_scan"] if x.name == "decay of heads, state, resets")
    q, k, v, g, beta, a, b, state, _ = example.arrays
    marks = np.zeros(q.shape[:2], bool)
    marks[:, 50] = True

    def gradients(spoilt: float) -> list[Any]:
        given = [torch.from_numpy(x.copy()) for x in (q, k, v, g, beta)]
        for x in given:
            x[:, 20:50] = x[:, 20:50] * spoilt
        given[3][:, 60] = -torch.inf
        given = [x.requires_grad_() for x in given]
        start = torch.from_numpy(state).requires_grad_()
        o, last = kernel(*given, a, b, start, torch.from_numpy(marks), **example.static, implementation=implementation)
        (o[:, 50:].sum() + last.sum()).backward()
        return [*(x.grad for x in given), start.grad]

    *clean, by_state = gradients(1.0)
    assert not by_state.any()
    for x, y in zip(clean, gradients(np.nan), strict=False):
        assert torch.isfinite(x).all()
        assert not x[:, :50].any()
        assert torch.equal(x[:, 50:], y[:, 50:])


@pytest.mark.parametrize(("gate", "implementation"), [("head", "auto"), ("none", "generic")])
def test_torch_compile_full_graph(gate: str, implementation: str) -> None:
    """Forward and backward, without a graph break."""
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    given = {name: torch.from_numpy(x).requires_grad_() for name, x in draw(20, gate).items()}
    compiled = torch.compile(
        functools.partial(call, implementation=implementation), fullgraph=True, backend="aot_eager"
    )
    o, state = compiled(given)
    check_close([x.detach().numpy() for x in (o, state)], loop(draw(20, gate)))
    ((o**2).sum() + state.sum()).backward()
    for x, expected in zip(given.values(), torch_gradients(gate, 20), strict=True):
        assert relative_error(x.grad.numpy(), expected) <= tolerance("float64")


@implementations
def test_jax_transforms(jax_library: Jax, implementation: str) -> None:
    import jax

    given = draw(20)
    with jax_library.context("float64"):
        arrays = {name: jax_library.array(x, "float64") for name, x in given.items()}
        scan = jax.vmap(jax.jit(functools.partial(call, implementation=implementation)))
        check_close([np.asarray(x) for x in scan(arrays)], loop(given))


def test_torch_vmap() -> None:
    torch = pytest.importorskip("torch")
    given = draw(20)
    found = torch.func.vmap(call)({name: torch.from_numpy(x) for name, x in given.items()})
    check_close([x.numpy() for x in found], loop(given))


def test_general_form_contains_the_delta_rule() -> None:
    """With a = w ∘ k, b = −β k and keys β k."""
    example = next(x for x in EXAMPLES["delta_scan"] if x.name == "decay of channels")
    q, k, v, g, beta, _, _, state, _ = example.arrays
    strength = beta[..., None]
    for implementation in ("auto", "generic"):
        options = {**example.static, "implementation": implementation}
        rule = kernel(*example.arrays, **options)
        general = kernel(q, strength * k, v, g, None, np.exp(g) * k, -strength * k, state, None, **options)
        for x, y in zip(general, rule, strict=True):
            assert relative_error(x, y) <= 1e-13


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": np.ones((2, 3, 20, 8))}, ValueError, ["q has shape (2, 3, 20, 8)", "(..., 20, 9)", "rows as of k"]),
        ({"v": np.ones((2, 3, 19, 8))}, ValueError, ["v has shape", "(..., 20, 8)", "one value per key"]),
        ({"beta": np.ones((2, 3, 20, 1))}, ValueError, ["beta has shape", "(..., 20)", "one number per key"]),
        ({"g": np.ones((2, 3, 20))}, ValueError, ["g has shape", "last axis of length 1"]),
        ({"initial_state": np.ones((9, 20))}, ValueError, ["initial_state has shape", "(..., 9, 21)"]),
        ({"k": np.ones(9)}, ValueError, ["k has shape (9,)", "(..., n, d)"]),
        ({"k": np.ones((2, 3, 20, 0))}, ValueError, ["k has shape", "at least one channel"]),
        ({"q": np.ones((4, 3, 20, 9))}, ValueError, ["batch shapes do not broadcast"]),
        ({"beta": None}, TypeError, ["beta is a NoneType"]),
        ({"v": np.ones((2, 3, 20, 21), int)}, TypeError, ["v", "int"]),
        ({"k": np.ones((2, 3, 20, 9), complex)}, TypeError, ["k", "complex"]),
    ],
    ids=str,
)  # fmt: skip
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as raised:
        call(draw(20) | change)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    "options", [{"scale": "1"}, {"scale": np.nan}, {"reverse": 1}, {"implementation": "cuda"}], ids=str
)
def test_errors_name_the_option(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        call(draw(5), **options)


def test_states_of_two_kinds_do_not_merge() -> None:
    given = draw(5)
    state = subquad.summarize_scan("delta_rule", *(given[x] for x in ("q", "k", "v", "beta", "g")))
    other = {"state": state["state"], "decay": state["state"]}
    for pair in ((state, other), (other, state)):
        with pytest.raises(ValueError, match="expected 'state', 'transition'"):
            subquad.merge_scan(*pair)
    with pytest.raises(ValueError, match="does not fit"):
        subquad.merge_scan(state, state | {"transition": state["transition"][..., :-1, :-1]})


def test_equals_the_chunked_rule_of_transformers() -> None:
    """`torch_chunk_gated_delta_rule` of Qwen3-Next; it has the heads after time, and scales by d^−½."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    peer = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next").torch_chunk_gated_delta_rule
    given = {name: torch.from_numpy(x.astype(np.float32)) for name, x in draw(130).items()}
    o, state = call(given)
    q, k, v, g, beta = (given[name].transpose(1, 2) for name in ("q", "k", "v", "g", "beta"))
    theirs, last = peer(q, k, v, g[..., 0], beta, initial_state=given["initial_state"], output_final_state=True)
    assert relative_error(o.numpy(), theirs.transpose(1, 2).numpy()) <= tolerance("float32")
    assert relative_error(state.numpy(), last.numpy()) <= tolerance("float32")


def test_a_layer_over_activations() -> None:
    """As the docstring of `activations` says; also the definition, with one batch axis and with none."""
    q, k, v = (np.random.default_rng(0).standard_normal((heads, 6, 4)) for heads in (4, 2, 2))
    row = subquad.registry.SCANS["delta_rule"]
    given, options = row.activations(q, k, v)
    assert relative_error(np.log(given["beta"] / (1 - given["beta"])), k.mean(axis=-1)) < 1e-12
    assert relative_error(np.log(np.expm1(-10 * given["g"][..., 0])), q[::2].mean(axis=-1)) < 1e-12
    assert np.allclose(np.linalg.norm(given["q"], axis=-1), 1)
    assert np.allclose(np.cross(given["q"][..., :3], q[::2, :, :3]), 0)
    out = row.call(given, options)
    assert relative_error(row.reference(given, options), out) < 1e-12
    first = {name: x[0] for name, x in given.items()}
    assert relative_error(row.reference(first, options), out[0]) < 1e-12
