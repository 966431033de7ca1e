#!/usr/bin/env bash
# llvmlite 0.50.0 (LLVM 22.1): vector registers that are spilled to the stack, in functions without vectors of their own on it.
# Expected: a spilled register of 32 or 64 bytes has a slot aligned to its size, as a vector by alloca has, and is moved by aligned stores.
# Instead: the stack is kept aligned to the 16 bytes of the calling convention, and slots follow one another from there, by unaligned moves. Of
#   the 32-byte slots every second one, of the 64-byte slots each, may lie across two cache lines, in every pass of a loop; whether it
#   does is decided by the depth of the caller's stack, so by the call chain and the size of the environment, and two runs of the same
#   code differ. Whether to align is settled before registers are given out, when no slot exists yet. A kernel has to ask for it
#   in its attributes: alignstack(64), or a frame pointer.
# Seen when run:
#   AVX2, plain: 11 spills of 32 bytes, 11 by unaligned stores; stack aligned to 16
#   AVX2, alignstack(64): 11 spills of 32 bytes, 0 by unaligned stores; stack aligned to 64
#   AVX2, frame pointer: 11 spills of 32 bytes, 0 by unaligned stores; stack aligned to 32
#   AVX-512, plain: 14 spills of 64 bytes, 14 by unaligned stores; stack aligned to 16
#   AVX-512, alignstack(64): 14 spills of 64 bytes, 0 by unaligned stores; stack aligned to 64
#   AVX-512, frame pointer: 14 spills of 64 bytes, 0 by unaligned stores; stack aligned to 64
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile llvmlite==0.50.0 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import re

import llvmlite.binding as llvm

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
triple = "x86_64-unknown-linux-gnu"


def normalise(lanes, count, attributes):
    """Divide vectors by their sum: all of them live until the sum is known."""
    vector = f"<{lanes} x float>"
    lines = [f"define void @normalise(ptr %x, ptr %y, {vector} %w) {attributes} {{"]
    for i in range(count):
        lines += [
            f"%from{i} = getelementptr {vector}, ptr %x, i64 {i}",
            f"%raw{i} = load {vector}, ptr %from{i}, align 4",
            f"%v{i} = fmul {vector} %raw{i}, %w",
        ]
    total = "%v0"
    for i in range(1, count):
        lines.append(f"%sum{i} = fadd {vector} {total}, %v{i}")
        total = f"%sum{i}"
    for i in range(count):
        lines += [
            f"%to{i} = getelementptr {vector}, ptr %y, i64 {i}",
            f"%part{i} = fdiv {vector} %v{i}, {total}",
            f"store {vector} %part{i}, ptr %to{i}, align 4",
        ]
    return "\n".join([*lines, "ret void", "}"])


def spills(cpu, lanes, count, attributes):
    """Number of spilled registers, how many are stored by unaligned moves, and the alignment of the stack pointer."""
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3, jit=True)
    module = llvm.parse_assembly(normalise(lanes, count, attributes))
    module.triple = triple
    module.verify()
    text = machine.emit_assembly(module)
    stores = re.findall(r"(vmov[ua]ps)\t%[yz]mm\d+, -?\d*\(%rsp\)", text)
    aligned = re.search(r"andq\t\$-(\d+), %rsp", text)
    return len(stores), stores.count("vmovups"), int(aligned[1]) if aligned else 16


for kind, cpu, lanes, count in (("AVX2", "haswell", 8, 24), ("AVX-512", "skylake-avx512", 16, 44)):
    for name, attributes in (("plain", ""), ("alignstack(64)", "alignstack(64)"), ("frame pointer", '"frame-pointer"="all"')):
        number, unaligned, stack = spills(cpu, lanes, count, attributes)
        print(f"{kind}, {name}: {number} spills of {4 * lanes} bytes, {unaligned} by unaligned stores; stack aligned to {stack}")
        assert number > 5, "nothing is spilled now"
        assert (unaligned, stack) == (number, 16) if name == "plain" else unaligned == 0 and stack >= 4 * lanes, "spills lie elsewhere now"
PY
env/bin/python check.py
