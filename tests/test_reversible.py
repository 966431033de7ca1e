"""Reversible layers of PyTorch: the gradients of plain layers, in memory that does not grow with depth."""

from __future__ import annotations

import copy
import doctest
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from interpreter import python
from rows.libraries import EPSILON, relative_error, tolerance

torch = pytest.importorskip("torch")
nn = torch.nn
reversible = pytest.importorskip("subquad_torch.nn")
Reversible, ReversibleSequence = reversible.Reversible, reversible.ReversibleSequence

D, WIDE = 16, 32
DEEP = 24


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def function(dropout: float = 0.0, d: int = D) -> Any:
    return nn.Sequential(nn.LayerNorm(d), nn.Linear(d, WIDE), nn.GELU(), nn.Dropout(dropout), nn.Linear(WIDE, d))


def layers(depth: int, dropout: float = 0.0, dtype: str = "float64") -> Any:
    made = [Reversible(function(dropout), function(dropout)) for _ in range(depth)]
    return ReversibleSequence(made).to(getattr(torch, dtype))


def streams(dtype: str = "float64", rows: int = 7) -> list[Any]:
    return [torch.randn(2, rows, D, dtype=getattr(torch, dtype), requires_grad=True) for _ in range(2)]


def plain(model: Any) -> Callable[..., Any]:
    """The same layers by plain operations, all of which autograd records."""

    def run(x1: Any, x2: Any) -> Any:
        for layer in model.layers:
            x1 = x1 + layer.f(x2)
            x2 = x2 + layer.g(x1)
        return x1, x2

    return run


def loss(y: Any) -> Any:
    return (y[0] * y[1].sin()).sum()


def gradients(run: Callable[..., Any], x: Any, of: Any, seed: int = 1) -> list[Any]:
    """The gradients of a loss, after a forward pass whose random numbers begin at a seed."""
    torch.manual_seed(seed)
    out = loss(run(*x))
    torch.manual_seed(seed + 1)  # a backward pass that draws by itself would draw other numbers
    return list(torch.autograd.grad(out, of))


def worst(got: Any, expected: Any) -> float:
    """The maximum over tensors of max|got − expected| / max|expected|."""
    pairs = zip(got, expected, strict=True)
    return max(relative_error(a.detach().double().numpy(), b.detach().double().numpy()) for a, b in pairs)


# Each layer rounds a stream four times, twice forward and twice back, and each function sums D and WIDE terms.
TERMS = 4 * DEEP * (D + WIDE)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_equal_those_of_plain_layers(dtype: str, dropout: float) -> None:
    model, x = layers(DEEP, dropout, dtype), streams(dtype)
    of = [*x, *model.parameters()]
    error = worst(gradients(model, x, of), gradients(plain(model), x, of))
    assert error < (1e-10 if dtype == "float64" else tolerance(dtype, TERMS))


def test_one_layer_equals_a_plain_one() -> None:
    model, x = layers(1, dropout=0.2), streams()
    of = [*x, *model.parameters()]
    assert worst(gradients(model.layers[0], x, of), gradients(plain(model), x, of)) < 1e-10


def test_layers_of_one_kind_each_equal_the_sequence() -> None:
    """A user's own loop over single layers, which keeps the outputs of each."""
    model, x = layers(5, dropout=0.2), streams()

    def loop(x1: Any, x2: Any) -> Any:
        for layer in model.layers:
            x1, x2 = layer(x1, x2)
        return x1, x2

    of = [*x, *model.parameters()]
    assert worst(gradients(loop, x, of), gradients(plain(model), x, of)) < 1e-10


@pytest.mark.parametrize("frozen", ["f", "g", "first", "last", "all"])
@pytest.mark.parametrize("inputs", [(True, True), (True, False), (False, True), (False, False)])
def test_parts_without_gradients(frozen: str, inputs: tuple[bool, bool]) -> None:
    model, x = layers(3), streams()
    for i, layer in enumerate(model.layers):
        for name in ("f", "g"):
            if frozen in (name, "all", {0: "first", 2: "last"}.get(i)):
                getattr(layer, name).requires_grad_(False)
    for given, needs in zip(x, inputs, strict=True):
        given.requires_grad_(needs)
    of = [t for t in (*x, *model.parameters()) if t.requires_grad]
    if not of:
        assert not loss(model(*x)).requires_grad
        return
    assert worst(gradients(model, x, of), gradients(plain(model), x, of)) < 1e-10


def test_parameters_that_nothing_depends_on_get_none() -> None:
    model, x = layers(2), streams()
    model(*x)[0].sum().backward()
    ours = {name for name, p in model.named_parameters() if p.grad is None}
    model.zero_grad()
    plain(model)(*x)[0].sum().backward()
    assert ours == {name for name, p in model.named_parameters() if p.grad is None} != set()


def test_nothing_is_recorded_without_gradients() -> None:
    model, x = layers(3), streams()
    with torch.no_grad():
        y = model(*x)
    assert not y[0].requires_grad
    assert worst(y, plain(model)(*x)) == 0


def test_inverse_recovers_within_the_bound_of_rounding() -> None:
    """max|x − inverse(y)| ≤ e · 2 L ε · max|y|.

    Each of the L layers rounds four times, by ε/2 of the stream at most. What is rounded is amplified by 1 + K in each of
    the 2 L functions on the way back, K their Lipschitz constant, which is made 1 / (2 L) here: by e in all.
    """
    model = ReversibleSequence(
        Reversible(*(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in "fg")) for _ in range(DEEP)
    )
    with torch.no_grad():
        for layer in model.layers:
            for f in (layer.f, layer.g):
                f[2].weight /= torch.linalg.matrix_norm(f[0].weight, 2) * torch.linalg.matrix_norm(f[2].weight, 2)
                f[2].weight /= 2 * DEEP
        x = [3 * t for t in streams("float32")]
        y = model(*x)
        bound = math.e * 2 * DEEP * EPSILON["float32"] * max(float(t.norm(dim=-1).max()) for t in y)
        errors = [float((a - b).norm(dim=-1).max()) for a, b in zip(model.inverse(*y), x, strict=True)]
    assert 0 < max(errors) < bound


class Kept:
    """A saved tensor, and the count of bytes that live with it."""

    def __init__(self, x: Any, bytes_by_address: dict[int, list[int]]) -> None:
        self.x, self.live = x.detach(), bytes_by_address
        self.address = x.untyped_storage().data_ptr()
        count = self.live.setdefault(self.address, [0, x.untyped_storage().nbytes()])
        count[0] += 1

    def __del__(self) -> None:
        self.live[self.address][0] -= 1
        if self.live[self.address][0] == 0:
            del self.live[self.address]


def saved_bytes(model: Any, run: Callable[..., Any], rows: int = 7) -> tuple[int, int]:
    """Bytes saved by a forward pass, and the most at any time of forward and backward; parameters are not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    live: dict[int, list[int]] = {}
    peak = 0

    def pack(x: Any) -> Any:
        nonlocal peak
        if x.untyped_storage().data_ptr() in own:
            return x.detach()
        kept = Kept(x, live)
        peak = max(peak, sum(size for _, size in live.values()))
        return kept

    x = streams("float32", rows)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.x if isinstance(kept, Kept) else kept):
        out = loss(run(*x))
        forward = sum(size for _, size in live.values())
        out.backward()
    return forward, peak


def test_memory_is_constant_in_depth() -> None:
    """What a forward pass saves, and the peak of a whole step; plain layers save four times as much in four times."""
    shallow, deep = layers(DEEP // 4, dtype="float32"), layers(DEEP, dtype="float32")
    assert saved_bytes(shallow, shallow) == saved_bytes(deep, deep)
    (forward, _), (four_times, peak) = (saved_bytes(m, plain(m)) for m in (shallow, deep))
    assert 3.5 * forward < four_times
    assert 20 * saved_bytes(deep, deep)[1] < peak
    # with dropout: the states of the generator, 5 kB for each function; no mask and no stream
    noisy, noisier = layers(DEEP // 4, 0.2, dtype="float32"), layers(DEEP, 0.2, dtype="float32")
    assert saved_bytes(noisy, noisy) == saved_bytes(noisier, noisier)


def test_no_tensor_between_layers_lives_on() -> None:
    """Not only what autograd saves: the streams between the layers are gone after the forward pass."""
    model, seen = layers(4), []
    for layer in model.layers[:-1]:
        layer.g.register_forward_hook(lambda _module, given, out: seen.extend(weakref.ref(x) for x in (*given, out)))
    y = model(*streams())
    gc.collect()
    assert len(seen) == 6
    assert [x() for x in seen] == 6 * [None]
    assert y[0].requires_grad


def test_random_numbers_after_a_step_are_those_after_a_plain_one() -> None:
    model, x = layers(3, dropout=0.2), streams()
    states = []
    for run in (model, plain(model)):
        torch.manual_seed(3)
        loss(run(*x)).backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_autocast_is_replayed() -> None:
    """The backward pass is outside of the context, and f and g compute in bfloat16 again."""
    model, x = layers(4, dropout=0.2, dtype="float32"), streams("float32")
    dtypes = []
    for layer in model.layers:
        layer.f.register_forward_hook(lambda _module, _given, out: dtypes.append(out.dtype))

    def cast(run: Callable[..., Any]) -> Callable[..., Any]:
        def within(*x: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return run(*x)

        return within

    of = [*x, *model.parameters()]
    got = gradients(cast(model), x, of)
    assert dtypes == 8 * [torch.bfloat16]
    assert [g.dtype for g in got] == [t.dtype for t in of]
    # what is recovered is rounded to bfloat16 again, and may fall on the other side
    assert worst(got, gradients(cast(plain(model)), x, of)) < tolerance("bfloat16")
    with torch.autocast("cpu", torch.bfloat16):  # and the other way round
        out = torch.autograd.grad(sum(y.sum() for y in _without_autocast(model, x)), of)
    assert worst(out, torch.autograd.grad(sum(y.sum() for y in plain(model)(*x)), of)) > 0  # other dropout
    assert set(dtypes[16:20]) == {torch.float32}


def _without_autocast(model: Any, x: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        return model(*x)


def test_a_weight_used_in_the_layer_and_after_it_gets_both_gradients_under_autocast() -> None:
    """Older versions of PyTorch keep a copy of the weight in a cache, made while nothing was recorded."""
    model, x = layers(1, dtype="float32"), streams("float32")
    weight = model.layers[0].f[1].weight
    got = []
    for run in (model, plain(model)):
        with torch.autocast("cpu", torch.bfloat16):
            y1, y2 = run(*x)
            out = loss((y1, y2)) + nn.functional.linear(y1, weight).float().square().sum()
        got += torch.autograd.grad(out, [weight])
    assert worst(got[:1], got[1:]) < tolerance("bfloat16")


def test_second_derivatives() -> None:
    model, x = layers(3, dropout=0.2), streams()
    of = [*x, *model.parameters()]

    def twice(run: Callable[..., Any]) -> Any:
        torch.manual_seed(1)
        first = torch.autograd.grad(loss(run(*x)), of, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), of)

    assert worst(twice(model), twice(plain(model))) < 1e-10


def test_a_pass_that_stops_early_leaves_nothing_behind() -> None:
    """Gradients of the last layer only; with create_graph, what is left would refer to its own graph for ever."""
    model, x = layers(3), streams()
    y = model(*x)
    first = torch.autograd.grad(loss(y), x, retain_graph=True)
    torch.autograd.grad(loss(y), model.layers[2].f[1].weight, retain_graph=True)
    assert worst(first, torch.autograd.grad(loss(y), x, retain_graph=True)) == 0
    torch.autograd.grad(loss(y), model.layers[2].f[1].weight, create_graph=True)
    node = weakref.ref(y[0].grad_fn)
    del y
    gc.collect()
    assert node() is None


def test_hooks_of_parameters_run_once_and_as_the_pass_goes_on() -> None:
    model, x = layers(3), streams()
    order = []
    for i, layer in enumerate(model.layers):
        layer.f[1].weight.register_hook(lambda _grad, i=i: order.append(("hook", i)))
        layer.f[0].register_forward_hook(lambda *_, i=i: order.append(("call", i)))
    loss(model(*x)).backward()
    assert order[3:] == [(what, i) for i in (2, 1, 0) for what in ("call", "hook")]


def test_keyword_arguments_get_gradients() -> None:
    def scaled(x: Any, weight: Any, power: int = 1) -> Any:
        return x.tanh() * weight**power

    layer, x = Reversible(scaled, scaled), streams()
    a, b = (torch.randn(D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = gradients(lambda *x: layer(*x, f_kwargs={"weight": a}, g_kwargs={"weight": b, "power": 3}), x, [*x, a, b])
    y1 = x[0] + scaled(x[1], a)
    expected = torch.autograd.grad(loss((y1, x[1] + scaled(y1, b, 3))), [*x, a, b])
    assert worst(got, expected) < 1e-10
    y = layer(*x, f_kwargs={"weight": a}, g_kwargs={"weight": b})
    assert worst(layer.inverse(*y, f_kwargs={"weight": a}, g_kwargs={"weight": b}), x) < 1e-10
    mask = torch.ones(D, dtype=torch.bool)
    loss(ReversibleSequence([layer, layer])(*x, f_kwargs={"weight": mask}, g_kwargs={"weight": mask})).backward()


def test_buffers_are_written_once_and_seen_again() -> None:
    """Batch statistics, and the power iteration of a spectral norm; two forward passes before the first backward."""

    def stateful() -> Any:
        return nn.Sequential(
            nn.Linear(D, D), nn.BatchNorm1d(7), nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))
        )

    model = ReversibleSequence(Reversible(stateful(), stateful()) for _ in range(3)).double()
    twin, x = copy.deepcopy(model), streams()
    got = []
    for m, run in ((model, model), (twin, plain(twin))):
        first, _second = loss(run(*x)), loss(run(*x))
        got.append(torch.autograd.grad(first, [*x, *m.parameters()]))
    assert worst(*got) < 1e-10
    for (name, ours), theirs in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_parameters_of_a_functional_call() -> None:
    model, x = layers(2), streams()
    given = {name: (1.5 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    got = torch.autograd.grad(loss(torch.func.functional_call(model, given, tuple(x))), list(given.values()))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert worst(got, gradients(plain(model), x, list(model.parameters()))) < 1e-10


def test_a_layer_within_a_layer_within_a_checkpoint() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Reversible(function(0.2, D // 2), function(0.2, D // 2))

        def forward(self, x: Any) -> Any:
            return torch.cat(self.layer(*x.chunk(2, -1)), -1)

    model, x = ReversibleSequence([Reversible(Halves(), Halves())]).double(), streams()
    of = [*x, *model.parameters()]
    checkpoint = torch.utils.checkpoint.checkpoint
    got = gradients(lambda *x: checkpoint(model, *x, use_reentrant=False), x, of)
    assert worst(got, gradients(plain(model), x, of)) < 1e-10


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_programs() -> None:
    """Where gradients are recorded the layers stay outside of the graph; without them, they are inside of it."""
    model, x = layers(2), streams()
    of = [*x, *model.parameters()]
    expected = gradients(plain(model), x, of)
    compiled = torch.compile(lambda *x: model(*(2 * t / 2 for t in x)), backend="aot_eager")
    assert worst(gradients(compiled, x, of), expected) < 1e-10
    parts = [Reversible(*(torch.compile(part, backend="aot_eager") for part in (m.f, m.g))) for m in model.layers]
    assert worst(gradients(ReversibleSequence(parts), x, of), expected) < 1e-10
    with torch.no_grad():
        whole = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert worst(whole(*x), plain(model)(*x)) < 1e-10


def test_transforms_run_the_plain_computation() -> None:
    model, x = layers(2), streams()
    parameters = dict(model.named_parameters())
    expected = gradients(plain(model), x, list(parameters.values()))
    got = torch.func.grad(lambda p: loss(torch.func.functional_call(model, p, tuple(x))))(parameters)
    assert worst(got.values(), expected) < 1e-10
    assert worst(torch.func.vmap(model)(*x), plain(model)(*x)) < 1e-10
    assert (
        worst(torch.func.jvp(model, tuple(x), tuple(x))[1], torch.func.jvp(plain(model), tuple(x), tuple(x))[1]) < 1e-10
    )
    exported = torch.export.export(model, tuple(x))
    assert worst(exported.module()(*x), plain(model)(*x)) < 1e-10
    traced = torch.jit.trace(model, tuple(t.detach() for t in x))
    assert worst(gradients(traced, x, x), gradients(plain(model), x, x)) < 1e-10


def test_a_batch_of_gradients() -> None:
    model, x = layers(2), streams()
    given = torch.randn(3, 2, 7, D, dtype=torch.float64)
    got, expected = (torch.autograd.grad(run(*x)[1], x, given, is_grads_batched=True) for run in (model, plain(model)))
    assert worst(got, expected) < 1e-10


def sine(x: Any) -> Any:
    return x.sin()


ONE = torch.ones(3, 4)
WRONG = [
    (TypeError, "f must be a module", lambda: Reversible(3, sine)),
    (TypeError, "got Linear at 1", lambda: ReversibleSequence([Reversible(sine, sine), nn.Linear(2, 2)])),
    (TypeError, "x2 must be a tensor, got list", lambda: Reversible(sine, sine)(ONE, [1.0])),
    (TypeError, "x1 must be floating", lambda: Reversible(sine, sine)(ONE.long(), ONE.long())),
    (ValueError, "one shape, got .3, 4. and .4,", lambda: Reversible(sine, sine)(ONE, ONE[0])),
    (ValueError, "one dtype, got torch.float32 and torch.float64", lambda: Reversible(sine, sine)(ONE, ONE.double())),
    (ValueError, "one device, got cpu and meta", lambda: Reversible(sine, sine)(ONE, ONE.to("meta"))),
    (ValueError, "y1 and y2 must have one shape", lambda: Reversible(sine, sine).inverse(ONE, ONE[0])),
    (TypeError, "f_kwargs must be a mapping", lambda: Reversible(sine, sine)(ONE, ONE, f_kwargs=[ONE])),
    (TypeError, "f must return one tensor, got tuple", lambda: Reversible(lambda x: (x, x), sine)(ONE, ONE)),
    (ValueError, "g must return the shape", lambda: Reversible(sine, lambda x: x[0])(ONE, ONE)),
    (ValueError, "g must return torch.float32", lambda: Reversible(sine, lambda x: x.double())(ONE, ONE)),
    (ValueError, "f must return a tensor on cpu", lambda: Reversible(lambda x: x.to("meta"), sine)(ONE, ONE)),
]


@pytest.mark.parametrize(("error", "message", "call"), WRONG, ids=[message for _, message, _ in WRONG])
def test_errors(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", ["leaf", "computed", "nested"])
@pytest.mark.parametrize("inputs", [True, False])
def test_a_captured_tensor_never_loses_its_gradient(where: str, inputs: bool) -> None:
    """It is an error, or the gradient is right: a first layer with nothing else to train is recorded as it is."""
    weight = torch.randn(D, dtype=torch.float64, requires_grad=True)
    used = 2 * weight if where == "computed" else weight
    last = Reversible(function().double(), function().double())
    if where == "nested":
        model, more = ReversibleSequence([Reversible(lambda x, w: x * w[0], sine), last]), {"f_kwargs": {"w": [used]}}
        model.layers[1] = Reversible(lambda x, w: x, function().double())
    else:
        model, more = ReversibleSequence([Reversible(lambda x: x * used, sine), last]), {}
    x = [t.requires_grad_(inputs) for t in streams()]
    out = loss(model(*x, **more))
    if inputs:
        with pytest.raises(ValueError, match=r"f reads a tensor of shape \(16,\).*f_kwargs"):
            out.backward()
    else:
        out.backward()
        got, weight.grad = weight.grad, None
        y1 = x[0] + x[1] * (2 * weight if where == "computed" else weight)
        y2, after = x[1] + y1.sin(), model.layers[1]
        y1 = y1 + (y2 if where == "nested" else after.f(y2))
        loss((y1, y2 + after.g(y1))).backward()
        assert worst([got], [weight.grad]) < 1e-10


def test_a_function_that_writes_to_its_input() -> None:
    with pytest.raises(ValueError, match="f writes to its input"):
        Reversible(nn.ReLU(inplace=True), nn.Linear(D, D).double())(*(1 * t for t in streams()))


def test_lazy_parameters() -> None:
    layer, x = Reversible(nn.LazyLinear(D), sine).double(), streams()
    with pytest.raises(ValueError, match="no shape yet"):
        layer(*x)
    with torch.no_grad():
        layer(*x)
    loss(layer(*x)).backward()
    assert layer.f.weight.grad.shape == (D, D)


def test_outputs_that_were_written_to() -> None:
    y1, y2 = layers(2)(*streams())
    with torch.no_grad():
        y1.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss((y1, y2)).backward()


def test_no_layers_change_nothing() -> None:
    x = streams()
    assert all(a is b for a, b in zip(ReversibleSequence([])(*x), x, strict=True))


def test_the_examples_of_the_docstrings() -> None:
    done = doctest.testmod(reversible)
    assert done.attempted
    assert not done.failed


def test_the_backend_does_not_load_its_modules() -> None:
    assert python("import sys, subquad_torch; print('subquad_torch.nn' in sys.modules)") == "False"
