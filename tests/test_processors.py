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
