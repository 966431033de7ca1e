"""The method "auto": what it chooses, on what that depends, and that it keeps to tolerances and budgets."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows.libraries import Jax, Library, Torch, relative_error

import subquad
from subquad.attention import choosing, estimate
from subquad.attention import machine_times as times

N = 400
LADDER = (subquad.Window(left=20), subquad.Window(left=80))
WIDTHS = (4.0, 24.0, 150.0)  # of which the first fits into the first window, the second into the second


def heads(widths: tuple[float, ...] = WIDTHS, n: int = N, seed: int = 0) -> tuple[Any, Any, Any]:
    """q, k, v of which each head weighs keys by a Gaussian of its width about its own place: q·k = −(x − y)²/2 w² + c."""
    x = (np.arange(n) - n / 2) / np.array(widths)[:, None]
    q, k = np.stack([x, np.ones_like(x)], axis=-1), np.stack([x, -(x**2) / 2], axis=-1)
    return q, k, 1 + np.random.default_rng(seed).standard_normal((len(widths), n, 2))


class KnownWindow(subquad.Window):
    """A window that says how much memory it takes: blocks, and what joining parts of the output takes."""

    def _extra_bytes(self, call: Any) -> int:
        return 2**24


KNOWN = (KnownWindow(left=20), KnownWindow(left=80))


def table(ratios: tuple[float, ...] = (0.25, 0.5), *, causal: bool = False, ladder: Any = LADDER) -> subquad.Crossover:
    """Exact attention takes 1 s for a head of 1000 keys; each method takes this multiple of its time."""
    methods = tuple((repr(x), (2 * ratio, ratio)) for x, ratio in zip(ladder, ratios, strict=True))
    return subquad.Crossover(causal, 2, (100, 200), (0.01, 0.04), methods)


def auto(**options: Any) -> subquad.Auto:
    return subquad.Auto(**({"ladder": LADDER, "crossover": table()} | options))


def test_the_first_rung_that_meets_the_tolerance() -> None:
    q, k, v = heads()
    chosen = auto().with_choice(q, k, v, scale=1.0)
    assert chosen.choice == (0, 1, 2)
    out = chosen(q, k, v, scale=1.0)
    for head, method in enumerate((*LADDER, subquad.Exact())):
        alone = method(q[head], k[head], v[head], scale=1.0)
        assert relative_error(out[head], alone) < 1e-13
    assert np.array_equal(auto()(q, k, v, scale=1.0), out)
    assert auto(tolerance=1e-9).with_choice(q, k, v, scale=1.0).choice == (1, 2, 2)
    assert auto(tolerance=9.0).with_choice(q, k, v, scale=1.0).choice == 0


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.1, 0.6])
@pytest.mark.parametrize("causal", [False, True])
def test_the_tolerance_is_met(tolerance: float, causal: bool) -> None:
    """On 24 heads of all widths: the errors of the whole output, not of the rows by which it was chosen."""
    q, k, v = heads(tuple(np.geomspace(1, 300, 24)), n=700)
    method = auto(tolerance=tolerance, crossover=table(causal=causal))
    args = {"causal": causal, "scale": 1.0}
    choice = np.broadcast_to(method.with_choice(q, k, v, **args).choice, 24)
    out, exact = method(q, k, v, **args), subquad.attention(q, k, v, "exact", **args)
    errors = np.linalg.norm(out - exact, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1))
    assert np.all(errors <= tolerance)
    kinds = {0.01: {0, 1, 2}, 0.05: {0, 1, 2}, 0.1: {0, 1}, 0.6: {0}}[tolerance]
    assert set(choice) == kinds


def test_rungs_go_by_their_times() -> None:
    q, k, v = heads((4.0, 4.0))
    assert auto(crossover=table((0.5, 0.25))).with_choice(q, k, v, scale=1.0).choice == 1
    assert auto(crossover=table((1.5, 0.25))).with_choice(q, k, v, scale=1.0).choice == 1
    assert auto(crossover=table((1.5, 1.0))).with_choice(q, k, v, scale=1.0).choice == 2
    assert auto(crossover=N).with_choice(q, k, v, scale=1.0).choice == 0  # as the ladder lists them
    assert auto(crossover=N + 1).with_choice(q, k, v, scale=1.0).choice == 2
    both = (table((1.5, 1.5)), table(causal=True))
    assert auto(crossover=both).with_choice(q, k, v, scale=1.0, causal=True).choice == 0
    assert auto(crossover=both).with_choice(q, k, v, scale=1.0).choice == 2


def test_few_queries_or_keys_are_computed_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look at the times of the machine, and without any estimate."""
    monkeypatch.setattr(choosing, "known_crossover", lambda *_, **__: pytest.fail("it was asked for"))
    monkeypatch.setattr(choosing, "sample", lambda *_: pytest.fail("rows were sampled"))
    q, k, v = (np.random.default_rng(0).standard_normal((n, 4)) for n in (3000, 40, 40))
    assert np.array_equal(subquad.attention(q, k, v, "auto"), subquad.attention(q, k, v, "exact"))
    assert subquad.Auto().with_choice(q, k, v).choice == len(subquad.Auto().rungs) - 1
    assert np.array_equal(auto(crossover=41)(q, k, v), subquad.attention(q, k, v, "exact"))


def test_an_item_does_not_depend_on_its_batch() -> None:
    parts = [heads(w, seed=i) for i, w in enumerate([(4.0, 150.0), (150.0, 24.0), (4.0, 4.0)])]
    q, k, v = (np.stack(x) for x in zip(*parts, strict=True))
    together = auto().with_choice(q, k, v, scale=1.0)
    assert together.choice == ((0, 2), (2, 1), (0, 0))
    out = auto()(q, k, v, scale=1.0)
    for i, part in enumerate(parts):
        alone = auto().with_choice(*part, scale=1.0)
        assert np.array_equal(np.broadcast_to(alone.choice, 2), together.choice[i])
        assert relative_error(out[i], auto()(*part, scale=1.0)) < 1e-13


def test_grouped_heads_share_the_choice_of_the_worst() -> None:
    """Four query heads on two key heads: the first group has a wide head, and the second none."""
    q, k, v = heads((4.0, 4.0, 4.0, 4.0))
    q[1] = 0  # it looks at all keys alike
    chosen = auto().with_choice(q, k[::2], v[::2], scale=1.0)
    assert chosen.choice == (2, 2, 0, 0)
    assert relative_error(chosen(q, k[::2], v[::2], scale=1.0), auto()(q, k[::2], v[::2], scale=1.0)) == 0
    one = auto().with_choice(q, k[0], v[0], scale=1.0)  # all heads share the keys
    assert one.choice == 2
    split = subquad.Auto(ladder=LADDER, choice=(0, 2, 1, 0))
    out = split(q, k[::2], v[::2], scale=1.0)
    for head, method in enumerate((LADDER[0], subquad.Exact(), LADDER[1], LADDER[0])):
        assert relative_error(out[head], method(q[head], k[0], v[head // 2 * 2], scale=1.0)) < 1e-13


def test_masks_and_documents() -> None:
    """A head is judged by the keys that are seen; a document by itself, as if it were alone."""
    q, k, v = heads((4.0, 150.0))
    mask = np.ones((2, N), dtype=bool)
    mask[1, 60:] = False  # the window of 80 keys holds all that rows near them see, but rows far away see none of it
    exact = subquad.attention(q, k, v, "exact", key_mask=mask, scale=1.0)
    out = auto()(q, k, v, key_mask=mask, scale=1.0)
    assert np.all(np.linalg.norm(out - exact, axis=(1, 2)) <= 0.05 * np.linalg.norm(exact, axis=(1, 2)))
    segments = np.repeat([0, 1], [150, 250])
    packed = auto()(q, k, v, segments=segments, scale=1.0)
    for part in (slice(0, 150), slice(150, N)):
        alone = auto()(*(x[:, part] for x in (q, k, v)), scale=1.0)
        assert relative_error(packed[:, part], alone) < 1e-13


@pytest.mark.parametrize("library", [Torch(), Jax()], ids=str)
def test_the_same_choice_on_every_library(library: Library) -> None:
    given = heads()
    with library.context("float32"):
        q, k, v = library.arrays(given, "float32")
        chosen = auto().with_choice(q, k, v, scale=1.0)
        out = auto()(q, k, v, scale=1.0)
    assert chosen.choice == (0, 1, 2)
    assert library.dtype_name(out) == "float32"
    assert relative_error(library.numpy(out), auto()(*given, scale=1.0)) < 1e-3  # exponents of 10⁴ in float32


def test_under_jit_after_with_choice(jax_library: Jax) -> None:
    import jax

    q, k, v = (jax_library.array(x, "float32") for x in heads())
    chosen = auto().with_choice(q, k, v, scale=1.0)
    compiled = jax.jit(lambda q, k, v, method: method(q, k, v, scale=1.0), static_argnums=3)
    eager = chosen(q, k, v, scale=1.0)
    assert relative_error(np.asarray(compiled(q, k, v, chosen)), np.asarray(eager)) < 1e-3
    compiled(q, k, v, auto(choice=(0, 1, 2)))  # equal methods are one program
    assert compiled._cache_size() == 1
    with pytest.raises(ValueError, match=r"'auto' chooses by the values .* choose before, on example arrays"):
        compiled(q, k, v, auto())
    with pytest.raises(ValueError, match="'auto' chooses by the values"):
        jax.jit(lambda q, k, v: auto().with_choice(q, k, v).choice)(q, k, v)


def test_compiled_by_torch_after_with_choice() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = Torch().arrays(heads(), "float64")
    chosen = auto().with_choice(q, k, v, scale=1.0)
    compiled = torch.compile(lambda q, k, v: chosen(q, k, v, scale=1.0), fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(q, k, v).numpy(), chosen(q, k, v, scale=1.0).numpy()) < 1e-12
    q.requires_grad_()
    chosen(q, k, v, scale=1.0).sum().backward()
    assert bool(torch.isfinite(q.grad).all())


def test_causal_rows_keep_their_bits_after_with_choice() -> None:
    """The choice looks at the whole input, so a later token may change it; when it is fixed, no later token matters."""
    q, k, v = heads((4.0, 24.0))
    method = auto(crossover=table(causal=True))
    chosen = method.with_choice(q, k, v, causal=True, scale=1.0)
    changed = [x.copy() for x in (q, k, v)]
    for x in changed:
        x[:, 300:] = 7.0
    before, after = (chosen(*x, causal=True, scale=1.0) for x in ((q, k, v), changed))
    assert np.array_equal(before[:, :300], after[:, :300])


def test_a_method_of_which_only_rows_are_asked() -> None:
    """One call of `on_rows` for all rungs that differ in `opened` alone; the rows are those of the sample."""
    calls = []

    class Summaries(subquad.Window):
        """A window of `opened` keys, which can give some rows alone."""

        def on_rows(self, q: Any, k: Any, v: Any, rows: Any, /, *, opened: tuple[int, ...], **given: Any) -> Any:
            calls.append((opened, len(rows), given))
            outs = [subquad.attention(q, k, v, "window", left=left, **given)[..., rows, :] for left in opened]
            return np.stack(outs, axis=-3)

    from dataclasses import dataclass, replace

    @dataclass(frozen=True, repr=False, eq=False)
    class Opened(Summaries):
        opened: int = 0

        def _evaluate(self, call: Any) -> Any:
            calls.append("whole")
            return replace(self, left=self.opened, opened=0)._evaluate(call) if self.opened else super()._evaluate(call)

    ladder = (Opened(opened=20), Opened(opened=80))
    q, k, v = heads()
    method = auto(ladder=ladder, crossover=table(ladder=ladder))
    assert method.with_choice(q, k, v, scale=1.0).choice == (0, 1, 2)
    (only,) = calls
    assert only == ((20, 80), 256, {"causal": False, "key_mask": None, "scale": 1.0})
    q4, k4, v4 = (np.concatenate([x, x[:1]]) for x in (q, k, v))
    assert method.with_choice(q4, k4[::2], v4[::2], scale=1.0).choice == 2


def test_budget_of_time() -> None:
    """A head takes 0.01 s at 100 keys, 0.16 s at 400; the windows a quarter and a half of it."""
    q, k, v = heads()
    estimate.WARNED.clear()
    for budget, choice in ((0.5, (0, 1, 2)), (0.3, (0, 1, 1)), (0.15, 0)):
        chosen = auto(max_time=budget, tolerance=0.05).with_choice(q, k, v, scale=1.0)
        assert chosen.choice == choice
    said = subquad.explain(auto(max_time=0.3), q, k, v, scale=1.0)
    assert "the least within the budget, and above the tolerance" in said.notes[0]
    with pytest.raises(ValueError, match=r"max_time is 0.1 s, and the fastest method takes about 0.12 s"):
        auto(max_time=0.1).with_choice(q, k, v, scale=1.0)
    estimate.WARNED.clear()
    far = np.stack([np.linspace(0, 40, N), np.ones(N)], axis=-1)
    with pytest.warns(subquad.PoorApproximation, match="Window has a relative error"):
        auto(max_time=0.05)(far, -far, v[0], scale=1.0)
    estimate.WARNED.clear()


def test_budget_of_bytes() -> None:
    """It is never exceeded, measured; a method that does not say what it takes is left out."""
    q, k, v = heads(n=1500)
    args = (q.astype("float32"), k.astype("float32"), v.astype("float32"))
    method = auto(max_bytes=10**8)
    assert method.with_choice(*args, scale=1.0).choice == 2  # windows do not say it
    assert "no method keeps within the budget" in subquad.explain(method, *args, scale=1.0).notes[0]
    with pytest.raises(ValueError, match=r"max_bytes is 1000, and the method that needs least takes up to \d+ bytes"):
        auto(max_bytes=1000)(*args, scale=1.0)
    for name, given in itertools.product(
        ("numpy", "torch"), ({}, {"causal": True}, {"key_mask": np.arange(1500) < 1400})
    ):
        bench = importlib.import_module(f"subquad_{name}.bench")
        q, k, v = (bench.asarray(x, device="cpu") for x in args)
        own = {key: bench.asarray(x, device="cpu") if key == "key_mask" else x for key, x in given.items()}
        for ladder in (KNOWN, ()):
            options = {"ladder": ladder, "crossover": table(causal="causal" in given, ladder=KNOWN)}
            with pytest.raises(ValueError, match="max_bytes is 1,") as said:
                auto(max_bytes=1, **options)(q, k, v, scale=1.0, **own)
            budget = int(str(said.value).split()[-2])
            call = functools.partial(auto(max_bytes=budget, **options), scale=1.0, **own)
            peak = bench.peak_extra_memory(call, q, k, v)
            assert peak is None or peak <= budget


def test_budget_of_bytes_counts_what_joining_two_methods_takes() -> None:
    """One method for all heads keeps within the bytes that it says; two make parts of the output."""
    args = heads()

    def fixed(choice: tuple[int, ...], budget: int) -> subquad.Auto:
        return auto(ladder=KNOWN, crossover=table(ladder=KNOWN), choice=choice, max_bytes=budget)

    with pytest.raises(ValueError, match="max_bytes is 1,") as said:
        fixed((0, 0, 0), 1)(*args, scale=1.0)
    budget = int(re.search(r"up to (\d+) bytes", str(said.value))[1])  # type: ignore[index]
    assert fixed((0, 0, 0), budget)(*args, scale=1.0).shape == args[2].shape
    with pytest.raises(ValueError, match="choose for such a call"):
        fixed((0, 1, 0), budget)(*args, scale=1.0)


def test_explain_tells_the_choice() -> None:
    q, k, v = heads()
    said = subquad.explain("attention", q, k, v, auto(), scale=1.0)
    (note,) = said.notes
    assert note.startswith("auto: tolerance 0.05 ≥ bound of the error; Window(left=20")
    assert "for 1 of 3 heads: estimated error" in note
    assert "0.25 of the time of exact attention" in note
    assert str(said).startswith(note)
    assert {choice.kernel for choice in said.choices} == {"block_attention", "softmax_attention"}
    fixed = subquad.explain(auto(choice=(0, 1, 2)), q, k, v, scale=1.0)
    assert fixed.notes[0].startswith("auto: as was chosen before, Window(left=20")
    assert subquad.explain("attention", q, k, v, "auto").notes == ("auto: Exact(implementation='auto') for all heads: "
        + subquad.explain("attention", q, k, v, "auto").notes[0].partition("for all heads: ")[2],)  # fmt: skip
    assert subquad.explain("attention", q, k, v, "exact").notes == ()


def test_nothing_to_choose_from() -> None:
    for shape in ((0, 3, 5, 4), (3, 0, 4)):
        x = np.ones(shape)
        assert auto(crossover=1)(x, x, x).shape == shape
        assert auto(crossover=1).with_choice(x, x, x).choice in (0, 2)
    assert auto(ladder=(), crossover=1).with_choice(*heads()).choice == 0
    q, k, v = heads()
    nystrom = subquad.Auto(ladder=(subquad.Nystrom(num_landmarks=9),), crossover=1, tolerance=99.0)
    assert nystrom.with_choice(q, k, v, scale=1.0).choice == 0
    assert nystrom.with_choice(q, k, v, scale=1.0, causal=True).choice == 1  # it has no causal form
    hidden = auto(crossover=1).with_choice(q, k, v, key_mask=np.zeros(N, bool))
    assert np.all(hidden(q, k, v, key_mask=np.zeros(N, bool)) == 0)


def test_times_between_those_measured() -> None:
    found = table()
    name = repr(LADDER[0])
    assert found.ratio(name, 99) == math.inf
    assert found.ratio(LADDER[0], 100) == pytest.approx(0.5)
    assert found.ratio(name, 141) == pytest.approx(0.5 * 2 ** -math.log2(1.41), rel=1e-9)
    assert found.ratio(name, 10**6) == pytest.approx(0.25)
    assert found.exact_seconds(200, 2, 2) == pytest.approx(0.04)
    assert found.exact_seconds(50, 2, 2) == pytest.approx(0.0025)
    assert found.exact_seconds(2000, 2, 6) == pytest.approx(8.0)
    one = subquad.Crossover(True, 4, (64,), (0.5,), (("a", (0.7,)),))
    assert (one.ratio("a", 64), one.ratio("a", 999)) == (0.7, 0.7)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(times, "KEPT", {})
    monkeypatch.setattr(times, "LENGTHS", (64, 128))
    return tmp_path / "kept"


def test_times_are_measured_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    like = np.zeros((1, 8), dtype=np.float32)
    first = times.known_crossover(like, LADDER, causal=True)
    assert (first.causal, first.channels, first.lengths) == (True, 8, (64, 128))
    (path,) = folder.iterdir()
    assert json.loads(path.read_text(encoding="utf-8"))["lengths"] == [64, 128]
    monkeypatch.setattr(times, "seconds_for", lambda *_, **__: pytest.fail("measured again"))
    assert times.known_crossover(like, LADDER, causal=True) == first
    times.KEPT.clear()
    assert times.known_crossover(like, LADDER, causal=True) == first


@pytest.mark.parametrize("takes", [0.0, 0.2])
def test_measuring_ends_and_is_told_when_it_takes_long(
    takes: float, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of four lengths two are measured, and one if that took long."""
    lengths = []

    def seconds_for(like: Any, methods: Any, n: int, **_: Any) -> list[float]:
        lengths.append(n)
        time.sleep(takes)
        return [1.0] * (1 + len(methods))

    monkeypatch.setattr(times, "LENGTHS", (64, 128, 256, 512))
    monkeypatch.setattr(times, "ENOUGH", 0.1)
    monkeypatch.setattr(times, "seconds_for", seconds_for)
    caplog.set_level(logging.INFO, "subquad")
    found = times.known_crossover(np.zeros((1, 8), dtype=np.float32), LADDER, causal=True)
    assert lengths == ([128] if takes else [128, 64])
    assert found.lengths == (64, 128, 256, 512)
    assert [str(folder) in record.getMessage() for record in caplog.records] == [True] * bool(takes)


def test_times_of_lengths_that_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact attention takes n², methods the median exponent of their class within 1 to 2."""
    monkeypatch.setattr(times, "LENGTHS", (100, 200, 400))
    methods = (*(subquad.Window(left=x) for x in (1, 2, 3)), subquad.LSH(seed=0), subquad.BigBird(seed=0))
    short, long = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [3.0, 2.0**1.5, 2.0, 8.0, 1.0, 8.0]
    found = times.predicted({200: long, 100: short}, methods, causal=False, channels=8)
    assert found.seconds == pytest.approx((1.0, 3.0, 12.0))
    rows = [row for _, row in found.methods]
    expected = [2.0**1.5 * 2**1.5, 2.0 * 2**1.5, 8.0 * 2**1.5, 1.0 * 2, 8.0 * 4]
    assert [row[2] for row in rows] == pytest.approx([x / 12 for x in expected])
    assert [row[:2] for row in rows] == [pytest.approx((x, y / 3)) for x, y in zip(short[1:], long[1:], strict=True)]
    alone = times.predicted({200: [4.0, 2.0]}, methods[:1], causal=True, channels=8)
    assert alone.seconds == pytest.approx((1.0, 4.0, 16.0))
    assert alone.methods[0][1] == pytest.approx([0.5 * 2 ** ((2 - times.GROWTH) * x) for x in (1, 0, -1)])


def test_files_that_cannot_be_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A broken file is written again; where no folder can be made, the times are measured in each process."""
    like = np.zeros((1, 8), dtype=np.float32)
    times.known_crossover(like, LADDER, causal=False)
    (path,) = folder.iterdir()
    path.write_text("{", encoding="utf-8")
    times.KEPT.clear()
    times.known_crossover(like, LADDER, causal=False)
    assert json.loads(path.read_text(encoding="utf-8"))["channels"] == 8
    path.unlink()
    folder.rmdir()
    folder.write_text("a file", encoding="utf-8")
    times.KEPT.clear()
    assert times.known_crossover(like, LADDER, causal=False).lengths == (64, 128)
    assert "cannot be kept" in caplog.records[-1].getMessage()


def test_the_folder_of_the_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SUBQUAD_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert times.cache_folder() == tmp_path / ".cache" / "subquad"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert times.cache_folder() == Path("/x/subquad")
    monkeypatch.setenv("SUBQUAD_CACHE", "/own")
    assert times.cache_folder() == Path("/own")


def test_measured_on_this_machine(eager: Library) -> None:
    with eager.context("float32"):
        like = eager.array(np.zeros((2, 4)), "float32")
        found = subquad.measure_crossover(like, [subquad.Window(left=3)], lengths=[96, 32], heads=1)
    assert found.lengths == (32, 96)
    assert found.channels == 4
    assert found.ratio(subquad.Window(left=3), 50) > 0


x = np.zeros((6, 4))
one = subquad.Exact()
REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "tolerance": (ValueError, "tolerance must be positive", lambda: auto(tolerance=0.0)),
    "max_bytes": (TypeError, "max_bytes must be an integer", lambda: auto(max_bytes=1e6)),
    "max_time": (ValueError, "max_time must be positive", lambda: auto(max_time=-1)),
    "rows": (ValueError, "rows must be at least 1", lambda: auto(rows=0)),
    "ladder-list": (TypeError, "expected a tuple of method objects", lambda: auto(ladder=[one])),
    "ladder-name": (TypeError, "expected a tuple of method objects", lambda: auto(ladder=("window",))),
    "ladder-auto": (ValueError, "put the methods themselves into it", lambda: auto(ladder=(auto(),))),
    "ladder-twice": (ValueError, "in which a method stands twice", lambda: auto(ladder=(one, one))),
    "ladder-arrays": (ValueError, "whose omega are arrays", lambda: auto(ladder=(subquad.Favor(omega=x),))),
    "crossover": (TypeError, "crossover must be an integer, got 1.5.*expected a Crossover", lambda: auto(crossover=1.5)),
    "crossover-tuple": (TypeError, "expected Crossover objects in the tuple", lambda: auto(crossover=(3, 4))),
    "crossover-time": (ValueError, "max_time needs times", lambda: auto(crossover=3, max_time=1.0)),
    "crossover-causal": (ValueError, "no times of causal calls", lambda: auto()(*heads(), causal=True)),
    "crossover-method": (ValueError, r"no times of Window\(left=3", lambda: auto(ladder=(subquad.Window(left=3),))(*heads())),
    "choice": (ValueError, "choice must be at most 2, got 3", lambda: auto(choice=3)),
    "choice-list": (TypeError, "choice must be an integer", lambda: auto(choice=[0])),
    "choice-ragged": (ValueError, "equally long parts", lambda: auto(choice=((0, 1), (0,)))),
    "choice-shape": (ValueError, r"choice is an array \(4,\), which does not fit the batch \[3\]", lambda: auto(choice=(0, 1, 2, 0))(*heads())),
    "choice-bytes": (ValueError, "was chosen before takes up to .* choose for such a call", lambda: auto(choice=-1, max_bytes=9)(x, x, x)),
    "choice-bytes-unknown": (ValueError, "does not say how much it takes", lambda: auto(choice=0, max_bytes=10**9)(x, x, x)),
    "choice-causal": (NotImplementedError, "no causal form", lambda: auto(ladder=(subquad.Nystrom(),), choice=0)(x, x, x, causal=True)),
    "visible": (NotImplementedError, "Auto cannot take visible", lambda: auto()(x, x, x, visible=np.zeros(6, int))),
    "step": (NotImplementedError, "Auto has no step", lambda: auto().step(x, x, x)),
    "lengths": (ValueError, "lengths must be at least 1", lambda: subquad.measure_crossover(x, [], lengths=[0])),
    "like": (TypeError, "like has dtype int", lambda: subquad.measure_crossover(np.ones((2, 2), int), [])),
    "table-lengths": (ValueError, "expected positive integers that increase", lambda: subquad.Crossover(True, 4, (2, 1), (1.0, 1.0))),
    "table-numbers": (ValueError, "a is .*, expected 2 positive numbers", lambda: subquad.Crossover(True, 4, (1, 2), (1.0, 1.0), (("a", (1.0, 0.0)),))),
    "table-rows": (ValueError, "seconds is .*, expected 2 positive numbers", lambda: subquad.Crossover(True, 4, (1, 2), (1.0,))),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_says_what_is_wrong(case: str) -> None:
    error, message, call = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_methods_compare_and_hash_by_their_options() -> None:
    assert auto() == auto()
    assert hash(auto()) == hash(auto())
    assert auto() != auto(choice=1)
    assert repr(subquad.Auto()) == "Auto(tolerance=0.05)"
    assert subquad.Auto().rungs[-1] == subquad.Exact()


def test_budget_of_bytes_of_a_batch() -> None:
    """The budget that a call of items with grouped heads names is enough for it."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 40, 8))
    k, v = k[:, :2], v[:, :2]
    with pytest.raises(ValueError, match="max_bytes is 1,") as said:
        auto(max_bytes=1)(q, k, v)
    needs = int(str(said.value).split()[-2])
    assert auto(max_bytes=needs)(q, k, v).shape == q.shape


def test_heads_with_choices_of_their_own_may_share_arrays_without_heads() -> None:
    q, k, v = heads((4.0, 4.0, 4.0, 4.0))
    split = subquad.Auto(ladder=LADDER, choice=(0, 2, 1, 0))
    out = split(q, k[0], v[0], scale=1.0, key_mask=np.arange(N) % 7 > 0)
    for head, method in enumerate((LADDER[0], subquad.Exact(), LADDER[1], LADDER[0])):
        alone = method(q[head], k[0], v[0], scale=1.0, key_mask=np.arange(N) % 7 > 0)
        assert relative_error(out[head], alone) < 1e-13


def test_without_a_known_error_the_most_expensive_within_the_budget_is_taken() -> None:
    """No row sees a key; exact attention of three heads of 400 keys takes 0.48 s."""
    q, k, v = heads()
    chosen = auto(max_time=0.3).with_choice(q, k, v, scale=1.0, key_mask=np.zeros(N, bool))
    assert chosen.choice == 1


BYTES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any], int]] = {
    # heads, dtype, options of the method, of the call, bytes by hand: the temporaries of exact attention are 8 blocks of
    # 2¹⁹ numbers, or of 64 rows of all heads by 256 keys
    "exact": (3, "float64", {"ladder": ()}, {}, 8 * 8 * 2**19),
    "exact of many heads": (64, "float64", {"ladder": ()}, {}, 8 * 8 * 64 * 64 * 256),
    "exact, causal": (3, "float64", {"ladder": ()}, {"causal": True}, 8 * (8 * 2**19 + 3 * N * 4)),  # and one copy
    "exact, masked": (3, "float32", {"ladder": ()}, {"key_mask": np.ones(N, bool)}, 4 * (8 * 2**19 + 2 * 3 * N * 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", BYTES)
def test_the_least_budget_of_bytes_is_told(name: str) -> None:
    count, dtype, options, given, expected = BYTES[name]
    q, k, v = (x.astype(dtype) for x in heads(tuple(np.linspace(4, 100, count))))
    table_of = table(ladder=KNOWN, causal="causal" in given)
    with pytest.raises(ValueError, match=f"takes up to {expected} bytes"):
        auto(max_bytes=1, crossover=table_of, **options)(q, k, v, scale=1.0, **given)


@pytest.mark.parametrize(("rows", "sampled"), [(9, 9), (128, 128), (999, N)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_choosing_takes_copies_of_sampled_rows_and_an_output(rows: int, sampled: int, dtype: str) -> None:
    """Of three heads: 8 of each sampled row, q, v and 4 numbers; at a byte less all is exact."""
    q, k, v = (x.astype(dtype) for x in heads())
    needs = q.itemsize * (8 * 2**19 + 8 * 3 * sampled * (2 + 2 + 4) + 3 * N * 2)
    for budget, choice in ((needs, 0), (needs - 1, 2)):
        method = auto(ladder=KNOWN, crossover=table(ladder=KNOWN), tolerance=99.0, rows=rows, max_bytes=budget)
        assert method.with_choice(q, k, v, scale=1.0).choice == choice
