"""The last call of a method is computed once more for tensors like its own alone, under the same modes."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rows.kernels import overrides_replaced

import subquad
from subquad.attention import remembered
from subquad.attention.remembered import LASTS
from subquad.backend import Accepts, Override
from subquad.core.loading import backend_of

torch = pytest.importorskip("torch")
pytest.importorskip("llvmlite")

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS: dict[str, Callable[[], Any]] = {
    "exact": subquad.Exact,
    "linear": subquad.Linear,
    "omega": lambda: subquad.Favor(omega=torch.randn(19, 8, generator=torch.Generator().manual_seed(0)).double()),
}
each_method = pytest.mark.parametrize("name", METHODS)


class Doubled(torch.Tensor):
    """A class whose operations count."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def tensors(n: int = 24) -> list[Any]:
    return [torch.from_numpy(x) for x in np.random.default_rng(0).standard_normal((3, 1, 2, n, 8))]


def warm(name: str) -> tuple[Any, list[Any], Any]:
    """A method, tensors whose call is the last one of the method, and its output."""
    method, given = METHODS[name](), tensors()
    for _ in range(4):
        out = method(*given)
    assert LASTS[id(method)].is_like(*tensors())
    return method, given, out


def close(found: Any, expected: Any) -> bool:
    return torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@each_method
def test_a_mode_is_seen(name: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += 1
            return func(*args, **(kwargs or {}))

    method, given, out = warm(name)
    modes: dict[str, Any] = {
        "inference": torch.inference_mode,
        "no grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "device": lambda: torch.device("meta"),
        "no flash": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        "watching": Watching,
    }
    for mode in modes.values():
        for _ in range(3):
            with mode() as entered:
                found = [method(*given) for _ in range(3)]
            assert all(close(x, out) for x in found)
            assert all(x.is_inference() == (mode is torch.inference_mode) for x in found)
            if mode is Watching:
                assert entered.seen > 9
            assert close(method(*given), out)
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert close(method(*given), out)
    finally:
        torch.set_num_threads(count)


@each_method
def test_gradients_are_recorded(name: str) -> None:
    method, given, out = warm(name)
    for i in range(3):
        learned = [x.clone().requires_grad_(i == j) for j, x in enumerate(given)]
        for _ in range(4):
            found = method(*learned)
            assert close(found, out)
            (by,) = torch.autograd.grad(found.sum(), learned[i])
            assert (by != 0).any()
            with torch.no_grad():
                assert not method(*learned).requires_grad
        parameter = [torch.nn.Parameter(x, requires_grad=i == j) for j, x in enumerate(given)]
        assert method(*parameter).requires_grad
        assert not method(*given).requires_grad
    given[0].requires_grad_()  # the tensor that was seen
    assert method(*given).requires_grad
    given[0].requires_grad_(False)
    assert close(method(*given), out)


@each_method
def test_transforms_are_seen(name: str) -> None:
    from torch.autograd import forward_ad

    method, given, out = warm(name)
    q, k, v = given
    leaked = []

    def mapped(x: Any) -> Any:
        leaked.append(x)
        assert close(method(q, k, v), out)  # whatever transform is active
        return method(x, k, v)

    for _ in range(3):
        assert close(torch.vmap(mapped)(torch.stack([q, q])), torch.stack([out, out]))
        by = torch.func.grad(lambda x: method(x, k, v).sum())(q)
        learned = q.clone().requires_grad_()
        assert close(by, torch.autograd.grad(method(learned, k, v).sum(), learned)[0])
        _, along = torch.func.jvp(lambda x: method(x, k, v), (q,), (torch.ones_like(q),))
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(method(forward_ad.make_dual(q, torch.ones_like(q)), k, v))
            assert close(method(q, k, v), out)
        assert close(found.primal, out)
        assert close(found.tangent, along)
        assert (along != 0).any()
        assert close(torch.func.functionalize(method)(q, k, v), out)
        assert not LASTS[id(method)].is_like(leaked[0], k, v)
        assert close(method(q, k, v), out)


@each_method
def test_programs_are_recorded(name: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    method, given, out = warm(name)
    shifted = [x + 1 for x in given]
    expected = METHODS[name]()(*shifted)
    programs = [make_fx(lambda *x: method(*x))(*given)]
    if name == "exact":
        programs.append(torch.jit.trace(lambda *x: method(*x), tuple(given)))
    for program in programs:
        assert close(program(*given), out)
        assert close(program(*shifted), expected)


@pytest.mark.parametrize("name", ["exact", "linear"])
def test_a_compiled_function_does_not_depend_on_last_calls(name: str) -> None:
    method, given, out = warm(name)
    seen = []

    def backend(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    program = torch.compile(lambda *x: method(*x), backend=backend, fullgraph=True)
    for n in (30, 24, 30, 40):
        assert close(program(*given), out)
        method(*tensors(n))
        METHODS[name]()(*tensors(n))
        LASTS.pop(id(method), None)
    assert len(seen) == 1


@each_method
def test_other_arguments_are_seen(name: str) -> None:
    method, (q, k, v), out = warm(name)
    keep = torch.arange(24) < 17
    turned = [x.mT.contiguous().mT for x in (q, k, v)]
    calls: dict[str, Callable[[], Any]] = {
        "mask": lambda m: m(q, k, v, key_mask=keep),
        "scale": lambda m: m(q, k, v, scale=0.25),
        "other scale": lambda m: m(q, k, v, scale=0.5),
        "causal": lambda m: m(q, k, v, causal=True),
        "segments": lambda m: m(q, k, v, segments=torch.arange(24) // 12),
        "turned": lambda m: m(*turned),
        "negated": lambda m: m(*(torch._neg_view(-x) for x in (q, k, v))),
        "conjugate": lambda m: m(q, torch.complex(k, -k).conj().imag, v),
        "one tensor": lambda m: m(q, q, q),
        "two": lambda m: m(q, k, k),
        "float32": lambda m: m(q.float(), k.float(), v.float()),
        "longer": lambda m: m(*tensors(30)),
    }
    expected = {key: call(METHODS[name]()) for key, call in calls.items()}
    for _ in range(4):
        for key, call in calls.items():
            for _ in range(2):
                torch.testing.assert_close(call(method), expected[key], rtol=1e-9, atol=1e-9, msg=key)
            assert close(method(q, k, v), out)
    with pytest.raises(TypeError, match="an array of numpy"):
        method(q, k.numpy(), v)
    with pytest.raises(TypeError):
        method(q, None, v)
    with pytest.raises(TypeError):
        method(q, k, v, causal=1)
    for scale in (0.5, 2.0):  # objects of equal value are not one object
        for _ in range(4):
            found = method(q, k, v, scale=float(str(scale)))
        assert close(found, METHODS[name]()(q, k, v, scale=scale))


def test_tensors_without_plain_memory_are_refused() -> None:
    method, (q, k, v), out = warm("exact")
    nested = torch.nested.nested_tensor([torch.randn(2, 24, 8).double()])
    ragged = torch.nested.nested_tensor([q[0, 0], k[0, 0, :9]], layout=torch.jagged)
    for x, why in (
        (nested, "nested"),
        (ragged, "nested"),
        (q.to_sparse(), "layout"),
        (q.float().to_mkldnn(), "layout"),
    ):
        for given in ((x, k, v), (q, x, v), (q, k, x)):
            with pytest.raises(TypeError, match=why):
                method(*given)
    assert close(method(q, k, v), out)


def test_a_subclass_computes_by_itself() -> None:
    method, given, out = warm("exact")
    for _ in range(3):
        Doubled.calls = 0
        found = method(*(x.as_subclass(Doubled) for x in given))
        assert Doubled.calls > 0
        assert isinstance(found, Doubled)
        assert close(found.as_subclass(torch.Tensor), out)


def test_settings_of_the_library_are_seen() -> None:
    from subquad_torch import array_api

    method, given, out = warm("exact")

    def run(q: Any, k: Any, v: Any, **keywords: Any) -> Any:
        return torch.zeros_like(v)

    override = Override("softmax_attention", "none", run, Accepts(options=frozenset({"key_mask"})))
    with overrides_replaced(backend_of(array_api), "softmax_attention", override):
        for _ in range(4):
            assert (method(*given) == 0).all()
        assert subquad.explain(method, *given).implementation == "none"
    for _ in range(3):
        assert subquad.explain(method, *given).implementation != "none"
        assert close(method(*given), out)


def test_another_thread_has_modes_of_its_own() -> None:
    method, given, out = warm("exact")
    learned = [x.clone().requires_grad_() for x in given]
    found = []

    def other() -> None:
        found.extend(method(*learned) for _ in range(4))

    with torch.no_grad():
        for _ in range(4):
            assert not method(*learned).requires_grad
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert not method(*learned).requires_grad
    assert all(x.requires_grad and close(x, out) for x in found)


def test_a_method_that_is_gone_has_no_last_call() -> None:
    for _ in range(3):
        method, _, _ = warm("omega")
        number = id(method)
        del method
        gc.collect()
        assert number not in LASTS
    method, given, out = warm("omega")
    other = subquad.Favor(num_features=19)
    LASTS[id(other)] = LASTS[id(method)]  # as if it had the id of one that is gone
    assert not close(other(*given), out)


def test_a_method_may_outlive_the_names_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """At exit, Python sets them to None, and methods that others hold go later: their end is silent."""
    method, *_ = warm("exact")
    raised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    monkeypatch.setattr(remembered, "LASTS", None)
    del method
    gc.collect()
    assert raised == []
