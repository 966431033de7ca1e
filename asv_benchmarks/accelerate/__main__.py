"""Errors of tiny models of each family, and the speed of a Mamba model: transformers' own path beside accelerate."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from asv_benchmarks import harness


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.accelerate", description=__doc__)
    parser.add_argument("what", choices=("errors", "speed", "memory"))
    parser.add_argument("--threads", type=int, help="of each library (default: the cores of this process)")
    parser.add_argument("--layers", type=int, default=24, help="of the Mamba model (default 24)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt (default 2048)")
    parser.add_argument("--new", type=int, default=16, help="generated tokens (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="in turn (default 3)")
    args = parser.parse_args()
    threads = harness.use_threads(args.threads)
    import torch

    torch.set_num_threads(threads)
    if args.what == "errors":
        Console().print(errors_table())
        return
    from asv_benchmarks.accelerate import speed

    if args.what == "memory":
        found = speed.memory(args.layers, args.tokens, threads)
        Console().print({name: f"{size / 2**20:.0f} MiB beyond the weights" for name, size in found.items()})
        return
    table = Table("form", f"prefill of {args.tokens}, s", "generation, tokens/s")
    for name, x in speed.times(args.layers, args.tokens, args.new, args.rounds).items():
        table.add_row(name, f"{x['prefill']:.2f}", f"{1 / x['token']:.1f}")
    Console().print(table)


def errors_table() -> Table:
    """Relative errors beside what is right: left transformers' own, right accelerated."""
    import torch

    from asv_benchmarks.accelerate import errors
    from asv_benchmarks.accelerate.families import CONFIGS, tiny_model
    from subquad_torch.transformers import accelerate

    pairs = ("10 + 5 + 1 with cache", "left padding", "next token", "right padding", "next token")
    table = Table("family", "logits", "gradients", *pairs)
    for family in CONFIGS:
        own, fast, ids = tiny_model(family), accelerate(tiny_model(family)), errors.tokens(2, 16)
        with torch.no_grad():
            rows = [
                [
                    errors.of_chunks(x, ids),
                    *(e for side in ("left", "right") for e in errors.of_padding(x, family, side)),
                ]
                for x in (own, fast)
            ]
            logits = errors.relative(fast(ids).logits, own(ids).logits)
        beside = [f"{x:.0e}, {y:.0e}" for x, y in zip(*rows, strict=True)]
        table.add_row(family, f"{logits:.0e}", f"{errors.of_gradients(fast, own, ids):.0e}", *beside)
    return table


if __name__ == "__main__":
    main()
