"""llama.cpp by the functions of its C library, which the package `xllamacpp` carries."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

WORDS = 256  # of a parameter structure, more than any release has: the library reads and writes what is its own


class Parameters(ctypes.Structure):
    """A structure of options; the first word of those of a context is the number of tokens that it holds."""

    _fields_ = (("words", ctypes.c_uint32 * WORDS),)


class Batch(ctypes.Structure):
    """What `llama_batch_get_one` returns."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq_id", "seq_id", "logits")),
    )


class Model:
    """A model with one context on a number of threads."""

    def __init__(self, path: Path, vocabulary: int, threads: int) -> None:
        import xllamacpp

        self.vocabulary, self.library = vocabulary, ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        self._silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
        self._call("llama_log_set", None, pointer, pointer)(ctypes.cast(self._silent, pointer), None)
        self._call("llama_backend_init", None)()
        options = self._call("llama_model_default_params", Parameters)()
        model = self._call("llama_model_load_from_file", pointer, ctypes.c_char_p, Parameters)(
            str(path).encode(), options
        )
        of_context = self._call("llama_context_default_params", Parameters)()
        of_context.words[0] = 4096
        self.context = self._call("llama_init_from_model", pointer, pointer, Parameters)(model, of_context)
        if not model or not self.context:
            msg = f"llama.cpp could not load {path}"
            raise RuntimeError(msg)
        self._call("llama_set_n_threads", None, pointer, number, number)(self.context, threads, threads)
        self._batch = self._call("llama_batch_get_one", Batch, pointer, number)
        self._decode = self._call("llama_decode", number, pointer, Batch)
        self._logits = self._call("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, number)
        self._memory = self._call("llama_get_memory", pointer, pointer)
        self._clear = self._call("llama_memory_clear", None, pointer, ctypes.c_bool)

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self.library, name)
        function.restype, function.argtypes = result, arguments
        return function

    def forget(self) -> None:
        """Begin a new text."""
        self._clear(self._memory(self.context), True)

    def logits(self, tokens: Any) -> Any:
        """The logits after these tokens, which continue the text."""
        tokens = np.ascontiguousarray(tokens, np.int32)
        if self._decode(self.context, self._batch(tokens.ctypes.data, len(tokens))):
            msg = "llama_decode failed"
            raise RuntimeError(msg)
        return np.ctypeslib.as_array(self._logits(self.context, -1), (self.vocabulary,)).copy()
