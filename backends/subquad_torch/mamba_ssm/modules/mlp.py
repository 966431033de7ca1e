"""A gated multilayer perceptron."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """fc2(y activation(gate)), where fc1 gives y and gate.

    Parameters
    ----------
    in_features : int
        Width of the input.
    hidden_features : int, optional
        Width inside, rounded up to a multiple. Default: 8 / 3 of the input's.
    out_features : int, optional
        Width of the output. Default: that of the input.
    activation : callable
        That of the gate; silu.
    bias : bool, default False
        Whether both maps have biases.
    multiple_of : int, default 128
        The multiple.
    device, dtype : optional
        Those of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = functional.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        inside = 8 * in_features // 3 if hidden_features is None else hidden_features
        inside = -(-inside // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * inside, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        outputs = in_features if out_features is None else out_features
        self.fc2 = nn.Linear(inside, outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The output (..., out_features) for (..., in_features)."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))
