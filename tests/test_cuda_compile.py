"""The kernels compiled by ptxas have no spills, and leave registers for enough blocks."""

import itertools
import re
import shutil
import subprocess
from collections import defaultdict

import pytest
from interpreter import PATIENCE

from subquad_cupy.compile import source as cuda_source
from subquad_cupy.device import STORAGE
from subquad_cupy.selective_scan.plan import plan_backward, plan_forward

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

STATES = [2**k for k in range(9)]
# An SM holds 65536 / (128 registers) blocks: 4 at 128, 3 at 168, 2 at 255. The backward pass keeps a tile of states.
CEILINGS = {"scan_backward": 255, "scan_carry": 48}
SHARED = 48 * 1024  # bytes that a kernel may have without asking for more


def ceiling(kernel, storage, states, lanes):
    """Registers that leave room for the blocks that `forward_blocks` in CUDA asks for."""
    usual = 128 if states <= 4 <= lanes else 168
    return CEILINGS.get(kernel, 255 if storage == "d" else usual)


def instantiations(storage, states, constant=(False, True)):
    """C++ names of all kernels that the launcher may ask for."""
    itemsize = 8 if storage == "double" else 4
    sizes = {"groups": 1, "itemsize": itemsize}
    for d_state in states:
        full, empty = (plan_forward(1, 1, 1, d_state, multiprocessors=count, **sizes) for count in (0, 132))
        for flags in itertools.product(constant, constant):
            backward = plan_backward(1, 1, 1, d_state, multiprocessors=132, constant=any(flags), **sizes)
            yield full.kernel("scan_forward", storage, *flags, True)
            yield empty.kernel("scan_forward", storage, *flags, True)
            yield backward.kernel("scan_backward", storage, *flags)
            yield backward.kernel("scan_tail", storage, flags[1], True)
        for flag in constant:
            yield full.kernel("scan_forward", storage, flag, True, False)
            yield empty.kernel("scan_forward", storage, flag, True, False)
            yield full.kernel("scan_tail", storage, flag, False)
    if storage in ("float", "double"):
        yield from (f"scan_carry<{storage}, {adjoint}>" for adjoint in ("false", "true"))


def compile_report(kernels, architecture, folder):
    """Registers and bytes spilled, by mangled name; shared memory is checked."""
    source = folder / "instantiations.cu"
    lines = [f"template __global__ void {kernel}(const Scan);" for kernel in kernels]
    source.write_text("\n".join([cuda_source(), *lines, ""]), encoding="utf-8")
    command = [NVCC, "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", str(source)]
    command += ["-o", str(folder / "out.cubin")]
    # all instantiations of a data type take minutes
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=6 * PATIENCE)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    found = re.findall(
        r"Function properties for (\S+)\s+\d+ bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers(?:.* (\d+) bytes smem)?",
        result.stderr,
    )
    assert max(int(shared or 0) for *_, shared in found) <= SHARED
    return {name: (int(registers), int(stores) + int(loads)) for name, stores, loads, registers, _ in found}


def check(kernels, architecture, folder):
    """No spills, registers below the ceilings; prints the account, which `pytest -s` shows."""
    report = compile_report(kernels, architecture, folder)
    assert len(report) == len(kernels)
    account = defaultdict(list)
    for name, (registers, spilled) in report.items():
        found = re.match(r"_Z\d+(scan_[a-z]+)I(\w)(?:\w*?Li(\d+)ELi(\d+))?", name)
        kernel, storage, states, lanes = found.groups(default="0")
        most = ceiling(kernel, storage, int(states), int(lanes))
        assert (spilled, registers) <= (0, most), f"{architecture} {name}: {registers} registers, {spilled} B"
        account[kernel, most].append(registers)
    for (kernel, most), used in sorted(account.items()):
        low, high = min(used), max(used)
        print(f"{architecture} {kernel}: {len(used)} kernels, {low} to {high} registers of {most}, 0 bytes spilled")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_usual_kernels_do_not_spill(architecture, tmp_path):
    kernels = list(instantiations("float", [16, 256], constant=(False,)))
    kernels += ["scan_forward<bf16, 4, 4, 2, false, false, true>", "scan_backward<bf16, 4, 4, 2, false, false>"]
    kernels += [f"scan_{name}, true>" for name in (  # with resets
        "forward<float, 4, 4, 2, false, false, true", "backward<float, 4, 4, 2, false, false", "carry<float, true",
        "tail<float, 4, 4, 2, false, false", "tail<float, 4, 4, 2, false, true",
    )]  # fmt: skip
    check(kernels, architecture, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("storage", STORAGE.values())
def test_no_instantiation_spills(storage, architecture, tmp_path):
    check(sorted(set(instantiations(storage, STATES))), architecture, tmp_path)
