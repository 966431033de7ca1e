"""Write queries, keys and values of both models as float16: `python -m asv_benchmarks.quality.activations DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from asv_benchmarks.quality import minilm, smollm2, texts

SMOL_LAYERS = (0, 3, 7, 11, 15, 19, 23, 27)
README = """Real queries, keys and values, float16, of the texts of asv_benchmarks/quality/texts.py ("tune", "report").

smol_{prose,code}_{tune,report}_l{layer}.npz   SmolLM2-135M: q (9, n, 64), k and v (3, n, 64), query head i reads key
                                               head i // 3; after rotary embedding, scale 1/8, causal
smol_window{00 to 15}_l{layer}.npz             of sixteen other texts (--windows)
mini_{tune,report}_l{layer}.npz                MiniLM-L6, prose: q, k, v (12, 16 · 512, 32), bidirectional, scale 1/√32;
                                               16 stretches of 512 tokens in a row, each attended by itself in the model
"""


class Recorder:
    """Exact attention that writes what it is given: one file for each layer asked for."""

    def __init__(self, out: Path, name: str, layers: tuple[int, ...], exact: smollm2.Attend) -> None:
        self.out, self.name, self.layers, self.exact = out, name, layers, exact

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        if layer in self.layers:
            joined = {x: _joined(array) for x, array in zip("qkv", (q, k, v), strict=True)}
            np.savez(self.out / f"{self.name}_l{layer}.npz", **joined)
        return self.exact(q, k, v, layer)


def _joined(x: torch.Tensor) -> np.ndarray:
    """(batch, heads, n, d) as float16 (heads, batch · n, d)."""
    return x.transpose(0, 1).flatten(1, 2).half().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.quality.activations", description=__doc__)
    parser.add_argument("out", type=Path, metavar="DIR", help="folder for the files")
    parser.add_argument("--n", type=int, default=smollm2.CONTEXT, help="tokens of SmolLM2 (default %(default)s)")
    parser.add_argument("--layers", default=",".join(map(str, SMOL_LAYERS)), help="of SmolLM2 (default %(default)s)")
    parser.add_argument(
        "--windows", action="store_true", help="of sixteen other texts in place of the four, SmolLM2's only"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "README").write_text(README, encoding="utf-8")
    layers = tuple(map(int, args.layers.split(",")))
    named = {f"smol_{kind}_{use}": texts.read(kind, use) for kind, use in texts.SOURCES}
    if args.windows:
        named = {f"smol_window{i:02}": text for i, text in enumerate(texts.windows())}
    else:
        encode(args.out)
    model = smollm2.SmolLM2()
    model.layers = max(layers) + 1  # what comes after is not written
    for name, text in named.items():
        model.hidden(model.encode(text, args.n), Recorder(args.out, name, layers, smollm2.exact))


def encode(out: Path) -> None:
    """Write the activations of MiniLM."""
    encoder = minilm.MiniLM()
    for use in texts.USES:
        recorder = Recorder(out, f"mini_{use}", tuple(range(minilm.LAYERS)), minilm.exact)
        encoder.embed(encoder.chunks(texts.read("prose", use), 16), recorder)


if __name__ == "__main__":
    main()
