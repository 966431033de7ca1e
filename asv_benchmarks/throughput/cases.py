"""The models that are measured, each behind three functions: a prompt, more sequences that continue it, a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from asv_benchmarks.throughput import weights

Tokens = Any  # numbers of tokens, an array of NumPy


class Case(Protocol):
    """A model on a library."""

    def prompt(self, tokens: Tokens) -> None:
        """Take a prompt from the beginning, up to the logits of its last token."""
        ...

    def generate(self, batch: int) -> Iterator[Any]:
        """Continue the prompt in so many sequences, greedily; each step is one token of all."""
        ...


class Ours:
    """`subquad.load_model` on an array library."""

    def __init__(self, folder: Path, threads: int, library: str = "numpy", dtype: str = "float32") -> None:
        import subquad

        self.model = subquad.load_model(folder, like=_like(library, threads), dtype=dtype)
        self.state: Any = None

    def prompt(self, tokens: Tokens) -> None:
        logits, self.state = self.model.logits(tokens.tolist(), return_state=True, num_last_tokens=1)
        np.asarray(logits)

    def generate(self, batch: int) -> Iterator[Any]:
        state = tuple({name: _repeat(x, batch) for name, x in layer.items()} for layer in self.state)
        return self.model.stream([[1]] * batch, max_new=10**6, stop=[], state=state)


def _like(library: str, threads: int) -> Any:
    if library == "numpy":
        return np.zeros(1, np.float32)
    if library == "torch":
        import torch

        torch.set_num_threads(threads)
        return torch.zeros(1)
    import jax.numpy as jnp

    return jnp.zeros(1)


def _repeat(x: Any, batch: int) -> Any:
    """`batch` copies of the state of one sequence."""
    x = x if x.ndim == 3 else x[None]
    xp = __import__(type(x).__module__.partition(".")[0])
    return x.repeat(batch, 1, 1) if xp.__name__ == "torch" else x.repeat(batch, axis=0)


class Theirs:
    """A causal language model of transformers, with its cache."""

    def __init__(self, folder: Path, threads: int, kind: str = "mamba") -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        transformers.logging.set_verbosity_error()
        if kind == "mamba":
            self.model = transformers.MambaForCausalLM.from_pretrained(folder).eval()
        else:
            torch.manual_seed(0)
            self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**weights.LLAMA)).eval()
        self.cache: Any = None

    def prompt(self, tokens: Tokens) -> None:
        given = self.torch.from_numpy(np.asarray(tokens, np.int64))[None]
        self.cache = self._run(given, None)[1]

    def generate(self, batch: int) -> Iterator[Any]:
        cache = copy.deepcopy(self.cache)
        if batch > 1:
            cache.batch_repeat_interleave(batch)
        tokens = self.torch.ones((batch, 1), dtype=self.torch.int64)
        while True:
            logits, cache = self._run(tokens, cache)
            tokens = logits[:, -1:].argmax(-1)
            yield tokens

    def _run(self, tokens: Any, cache: Any) -> tuple[Any, Any]:
        given = {} if cache is None else {"cache": cache}
        out = self.model(tokens, use_cache=True, logits_to_keep=1, **given)
        return out.logits, out.cache


class LlamaCpp:
    """llama.cpp with the same weights in float32; one sequence."""

    def __init__(self, folder: Path, threads: int) -> None:
        from asv_benchmarks.throughput.llama_cpp import Model

        self.model = Model(folder / "model.gguf", weights.VOCABULARY, threads)
        self.logits: Any = None

    def prompt(self, tokens: Tokens) -> None:
        self.model.forget()
        self.logits = self.model.logits(tokens)

    def generate(self, batch: int) -> Iterator[Any]:
        while True:
            token = int(np.argmax(self.logits))
            self.logits = self.model.logits([token])
            yield token


class Products:
    """The matrix products of a prompt and of a step alone, by NumPy: what no implementation can leave out."""

    def __init__(self, folder: Path, threads: int) -> None:
        drawn = weights.draw()
        self.matrices = [x for name, x in drawn.items() if name.endswith("_proj.weight")]
        self.head = drawn["backbone.embeddings.weight"]

    def prompt(self, tokens: Tokens, block: int = 1024) -> None:
        rows = {x.shape[1]: np.ones((block, x.shape[1]), np.float32) for x in self.matrices}
        for W in self.matrices:
            for start in range(0, len(tokens), block):
                rows[W.shape[1]][: len(tokens) - start] @ W.T

    def generate(self, batch: int) -> Iterator[Any]:
        rows = {x.shape[1]: np.ones((batch, x.shape[1]), np.float32) for x in (*self.matrices, self.head)}
        while True:
            for W in (*self.matrices, self.head):
                rows[W.shape[1]] @ W.T
            yield None


ALONE = ("llama.cpp", "transformers, Mamba")  # measured with one sequence: the cache of the latter cannot be repeated
LIBRARIES = {"NumPy": "numpy", "PyTorch": "torch", "JAX": "jax"}
CASES: dict[str, Callable[[Path, int], Case]] = {
    **{
        f"subquad, {name}, {dtype}": (lambda folder, threads, x=library, y=dtype: Ours(folder, threads, x, y))
        for dtype in ("float32", "bfloat16")
        for name, library in LIBRARIES.items()
    },
    "transformers, Mamba": Theirs,
    "transformers, Llama": lambda folder, threads: Theirs(folder, threads, "llama"),
    "llama.cpp": LlamaCpp,
    "products alone": Products,
}
