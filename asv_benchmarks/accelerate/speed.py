"""A Mamba model of 130 million parameters' shapes: transformers' own path and the accelerated one, in turn.

Prefill is one pass over a prompt with a cache, generation what transformers' `generate` takes for a token. Memory is
the rise of the peak resident memory during a prefill, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from asv_benchmarks.papers.memory import THRESHOLD, resident_bytes
from subquad_torch.transformers import accelerate, restore

SHAPES: dict[str, int] = {"vocab_size": 2000, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16}
FORMS: dict[str, Callable[[Any], Any]] = {"transformers": restore, "accelerated": accelerate}


def make_model(layers: int) -> Any:
    """The model, with random weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.MambaConfig(**SHAPES | {"num_hidden_layers": layers})
    return transformers.MambaForCausalLM(config).eval()


def prompt(n: int) -> torch.Tensor:
    """Random tokens, (1, n)."""
    return torch.randint(3, SHAPES["vocab_size"], (1, n), generator=torch.Generator().manual_seed(0))


def prefill(model: Any, n: int) -> None:
    """One pass over a prompt of n tokens, which leaves a cache and the logits of the last token."""
    with torch.no_grad():
        model(prompt(n), use_cache=True, logits_to_keep=1)


def generate(model: Any, count: int) -> None:
    """`count` tokens after a short prompt, greedily."""
    how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    model.generate(prompt(8), **how)


def products(model: Any, n: int) -> None:
    """The matrix products of a pass over n tokens, alone: the least that any form has to do."""
    made: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for layer in model.backbone.layers:
            for linear in (layer.mixer.in_proj, layer.mixer.x_proj, layer.mixer.dt_proj, layer.mixer.out_proj):
                size = linear.in_features
                linear(made.setdefault(size, torch.ones(1, n, size)))


def times(layers: int, n: int, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds, in turn: {form: {"prefill": seconds, "token": seconds}}, the products as a form too."""
    model, found = make_model(layers), {name: ([], []) for name in (*FORMS, "products")}
    for form in FORMS.values():
        generate(form(model), 2)
        prefill(model, 16)
    for _ in range(rounds):
        for name, form in FORMS.items():
            form(model)
            found[name][0].append(_seconds(prefill, model, n))
            found[name][1].append(_seconds(generate, model, count) / count)
        found["products"][0].append(_seconds(products, model, n))
        found["products"][1].append(_seconds(products, model, 1))
    return {name: {"prefill": median(x), "token": median(y)} for name, (x, y) in found.items()}


def memory(layers: int, n: int, threads: int) -> dict[str, int]:
    """Bytes beyond the weights of a prefill, by form."""
    code = f"from asv_benchmarks.accelerate import speed; speed.print_memory({{!r}}, {layers}, {n}, {threads})"
    found = {}
    for name in FORMS:
        command = [sys.executable, "-c", code.format(name)]
        done = subprocess.run(command, env=os.environ | THRESHOLD, check=True, stdout=subprocess.PIPE, text=True)
        found[name] = int(done.stdout.splitlines()[-1])
    return found


def print_memory(name: str, layers: int, n: int, threads: int) -> None:
    """Write the bytes of one form to standard output."""
    torch.set_num_threads(threads)
    model = FORMS[name](make_model(layers))
    prefill(model, 16)
    sys.stdout.write(f"{resident_bytes(lambda: prefill(model, n))}\n")


def _seconds(function: Callable[..., None], *args: Any) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start
