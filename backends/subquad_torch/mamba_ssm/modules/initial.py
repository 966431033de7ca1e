"""How the parameters of mixers begin, and the caches of their states."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def biases_of_steps(
    size: int, dt_min: float, dt_max: float, dt_init_floor: float, device: Any = None, dtype: Any = None
) -> Tensor:
    """Biases whose softplus is log-uniform in [dt_min, dt_max], and at least `dt_init_floor`."""
    low, high = math.log(dt_min), math.log(dt_max)
    steps = torch.exp(low + (high - low) * torch.rand(size, device=device, dtype=dtype)).clamp(min=dt_init_floor)
    return steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus, exact for small steps


def parameter(x: Tensor) -> torch.nn.Parameter:
    """A parameter that optimisers shall leave without weight decay, as the original marks it."""
    made = torch.nn.Parameter(x)
    made._no_weight_decay = True  # type: ignore[attr-defined]
    return made


def states_from_cache(mixer: Any, inference_params: Any, batch_size: int, initialize_states: bool) -> Any:
    """The states (convolution, scan) of a layer in an inference cache, made at the first call."""
    memory = inference_params.key_value_memory_dict
    if mixer.layer_idx is None:
        msg = "layer_idx is None, expected the number of the layer: inference_params keeps states by it"
        raise ValueError(msg)
    if mixer.layer_idx not in memory:
        memory[mixer.layer_idx] = mixer.allocate_inference_cache(batch_size, inference_params.max_seqlen)
    states = memory[mixer.layer_idx]
    if any(state.shape[0] != batch_size for state in states):
        msg = f"inference_params holds states of {states[0].shape[0]} sequences, expected {batch_size} as in this call"
        raise ValueError(msg)
    if initialize_states:
        for state in states:
            state.zero_()
    return states


@torch.no_grad()
def keep_last(conv_state: Tensor, inputs: Tensor, *, continued: bool) -> None:
    """Write the last inputs (batch, n, channels) of a convolution to its cache (batch, channels, d_conv)."""
    width, inputs = conv_state.shape[-1], inputs[:, -conv_state.shape[-1] :].mT.to(conv_state.dtype)
    before = conv_state if continued else torch.zeros_like(conv_state)
    conv_state.copy_(torch.cat([before, inputs], dim=-1)[..., -width:])
