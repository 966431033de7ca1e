"""From LLVM's language to machine code: optimisation for this machine, object files kept on disk, addresses."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import RLock
from typing import Any

import llvmlite
from llvmlite import binding

from subquad_numpy.codegen import processor

DIGEST = 32  # bytes of the hash at the head of a file
_lock = RLock()  # LLVM's modules share one context


@cache
def target() -> tuple[Any, str]:
    """(the machine that is compiled for, a text that tells it from others)."""
    for part in ("target", "asmprinter"):
        with suppress(RuntimeError):  # newer versions of llvmlite do so themselves, and refuse the call
            getattr(binding, f"initialize_native_{part}")()
    triple, cpu, features = binding.get_process_triple(), processor.name(), processor.features()
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3, codemodel="jitdefault"
    )
    return machine, f"{triple} {cpu} {features} {llvmlite.__version__}"


@cache
def _engine() -> Any:
    machine, _ = target()
    module = binding.parse_assembly("")
    module.triple, module.data_layout = binding.get_process_triple(), str(machine.target_data)
    own = binding.Target.from_triple(module.triple).create_target_machine(codemodel="jitdefault")  # the engine frees it
    return binding.create_mcjit_compiler(module, own)


def object_of(module: Any) -> bytes:
    """The object file of a module, optimised for this machine."""
    with _lock:
        machine, _ = target()
        module.triple, module.data_layout = binding.get_process_triple(), str(machine.target_data)
        parsed = binding.parse_assembly(str(module))
        # What should be a vector is one in the source already: to unroll loops doubles the code and the time to compile
        # it, and makes no kernel faster.
        options = binding.create_pipeline_tuning_options(speed_level=3)
        options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
        builder = binding.create_pass_builder(machine, options)
        builder.getModulePassManager().run(parsed, builder)
        return bytes(machine.emit_object(parsed))


def loaded(code: bytes, name: str) -> int:
    """The address of a function of an object file, which stays in memory as long as the process."""
    with _lock:
        engine = _engine()
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
        engine.finalize_object()
        return int(engine.get_function_address(name))


def folders(beside: Path) -> Iterator[Path]:
    """Where code may be kept: NUMBA_CACHE_DIR alone, or else beside the source, or in the user's cache."""
    own = os.environ.get("NUMBA_CACHE_DIR")
    if own:
        yield Path(own) / "subquad"
        return
    yield beside / "__pycache__"
    general = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # a user may have no home, as in a container
        default = "Library/Caches" if sys.platform == "darwin" else ".cache"
        yield (Path(general) if general else Path.home() / default) / "subquad" / "kernels"


def kept(beside: Path, name: str, stamp: str, rest: str, make: Callable[[], bytes]) -> bytes:
    """Code that is read from the disk or made; `stamp` stands for the sources and `rest` for all else that counts."""
    file = f"{name}.{stamp}.{sha256(f'{rest} {target()[1]}'.encode()).hexdigest()[:16]}.o"
    for folder in folders(beside):
        with suppress(OSError):
            found = (folder / file).read_bytes()
            if sha256(found[DIGEST:]).digest() == found[:DIGEST]:
                return found[DIGEST:]
    code = make()
    for folder in folders(beside):
        with suppress(OSError):
            _write(folder, file, sha256(code).digest() + code)
            break
    own = re.compile(rf"{re.escape(name)}\.([0-9a-f]+)\.[0-9a-f]+\.o")
    for path in (beside / "__pycache__").glob(f"{name}.*.o"):  # code of other sources
        found_name = own.fullmatch(path.name)
        if found_name and found_name[1] != stamp:
            with suppress(OSError):
                path.unlink()
    return code


def _write(folder: Path, file: str, code: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(code)
        Path(path).replace(folder / file)
    except OSError:
        Path(path).unlink(missing_ok=True)
        raise
