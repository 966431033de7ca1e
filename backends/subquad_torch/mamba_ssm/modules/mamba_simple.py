"""The Mamba block as the module of ``mamba_ssm``, with its parameters, arguments and caches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from subquad_torch.mamba_ssm.modules.block import Block
from subquad_torch.mamba_ssm.modules.initial import biases_of_steps, keep_last, parameter, states_from_cache
from subquad_torch.mamba_ssm.ops.mixer import mix

__all__ = ["Block", "Mamba"]


class Mamba(nn.Module):
    """A Mamba block.

    Parameters
    ----------
    d_model : int
        Width of the input and output.
    d_state, d_conv, expand : int
        States of a channel, taps of the convolution, and d_inner / d_model.
    dt_rank : int or "auto", default "auto"
        Rank of the map to the step sizes; d_model / 16, rounded up.
    dt_min, dt_max, dt_init, dt_scale, dt_init_floor : optional
        The steps begin log-uniform from `dt_min` to `dt_max`, at least `dt_init_floor`; the weight of ``dt_proj`` is
        ±dt_scale / √dt_rank, uniform ("random") or "constant".
    conv_bias, bias : bool
        Whether the convolution, and the outer projections, have biases.
    use_fast_path : bool, default True
        Which of two forms the original computes; here there is one, and nothing depends on it.
    layer_idx : int, optional
        Under which number an inference cache keeps the states.
    device, dtype : optional
        Those of the parameters; ``A_log`` and ``D`` are float32.

    See Also
    --------
    subquad_torch.nn.Mamba : The block with subquad's own arguments.

    Notes
    -----
    Parameters are drawn in the order of the original from PyTorch's generator.

    Examples
    --------
    >>> import torch
    >>> from subquad_torch.mamba_ssm import Mamba
    >>> Mamba(32, d_state=8)(torch.zeros(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else int(dt_rank)
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.activation, self.act = "silu", nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **made
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, **made)
        bound = self.dt_rank**-0.5 * dt_scale
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        elif dt_init == "random":
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        else:
            msg = f"dt_init is {dt_init!r}, expected 'random' or 'constant'"
            raise ValueError(msg)
        with torch.no_grad():
            self.dt_proj.bias.copy_(biases_of_steps(self.d_inner, dt_min, dt_max, dt_init_floor, **made))
        self.dt_proj.bias._no_reinit = True  # the initialisation of a model would set it to 0
        rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device)
        self.A_log = parameter(torch.log(rates).repeat(self.d_inner, 1))
        self.D = parameter(torch.ones(self.d_inner, device=device))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """Compute the block.

        Parameters
        ----------
        hidden_states : Tensor, shape (batch, seqlen, d_model)
            Input sequence.
        inference_params : InferenceParams, optional
            The cache. At ``seqlen_offset`` 0 a sequence begins, and its states are kept; later the input, of one token
            or of any number, continues it.

        Returns
        -------
        Tensor, shape (batch, seqlen, d_model)
            The output.

        Raises
        ------
        ValueError
            If there is no `layer_idx`, or the cache is of another batch.
        """
        if inference_params is None:
            return self._run(hidden_states, None, continued=False)
        states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        return self._run(hidden_states, states, continued=inference_params.seqlen_offset > 0)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Continue a sequence by (batch, seqlen, d_model), of one token or more: (output, states, written in place)."""
        return self._run(hidden_states, (conv_state, ssm_state), continued=True), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """States of 0: (batch, d_inner, d_conv) of the convolution, (batch, d_inner, d_state) of the scan.

        They do not grow with `max_seqlen`, and further arguments, for layers of other kinds, change nothing.
        """
        device = self.out_proj.weight.device
        conv, ssm = (weight.dtype if dtype is None else dtype for weight in (self.conv1d.weight, self.dt_proj.weight))
        return (
            torch.zeros(batch_size, self.d_inner, self.d_conv, device=device, dtype=conv),
            torch.zeros(batch_size, self.d_inner, self.d_state, device=device, dtype=ssm),
        )

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        return states_from_cache(self, inference_params, batch_size, initialize_states)

    def _run(self, hidden_states: Tensor, states: tuple[Tensor, Tensor] | None, *, continued: bool) -> Tensor:
        """The output; states, if any, are read where the sequence is continued, and written."""
        history, before = None, None
        if states is not None and continued:
            history, before = states[0][..., 1:].mT, states[1]
        y, inputs, after = mix(
            self.in_proj(hidden_states), self.conv1d.weight[:, 0, :], self.conv1d.bias, self.x_proj,
            self.dt_proj.weight, -torch.exp(self.A_log.float()), self.D.float(), self.dt_proj.bias.float(),
            history=history, state=before,
        )  # fmt: skip
        if states is not None:
            keep_last(states[0], inputs.detach(), continued=continued)
            with torch.no_grad():
                states[1].copy_(after)
        return self.out_proj(y)
