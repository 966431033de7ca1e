"""The CUDA scan on the CPU: the same source and the same launch code, against the definition in float64."""

import functools
import itertools
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")  # gradients of the reference
from cuda_shim import COMPILER, Library, NumpyDevice, TorchHost, build  # noqa: E402
from cuda_shim.cases import (  # noqa: E402
    CASES,
    LOW,
    LOW_PRECISION,
    SANITIZED,
    SPLIT,
    Case,
    expected,
    small_chunks,
    solve,
)
from cuda_shim.mutated import MUTATED  # noqa: E402
from interpreter import PATIENCE  # noqa: E402
from rows.libraries import relative_error  # noqa: E402

from subquad.backend import Backend, Call  # noqa: E402
from subquad.core.override import PLAIN  # noqa: E402
from subquad.kernels.selective_scan import Inputs, selective_scan  # noqa: E402
from subquad_cupy.compile import source  # noqa: E402
from subquad_cupy.selective_scan import calls, passes, plan  # noqa: E402

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

SINGLE = 5e-7  # 8 units in the last place of float32: sums of 32-bit products, in the order of the kernel
DOUBLE = 1e-14
BARRIERS = [number for number, line in enumerate(source().splitlines(), 1) if "__syncthreads" in line]


def kernels_of(cases):
    """What a run of the cases launches, from a dry run."""
    names = set()
    for multiprocessors in (0, 132):
        device = NumpyDevice(lambda *launch: names.add(launch[0]), multiprocessors)
        for case, steps in itertools.product(cases, (32, 256)):
            with small_chunks(steps):
                solve(case, device)
    return names


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    return build(kernels_of(CASES + SPLIT + LOW_PRECISION), tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def library(binary):
    return Library(binary)


@pytest.fixture
def device(library):
    return NumpyDevice(library.run)


def assert_close(got, case, tolerance):
    want = expected(case)
    assert got.keys() == want.keys()
    worst = {name: relative_error(got[name], want[name]) for name in want}
    assert max(worst.values()) <= tolerance, worst


@pytest.mark.parametrize("multiprocessors", [0, 132])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_definition(library, case, multiprocessors):
    """On a device that anything fills, and on one where fewer channels a lane make more blocks."""
    device = NumpyDevice(library.run, multiprocessors)
    assert_close(solve(case, device), case, DOUBLE if case.dtype == "float64" else SINGLE)


@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_a_split_sequence_equals_the_definition(library, case):
    launched = []

    def run(kernel, blocks, arguments):
        launched.append(kernel.partition("<")[0])
        library.run(kernel, blocks, arguments)

    with small_chunks(32):
        got = solve(case, NumpyDevice(run))
    assert launched.count("scan_tail") == launched.count("scan_carry") == 3  # forward, its repetition, backward
    assert_close(got, case, 2 * DOUBLE if case.dtype == "float64" else SINGLE)


@pytest.mark.parametrize("reverse", [False, True])
def test_nothing_passes_where_the_state_starts_anew(library, reverse):
    """Not even what is no number, through chunks of time that are joined, nor by a gradient."""
    case = next(case for case in SPLIT if case.anew)
    arrays, dy, _ = case.inputs()
    numbers = np.arange(case.n) // 47
    changes = numbers[1:] != numbers[:-1]
    resets = np.append(changes, False) if reverse else np.append(False, changes)
    arrays["resets"] = np.stack([resets, resets])
    found = []
    for value in (1, np.nan):
        for name in ("u", "delta", "z", "B", "C"):
            arrays[name][:, numbers == 1] *= value
        inputs = Inputs(*(None if x is None else x if x.dtype == bool else x.astype("f4") for x in arrays.values()))
        options = {"delta_softplus": True, "reverse": reverse, "device": NumpyDevice(library.run)}
        with small_chunks(32):
            y, state, _ = calls.scan_forward(inputs, **options)
            by = calls.scan_backward(dy.astype("f4"), None, inputs, **options)
        of_steps = [x[:, numbers != 1] for x in (y, by.u, by.delta, by.z, by.B, by.C)]
        found.append([*of_steps, state, by.initial_state])
    for clean, dirty in zip(*found, strict=True):
        assert np.array_equal(clean, dirty)


@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
def test_half_precision_rounds_only_the_outputs(device, case):
    got = solve(case, device)
    assert_close(got, case, LOW[case.dtype])
    want = expected(case)
    assert all(relative_error(got[name], want[name]) < SINGLE for name in ("state", "dA", "dD", "ddelta_bias"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_tensors_take_the_same_path(library, dtype):
    case = next(case for case in CASES[:1] + LOW_PRECISION if case.dtype == dtype)

    def cast(name, x):
        return torch.from_numpy(x).to(getattr(torch, case.dtype_of(name)))

    got = solve(case, TorchHost(library.run), cast)
    assert got["y"].dtype == getattr(torch, dtype)
    assert_close({name: x.double().numpy() for name, x in got.items()}, case, LOW.get(dtype, SINGLE))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_torch_operators_of_cuda(library, monkeypatch, dtype):
    """What is registered for CUDA, on host memory: u and z are slices of one tensor, one gradient is expanded."""
    from subquad_torch import cuda

    monkeypatch.setattr(cuda, "device_of", lambda like: TorchHost(library.run))
    case = next(case for case in CASES[:1] + LOW_PRECISION if case.dtype == dtype)
    arrays, _, _ = case.inputs()
    resets = arrays.pop("resets")
    tensors = {name: torch.from_numpy(x).to(getattr(torch, case.dtype_of(name))) for name, x in arrays.items()}
    tensors["u"], tensors["z"] = torch.cat([tensors["u"], tensors["z"]], -1).chunk(2, -1)
    given = *tensors.values(), resets
    (y, state), saved = cuda.forward(given, case.options)
    grads = torch.ones((), dtype=y.dtype).expand(y.shape), torch.ones(state.shape)
    found = cuda.backward(given, case.options, saved, (None, None), grads, [True] * len(given))

    leaves = {name: x.double().requires_grad_() for name, x in tensors.items()}
    want = selective_scan.generic(*leaves.values(), resets, **case.options)
    by = torch.autograd.grad(want, list(leaves.values()), [x.double() for x in grads])
    *found, of_resets = found
    assert of_resets is None
    for got, right, like in zip((y, state, *found), (*want, *by), (y, state, *given[:-1]), strict=True):
        assert (got.dtype, got.shape) == (like.dtype, like.shape)
        assert relative_error(got.double().numpy(), right.detach().numpy()) <= LOW.get(dtype, SINGLE)


def test_torch_asks_the_kernel_of_its_device():
    """Also while compiling, where a call that the kernel cannot take would read the wrong memory."""
    from subquad_torch import BACKEND, cuda

    x, maps = torch.ones(1, 2, 4), torch.ones(1, 2, 1, 8)

    def call(x, A):
        return Call("selective_scan", (x, x, A, maps, maps, None, None, None, None, None), None, {}, PLAIN)

    reasons = cuda.OVERRIDE.accepts.why_not(call(x, torch.ones(4, 8)), BACKEND, {})
    assert reasons == ["it runs on cuda, the arrays are on cpu"]

    @torch.compile(fullgraph=True, backend="eager")
    def taken(x, A):
        return x if calls.declines(call(x, A)) is None else x + 1

    assert taken(x, torch.ones(4, 8)).equal(x)
    assert taken(x, torch.ones(4, 8, dtype=torch.complex64)).equal(x + 1)
    assert taken(x, torch.ones(4, 300)).equal(x + 1)


@pytest.mark.parametrize("case", [CASES[0], SPLIT[0]], ids=str)
def test_the_order_of_threads_changes_no_bit(library, case):
    with small_chunks(32):
        first, *others = (solve(case, NumpyDevice(functools.partial(library.run, seed=seed))) for seed in (0, 1, 2, 3))
    for other in others:
        for name, x in first.items():
            np.testing.assert_array_equal(x, other[name], strict=True)


@pytest.fixture(scope="module")
def right_numbers(tmp_path_factory):
    path = tmp_path_factory.mktemp("expected") / "expected.npz"
    np.savez(path, **{f"{case} {name}": x for case in MUTATED for name, x in expected(case).items()})
    return path


@pytest.mark.parametrize("line", [0, *BARRIERS])
def test_every_barrier_is_needed(binary, right_numbers, line):
    """Leaving one out must show in some case and order: wrong numbers, threads that never meet, or a crash."""
    result = in_a_process("cuda_shim.mutated", binary, right_numbers, line)
    assert (result.returncode == 0) == (line == 0), result.stdout + result.stderr


def in_a_process(module, *arguments, **environment):
    """Run a module of the tests in an interpreter of its own."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_sanitizers_find_nothing(tmp_path):
    flags = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")  # -O1 compiles for 10 s
    try:
        binary = build(kernels_of(SANITIZED), tmp_path, flags)
        runtime = subprocess.run(
            [COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True, timeout=PATIENCE
        ).stdout.strip()
    except subprocess.CalledProcessError:
        pytest.skip("g++ has no sanitizers here")
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    result = in_a_process("cuda_shim.sanitized", binary, LD_PRELOAD=runtime, ASAN_OPTIONS=options)
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"{len(SANITIZED)} cases clean" in result.stdout


def test_slices_are_read_in_place(library):
    """The halves of one projection, as Mamba has them: no copy, whatever the alignment."""
    rng = np.random.default_rng(0)
    both = rng.standard_normal((2, 45, 2 * 12 + 1)).astype("float32")
    delta = abs(rng.standard_normal((2, 45, 12)).astype("float32"))
    maps = rng.standard_normal((2, 45, 40)).astype("float32")
    A = -np.ones((12, 16), dtype="float32")
    inputs = [
        both[..., :12],
        delta,
        A,
        maps[..., None, :16],
        maps[..., None, 20:36],
        None,
        both[..., 13:],
        None,
        None,
    ]
    addresses = []

    def run(kernel, blocks, arguments):
        addresses.append(arguments["rows"]["data"][0, :5].tolist())
        library.run(kernel, blocks, arguments)

    def solve_in_place(inputs):
        y, state, _ = calls.scan_forward(Inputs(*inputs), delta_softplus=False, reverse=False, device=NumpyDevice(run))
        return y, state

    got = solve_in_place(inputs)
    assert addresses[0] == [inputs[i].ctypes.data for i in (0, 1, 6, 3, 4)]
    want = solve_in_place([None if x is None else x.copy() for x in inputs])
    for x, copied in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, copied, strict=True)


def test_offsets_are_64_bit(device):
    """Rows 1 GiB and batch items 8 GiB apart, in memory that is reserved but hardly touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, 2**34, flags=flags)
    except (OSError, ValueError):
        pytest.skip("16 GiB of address space are not to be had")
    u = np.ndarray((2, 8, 41), np.float32, memory, strides=(2**33, 2**30, 4))
    rng = np.random.default_rng(0)
    u[...] = rng.standard_normal(u.shape)
    delta, maps = np.abs(u), rng.standard_normal((2, 8, 1, 16)).astype("float32")
    shared = (-np.ones((41, 16), dtype="float32"), maps, maps, None, None, None, None)
    options = {"delta_softplus": False, "reverse": False, "device": device}
    got = calls.scan_forward(Inputs(u, delta, *shared), **options)
    want = calls.scan_forward(Inputs(u.copy(), delta, *shared), **options)
    np.testing.assert_array_equal(got[0], want[0], strict=True)


def test_bounded_scratch_changes_nothing_but_the_passes(library, monkeypatch):
    """Past `CHECKPOINT_BYTES` the backward pass walks windows of the sequence."""
    case = Case(1, 600, 5, 16, reverse=True)
    launched = []

    def run(kernel, blocks, arguments):
        launched.append((kernel.partition("<")[0], int(arguments["n"][0])))
        library.run(kernel, blocks, arguments)

    monkeypatch.setattr(passes, "CHECKPOINT_BYTES", 1)
    got = solve(case, NumpyDevice(run, multiprocessors=1))
    assert [steps for kernel, steps in launched if kernel == "scan_backward"] == [88, 256, 256]
    assert_close(got, case, SINGLE)


def test_saved_checkpoints_spare_the_second_forward_pass(library):
    launched = []

    def run(kernel, blocks, arguments):
        launched.append(kernel.partition("<")[0])
        library.run(kernel, blocks, arguments)

    device, case = NumpyDevice(run), CASES[5]
    arrays, dy, _ = case.inputs()
    inputs = [None if x is None else x.astype("float32") for x in arrays.values()]
    options = case.options | {"device": device}
    *_, checkpoints = calls.scan_forward(Inputs(*inputs), **options, save=True)
    got = calls.scan_backward(dy.astype("float32"), None, Inputs(*inputs), **options, checkpoints=checkpoints)
    assert launched == ["scan_forward", "scan_backward"]
    assert relative_error(got.A, expected(case)["dA"]) < SINGLE


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_to_do_launches_nothing(shape):
    def run(*launch):
        raise AssertionError(launch)

    batch, n, d = shape
    x, A, maps = np.ones(shape, "float32"), -np.ones((d, 4), "float32"), np.ones((batch, n, 1, 4), "float32")
    state = np.full((batch, d, 4), 3, dtype="float32")
    options = {"delta_softplus": True, "reverse": False, "device": NumpyDevice(run)}
    inputs = Inputs(x, x, A, maps, maps, None, None, None, state)
    y, last, _ = calls.scan_forward(inputs, **options)
    assert y.shape == shape
    np.testing.assert_array_equal(last, state)
    gradients = calls.scan_backward(x, state, inputs, **options)
    np.testing.assert_array_equal(gradients.A, np.zeros((d, 4)))
    np.testing.assert_array_equal(gradients.initial_state, state)
    assert not np.shares_memory(gradients.initial_state, state)  # a torch operator may not return its input
    np.testing.assert_array_equal(gradients.B, np.zeros_like(maps))
    np.testing.assert_array_equal(gradients.C, np.zeros_like(maps))


class CudaHost(Backend):
    def device_kind(self, array):
        return "cuda"


def test_it_declines_what_it_cannot_do():
    x, A, maps = np.ones((1, 2, 4), "float32"), -np.ones((4, 8), "float32"), np.ones((1, 2, 2, 8), "float32")

    def reason(u=x, delta=x, A=A, B=maps, C=maps):
        call = Call("selective_scan", (u, delta, A, B, C, None, None, None, None))
        return "; ".join(calls.ACCEPTS.why_not(call, CudaHost(), {}))

    assert reason() == ""
    assert "complex" in reason(A=A.astype(complex))
    assert "float64" in reason(u=x.astype(float))
    assert "float64" in reason(A=A.astype(float))
    assert "256" in reason(A=np.ones((4, 257), "float32"))
    assert "groups" in reason(C=np.ones((1, 2, 4, 8), "float32"))


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (8, 2048, 2048, 16), (1, 524288, 64, 16), (3, 1000, 770, 200)])
def test_geometry_covers_every_channel_and_step_once(shape, multiprocessors):
    batch, n, d, d_state = shape
    forward = plan.plan_forward(*shape, groups=1, itemsize=4, multiprocessors=multiprocessors)
    backward = plan.plan_backward(*shape, groups=1, itemsize=4, multiprocessors=multiprocessors, constant=False)
    for made in (forward, backward):
        width = plan.THREADS // made.lanes * made.channels
        assert (made.blocks - 1) * width < d <= made.blocks * width
        assert (made.chunks - 1) * made.chunk < n <= made.chunks * made.chunk
        assert made.chunk % plan.CHUNK_MULTIPLE == 0
        assert made.states * made.lanes >= d_state
        assert made.grid == batch * made.blocks * made.chunks <= plan.MAX_BLOCKS


def test_only_a_long_narrow_sequence_is_split():
    def chunks(*shape):
        return plan.plan_forward(*shape, groups=1, itemsize=4, multiprocessors=132).chunks

    assert chunks(8, 2048, 2048, 16) == 1
    assert chunks(1, 200, 64, 16) == 1
    assert chunks(1, 524288, 64, 16) > 132
