"""The Mamba-2 block as the module of ``mamba_ssm``, with its parameters, arguments and caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from subquad_torch.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from subquad_torch.mamba_ssm.modules.initial import biases_of_steps, keep_last, parameter, states_from_cache
from subquad_torch.mamba_ssm.ops.split import NO_LIMIT, split_scan
from subquad_torch.mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated

__all__ = ["Mamba2"]


class Mamba2(nn.Module):
    """A Mamba-2 block.

    Parameters
    ----------
    d_model : int
        Width of the input and output.
    d_state, d_conv, expand, headdim, ngroups : int
        States of a channel, taps of the convolution, d_inner / d_model, channels of a head, groups of heads.
    conv_init : float, optional
        The taps begin uniform in ±conv_init. Default: as PyTorch draws them.
    d_ssm : int, optional
        How many of the d_inner channels the scan takes; the rest is a gated multilayer perceptron. Default: all.
    A_init_range : (float, float)
        The rates −A begin uniform in this range.
    D_has_hdim : bool, default False
        Whether the skip connection has a factor for each channel, in place of each head.
    rmsnorm, norm_before_gate : bool
        Whether there is a norm before the last projection, and whether the gate is outside of it.
    dt_min, dt_max, dt_init_floor : float
        The steps begin log-uniform from `dt_min` to `dt_max`, at least `dt_init_floor`.
    dt_limit : (float, float)
        Least and greatest step size, in every call; the original's one-token step leaves it out.
    bias, conv_bias : bool
        Whether the outer projections, and the convolution, have biases.
    chunk_size : int
        The length of the original's chunks; results do not depend on it.
    use_mem_eff_path : bool, default True
        Which of two forms the original computes; here there is one, and nothing depends on it.
    layer_idx : int, optional
        Under which number an inference cache keeps the states.
    process_group : None
        Tensor parallelism, which is not provided: anything but None raises NotImplementedError.
    sequence_parallel : bool
        How the original reduces over a `process_group`; without one, nothing depends on it.
    device, dtype : optional
        Those of the parameters; ``D`` is float32.

    See Also
    --------
    subquad_torch.nn.Mamba2 : The block with subquad's own arguments.

    Notes
    -----
    Parameters are drawn in the order of the original from PyTorch's generator.

    Examples
    --------
    >>> import torch
    >>> from subquad_torch.mamba_ssm import Mamba2
    >>> Mamba2(32, d_state=8, headdim=16)(torch.zeros(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = NO_LIMIT,
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: None = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            msg = "process_group is given, expected None: tensor parallelism of Mamba2 is not provided by subquad"
            raise NotImplementedError(msg)
        made = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.conv_init = d_model, d_state, d_conv, conv_init
        self.expand, self.headdim, self.ngroups = expand, headdim, ngroups
        self.process_group, self.sequence_parallel, self.world_size, self.local_rank = None, sequence_parallel, 1, 0
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.nheads = self.d_ssm // headdim
        if self.d_ssm % headdim or self.nheads % ngroups or not 0 < self.d_ssm <= self.d_inner:
            msg = (
                f"headdim is {headdim} and ngroups {ngroups} for {self.d_ssm} channels of the scan, of d_inner = "
                f"{self.d_inner}; expected that headdim divides these, and ngroups the number of heads"
            )
            raise ValueError(msg)
        if not 0 < A_init_range[0] <= A_init_range[1]:
            msg = f"A_init_range is {A_init_range}, expected two numbers above 0, in order"
            raise ValueError(msg)
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.chunk_size, self.use_mem_eff_path = tuple(dt_limit), chunk_size, use_mem_eff_path
        self.layer_idx, self.activation, self.act = layer_idx, "silu", nn.SiLU()

        conv_dim = self.d_ssm + 2 * ngroups * d_state
        inputs = 2 * (self.d_inner - self.d_ssm) + self.d_ssm + conv_dim + self.nheads
        self.in_proj = nn.Linear(d_model, inputs, bias=bias, **made)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1, bias=conv_bias, **made)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = parameter(biases_of_steps(self.nheads, dt_min, dt_max, dt_init_floor, **made))
        rates = torch.empty(self.nheads, dtype=torch.float32, device=device).uniform_(*A_init_range)
        self.A_log = parameter(torch.log(rates).to(dtype))
        self.D = parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        if rmsnorm:
            self.norm = RMSNormGated(
                self.d_ssm, eps=1e-5, norm_before_gate=norm_before_gate, group_size=self.d_ssm // ngroups, **made
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Compute the block.

        Parameters
        ----------
        u : Tensor, shape (batch, seqlen, d_model), or (batch · seqlen, d_model) with `seqlen`
            Input sequence.
        seqlen : int, optional
            The length of the sequences, where batch and time are one axis.
        seq_idx : Tensor of int, shape (batch, seqlen), optional
            Numbers of packed documents, each of which is as alone.
        cu_seqlens : Tensor of int, shape (num_sequences + 1,), optional
            Where packed sequences begin: with `inference_params` and `seq_idx`, the cache gets the states of each.
        inference_params : InferenceParams, optional
            The cache. At ``seqlen_offset`` 0 sequences begin, and their states are kept; later the input, of one token
            or of any number, continues them.

        Returns
        -------
        Tensor, shape of u
            The output.

        Raises
        ------
        ValueError
            If there is no `layer_idx`, the cache is of another batch, or arguments do not go together.
        """
        x = u if seqlen is None else u.unflatten(0, (-1, seqlen))
        if inference_params is None:
            out = self._run(x, None, seq_idx, cu_seqlens, continued=False)
        else:
            count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            states = self._get_states_from_cache(inference_params, count)
            continued = inference_params.seqlen_offset > 0
            if continued and (seq_idx is not None or cu_seqlens is not None):
                msg = (
                    "seq_idx or cu_seqlens is given where sequences go on, expected one sequence for each cached state"
                )
                raise ValueError(msg)
            out = self._run(x, states, seq_idx, cu_seqlens, continued=continued)
        return out if seqlen is None else out.flatten(0, 1)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Continue a sequence by (batch, seqlen, d_model), of one token or more: (output, states, written in place)."""
        out = self._run(hidden_states, (conv_state, ssm_state), None, None, continued=True)
        return out, conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """States of 0: (batch, conv_dim, d_conv) of the convolution, (batch, nheads, headdim, d_state) of the scan.

        They do not grow with `max_seqlen`, and further arguments, for layers of other kinds, change nothing.
        """
        device, channels = self.out_proj.weight.device, self.conv1d.weight.shape[0]
        conv, ssm = (weight.dtype if dtype is None else dtype for weight in (self.conv1d.weight, self.in_proj.weight))
        return (
            torch.zeros(batch_size, self.d_conv, channels, device=device, dtype=conv).mT,
            torch.zeros(batch_size, self.nheads, self.headdim, self.d_state, device=device, dtype=ssm),
        )

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        return states_from_cache(self, inference_params, batch_size, initialize_states)

    def _run(
        self, x: Tensor, states: tuple[Tensor, Tensor] | None, seq_idx: Tensor | None, cu_seqlens: Tensor | None,
        *, continued: bool,
    ) -> Tensor:  # fmt: skip
        """The output; states, if any, are read where sequences are continued, and written."""
        history, before = None, None
        if states is not None and continued:
            history, before = states[0][..., 1:].mT, states[1]
        found = split_scan(
            self.in_proj(x), self.conv1d.weight[:, 0, :], self.conv1d.bias, self.dt_bias,
            -torch.exp(self.A_log.float()), self.D.view(self.nheads, -1) if self.D_has_hdim else self.D,
            chunk_size=self.chunk_size, headdim=self.headdim, ngroups=self.ngroups, dt_limit=self.dt_limit,
            history=history, initial_states=before, seq_idx=seq_idx, cu_seqlens=cu_seqlens,
            return_varlen_states=states is not None and cu_seqlens is not None,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6, norm_before_gate=self.norm_before_gate,
        )  # fmt: skip
        if states is not None:
            with torch.no_grad():
                if cu_seqlens is None:
                    keep_last(states[0], found.inputs, continued=continued)
                    states[1].copy_(found.final_states)
                else:
                    states[0].copy_(causal_conv1d_varlen_states(found.inputs[0], cu_seqlens, self.d_conv))
                    states[1].copy_(found.varlen_states)
        return self.out_proj(found.out)
