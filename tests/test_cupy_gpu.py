"""The CUDA scan on a device: ``pytest -m gpu``. The same cases run without one in test_cuda_shim.py."""

import numpy as np
import pytest
from rows.libraries import relative_error, tolerance

from asv_benchmarks.gpu.clock import exponentials
from asv_benchmarks.gpu.inputs import NO_BFLOAT16, has_bfloat16

pytestmark = pytest.mark.gpu

APPROXIMATE = 4e-6  # ex2.approx is good to 2 units in the last place, and a state multiplies a dozen of them


@pytest.fixture(scope="module")
def cupy():
    """CuPy, if it finds a device."""
    module = pytest.importorskip("cupy")
    try:
        count = module.cuda.runtime.getDeviceCount()
    except module.cuda.runtime.CUDARuntimeError as problem:
        pytest.skip(f"no CUDA device: {problem}")
    if not count:
        pytest.skip("no CUDA device: the driver lists none")
    return module


@pytest.fixture(scope="module")
def cases():
    pytest.importorskip("torch")  # gradients of the reference
    from cuda_shim import cases

    return cases


def on_device(cupy, case):
    return lambda name, x: cupy.asarray(case.stored(name, x))


def solve(cupy, cases, case):
    from subquad_cupy.device import CupyDevice

    found = cases.solve(case, CupyDevice(), on_device(cupy, case))
    return {name: cupy.asnumpy(x) for name, x in found.items()}


def differences(cupy, cases, selected):
    """The worst errors of the cases that are not close to the definition."""
    failures = {}
    for case in selected:
        got = solve(cupy, cases, case)
        tolerance = 1e-13 if case.dtype == "float64" else cases.LOW.get(case.dtype, APPROXIMATE)
        worst = {name: relative_error(got[name], want) for name, want in cases.expected(case).items()}
        if max(worst.values()) > tolerance:
            failures[str(case)] = worst
    return failures


@pytest.mark.parametrize(("kind", "chunk"), [("CASES", 256), ("SPLIT", 32)])
def test_kernels_equal_the_definition(cupy, cases, kind, chunk):
    with cases.small_chunks(chunk):
        assert not differences(cupy, cases, getattr(cases, kind))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_equals_the_definition(cupy, cases, dtype):
    if dtype == "bfloat16" and not has_bfloat16():
        pytest.skip(NO_BFLOAT16)
    assert not differences(cupy, cases, [case for case in cases.LOW_PRECISION if case.dtype == dtype])


def test_two_runs_agree_in_every_bit(cupy, cases):
    case = cases.Case(4, 3000, 130, 16)
    first, second = (solve(cupy, cases, case) for _ in range(2))
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name], strict=True)


def test_a_long_narrow_sequence_equals_its_chunks(cupy):
    """Split over blocks, 2^17 steps agree with the same steps in calls too short to be split."""
    from subquad.kernels.selective_scan import Inputs
    from subquad_cupy.selective_scan.calls import scan_forward

    rng = cupy.random.default_rng(0)
    n, d, short = 2**17, 64, 500
    u, delta = (rng.standard_normal((1, n, d), dtype="float32") for _ in range(2))
    maps = rng.standard_normal((1, n, 1, 16), dtype="float32")
    A = -cupy.tile(cupy.arange(1, 17, dtype="float32"), (d, 1)) / 64
    options = {"delta_softplus": True, "reverse": False}
    y, state, _ = scan_forward(Inputs(u, delta, A, maps, maps, None, None, None, None), **options)
    pieces, carried = [], None
    for start in range(0, n, short):
        part = (x[:, start : start + short] for x in (u, delta))
        B = maps[:, start : start + short]
        piece, carried, _ = scan_forward(Inputs(*part, A, B, B, None, None, None, carried), **options)
        pieces.append(piece)
    scale = float(abs(y).max())
    assert float(abs(y - cupy.concatenate(pieces, axis=1)).max()) <= APPROXIMATE * scale
    assert float(abs(state - carried).max()) <= APPROXIMATE * float(abs(state).max())


def test_it_runs_on_the_current_stream(cupy, cases):
    """Inputs that are still being written on the same stream are waited for."""
    from subquad_cupy.device import CupyDevice

    case = cases.CASES[0]

    def written_late(name, x):
        sent = on_device(cupy, case)(name, x)
        exponentials()(4096)  # some 8 ms, so that what is launched elsewhere would come first
        return sent.copy()  # by the device: a copy from the host might wait for the stream

    with cupy.cuda.Stream(non_blocking=True):
        got = cases.solve(case, CupyDevice(), written_late)
        got = {name: x.get() for name, x in got.items()}
    assert max(relative_error(got[name], want) for name, want in cases.expected(case).items()) <= APPROXIMATE


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_tensors_on_a_side_stream(cases, dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    from subquad_cupy.device import TorchDevice

    case = next(case for case in cases.CASES[:1] + cases.LOW_PRECISION if case.dtype == dtype)

    def cast(name, x):
        return torch.from_numpy(x).cuda().to(getattr(torch, case.dtype_of(name)))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = cases.solve(case, TorchDevice(0, stream.cuda_stream), cast)
        got = {name: x.double().cpu().numpy() for name, x in got.items()}
    worst = {name: relative_error(got[name], want) for name, want in cases.expected(case).items()}
    assert max(worst.values()) <= cases.LOW.get(dtype, APPROXIMATE), worst


@pytest.fixture
def torch_inputs(cupy):
    """Arrays of a scan on torch's CUDA device, and its options."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")

    def draw(dtype):
        torch.manual_seed(0)
        u, delta, z = torch.randn(3, 2, 300, 24, device="cuda", dtype=dtype)
        B, C = torch.randn(2, 2, 300, 16, device="cuda", dtype=dtype)
        A, D = -torch.rand(24, 16, device="cuda"), torch.randn(24, device="cuda")
        return [u, delta, A, B, C, D], z

    return torch, draw


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_autograd_through_the_front_door(torch_inputs, cases, dtype):
    import subquad

    torch, draw = torch_inputs
    arrays, z = draw(getattr(torch, dtype))
    assert subquad.explain(subquad.selective_scan, *arrays, z=z, delta_softplus=True).implementation == "rawkernel"
    leaves = [x.clone().requires_grad_() for x in (*arrays, z)]
    results = []
    for choice in ("rawkernel", "generic"):
        y, state = subquad.selective_scan(
            *leaves[:6], z=leaves[6], delta_softplus=True, return_state=True, implementation=choice
        )
        grads = torch.autograd.grad(y.float().sum() + state.sum(), leaves)
        results.append([y, state, *grads])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        got, want = (x.detach().double().cpu().numpy() for x in (got, want))
        assert relative_error(got, want) <= cases.LOW.get(dtype, tolerance("float32"))


def test_torch_compile_keeps_the_kernel_and_declines_what_it_cannot_do(torch_inputs):
    import subquad

    torch, draw = torch_inputs
    arrays, z = draw(torch.float32)

    def scan(*arrays):
        return subquad.selective_scan(*arrays, z=z, delta_softplus=True)

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in arrays]
    results = [[y, *torch.autograd.grad(y.sum(), leaves)] for y in (compiled(*leaves), scan(*leaves))]
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    complex_A = [*arrays[:2], arrays[2].to(torch.complex64), *arrays[3:]]
    got, want = (form(*complex_A).cpu().numpy() for form in (compiled, scan))  # both generic, in different blocks
    assert relative_error(got, want) <= tolerance("float32")


def test_torch_func_sees_through_the_generic_form(torch_inputs):
    import subquad

    torch, draw = torch_inputs
    (u, *rest), _ = draw(torch.float32)
    loss = torch.func.grad(lambda u: subquad.selective_scan(u, *rest, delta_softplus=True).sum())
    u.requires_grad_()
    (want,) = torch.autograd.grad(subquad.selective_scan(u, *rest, delta_softplus=True).sum(), u)
    got, want = (x.double().cpu().numpy() for x in (loss(u.detach()), want))
    assert relative_error(got, want) <= tolerance("float32")
