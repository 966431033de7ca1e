"""`subquad generate`: continue a prompt by a model with published weights, and say how fast it went."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from subquad.cli.digits import three_digits
from subquad.cli.errors import CommandError
from subquad.cli.libraries import Target, targets
from subquad.models import LanguageModel, load_model

INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand to its parser."""
    add = parser.add_argument
    formats = "a directory with config.json and .safetensors files, of transformers or mamba-ssm, or a .gguf file"
    add("path", type=Path, metavar="PATH", help=formats)
    add("prompt", nargs="?", metavar="PROMPT", help="the text to continue; the model must have a tokenizer")
    add("--tokens", metavar="LIST", help="the prompt as numbers of tokens, such as 3,1,4, in place of text")
    add("--max-new", type=int, default=128, metavar="INT", help="the most tokens to add. Default: %(default)s")
    heat = "0 takes the likeliest token; above, tokens are drawn from p ∝ exp(logits / temperature). Default: 0"
    add("--temperature", type=float, default=0.0, metavar="FLOAT", help=heat)
    add("--top-k", type=int, metavar="INT", help="draw among the k likeliest tokens alone")
    nucleus = "draw among the fewest tokens whose probabilities sum to this or more"
    add("--top-p", type=float, metavar="FLOAT", help=nucleus)
    add("--stop", action="append", metavar="TEXT", help="end with this text, too; may be given several times")
    add("--seed", type=int, default=0, metavar="INT", help="seed of the draws. Default: %(default)s")
    dtype = "of matrices: float32, float64, float16 or bfloat16. Default: as stored"
    add("--dtype", metavar="NAME", help=dtype)
    where = "array library, or library:device, of those that subquad info lists. Default: %(default)s"
    add("--backend", default="numpy", metavar="NAME", help=where)


def run(args: argparse.Namespace) -> int:
    """Load the model, print what it generates as it comes, then the speed on stderr; return the exit code."""
    if (args.prompt is None) == (args.tokens is None):
        msg = "expected a prompt, either PROMPT as text or --tokens as numbers"
        raise CommandError(msg)
    target = _target(args.backend)
    start = time.perf_counter()
    try:
        like = target.bench.asarray(np.zeros(1, np.float32), None, target.device)
        model = load_model(args.path, like=like, dtype=args.dtype)
        loaded = time.perf_counter() - start
        prompt = args.prompt if args.tokens is None else _numbers(args.tokens)
        if args.prompt is not None and model.tokenizer is None:
            msg = f"{args.path} has no tokenizer that can be read; give the prompt by --tokens, as numbers"
            raise CommandError(msg)
        stream = model.stream(
            prompt, max_new=args.max_new, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            stop=args.stop, seed=args.seed,
        )  # fmt: skip
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise CommandError(" ".join(str(error).split())) from error
    print(f"{model!r}, loaded in {three_digits(loaded)} s", file=sys.stderr)
    return _show(model, prompt, stream)


def _show(model: LanguageModel, prompt: Any, stream: Any) -> int:
    """Print the prompt and the stream, then its speed; the exit code."""
    text = isinstance(prompt, str)
    count = len(model.tokenizer.encode(prompt).ids) if text else len(prompt)
    print(prompt if text else " ".join(map(str, prompt)), end="", flush=True)
    times, code = [time.perf_counter()], 0
    try:
        for piece in stream:
            times.append(time.perf_counter())
            print(piece if text else f" {piece}", end="", flush=True)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except ValueError as error:  # weights that are not finite
        print()
        raise CommandError(str(error)) from error
    print()
    new = len(times) - 1
    if new:
        print(f"prompt: {count} tokens, first new token after {three_digits(times[1] - times[0])} s", file=sys.stderr)
    if new > 1:
        speed = three_digits((new - 1) / (times[-1] - times[1]))
        print(f"then {new - 1} tokens at {speed} tokens/s", file=sys.stderr)
    return code


def _target(name: str) -> Target:
    """The one library and device that `--backend` names."""
    if "," in name:
        msg = f"--backend is {name!r}, expected one library"
        raise CommandError(msg)
    try:
        return targets(name)[0][0]
    except CommandError as error:
        raise CommandError(str(error).replace("--backends", "--backend")) from error


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        msg = f"--tokens is {text!r}, expected whole numbers separated by commas, such as 3,1,4"
        raise CommandError(msg) from None
