"""What all swapped recurrent layers share: the cache, padding, packed documents, and long prompts in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from subquad.explain import explain
from subquad.scans import causal_conv1d
from subquad_torch.transformers.accelerate.swap import Swapped

PIECE = 1024  # steps of a long prompt that go through a layer together, so that its temporaries do not grow with n


class Past(NamedTuple):
    """What a layer knows of the tokens before; None: there were none.

    Attributes
    ----------
    conv : Tensor or None
        The last inputs of the convolution, (batch, channels, width).
    state : Tensor or None
        The state of the recurrence, in the layout of the original.
    """

    conv: Tensor | None
    state: Tensor | None


class Time(NamedTuple):
    """Which steps count, and which documents they belong to.

    Attributes
    ----------
    mask : Tensor or None
        (batch, n) bool, False for a padded step; None: all count.
    segments : Tensor or None
        (batch or 1, n), numbers of packed documents; None: one document.
    """

    mask: Tensor | None
    segments: Tensor | None


class Recurrent(Swapped):
    """A layer of a convolution and a recurrence over time, with one state of each in the model's cache."""

    reads: ClassVar[tuple[str, ...]] = ("conv1d",)

    # attributes of the originals
    conv1d: Any
    conv_kernel_size: int
    layer_idx: int
    activation: str

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if module.activation not in ("silu", "swish"):
            return f"its activation is {module.activation!r}, expected 'silu' or 'swish'"
        return None

    def subquad_mix(self, x: Tensor, past: Past, time: Time) -> tuple[Tensor, Past]:
        """Output and what is to be remembered, of the inputs (batch, n, d_model) and of what came before."""
        raise NotImplementedError

    def forward(
        self, hidden_states: Tensor, cache: Any = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The output of the layer, (batch, n, d_model); `cache` is read and written."""
        if cache is not None and cache.is_recording_past(self.layer_idx):  # to be rolled back: the original keeps more
            return super().forward(hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
        time = Time(padding(attention_mask, hidden_states), documents(kwargs, hidden_states))
        past = Past(None, None) if cache is None else read(cache, self.layer_idx)
        out, past = self._in_pieces(hidden_states, past, time)
        if cache is not None:
            write(cache, self.layer_idx, past, steps=hidden_states.shape[1])
        return out

    def _in_pieces(self, x: Tensor, past: Past, time: Time) -> tuple[Tensor, Past]:
        """`subquad_mix`, of a long sequence by pieces where no gradient will be asked for."""
        n = x.shape[1]
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or n <= PIECE or time.segments is not None:
            return self.subquad_mix(x, past, time)
        whole: Tensor | None = None
        for start in range(0, n, PIECE):
            rows = slice(start, start + PIECE)
            mask = None if time.mask is None else time.mask[:, rows]
            out, past = self.subquad_mix(x[:, rows], past, Time(mask, None))
            if whole is None:
                whole = out.new_empty((x.shape[0], n, out.shape[-1]))
            whole[:, rows] = out
        assert whole is not None
        return whole, past

    def subquad_convolve(self, u: Tensor, past: Past, time: Time) -> tuple[Tensor, Tensor]:
        """(silu of the convolution, its last inputs) of its inputs (batch, n, channels)."""
        taps, bias = self.conv1d.weight[:, 0], self.conv1d.bias
        if u.shape[1] == 1 and past.conv is not None and time.mask is None:
            return one_step(u, taps, bias, past.conv)
        before = past.conv
        if before is not None:  # the oldest of the inputs is seen by no step to come
            before = before[..., before.shape[-1] - taps.shape[-1] + 1 :].mT
        y, last = causal_conv1d(
            u, taps, bias, activation="silu",
            initial_state=before, return_state=True, mask=time.mask, segments=time.segments,
        )  # fmt: skip
        return y, torch.nn.functional.pad(last.mT, (1, 0)).to(u.dtype)


def one_step(u: Tensor, taps: Tensor, bias: Tensor | None, before: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution of one token, in the layout of the cache.

    These few operations take less time than a call of `causal_conv1d` and bringing the cache to its layout and back.
    """
    last = torch.cat([before[..., 1:], u.mT.to(before.dtype)], dim=-1)
    wide = last.float() if last.dtype in (torch.float16, torch.bfloat16) else last
    y = (wide * taps).sum(dim=-1)
    y = torch.nn.functional.silu(y if bias is None else y + bias)
    return y.to(u.dtype)[:, None], last


def read(cache: Any, layer: int) -> Past:
    """What the cache of transformers holds for a layer; copies, where a gradient might be asked for."""
    past = Past(cache.get_conv_state(layer), cache.get_recurrent_state(layer))
    if torch.is_grad_enabled():  # the cache writes over its states, which autograd may have kept
        past = Past(*(None if x is None else x.clone() for x in past))
    return past


def write(cache: Any, layer: int, past: Past, *, steps: int) -> None:
    """Let the cache hold what a layer has to remember after so many steps."""
    assert past.conv is not None
    held = cache.get_conv_state(layer)
    if held is not None and steps == 1:
        held.copy_(past.conv)
    else:
        cache.update_conv_state(past.conv, layer, conv_kernel_size=past.conv.shape[-1])
    cache.update_recurrent_state(past.state, layer)


def padding(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask of a call's own steps, (batch, n) bool; None where all steps count."""
    if attention_mask is None:
        return None
    (batch, n), shape = x.shape[:2], tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < n:
        msg = f"attention_mask has shape {shape}, expected ({batch}, n) with n at least the {n} new tokens"
        raise ValueError(msg)
    mask = attention_mask[:, shape[1] - n :].bool()
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def documents(kwargs: dict[str, Any], x: Tensor) -> Tensor | None:
    """The numbers of packed documents, of ``seq_idx`` or else of the lengths summed up, ``cu_seq_lens_q``."""
    segments, ends, n = kwargs.get("seq_idx"), kwargs.get("cu_seq_lens_q"), x.shape[1]
    if segments is None and ends is not None and x.shape[0] == 1:
        steps = torch.arange(n, device=x.device)
        segments = torch.searchsorted(ends.to(steps), steps, right=True)[None]
    if segments is not None and segments.shape[-1] != n:
        msg = f"seq_idx has shape {tuple(segments.shape)}, expected ({x.shape[0]}, {n}): a number for each new token"
        raise ValueError(msg)
    return segments


def runs(*calls: tuple[Any, Sequence[Any]]) -> str:
    """The kernels of calls, and which implementation of each would run: 'selective_scan (compiled)'."""
    choices = [choice for function, args in calls for choice in explain(function, *args).choices]
    return ", ".join(f"{choice.kernel} ({choice.implementation})" for choice in choices)
