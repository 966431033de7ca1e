"""Kernels are compiled for processors other than the one at hand: its own vectors hide what is wrong for others."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from interpreter import python

pytest.importorskip("llvmlite")
pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="LLVM was built for another one")

AVX2 = "+sse2,+sse4.2,+avx,+avx2,+fma,+f16c"
PROCESSORS = {
    "sse2": ("x86-64", "+sse2"),
    "avx2": ("x86-64-v3", AVX2),
    "avx512": ("x86-64-v4", f"{AVX2},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl"),
}
COMPILED = """
    from subquad_numpy.codegen import machine, processor
    import warm

    sizes = []
    machine.loaded = lambda code, name: sizes.append(len(code)) or 0  # this processor may not have what it runs
    seen = set()
    for make in warm.kernels():
        if make.func not in seen:
            make()
        seen.add(make.func)
    print(len(sizes), "{cpu}" in machine.target()[1], processor.has("avx512f"), min(sizes) > 1000)
"""


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_kernel_compiles_for(name: str, tmp_path: object) -> None:
    cpu, features = PROCESSORS[name]
    settings = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    count, named, wide, whole = python(COMPILED.replace("{cpu}", cpu), Path(__file__).parent, **settings).split()
    assert int(count) >= 27
    assert (named, wide, whole) == ("True", str(name == "avx512"), "True")


HALF = """
    import numpy as np, subquad

    rng = np.random.default_rng(0)
    u, z, steps = rng.standard_normal((3, 2, 40, 8))
    B, C = rng.standard_normal((2, 2, 40, 4))
    decay = 1 / (1 + steps**2)
    for name, function, given in (
        ("selective_scan", subquad.selective_scan, (u, decay, -np.ones((8, 4)), B, C)),
        ("linear_scan", subquad.linear_scan, (decay, u)),
        ("causal_conv1d", subquad.causal_conv1d, (u, rng.standard_normal((8, 4)))),
        ("gated_linear_attention", subquad.gated_linear_attention, (B, C, u, np.log(decay[..., :4]))),
        ("window", lambda q, k, v: subquad.attention(q, k, v, "window", left=8), (u, z, steps)),
    ):
        given = [x.astype(np.float16) for x in given]
        expected = function(*(x.astype(np.float64) for x in given))
        if not np.allclose(function(*given), expected, rtol=0.01, atol=0.01):
            print(name)
"""


def test_float16_without_an_instruction_that_converts_it(tmp_path: Path) -> None:
    """Kernels that would read float16 as it is stored decline; it was read as bfloat16."""
    cpu, features = PROCESSORS["sse2"]
    assert python(HALF, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features, NUMBA_CACHE_DIR=str(tmp_path)) == ""
