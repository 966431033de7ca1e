"""From LLVM's language to machine code: optimisation for this machine, object files kept on disk, addresses."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import RLock, Thread
from typing import Any

import llvmlite
from llvmlite import binding
from llvmlite.binding import ffi

from subquad_numpy.codegen import processor
from subquad_numpy.codegen.parts import texts_of

DIGEST = 32  # bytes of the hash at the head of a file
LENGTH = 8  # bytes of the length at the head of an object file among others
_lock = RLock()  # of the engine


@cache
def target() -> tuple[Any, str]:
    """(the data layout of the machine that is compiled for, a text that tells the machine from others)."""
    for part in ("target", "asmprinter"):
        with suppress(RuntimeError):  # newer versions of llvmlite do so themselves, and refuse the call
            getattr(binding, f"initialize_native_{part}")()
    triple, cpu, features = binding.get_process_triple(), processor.name(), processor.features()
    return str(_machine().target_data), f"{triple} {cpu} {features} {llvmlite.__version__}"


def _machine() -> Any:
    """A machine that compiles: it serves one thread at a time."""
    return binding.Target.from_triple(binding.get_process_triple()).create_target_machine(
        cpu=processor.name(), features=processor.features(), opt=3, codemodel="jitdefault"
    )


@cache
def _engine() -> Any:
    module = binding.parse_assembly("")
    module.triple, module.data_layout = binding.get_process_triple(), target()[0]
    own = binding.Target.from_triple(module.triple).create_target_machine(codemodel="jitdefault")  # the engine frees it
    return binding.create_mcjit_compiler(module, own)


def object_of(module: Any) -> bytes:
    """The object files of a module, optimised for this machine, one behind the other."""
    module.triple, module.data_layout = binding.get_process_triple(), target()[0]
    made = _all_compiled(texts_of(module))
    return b"".join(len(one).to_bytes(LENGTH, "little") + one for one in made)


def _all_compiled(texts: list[str]) -> list[bytes]:
    """The object files of all texts, by a thread for each but the first."""
    found: dict[int, Any] = {}

    def work(place: int) -> None:
        try:
            found[place] = compiled_text(texts[place])
        except Exception as error:
            found[place] = error

    threads = [Thread(target=work, args=(place,)) for place in range(1, len(texts))]
    for place, thread in enumerate(threads, start=1):
        try:
            thread.start()
        except RuntimeError:  # no thread can be started
            work(place)
    work(0)
    for thread in threads:
        if thread.ident is not None:
            thread.join()
    for one in found.values():
        if isinstance(one, Exception):
            raise one
    return [found[place] for place in range(len(texts))]


def compiled_text(text: str) -> bytes:
    """The object file of LLVM's language, in a context of its own."""
    machine, parsed = _machine(), binding.parse_assembly(text, binding.create_context())
    # What should be a vector is one in the source already: to unroll loops doubles the code and the time to compile
    # it, and makes no kernel faster.
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = binding.create_pass_builder(machine, options)
    _unlocked("LLVMPY_RunNewModulePassManager")(builder.getModulePassManager(), parsed, builder)
    with ffi.OutputString() as error:
        memory = _unlocked("LLVMPY_TargetMachineEmitToMemory")(machine, parsed, 1, error)
        if not memory:
            raise RuntimeError(str(error))
    try:
        return ctypes.string_at(ffi.lib.LLVMPY_GetBufferStart(memory), ffi.lib.LLVMPY_GetBufferSize(memory))
    finally:
        ffi.lib.LLVMPY_DisposeMemoryBuffer(memory)


def _unlocked(name: str) -> Any:
    """A function of LLVM without the lock by which llvmlite lets in one thread at a time.

    LLVM itself lets in one for each context. With the lock, threads would merely wait for each other.
    """
    function = getattr(ffi.lib, name)
    return getattr(function, "_cfn", function)


def loaded(code: bytes, name: str) -> int:
    """The address of a function of object files, which stay in memory as long as the process."""
    with _lock:
        engine = _engine()
        while code:
            end = LENGTH + int.from_bytes(code[:LENGTH], "little")
            engine.add_object_file(binding.ObjectFileRef.from_data(code[LENGTH:end]))
            code = code[end:]
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
