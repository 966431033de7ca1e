"""Reversible layers beside plain ones: peak memory of a training step, and how far the gradients of the two differ."""

import copy
from typing import Any

from asv_benchmarks import harness

ROWS, CHANNELS = 512, 128  # of each of the two streams


class ReversibleLayers:
    """One step through layers of two feed-forward networks: the two streams' forward pass and the gradients.

    "plain" computes x₁ + f(x₂) and x₂ + g(y₁) of the same layers and keeps every activation. Needs PyTorch, whose
    profiler counts the bytes; n/a without it.
    """

    timeout = 120.0
    param_names = ("layers", "depth")
    params = (["reversible", "plain"], [6, 24])

    def setup(self, layers: str, depth: int) -> None:
        """Draw the parameters, which are those of the same seed for both kinds, and the streams."""
        if "torch" not in harness.backends():
            msg = "SUBQUAD_BENCH_BACKENDS leaves torch out"
            raise NotImplementedError(msg)
        self.bench = harness.target("torch").bench
        import torch

        from subquad_torch.nn import Reversible, ReversibleSequence

        def feed_forward() -> Any:
            parts = torch.nn.Linear(CHANNELS, 4 * CHANNELS), torch.nn.GELU(), torch.nn.Linear(4 * CHANNELS, CHANNELS)
            return torch.nn.Sequential(torch.nn.LayerNorm(CHANNELS), *parts)

        torch.manual_seed(0)
        self.model = ReversibleSequence(Reversible(feed_forward(), feed_forward()) for _ in range(depth))
        self.streams = [torch.randn(ROWS, CHANNELS) for _ in "12"]
        self.layers = layers

    def step(self, *streams: Any) -> Any:
        """The gradients of ½(‖y₁‖² + ‖y₂‖²) by the parameters, one after the other."""
        run = self.model if self.layers == "reversible" else self._plain
        return self._gradients(self.model, run, streams)

    def track_extra_memory(self, _layers: str, _depth: int) -> float:
        """Peak memory of a step beyond the streams, the parameters and their gradients."""
        return self.bench.peak_extra_memory(self.step, *self.streams)

    track_extra_memory.unit = "bytes"  # type: ignore[attr-defined]

    def track_gradient_difference(self, _layers: str, _depth: int) -> float:
        """Largest difference from the gradients of plain layers in float64, relative to the largest gradient."""
        wide = copy.deepcopy(self.model).double()
        right = self._gradients(wide, lambda x1, x2: self._plain(x1, x2, wide), [x.double() for x in self.streams])
        found = self.step(*self.streams)
        differences = [float((a.double() - b).abs().max()) for a, b in zip(found, right, strict=True)]
        return max(differences) / max(float(x.abs().max()) for x in right)

    def _plain(self, x1: Any, x2: Any, model: Any = None) -> Any:
        for layer in (model or self.model).layers:
            x1 = x1 + layer.f(x2)
            x2 = x2 + layer.g(x1)
        return x1, x2

    @staticmethod
    def _gradients(model: Any, run: Any, streams: Any) -> Any:
        import torch

        y1, y2 = run(*streams)
        return torch.autograd.grad(0.5 * (y1.square().sum() + y2.square().sum()), list(model.parameters()))
