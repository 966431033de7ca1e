"""The compiled scan against its definition, in float64; against another implementation; and under threads."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llvmlite")
torch = pytest.importorskip("torch")

import oracle  # noqa: E402
import torch_scan  # noqa: E402
from compiled_calls import linear_scan_backward, linear_scan_forward, scan_backward, scan_forward  # noqa: E402
from pieces import piece  # noqa: E402
from rows.libraries import relative_error  # noqa: E402

import subquad  # noqa: E402
from subquad.kernels.selective_scan import Inputs  # noqa: E402
from subquad_numpy.codegen import compile as codegen_compile  # noqa: E402
from subquad_numpy.codegen import machine, types  # noqa: E402

Arrays = dict[str, Any]
torch.set_num_threads(1)  # the loops of the definition are too small for more

# The promise is 1e-6 relative to the largest entry. Phases of complex rates reach tens of radians, and
# rounding the step alone, 6e-8 of the phase, then costs as many times more.
TOLERANCE = {"float32": 1e-6, "complex64": 4e-6, "float64": 1e-14, "complex128": 4e-14}

KINDS: dict[str, Any] = {
    "plain": {"options": ""},
    "all options": {},
    "even rates": {"is_even": True},
    "groups": {"groups": 3},
    "a group per channel": {"groups": 0},
    "constant B": {"constant": "B", "options": "D"},
    "constant C": {"constant": "C", "options": "z"},
    "constant B and C": {"constant": "BC"},
    "B and C shared by the batch": {"shared": True},
    "documents": {"options": "bir"},
    "complex": {"is_complex": True},
    "complex, constant B and C": {"is_complex": True, "constant": "BC", "options": "zbir"},
}
# compiling takes most of the time, and float64 differs in coefficients alone: three kinds do
CASES = [("float32", kind) for kind in KINDS] + [
    ("float64", kind) for kind in ("all options", "even rates", "groups", "complex")
]
SIZES = [(2, 63, 64, 16), (1, 257, 300, 3), (3, 2, 3, 5), (1, 1, 1, 1), (2, 33, 12, 4), (1, 19, 50, 6)]


def draw(
    batch: int,
    n: int,
    d: int,
    d_state: int,
    *,
    dtype: str = "float32",
    groups: int = 1,
    constant: str = "",
    shared: bool = False,
    is_complex: bool = False,
    is_even: bool = False,
    options: str = "Dzbi",
) -> Arrays:
    """Inputs of a scan; steps from 0.01 to 3, rates from -0.3 to -5, at equal distances in channels 16 to 47 if asked."""
    rng = np.random.default_rng(5)
    groups = groups if groups and d % groups == 0 else d if groups == 0 else 1
    kind = np.result_type(dtype, np.complex64) if is_complex else np.dtype(dtype)

    def real(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    def either(*shape: int) -> Any:
        imaginary = 1j * rng.standard_normal(shape) if is_complex else 0
        return (rng.standard_normal(shape) + imaginary).astype(kind)

    def mapping(name: str) -> Any:
        return either(d, d_state) if name in constant else either(1 if shared else batch, n, groups, d_state)

    rates = -np.exp(rng.uniform(-1, 1.6, (d, d_state)))
    if is_even:  # for slow decays, for fast ones, and for one that is not
        rates[16:48] = np.linspace(rng.uniform(-1, 0, 32), rng.uniform(-20, -1, 32), d_state, axis=1)[: max(0, d - 16)]
    turning = 5j * rng.standard_normal((d, d_state)) if is_complex else 0
    return {
        "u": real(batch, n, d),
        "delta": (real(batch, n, d) - 2).astype(dtype),
        "A": (rates + turning).astype(kind),
        "B": mapping("B"),
        "C": mapping("C"),
        "D": real(d) if "D" in options else None,
        "z": real(batch, n, d) if "z" in options else None,
        "delta_bias": real(d) if "b" in options else None,
        "initial_state": either(batch, d, d_state) if "i" in options else None,
    } | ({"resets": rng.random((batch, n)) < 0.1} if "r" in options else {})


def by_definition(given: Arrays, softplus: bool, reverse: bool) -> tuple[Arrays, Any, Any]:
    """Inputs as tensors that ask for gradients, y and the last state."""
    t = torch_scan.leaves(given)
    return t, *torch_scan.scan(t, delta_softplus=softplus, reverse=reverse)


def error(got: Any, expected: Any) -> float:
    """The maximum difference divided by the maximum of the expected entries."""
    return relative_error(got, expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "kind"), CASES)
def test_scan_and_gradient_are_those_of_the_definition(
    dtype: str, kind: str, size: tuple[int, int, int, int], reverse: bool
) -> None:
    given = draw(*size, dtype=dtype, **KINDS[kind])
    t, y, h = by_definition(given, True, reverse)
    got_y, got_h = scan_forward(**given, delta_softplus=True, reverse=reverse)
    assert (got_y.dtype, got_h.dtype) == (given["u"].dtype, given["A"].dtype)
    tolerance = TOLERANCE[got_h.dtype.name]
    assert error(got_y, y) < tolerance
    assert error(got_h, h) < tolerance

    rng = np.random.default_rng(6)
    grad_y = rng.standard_normal(got_y.shape).astype(got_y.dtype)
    grad_h = (rng.standard_normal(got_h.shape) + 1j * rng.standard_normal(got_h.shape)).astype(np.complex64)
    grad_h = (grad_h if np.iscomplexobj(got_h) else grad_h.real).astype(got_h.dtype)
    names = [name for name, tensor in t.items() if tensor is not None and tensor.requires_grad]
    loss_by = [torch.tensor(grad_y, dtype=y.dtype), torch.tensor(grad_h, dtype=h.dtype)]
    expected = torch.autograd.grad([y, h], [t[name] for name in names], loss_by)
    got = scan_backward(**given, delta_softplus=True, reverse=reverse, grad_y=grad_y, grad_state=grad_h)
    more = scan_backward(**given, delta_softplus=True, reverse=reverse, grad_y=grad_y, grad_state=grad_h, saves=True)
    for name in names:  # from saved states, which may differ by the roundings that a compiler fuses
        assert error(getattr(more, name), getattr(got, name)) < tolerance, name
    for name, gradient in zip(names, expected, strict=True):
        value = getattr(got, name)
        assert value.dtype == given[name].dtype
        assert error(value, gradient) < tolerance, name
    assert all(getattr(got, name) is None for name in t if name not in names)


def test_steps_without_softplus_are_taken_as_they_are() -> None:
    given = draw(2, 40, 20, 4, options="Db")
    given["delta"] = np.abs(given["delta"])
    given["delta_bias"] = np.abs(given["delta_bias"])
    t, y, _ = by_definition(given, False, False)
    got, _ = scan_forward(**given)
    assert error(got, y) < 1e-6
    grad_y = np.ones_like(got)
    (expected,) = torch.autograd.grad(y.sum(), [t["delta"]])
    assert error(scan_backward(**given, delta_softplus=False, reverse=False, grad_y=grad_y).delta, expected) < 1e-6


def test_groups_of_B_and_C_may_differ() -> None:
    given = draw(2, 9, 12, 3, groups=3)
    given["C"] = given["C"][:, :, :1]
    t, y, _ = by_definition(given, True, False)
    got, _ = scan_forward(**given, delta_softplus=True)
    assert error(got, y) < 1e-6
    (expected,) = torch.autograd.grad(y.sum(), [t["C"]])
    gradients = scan_backward(**given, delta_softplus=True, reverse=False, grad_y=np.ones_like(got))
    assert error(gradients.C, expected) < 1e-6


@pytest.mark.parametrize("name", oracle.SCANS)
def test_scan_agrees_with_another_implementation(name: str) -> None:
    """Its float32 gives 1e-5."""
    stored = oracle.load(name)

    def with_groups(arrays: Arrays) -> Arrays:
        return {key: x[:, :, None] if key in ("B", "C") and x.ndim == 3 else x for key, x in arrays.items()}

    given = dict.fromkeys(Inputs._fields) | with_groups(oracle.inputs_of(stored))
    softplus = bool(stored["delta_softplus"])
    y, state = scan_forward(**given, delta_softplus=softplus)
    assert error(y, oracle.channels_last("out", stored["out"], stored)) < 1e-5
    assert error(state, stored["last_state"]) < 1e-5
    grad_y = oracle.channels_last("out", stored["grad_out"], stored)
    got = scan_backward(**given, delta_softplus=softplus, reverse=False, grad_y=grad_y)
    for key, expected in with_groups(oracle.expected_gradients(stored)).items():
        assert error(getattr(got, key), expected) < 3e-5, key


@pytest.mark.parametrize("name", oracle.UPDATES)
def test_step_agrees_with_another_implementation(name: str) -> None:
    stored = oracle.load(name)
    batch, d_state = stored["state_in"].shape[0], stored["A"].shape[-1]

    def flat(name: str) -> Any:
        return stored[name].reshape(batch, -1) if name in stored else None

    def row(name: str) -> Any:
        return stored[name].reshape(-1) if name in stored else None

    B, C = (stored[name].reshape(batch, -1, d_state) for name in ("B", "C"))
    rates = stored["A"].reshape(-1, d_state)
    before = stored["state_in"].reshape(batch, -1, d_state)
    softplus = bool(stored["dt_softplus"])
    options = {"z": flat("z"), "delta_bias": row("dt_bias"), "delta_softplus": softplus, "implementation": "compiled"}
    y, state = subquad.selective_scan_step(before, flat("x"), flat("dt"), rates, B, C, row("D"), **options)
    assert error(y, flat("out")) < 1e-5
    assert error(state, stored["state_out"].reshape(state.shape)) < 1e-5


@pytest.mark.parametrize("slowest", [1.0, 0.25, (1.0, 0.25)])
def test_powers_of_two_exponentials_are_exact_to_rounding(slowest: Any) -> None:
    """Where rates are even, the decays of all states follow from two exponentials; beside the same rates, moved apart.

    One exponential does where the slowest rate is their distance, as in Mamba's rates at first.
    """
    given = draw(1, 500, 32, 16, options="")
    given["A"] = -(np.resize(slowest, (32, 1)) + np.arange(16)).astype(np.float32)
    errors = []
    for scale in (1, 1 + 1e-5 * np.random.default_rng(0).uniform(size=given["A"].shape)):
        for size in (1e-3, 0.05, 0.7, 8):
            now = given | {"A": (given["A"] * scale).astype(np.float32), "delta": np.full_like(given["delta"], size)}
            _, y, h = by_definition(now, False, False)
            got, state = scan_forward(**now)
            errors.append(max(error(got, y), error(state, h)))
    for even, uneven in zip(errors[:4], errors[4:], strict=True):
        assert even < max(1.5 * uneven, 2e-7)


@pytest.mark.parametrize("kind", ["all options", "even rates", "groups", "complex", "constant B and C", "long steps"])
def test_scan_is_its_steps_and_its_parts_to_the_bit(kind: str) -> None:
    given = draw(2, 21, 36, 4, **KINDS["all options" if kind == "long steps" else kind])
    if kind == "long steps":  # beyond the bounds of exponents
        given["delta"][:, 3::7] += 500
    y, last = scan_forward(**given, delta_softplus=True)

    def part(rows: slice) -> Arrays:
        return {
            name: array[:, rows] if array is not None and array.ndim > 2 and name != "initial_state" else array
            for name, array in given.items()
        }

    y1, middle = scan_forward(**part(slice(0, 8)), delta_softplus=True)
    y2, end = scan_forward(**{**part(slice(8, None)), "initial_state": middle}, delta_softplus=True)
    np.testing.assert_array_equal(np.concatenate([y1, y2], axis=1), y)
    np.testing.assert_array_equal(end, last)

    state = given["initial_state"]
    if state is None:
        state = np.zeros_like(last)
    for i in range(y.shape[1]):
        now = {name: array for name, array in part(slice(i, i + 1)).items() if name != "initial_state"}
        now = {name: array[:, 0] if array is not None and array.ndim > 2 else array for name, array in now.items()}
        positional = [now.pop(name) for name in ("u", "delta", "A", "B", "C", "D")]
        token, state = subquad.selective_scan_step(
            state, *positional, **now, delta_softplus=True, implementation="compiled"
        )
        np.testing.assert_array_equal(token, y[:, i])
    np.testing.assert_array_equal(state, last)


@pytest.mark.parametrize("kind", ["all options", "groups", "constant B", "complex"])
@pytest.mark.parametrize(("n", "d", "saves"), [(300, 90, False), (70, 300, True)])
def test_number_of_threads_does_not_change_a_bit(kind: str, n: int, d: int, saves: bool) -> None:
    """With saved states, one thread takes several blocks of channels side by side, and five take one each."""
    given = draw(2, n, d, 4, **KINDS[kind])
    y, state = scan_forward(**given, delta_softplus=True, threads=1)
    grad_y = np.ones_like(y)
    one = scan_backward(**given, delta_softplus=True, reverse=False, grad_y=grad_y, saves=saves, threads=1)
    for threads in (2, 3, 5):
        more_y, more_state = scan_forward(**given, delta_softplus=True, threads=threads)
        np.testing.assert_array_equal(more_y, y)
        np.testing.assert_array_equal(more_state, state)
        more = scan_backward(**given, delta_softplus=True, reverse=False, grad_y=grad_y, saves=saves, threads=threads)
        for got, expected in zip(more, one, strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("options", ["", "Dzbi"])
def test_chunks_of_time_give_the_scan(options: str, is_complex: bool, reverse: bool) -> None:
    """Few channels, many steps and threads: two passes over chunks, the last one ragged. Decays are slow."""
    given = draw(1, 5001, 7, 4, options=options, is_complex=is_complex)
    given["A"] = (given["A"] / 200).astype(given["A"].dtype)
    y, state = scan_forward(**given, delta_softplus=True, reverse=reverse, threads=1)
    chunked_y, chunked_state = scan_forward(**given, delta_softplus=True, reverse=reverse, threads=4)
    assert not np.array_equal(chunked_y, y), "chunks were not used"
    assert error(chunked_y, y) < 2e-6
    assert error(chunked_state, state) < 2e-6


def test_chunks_of_time_of_a_state_that_grows() -> None:
    """The decay of a chunk is infinite; the state before it is 0."""
    u = np.zeros((1, 32768, 1))
    u[0, -100:] = 1e-3
    given = {"u": u, "delta": np.ones_like(u), "A": np.full((1, 4), 0.1), "B": np.ones((1, 32768, 1, 4))}
    y, _ = scan_forward(**given, C=given["B"], threads=1)
    chunked_y, _ = scan_forward(**given, C=given["B"], threads=4)
    np.testing.assert_allclose(chunked_y, y, rtol=1e-12)


def test_gradient_by_an_input_that_is_infinite() -> None:
    """It is that of a finite one: the output is linear in u."""
    given = draw(1, 5, 3, 4, dtype="float64", options="")
    grad_y, grads = np.ones_like(given["u"]), []
    for value in (1.0, np.inf):
        given["u"][0, 2, 1] = value
        grads.append(scan_backward(**given, delta_softplus=False, reverse=False, grad_y=grad_y).u)
    np.testing.assert_array_equal(*grads)


def test_gradient_of_an_empty_batch_by_what_it_shares() -> None:
    given = draw(1, 5, 6, 4, dtype="float64", groups=2, options="")
    given = {name: x[:0] if name in ("u", "delta", "B") else x for name, x in given.items()}
    found = scan_backward(**given, delta_softplus=False, reverse=False, grad_y=given["u"])
    assert np.array_equal(found.C, np.zeros_like(given["C"]))


def double(x: int) -> int:
    return 2 * x


def test_nowhere_to_keep_compiled_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))  # no folder
    address = codegen_compile.compiled_address(double, "double", [types.int64])
    assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)(21) == 42


def test_code_that_was_kept_is_read_and_damaged_code_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    made = []

    def keep() -> bytes:
        return machine.kept(tmp_path, "name", "0" * 16, "options", lambda: made.append(1) or b"code")

    assert (keep(), keep(), len(made)) == (b"code", b"code", 1)
    (file,) = tmp_path.rglob("*.o")
    file.write_bytes(file.read_bytes()[:-1])
    assert (keep(), keep(), len(made)) == (b"code", b"code", 2)


def test_threads_may_call_at_once() -> None:
    given = draw(2, 400, 96, 8)
    y, state = scan_forward(**given, delta_softplus=True, threads=1)
    gradient = scan_backward(**given, delta_softplus=True, reverse=False, grad_y=y, threads=1)

    def call(_: int) -> None:
        got_y, got_state = scan_forward(**given, delta_softplus=True, threads=3)
        np.testing.assert_array_equal(got_y, y)
        np.testing.assert_array_equal(got_state, state)
        got = scan_backward(**given, delta_softplus=True, reverse=False, grad_y=y, threads=3)
        np.testing.assert_array_equal(got.B, gradient.B)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(call, range(24)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steep_decays_and_long_steps_stay_finite(dtype: str) -> None:
    given = draw(1, 200, 40, 8, dtype=dtype, options="Dz")
    rng = np.random.default_rng(0)
    given["delta"] = rng.uniform(0, 50, given["delta"].shape).astype(dtype)
    given["A"] = (-np.exp(rng.uniform(np.log(1e-4), np.log(200), given["A"].shape))).astype(dtype)
    t, y, h = by_definition(given, False, False)
    got, state = scan_forward(**given)
    assert error(got, y) < TOLERANCE[dtype]
    assert error(state, h) < TOLERANCE[dtype]
    names = ["u", "delta", "A", "B", "C", "D", "z"]
    expected = torch.autograd.grad(y.sum(), [t[name] for name in names])
    gradients = scan_backward(**given, delta_softplus=False, reverse=False, grad_y=np.ones_like(got))
    for name, gradient in zip(names, expected, strict=True):
        assert error(getattr(gradients, name), gradient) < TOLERANCE[dtype], name


def test_slow_decays_keep_their_digits() -> None:
    """A factor next to 1, rounded, would be wrong the same way at each of 4096 steps: 1e-4 at the end."""
    given = draw(1, 4096, 32, 4, options="i")
    given["delta"] = np.full_like(given["delta"], 1.1e-3)
    given["A"] = (given["A"] / 10).astype(np.float32)
    exact = {name: None if array is None else array.astype(np.float64) for name, array in given.items()}
    for got, expected in zip(scan_forward(**given), scan_forward(**exact), strict=True):
        assert error(got, expected) < 5e-6  # that of rounding h itself, 6e-8, on a walk over 4096 steps


def test_angles_of_thousands_of_turns_keep_their_digits() -> None:
    """Up to 1e4 radians a step: reduced in float32 they would be wrong by 1e-3."""
    given = draw(1, 6, 40, 4, is_complex=True, options="i")
    rng = np.random.default_rng(0)
    given["delta"] = rng.uniform(1, 30, given["delta"].shape).astype(np.float32)
    given["A"] = (-0.01 + 1j * rng.uniform(-300, 300, given["A"].shape)).astype(np.complex64)
    _, y, h = by_definition(given, False, False)
    got, state = scan_forward(**given)
    assert error(got, y) < 1e-6
    assert error(state, h) < 1e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_bad_numbers_show_where_they_should_and_nowhere_else(name: str, bad: float) -> None:
    given = draw(2, 12, 40, 4)
    clean, _ = scan_forward(**given, delta_softplus=True)
    place = {1: (3,), 2: (3, 1), 3: (0, 5, 3), 4: (0, 5, 0, 1)}[given[name].ndim]
    place = (0, 3, 1) if name == "initial_state" else place
    given[name] = given[name].copy()
    given[name][place] = bad
    _, expected, _ = by_definition(given, True, False)
    got, _ = scan_forward(**given, delta_softplus=True)
    wrong = ~np.isfinite(expected.detach().numpy())
    assert wrong.any() or (name, bad) == ("delta_bias", np.inf)
    np.testing.assert_array_equal(~np.isfinite(got), wrong)  # an infinite state may become NaN
    np.testing.assert_array_equal(got[1:] if given[name].ndim > 2 else 0, clean[1:] if given[name].ndim > 2 else 0)


def test_layout_of_inputs_does_not_matter_and_they_are_not_written() -> None:
    given = draw(2, 30, 33, 4)
    y, state = scan_forward(**given, delta_softplus=True)
    strided = {}
    for name, array in given.items():
        wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
        wide[..., ::2] = array
        strided[name] = wide[..., ::2]
        strided[name].flags.writeable = False
    other_y, other_state = scan_forward(**strided, delta_softplus=True)
    np.testing.assert_array_equal(other_y, y)
    np.testing.assert_array_equal(other_state, state)


@pytest.mark.parametrize("size", [(0, 5, 3, 2), (2, 0, 3, 2), (2, 5, 3, 0)], ids=str)
def test_empty_inputs_leave_the_state_alone(size: tuple[int, int, int, int]) -> None:
    given = draw(*size)
    y, state = scan_forward(**given, delta_softplus=True)
    assert y.shape == size[:3]
    assert state.shape == (size[0], *size[2:])
    if size[1] == 0:
        np.testing.assert_array_equal(state, given["initial_state"])
    gradients = scan_backward(
        **given, delta_softplus=True, reverse=False, grad_y=np.ones_like(y), grad_state=np.ones_like(state)
    )
    np.testing.assert_array_equal(gradients.initial_state.size and gradients.initial_state, 1 if size[1] == 0 else 0)
    if size[3] == 0:
        _, expected, _ = by_definition(given, True, False)
        assert error(y, expected) < 1e-6


def test_complex_maps_need_complex_rates() -> None:
    given = draw(1, 4, 3, 2)
    with pytest.raises(TypeError, match="B is complex but A is real"):
        scan_forward(**{**given, "B": given["B"] + 1j})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("start", "anew"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("size", [(2, 63, 70), (1, 1, 3), (1, 257, 300), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_linear_scan_and_gradient_are_those_of_the_definition(
    dtype: str, size: tuple[int, int, int], start: bool, anew: bool, reverse: bool, threads: int
) -> None:
    rng = np.random.default_rng(1)
    batch, n, d = size

    def numbers(*shape: int) -> Any:
        imaginary = 1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else 0
        return (rng.standard_normal(shape) + imaginary).astype(dtype)

    a, b, initial, grad_h = numbers(*size) / 3, numbers(*size), numbers(batch, d), numbers(*size)
    state, resets = initial if start else None, rng.random((batch, n)) < 0.1 if anew else None
    wide = torch.complex128 if np.dtype(dtype).kind == "c" else torch.float64
    tensors = [torch.tensor(x, dtype=wide, requires_grad=True) for x in (a, b, initial)]
    h = tensors[2] if start else torch.zeros(batch, d, dtype=wide)
    rows: list[Any] = [None] * n
    for t in reversed(range(n)) if reverse else range(n):
        h = torch.where(torch.tensor(resets[:, t, None]), 0, h) if anew else h
        rows[t] = h = tensors[0][:, t] * h + tensors[1][:, t]
    expected = torch.stack(rows, 1)
    gradients = torch.autograd.grad(
        expected, tensors[: 3 if start else 2], torch.tensor(grad_h, dtype=wide), materialize_grads=True
    )
    got = linear_scan_forward(a, b, state, reverse, resets, threads=threads)
    by_input = linear_scan_backward(a, got, state, reverse, grad_h, resets, threads=threads)
    tolerance = 8 * np.finfo(dtype).eps
    assert error(got, expected) < tolerance
    for value, gradient in zip(by_input, gradients, strict=start):
        assert error(value, gradient) < tolerance
    assert start or by_input[2] is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_over_lanes_turn_in_two_stages(dtype: str) -> None:
    from subquad_numpy.codegen import load, pointer, store
    from subquad_numpy.codegen.turn import quarters, totals_of_quarters

    zero, lanes = np.dtype(dtype).type(0), 64 // np.dtype(dtype).itemsize

    def turn(source: int, parts: int, target: int) -> int:
        x, between, y = pointer(source, zero), pointer(parts, zero), pointer(target, zero)
        for i in range(0, lanes, 4):
            at, to = i * lanes, i // 4 * lanes
            found = quarters(load(x, at), load(x, at + lanes), load(x, at + 2 * lanes), load(x, at + 3 * lanes))
            store(between, to, found)
        store(y, 0, totals_of_quarters(between, 0))
        return 0

    x = np.random.default_rng(0).integers(-100, 100, (lanes, lanes)).astype(dtype)
    between, y = np.empty((lanes // 4, lanes), dtype), np.empty(lanes, dtype)
    piece(turn)(x.ctypes.data, between.ctypes.data, y.ctypes.data)
    assert np.array_equal(y, x.sum(axis=1))
    assert np.array_equal(between.reshape(lanes // 4, lanes // 4, 4).sum(axis=1).ravel(), x.sum(axis=1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_halves_of_vectors_are_loaded_spread_turned_and_added_up(dtype: str) -> None:
    from subquad_numpy.codegen import add_up, halved, load, pointer, shifted, split, spread, store, zeros
    from subquad_numpy.codegen.turn import quarters

    zero, zero64, half = np.dtype(dtype).type(0), np.float64(0), 32 // np.dtype(dtype).itemsize

    @split
    def by_halves(x: Any, y: Any, total: Any) -> None:  # a pointer is by halves in what it is given to, too
        four = load(x, 0), load(x, half), load(x, 2 * half), load(x, 3 * half)
        store(y, 0, quarters(four[0], four[1], four[2], four[3]))
        store(y, half, load(x, half) * spread(x, 1) + 1.0)
        store(shifted(y, half), half, zeros(y))
        add_up(total, 0, load(x, 0))

    def run(source: int, target: int, total: int) -> int:
        by_halves(halved(pointer(source, zero)), halved(pointer(target, zero)), pointer(total, zero64))
        return 0

    x = np.random.default_rng(0).integers(-100, 100, (4, half)).astype(dtype)
    y, total = np.full((4, half), 7, dtype), np.full(2 * half, 5.0)
    piece(run)(x.ctypes.data, y.ctypes.data, total.ctypes.data)
    assert np.array_equal(y[0].reshape(half // 4, 4).sum(axis=0), x.sum(axis=1))
    assert np.array_equal(y[1], x[1] * x[0, 1] + 1)
    assert np.array_equal(y[2:], [np.zeros(half), np.full(half, 7)])  # no number beyond a half is written
    assert np.array_equal(total, [*(5 + x[0]), *np.full(half, 5)])


def test_the_stack_of_functions_lies_on_a_boundary_of_the_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    from subquad_numpy.codegen import apart, merged, processor
    from subquad_numpy.codegen.translate import translated

    @merged
    def part_of_its_caller(x: int) -> int:
        return x + 1

    @apart
    def called(x: int) -> int:
        return part_of_its_caller(x) * 2

    def run(x: int) -> int:
        return called(x)

    for size, expected in ((64, "alignstack(64)"), (32, "alignstack(32)"), (16, ""), (0, "")):
        monkeypatch.setattr(processor, "register_bytes", lambda size=size: size)
        functions = translated(run, "run", [types.int64]).functions
        of_merged = [x for x in functions if "alwaysinline" in x.attributes]
        others = [x for x in functions if x not in of_merged]
        assert (len(of_merged), len(others)) == (1, 2)
        assert all("alignstack" not in str(x) for x in of_merged)
        assert all(expected in str(x) and ("alignstack" in str(x)) == bool(expected) for x in others)


def test_polynomials_keep_their_promise() -> None:
    """Units in the last place, against float64 or extended precision."""
    from subquad_numpy.codegen import absolute, add_where_zero, inline, load, pointer, store
    from subquad_numpy.codegen.side_by_side import (
        decays,
        exp_negative,
        log1p_to_1,
        moderate_decays,
        moderate_exp,
        scaled_exp2,
    )
    from subquad_numpy.codegen.vector_math import ONE, sigmoid, softplus, split_exp2

    @inline
    def exp2(x: Any) -> Any:
        factor, whole = split_exp2(x)
        return add_where_zero(whole, factor, ONE(x))

    @inline
    def scaled(x: Any) -> Any:
        _, power, _, rest = scaled_exp2((x, x))
        return power + power * rest

    @inline
    def decay(x: Any) -> Any:
        _, power, _, rest = decays((x, x))
        return power + power * rest

    @inline
    def moderate(x: Any) -> Any:
        _, power, _, rest = moderate_decays((x, x))
        return power + power * rest

    @inline
    def slow(x: Any) -> Any:
        _, _, _, rest = decays((x, x))
        return rest

    @inline
    def negative(x: Any) -> Any:
        return exp_negative((-absolute(x), -absolute(x)))[1]

    @inline
    def exp(x: Any) -> Any:
        return moderate_exp((x, x))[1]

    @inline
    def log1p(x: Any) -> Any:
        return log1p_to_1((absolute(x), absolute(x)))[1]

    def over(function: Any, x: Any, y: Any) -> None:
        zero, lanes = x.dtype.type(0), 64 // x.itemsize

        def loop(x: int, y: int, size: int) -> int:
            source, target = pointer(x, zero), pointer(y, zero)
            for i in range(0, size, lanes):
                store(target, i, function(load(source, i)))
            return 0

        piece(loop)(x.ctypes.data, y.ctypes.data, x.size)

    rng = np.random.default_rng(0)
    for dtype, wide in (("float32", np.float64), ("float64", np.longdouble)):
        largest = -np.finfo(dtype).minexp
        for function, exact, low, high, bound in (
            (exp2, np.exp2, -largest, largest, 2),
            (scaled, np.exp2, -largest, largest, 2),
            (decay, np.exp2, -largest, largest, 2),
            (moderate, np.exp2, -largest, largest, 2),
            (negative, lambda x: np.exp(-np.abs(x)), -largest * 0.69, largest * 0.69, 2),
            (exp, np.exp, -largest * 0.69, 88.3 if dtype == "float32" else 709, 2),
            (log1p, lambda x: np.log1p(np.abs(x)), -1, 1, 1),
            (softplus, lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), -80, 80, 2),
            (sigmoid, lambda x: 1 / (1 + np.exp(-x)), -80, 80, 3),
        ):
            x = np.concatenate([rng.uniform(low, high, 1 << 15), rng.uniform(-1, 1, 1 << 15)]).astype(dtype)
            y = np.empty_like(x)
            over(function, x, y)
            expected = exact(x.astype(wide))
            units = np.abs(y - expected) / np.spacing(expected.astype(dtype))
            assert units.max() <= bound, function
        # below the normal numbers a decay is 0, and no other number
        least = np.finfo(dtype).tiny
        x = np.linspace(-largest - 2, -largest, 1 << 15).astype(dtype)
        y = np.empty_like(x)
        over(decay, x, y)
        units = np.abs(y - np.exp2(x.astype(wide))) / np.spacing(least)
        assert np.all((y == 0) | (units <= 2))
        assert np.all(y[x < -largest - 1] == 0)
        assert y[-1] == least
        # a slow decay, next to 1, keeps the digits of what it is less than 1
        x = (-np.exp2(rng.uniform(-30, -5, 1 << 15))).astype(dtype)
        y = np.empty_like(x)
        over(slow, x, y)
        assert np.max(np.abs(y / np.expm1(x.astype(wide) * np.log(wide(2))) - 1)) <= 2 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_steps_and_gates_of_any_size(dtype: str) -> None:
    """Softplus, silu and their slopes, by one step whose state is Δ, and by one whose output is silu(z).

    A gate below the normal numbers may be any of these. The slope of silu has a root, near which digits are lost.
    """
    rng, top = np.random.default_rng(0), np.log(np.finfo(dtype).max)
    eps, tiny = float(np.finfo(dtype).eps), float(np.finfo(dtype).tiny)
    edges = [top, top - 0.3, top - 1.5, 2 * top, 0.0, np.finfo(dtype).max, np.inf]
    x = np.array([*edges, *(-x for x in edges), *rng.uniform(-20, 20, 50), np.nan]).astype(dtype)
    one, none, wide = np.ones((1, 1, x.size), dtype), np.zeros((1, 1, x.size), dtype), x.astype(np.longdouble)
    given = {
        "u": one, "A": -np.ones((x.size, 1), dtype), "B": np.ones((1, 1, 1, 1), dtype),
        "C": np.zeros((1, 1, 1, 1), dtype), "D": one[0, 0], "delta_bias": None, "initial_state": None,
    }  # fmt: skip
    gated, stepped = given | {"delta": none, "z": x[None, None]}, given | {"delta": x[None, None], "z": None}
    options = {"delta_softplus": True, "reverse": False}
    gate, _ = scan_forward(**gated, delta_softplus=True)
    _, step = scan_forward(**stepped, delta_softplus=True)
    gate_slope = scan_backward(**gated, **options, grad_y=one).z
    slope = scan_backward(**stepped, **options, grad_y=none, grad_state=np.ones((1, x.size, 1), dtype)).delta
    with np.errstate(all="ignore"):
        opened, closed = 1 / (1 + np.exp(-wide)), 1 / (1 + np.exp(wide))
        bend = opened * (1 + wide * closed)
        for got, expected, least in (
            (gate, wide * opened, 1000 * tiny),
            (step, np.maximum(wide, 0) + np.log1p(np.exp(-np.abs(wide))), tiny),
            (gate_slope, np.where(wide == np.inf, opened, bend), eps),
            (slope, opened, tiny),
        ):
            np.testing.assert_allclose(got.ravel(), expected.astype(dtype), rtol=4 * eps, atol=least)
