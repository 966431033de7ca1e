"""Every scan goes through time alike: packed documents, padded steps and states on the way are what separate calls give.

A row of the table is a registered scan. Scans that walk through time, step by step, are equal to the last bit.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rows.libraries import LIBRARIES, Jax, Library, NumPy, Torch, relative_error, tolerance, tree_map
from rows.scans import SCANS as FORMS
from rows.scans import Scan
from rows.times import Arrays, cut, drawn, of_steps, out_axis, time_axes, with_time

import subquad
from subquad.core.kernel import Kernel
from subquad.registry import SCANS

WALKS = {
    "linear_scan",
    "selective_scan",
    "delta_rule",
    "causal_conv1d",
}  # scans whose compiled form goes from step to step
N = 41
LENGTHS = (1, 22, 18)  # of documents
NUMBERS = np.repeat([5, -2, 5], LENGTHS)  # a number may come back: it is another document
PADDED = np.random.default_rng(7).random(N) < 0.4
PADDED[:3] = PADDED[-4:] = True  # on both sides, and within
NAMES = [name for name, row in SCANS.items() if with_time(row)]
every_scan = pytest.mark.parametrize("name", NAMES)
implementations = pytest.mark.parametrize("implementation", ["auto", "generic"])


def directions(name: str) -> list[bool]:
    """Whether time runs from the end, each way that the scan has."""
    return [False, True] if "reverse" in inspect.signature(SCANS[name].function).parameters else [False]


def has_limits(name: str) -> bool:
    """Whether a scan has step sizes that can be limited."""
    return "delta_limits" in inspect.signature(SCANS[name].function).parameters


def scan(name: str, arrays: Arrays, implementation: str = "auto", **options: Any) -> Any:
    """A scan of inputs by name, with the options of its example."""
    return SCANS[name].call(arrays, drawn(name, N)[1] | options | {"implementation": implementation})


def check_equal(name: str, implementation: str, got: Any, expected: Any) -> None:
    """Trees of arrays are equal: to the last bit where the scan walks through time."""
    if isinstance(expected, tuple | list):
        for x, y in zip(got, expected, strict=True):
            check_equal(name, implementation, x, y)
        return
    assert got.shape == expected.shape
    if name in WALKS and implementation == "auto":
        assert np.array_equal(got, expected)
    else:
        assert relative_error(got, expected) <= 1e-12


def test_every_scan_has_these_arguments() -> None:
    ours = {name for name, row in SCANS.items() if row.function.__module__.startswith("subquad.")}
    assert ours <= set(NAMES)


@implementations
@every_scan
def test_segments_are_separate_documents(name: str, implementation: str) -> None:
    """The first of which goes on from the state given; with reverse=True it is the last in the arrays."""
    arrays, _ = drawn(name, N)
    for reverse in directions(name):
        run = functools.partial(scan, name, implementation=implementation, return_state=True)
        options = {"reverse": True} if reverse else {}
        _, before = run(arrays, **options)
        out, last = run(arrays | {"initial_state": before}, segments=NUMBERS, **options)
        edges, parts, state = np.cumsum([0, *LENGTHS]), {}, {"initial_state": before}
        for i in (2, 1, 0) if reverse else (0, 1, 2):
            piece = cut(name, arrays, slice(edges[i], edges[i + 1])) | state
            (parts[i], end), state = run(piece, **options), {}
        whole = np.concatenate([parts[i] for i in range(3)], axis=out_axis(name))
        check_equal(name, implementation, (out, last), (whole, end))


@implementations
@every_scan
def test_padding_is_as_if_it_were_not_there(name: str, implementation: str) -> None:
    """Wherever it stands, with documents too: numbers of padded steps do not count, their outputs are 0."""
    arrays, _ = drawn(name, N)
    numbers = np.where(PADDED, np.arange(N) + 100, NUMBERS)
    for options in [{}, {"segments": numbers}]:
        for reverse in directions(name):
            way = {"reverse": True} if reverse else {}
            kept = {key: x[~PADDED] for key, x in options.items()}
            run = functools.partial(scan, name, implementation=implementation, return_state=True, **way)
            out, last = run(arrays, mask=~PADDED, **options)
            expected = run(cut(name, arrays, ~PADDED), **kept)
            check_equal(name, implementation, (of_steps(name, out, ~PADDED), last), expected)
            assert not np.any(of_steps(name, out, PADDED))


@implementations
@every_scan
def test_states_at_positions_are_those_of_split_calls(name: str, implementation: str) -> None:
    arrays, _ = drawn(name, N)
    positions = (7, 0, N, 23, 7)
    for reverse in directions(name):
        way = {"reverse": True} if reverse else {}
        run = functools.partial(scan, name, implementation=implementation, segments=NUMBERS, **way)
        plain = run(arrays, return_state=True)
        out, last, states = run(arrays, states_at=positions, return_state=True)
        check_equal(name, implementation, (out, last), plain)
        for i, p in enumerate(positions):
            some = slice(N - p, N) if reverse else slice(0, p)
            whole = run.func(
                name, cut(name, arrays, some), implementation, segments=NUMBERS[some], return_state=True, **way
            )
            check_equal(name, implementation, tree_map(lambda x, i=i: x[i], states), whole[1])
        alone = run(arrays, states_at=list(positions))
        check_equal(name, implementation, alone, (out, states))


@every_scan
def test_states_at_positions_of_one_document(name: str) -> None:
    """Without segments they are those of one segment."""
    arrays, _ = drawn(name, N)
    for way in [{"reverse": True} if reverse else {} for reverse in directions(name)]:
        run = functools.partial(scan, name, arrays, "generic", states_at=(7, 0, N), **way)
        check_equal(name, "generic", run(), run(segments=np.zeros(N, np.int64)))


@every_scan
def test_states_at_every_so_many_steps(name: str) -> None:
    arrays, _ = drawn(name, N)
    _, few = scan(name, arrays, states_at=subquad.every(10))
    _, same = scan(name, arrays, states_at=range(10, N + 1, 10))
    check_equal(name, "auto", few, same)
    _, none = scan(name, arrays, states_at=subquad.every(N + 1))
    _, empty = scan(name, arrays, states_at=())
    tree_map(lambda x: check_none(x, few), none)
    tree_map(lambda x: check_none(x, few), empty)


def check_none(x: Any, few: Any) -> None:
    first = few[0] if isinstance(few, tuple) else few
    assert x.shape[0] == 0
    assert x.ndim == first.ndim


@implementations
@every_scan
def test_any_split_is_the_whole(name: str, implementation: str) -> None:
    """A chunk that begins a document is given no state, any other the state of the chunk before."""
    arrays, _ = drawn(name, N)
    keep = ~PADDED
    run = functools.partial(scan, name, implementation=implementation, return_state=True)
    whole = run(arrays, segments=NUMBERS, mask=keep)
    parts, state = [], {}
    edges = (0, 5, 20, 23, 24, 40, N)
    for start, stop in itertools.pairwise(edges):
        some = slice(start, stop)
        if start == LENGTHS[0] + LENGTHS[1]:
            state = {}
        given = {"segments": NUMBERS[some], "mask": keep[some]}
        if start == 0:  # its first document is padded away
            given.pop("segments")
        out, end = run(cut(name, arrays, some) | state, **given)
        parts.append(out)
        state = {"initial_state": end}
    check_equal(name, implementation, (np.concatenate(parts, axis=out_axis(name)), end), whole)


@implementations
@every_scan
def test_each_item_has_a_timeline_of_its_own(name: str, implementation: str) -> None:
    arrays, _ = drawn(name, N)
    shape = scan(name, arrays).shape
    batch = shape[: out_axis(name) % len(shape)]
    rng = np.random.default_rng(1)
    mask, numbers = rng.random((*batch, N)) < 0.7, np.sort(rng.integers(0, 4, (*batch, N)), axis=-1)
    out = scan(name, arrays, implementation, mask=mask, segments=numbers)
    for index in np.ndindex(batch):
        alone = scan(name, arrays, implementation, mask=mask[index], segments=numbers[index])
        check_equal(name, implementation, out[index], alone[index])


@implementations
@every_scan
def test_what_is_hidden_changes_no_bit_and_no_gradient(name: str, implementation: str) -> None:
    """NaN in padded steps, and in another document; gradients by torch."""
    torch = pytest.importorskip("torch")
    arrays, axes = drawn(name, N)[0], time_axes(name)
    middle = np.arange(N) // (N // 3 + 1) == 1
    for hidden, options in [
        (PADDED, {"mask": ~PADDED}),
        (middle, {"segments": np.where(middle, 1, 0)}),
        (middle, {"segments": np.where(middle, 1, 0), "mask": ~middle}),
        *[(PADDED, {"mask": ~PADDED, "delta_limits": (0.005, 0.02)})] * has_limits(name),
    ]:
        for way in [{"reverse": True} if reverse else {} for reverse in directions(name)]:
            given = {key: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for key, x in options.items()}
            found = []
            for filling in (None, np.nan, np.inf):
                own = {key: np.array(x) for key, x in arrays.items()}
                for key, axis in axes.items():
                    if filling is not None:
                        np.moveaxis(own[key], axis, 0)[hidden] = filling
                tensors = {key: torch.from_numpy(x).requires_grad_() for key, x in own.items()}
                out = scan(name, tensors, implementation, **given, **way)
                seen = torch.index_select(out, out_axis(name), torch.from_numpy(np.flatnonzero(~hidden)))
                weights = torch.linspace(-1, 2, seen.numel(), dtype=seen.dtype).reshape(seen.shape)
                keys = list(axes) if "mask" not in options else list(tensors)  # all share the parameters
                grads = torch.autograd.grad((seen * weights).sum(), [tensors[key] for key in keys])
                by = {key: x.numpy() for key, x in zip(keys, grads, strict=True)}
                for key in axes:
                    moved = np.moveaxis(by[key], axes[key], 0)
                    if "mask" in options:
                        assert not np.any(moved[hidden])
                    by[key] = moved[~hidden]
                found.append([seen.detach().numpy(), *by.values()])
            for other in found[1:]:
                for x, y in zip(found[0], other, strict=True):
                    assert np.array_equal(x, y)
            assert all(np.any(x) for x in found[0])


@every_scan
def test_gradients_are_those_of_separate_documents(name: str) -> None:
    """By every input, the first state too, through outputs, last state and states at positions, of both forms."""
    torch = pytest.importorskip("torch")
    arrays, _ = drawn(name, N)
    state = scan(name, arrays, return_state=True)[1]
    if isinstance(state, tuple):
        pytest.skip("a state in parts has a test of its own")
    for way in [{"reverse": True} if reverse else {} for reverse in directions(name)]:
        expected = None
        for implementation in ("by hand", "generic", "auto"):
            tensors = {
                key: torch.from_numpy(x).requires_grad_() for key, x in (arrays | {"initial_state": state}).items()
            }
            if implementation == "by hand":
                out, last, at = of_documents(name, tensors, way, torch)
            else:
                options = {"segments": torch.from_numpy(NUMBERS), "states_at": (30,), "return_state": True}
                out, last, at = scan(name, tensors, implementation, **options, **way)
            loss = sum(weighted(x) for x in (out, last, at))
            found = [x.resolve_conj().numpy() for x in torch.autograd.grad(loss, list(tensors.values()))]
            for x, y in zip(found, expected or found, strict=True):
                assert relative_error(x, y) <= 1e-12
            expected = expected or found


def weighted(x: Any) -> Any:
    """A real number in which every entry of a tensor counts differently."""
    weights = np.linspace(-1, 2, x.numel()).reshape(x.shape)
    weights = x.real.new_tensor(weights)
    return ((x.real + x.imag / 2 if x.is_complex() else x) * weights).sum()


def of_documents(name: str, tensors: Arrays, way: dict[str, Any], torch: Any) -> tuple[Any, Any, Any]:
    """(output, last state, state after 30 steps stacked) by calls for each document, which know no segments."""
    edges, parts, state = np.cumsum([0, *LENGTHS]), {}, {"initial_state": tensors["initial_state"]}
    own = {key: x for key, x in tensors.items() if key != "initial_state"}
    run = functools.partial(scan, name, implementation="generic", return_state=True, **way)
    order, done, at = ((2, 1, 0) if way else (0, 1, 2)), 0, None
    for i in order:
        steps = slice(edges[i], edges[i + 1])
        if done < 30 <= done + LENGTHS[i]:
            count = 30 - done
            some = slice(steps.stop - count, steps.stop) if way else slice(steps.start, steps.start + count)
            at = run(cut(name, own, some) | state)[1]
        (parts[i], last), state = run(cut(name, own, steps) | state), {}
        done += LENGTHS[i]
    return torch.cat([parts[i] for i in range(3)], dim=out_axis(name)), last, at[None]


@pytest.mark.parametrize("library", [x for x in LIBRARIES if type(x.values[0]) is not NumPy])
@every_scan
def test_every_library(library: Library, name: str) -> None:
    """Under `jit` the numbers and the mask are traced; the positions are not."""
    arrays, dtype = drawn(name, N)[0], library.dtypes[0]
    options = {"segments": NUMBERS, "mask": ~PADDED}

    def run(given: Arrays, options: Arrays) -> Any:
        return scan(name, given, states_at=(3, 30), return_state=True, **options)

    got, expected = library.call(run, arrays, options, dtype=dtype), run(arrays, options)
    for x, y in zip(flat(got), flat(expected), strict=True):
        assert tuple(x.shape) == y.shape
        if library.has_values:
            assert relative_error(library.numpy(x), y) <= tolerance(dtype)


def flat(tree: Any) -> list[Any]:
    return [x for part in tree for x in flat(part)] if isinstance(tree, tuple) else [tree]


@every_scan
def test_torch_compile_and_vmap(name: str) -> None:
    torch = pytest.importorskip("torch")
    torch._dynamo.reset()
    row, options = SCANS[name], drawn(name, N)[1]
    tensors = {key: torch.from_numpy(x) for key, x in drawn(name, N)[0].items()}
    numbers, keep = torch.from_numpy(np.stack([NUMBERS, 0 * NUMBERS])), torch.from_numpy(np.stack([~PADDED, PADDED]))

    def run(numbers: Any, keep: Any) -> Any:
        return row.call(tensors, {**options, "segments": numbers, "mask": keep, "states_at": (9,)})

    each = [run(numbers[i], keep[i]) for i in range(2)]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    mapped = torch.func.vmap(run)(numbers, keep)
    for i in range(2):
        for got in (compiled(numbers[i], keep[i]), tree_map(lambda x, i=i: x[i], mapped)):
            for x, y in zip(flat(got), flat(each[i]), strict=True):
                assert relative_error(x.numpy(), y.numpy()) <= 1e-12
    torch._dynamo.reset()


@every_scan
def test_jax_vmap_and_gradient(jax_library: Jax, name: str) -> None:
    import jax

    with jax_library.context("float64"):
        arrays = jax_library.arrays(drawn(name, N)[0], "float64")
        numbers, keep = (jax_library.array(np.stack(x), "float64") for x in ([NUMBERS, 0 * NUMBERS], [~PADDED, PADDED]))

        def loss(first: Any, numbers: Any, keep: Any) -> Any:
            key = next(iter(arrays))
            return (scan(name, arrays | {key: first}, segments=numbers, mask=keep) ** 2).sum()

        first = next(iter(arrays.values()))
        found = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(first, numbers, keep)
        with_numpy = [torch_gradient(name, np.asarray(numbers[i]), np.asarray(keep[i])) for i in range(2)]
    for got, expected in zip(found, with_numpy, strict=True):
        assert relative_error(np.asarray(got), expected) <= tolerance("float64")


def torch_gradient(name: str, numbers: Any, keep: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    tensors = {key: torch.from_numpy(x) for key, x in drawn(name, N)[0].items()}
    first = next(iter(tensors.values())).requires_grad_()
    given = {"segments": torch.from_numpy(np.array(numbers)), "mask": torch.from_numpy(np.array(keep))}
    (scan(name, tensors, "generic", **given) ** 2).sum().backward()
    return first.grad.numpy()


@pytest.mark.parametrize("name", [name for name in NAMES if SCANS[name].step is not None])
def test_steps_of_items_that_have_ended(name: str) -> None:
    """Their states stay as they are; all steps together are the scan with that mask, to the last bit if it walks."""
    row, (arrays, options), axes = SCANS[name], drawn(name, N), time_axes(name)
    assert row.step is not None
    step = dataclasses.replace(row, function=row.step, positional=("state", *row.positional))
    keep, state, outs = ~PADDED[:9], None, []
    for t in range(9):
        token = {key: np.take(x, t, axis=axes[key]) if key in axes else x for key, x in arrays.items()}
        out, state = step.call({"state": state, **token}, options | {"mask": np.asarray(keep[t])})
        outs.append(out)
    expected = scan(name, cut(name, arrays, slice(0, 9)), mask=keep, return_state=True)
    check_equal(name, "auto", (np.stack(outs, axis=out_axis(name)), state), expected)


@every_scan
def test_summaries_know_documents_and_padding(name: str) -> None:
    """A chunk in which a document begins has no decay: nothing from before it counts."""
    row, (arrays, options) = SCANS[name], drawn(name, N)
    if row.state.merge is None:
        pytest.skip("its states do not merge")

    def summary(some: slice, given: Arrays) -> Any:
        own = cut(name, arrays, some)
        positional = [own.get(key) for key in row.positional]
        rest = {key: x for key, x in own.items() if key not in row.positional}
        return subquad.summarize_scan(name, *positional, **rest, **options, **given)

    keep = {"mask": ~PADDED}
    left, right = (summary(x, {"mask": ~PADDED[x]}) for x in (slice(0, 20), slice(20, N)))
    last = scan(name, arrays, return_state=True, **keep)[1]
    assert relative_error(subquad.merge_scan(left, right)["state"], last) <= 1e-12
    whole = summary(slice(0, N), {"segments": NUMBERS})
    assert not any(np.any(x) for key, x in whole.items() if key != "state")
    assert relative_error(whole["state"], scan(name, arrays, return_state=True, segments=NUMBERS)[1]) <= 1e-12
    with pytest.raises(TypeError, match="states_at"):
        summary(slice(0, N), {"states_at": (1,)})


@every_scan
def test_summaries_of_a_batch_are_those_of_its_items(name: str) -> None:
    """With two batch axes more, and a mask for each item."""
    row, (arrays, options) = SCANS[name], drawn(name, N)
    if row.state.merge is None:
        pytest.skip("its states do not merge")
    axis, axes = out_axis(name), time_axes(name)
    own = SCANS[name].call(arrays, options).ndim + axis
    mask = np.random.default_rng(1).random((2, 3, *(1,) * own, N)) < 0.6

    def summary(given: Arrays, keep: np.ndarray) -> Any:
        positional = [given.get(key) for key in row.positional]
        rest = {key: x for key, x in given.items() if key not in row.positional}
        return subquad.summarize_scan(name, *positional, **rest, **options, mask=keep)

    wide = {key: np.broadcast_to(x, (2, 3, *x.shape)) if key in axes else x for key, x in arrays.items()}
    whole = summary(wide, mask)
    for i, j in itertools.product(range(2), range(3)):
        for key, x in summary(arrays, mask[i, j]).items():
            assert relative_error(whole[key][i, j], x) <= 1e-12


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"segments": np.zeros(N)}, TypeError, "segments has dtype float64, expected integers"),
    ({"segments": np.zeros(N - 1, int)}, ValueError, rf"segments has shape \({N - 1},\), expected \(\.\.\., {N}\)"),
    ({"segments": [0] * N}, TypeError, r"segments is a list.*numpy.asarray\(segments, dtype=int\)"),
    ({"mask": np.ones(N)}, TypeError, "mask has dtype float64, expected bool"),
    ({"mask": np.ones((), bool)}, ValueError, "mask has shape"),
    ({"mask": np.ones((7, N), bool)}, ValueError, "mask"),
    ({"mask": np.ones((7, 1, 1, 1, 1, N), bool)}, ValueError, "mask has shape .* does not broadcast"),
    ({"states_at": 3}, TypeError, r"states_at is 3 .*\(3,\) is one position, subquad.every\(3\) all multiples"),
    ({"states_at": (3, N + 1)}, ValueError, rf"states_at\[1\] must be at most {N}, got {N + 1}"),
    ({"states_at": (-1,)}, ValueError, r"states_at\[0\] must be at least 0"),
    ({"states_at": (1.5,)}, TypeError, r"states_at\[0\] must be an integer"),
    ({"states_at": "all"}, TypeError, "states_at is 'all'"),
]


@pytest.mark.parametrize(
    ("options", "error", "match"), WRONG, ids=[next(iter(x)) + str(i) for i, (x, *_) in enumerate(WRONG)]
)
@every_scan
def test_errors_name_the_argument(name: str, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        scan(name, drawn(name, N)[0], **options)


def test_every_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        subquad.every(0)
    with pytest.raises(TypeError, match="every must be an integer"):
        subquad.every(2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [0, 1])
@every_scan
def test_few_steps(name: str, n: int) -> None:
    arrays = cut(name, drawn(name, N)[0], slice(0, n))
    options = {"segments": np.zeros(n, int), "mask": np.ones(n, bool)}
    out, last, states = scan(name, arrays, states_at=(0, n), return_state=True, **options)
    check_equal(name, "auto", (out, last), scan(name, arrays, return_state=True))
    for x, y in zip(flat(states), flat(last), strict=True):
        assert x.shape == (2, *y.shape)
        assert np.array_equal(x[1], y)


# The selective scan ---------------------------------------------------------------------------------------------------


def selective(form: Scan, arrays: Arrays, implementation: str = "auto", **options: Any) -> Any:
    positional = [arrays.get(name) for name in ("u", "delta", "A", "B", "C", "D")]
    rest = {name: arrays.get(name) for name in ("z", "delta_bias", "initial_state")}
    options = {"delta_softplus": form.softplus, "reverse": form.reverse, "return_state": True} | options
    return subquad.selective_scan(*positional, **rest, implementation=implementation, **options)


def steps_of(form: Scan, arrays: Arrays, some: Any) -> Arrays:
    place = len(form.batch)
    timed = {name for name, x in arrays.items() if x.ndim > place and x.shape[place : place + 1] == (N,) and x.ndim > 1}
    timed -= {"A", "D", "delta_bias", "initial_state"}
    return {name: x[(*[slice(None)] * place, some)] if name in timed else x for name, x in arrays.items()}


@implementations
@pytest.mark.parametrize("limits", [None, (0.1, 0.4)], ids=["", "limits"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_forms_of_the_selective_scan(form: Scan, limits: Any, implementation: str) -> None:
    """Complex, grouped and constant maps, gates, biases with and without softplus: documents with padding."""
    arrays, keep, place = form.draw(N), ~PADDED, len(form.batch)
    run = functools.partial(selective, form, implementation=implementation, delta_limits=limits)
    out, last, states = run(arrays, segments=NUMBERS, mask=keep, states_at=(30,))
    shown = (*[slice(None)] * place, keep)
    expected, end = run(steps_of(form, arrays, keep), segments=NUMBERS[keep])
    check_equal("selective_scan", implementation, (out[shown], last), (expected, end))
    assert not np.any(out[(*[slice(None)] * place, PADDED)])
    some = slice(N - 30, N) if form.reverse else slice(0, 30)
    at = run(steps_of(form, arrays, some), segments=NUMBERS[some], mask=keep[some])[1]
    check_equal("selective_scan", implementation, states[0], at)


@pytest.mark.parametrize("softplus", [False, True])
@implementations
def test_padding_is_exact_in_half_precision(implementation: str, softplus: bool) -> None:
    """A bias that half precision does not have is no reason for a step that is not 0."""
    form = Scan("", extras=("delta_bias", "z"), softplus=softplus)
    arrays = {name: x.astype("f4" if name in ("A", "delta_bias") else "f2") for name, x in form.draw(N).items()}
    out, last = selective(form, arrays, implementation, mask=~PADDED)
    expected, end = selective(form, steps_of(form, arrays, ~PADDED), implementation)
    assert out.dtype == np.float16
    if implementation == "auto":
        assert np.array_equal(last, end)
        assert np.array_equal(out[:, ~PADDED], expected)
    assert relative_error(last, end) <= tolerance("float32")


@implementations
@pytest.mark.parametrize("library", [NumPy(), Torch(), Jax()], ids=str)
def test_limits_of_step_sizes(library: Library, implementation: str) -> None:
    """Clipped after softplus; half of them are outside, and have no gradient."""
    form = Scan("", extras=("delta_bias",), softplus=True)
    arrays = form.draw(N)
    size = np.logaddexp(0, arrays["delta"] + arrays["delta_bias"])
    clipped = {name: x for name, x in arrays.items() if name != "delta_bias"} | {"delta": np.clip(size, 0.3, 0.7)}
    expected = selective(Scan(""), clipped)
    got = library.call(lambda x: selective(form, x, implementation, delta_limits=(0.3, 0.7)), arrays, dtype="float64")
    for x, y in zip(got, expected, strict=True):
        assert relative_error(library.numpy(x), y) <= 1e-12
    if isinstance(library, Torch):
        import torch

        tensors = {name: torch.from_numpy(x).requires_grad_() for name, x in arrays.items()}
        selective(form, tensors, implementation, delta_limits=(0.3, float("inf")))[0].sum().backward()
        assert np.array_equal(tensors["delta"].grad.numpy() != 0, size > 0.3)


def test_limits_of_one_step() -> None:
    one, two = np.ones(1), np.full(1, 2.0)
    y, _ = subquad.selective_scan_step(None, one, two, np.zeros((1, 1)), one, one, delta_limits=(0.0, 1.5))
    assert y == 1.5


@pytest.mark.parametrize(
    ("limits", "error", "match"),
    [
        (0.1, TypeError, "delta_limits is 0.1, expected two numbers"),
        ((0.1, "a"), TypeError, "delta_limits is .* expected two numbers"),
        ((0.2, 0.1), ValueError, "expected low ≤ high"),
        ((float("nan"), 1), ValueError, "expected low ≤ high"),
    ],
)
def test_wrong_limits(limits: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        selective(FORMS[0], FORMS[0].draw(3), delta_limits=limits)


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_of_time_on_many_threads_keep_documents_apart(reverse: bool) -> None:
    """Few channels and a long sequence: the threads share time. A document before is not finite."""
    pytest.importorskip("llvmlite")
    from subquad_numpy.table import COMPILED

    n, form = 5000, Scan("", batch=(1,), extras=("initial_state",), reverse=reverse)
    arrays = form.draw(n)
    numbers = np.arange(n) // 1800
    resets = np.concatenate([[False], numbers[1:] != numbers[:-1]])
    resets = np.append(resets[1:], False) if reverse else resets
    arrays["u"][:, numbers == 1] = np.nan
    given = [arrays["u"], arrays["delta"], arrays["A"], *(arrays[name][:, :, None] for name in "BC"), None, None, None,
             arrays["initial_state"], resets[None]]  # fmt: skip
    static = {"delta_softplus": False, "reverse": reverse}
    forward: Callable[..., Any] = COMPILED["selective_scan"].forward
    (one, last), (many, end) = (forward(given, static, threads=threads)[0] for threads in (1, 4))
    kept = numbers != 1
    assert np.all(np.isfinite(one[:, kept]))
    assert relative_error(many[:, kept], one[:, kept]) <= 1e-12
    assert relative_error(end, last) <= 1e-12


def test_kernels_take_a_reset_at_the_first_step() -> None:
    """It hides the state before; the gradient by that state is 0."""
    torch = pytest.importorskip("torch")
    from subquad import kernels

    rng = np.random.default_rng(0)
    a, b, h = (
        torch.from_numpy(rng.standard_normal(shape)).requires_grad_() for shape in ((1, 5, 3), (1, 5, 3), (1, 3))
    )
    resets = torch.tensor([[True, False, False, False, False]])
    scan_kernel: Kernel = kernels.linear_scan
    for implementation in ("auto", "generic"):
        out = scan_kernel(a, b, h, resets, reverse=False, implementation=implementation)
        assert torch.equal(out, scan_kernel(a, b, None, None, reverse=False, implementation=implementation))
        (grad,) = torch.autograd.grad(out.sum(), [h])
        assert not grad.any()
