"""What is known of a language model before its weights are read: sizes and options, from any format's description."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from subquad.core.checks import check_count, check_positive

KINDS = ("mamba", "mamba2")
MOST_BYTES = 2**24  # of a config.json: a file that is larger is something else
PADDED_TO = 8  # rows of an embedding are a multiple of this in mamba-ssm, unless its config says otherwise
INFINITY = {"__float__": "Infinity"}  # how transformers writes what JSON lacks


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and options of a language model of Mamba or Mamba-2 blocks.

    Attributes
    ----------
    kind : {"mamba", "mamba2"}
        The block of every layer.
    d_model : int
        Width of the residual stream.
    n_layers : int
        Number of blocks.
    vocab_size : int
        Rows of the embedding, which is the number of logits.
    d_inner : int
        Channels inside a block.
    d_state : int
        States of a channel.
    d_conv : int
        Taps of the convolution.
    dt_rank : int
        Rank of the map to the step sizes; 0 for Mamba-2.
    heads, groups : int
        Heads, and groups of them that share B and C, of Mamba-2; 0 for Mamba.
    norm_eps : float
        Added to the mean square in every norm.
    delta_limits : (float, float) or None
        Range that step sizes of Mamba-2 are clipped to.
    norm_before_gate : bool
        Whether a block of Mamba-2 multiplies by the gate after its norm.
    gated_norm : bool
        Whether a block of Mamba-2 has a norm.
    bias, conv_bias : bool
        Whether the projections in and out, and the convolution, have a bias.
    D_has_hdim : bool
        Whether the skip connection of Mamba-2 has a number for each channel, not for each head.
    tied : bool
        Whether the embedding is the head, too.
    used_vocab : int
        Tokens that exist: the rows of the embedding beyond these are padding, which is never generated.
    eos : tuple of int
        Tokens that end a text.
    """

    kind: str
    d_model: int
    n_layers: int
    vocab_size: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int = 0
    heads: int = 0
    groups: int = 0
    norm_eps: float = 1e-5
    delta_limits: tuple[float, float] | None = None
    norm_before_gate: bool = False
    gated_norm: bool = True
    bias: bool = False
    conv_bias: bool = True
    D_has_hdim: bool = False
    tied: bool = True
    used_vocab: int = 0
    eos: tuple[int, ...] = ()


class Fields:
    """The entries of a description, checked one by one; errors name the file and the entry."""

    def __init__(self, entries: Mapping[str, Any], source: str) -> None:
        self.entries, self.source = entries, source

    def count(self, name: str, default: int | None = None) -> int:
        """An integer of 1 or more."""
        value = self.entries.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, float) and value.is_integer():  # `expand` of some configs
            value = int(value)
        if value is None:
            msg = f"{self.source} lacks {name!r}, expected an integer"
            raise ValueError(msg)
        try:
            return check_count(name, value, most=2**31 - 1)
        except (TypeError, ValueError) as error:
            msg = f"{self.source}: {error}"
            raise ValueError(msg) from None

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.entries.get(name)
        try:
            return default if value is None else check_positive(name, value)
        except (TypeError, ValueError) as error:
            msg = f"{self.source}: {error}"
            raise ValueError(msg) from None

    def flag(self, name: str, default: bool) -> bool:
        """True or False."""
        value = self.entries.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            msg = f"{self.source}: {name} is {value!r}, expected true or false"
            raise ValueError(msg)
        return value

    def limits(self, name: str) -> tuple[float, float] | None:
        """A range of step sizes, None for [0, ∞]; infinity may be written as transformers does."""
        value = self.entries.get(name)
        if value is None:
            return None
        ends = [math.inf if end == INFINITY else end for end in value] if isinstance(value, list | tuple) else []
        if len(ends) != 2 or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in ends):
            msg = f"{self.source}: {name} is {value!r}, expected two numbers"
            raise ValueError(msg)
        low, high = map(float, ends)
        if not 0 <= low < high:
            msg = f"{self.source}: {name} is {value!r}, expected 0 ≤ low < high"
            raise ValueError(msg)
        return None if low == 0 and high == math.inf else (low, high)

    def tokens(self, name: str) -> tuple[int, ...]:
        """A token or a list of tokens, empty if there is none; −1 stands for none in some files."""
        value = self.entries.get(name)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in found):
            msg = f"{self.source}: {name} is {value!r}, expected a token number or a list of these"
            raise ValueError(msg)
        return tuple(x for x in found if x >= 0)

    def only(self, name: str, allowed: Any, why: str) -> None:
        """Raise ValueError unless an entry is absent or as `allowed`."""
        value = self.entries.get(name)
        if value is not None and value != allowed:
            msg = f"{self.source}: {name} is {value!r}, which is not supported: {why}"
            raise ValueError(msg)


def read_json(path: Path, most: int = MOST_BYTES) -> Fields:
    """The entries of a JSON file that holds an object; ValueError for any other."""
    size = path.stat().st_size
    if size > most:
        msg = f"{path} has {size} bytes, expected at most {most}"
        raise ValueError(msg)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        msg = f"{path} is no JSON: {error}"
        raise ValueError(msg) from None
    if not isinstance(entries, dict):
        msg = f"{path} holds a {type(entries).__name__}, expected a JSON object"
        raise ValueError(msg)
    return Fields(entries, str(path))


def read_config(path: Path) -> ModelConfig:
    """The model that a config.json of transformers, mlx-lm or mamba-ssm describes.

    What ends a text comes from a generation_config.json beside it, where there is one that says it.
    """
    fields = read_json(path)
    if "model_type" in fields.entries:
        config = _of_transformers(fields, fields.entries["model_type"])
        beside = path.parent / "generation_config.json"
        eos = read_json(beside).tokens("eos_token_id") if beside.is_file() else ()
        return checked(replace(config, eos=eos or config.eos), fields.source)
    if "d_model" in fields.entries:
        return checked(_of_mamba_ssm(fields), fields.source)
    msg = f"{fields.source} has neither 'model_type', as of transformers, nor 'd_model', as of mamba-ssm"
    raise ValueError(msg)


def checked(config: ModelConfig, source: str) -> ModelConfig:
    """The config, its sizes known to fit one another; ValueError otherwise."""
    c = config
    if c.kind == "mamba2" and (c.d_inner % c.heads or c.heads % c.groups or c.d_inner % c.groups):
        msg = (
            f"{source}: {c.heads} heads, {c.groups} groups and {c.d_inner} inner channels do not fit: groups must "
            f"divide heads, and heads the channels"
        )
        raise ValueError(msg)
    return config


def unsupported(kind: Any, source: str) -> ValueError:
    """The error for a model that is neither Mamba nor Mamba-2."""
    msg = f"{source} describes a model of type {kind!r}; load_model reads {' and '.join(map(repr, KINDS))}"
    return ValueError(msg)


def _of_transformers(fields: Fields, kind: Any) -> ModelConfig:
    if kind not in KINDS:
        raise unsupported(kind, fields.source)
    fields.only("hidden_act", "silu", "blocks have silu")
    d_model, vocab = fields.count("hidden_size"), fields.count("vocab_size")
    shared: dict[str, Any] = {
        "kind": kind,
        "d_model": d_model,
        "n_layers": fields.count("num_hidden_layers"),
        "vocab_size": vocab,
        "d_conv": fields.count("conv_kernel", 4),
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "bias": fields.flag("use_bias", False),
        "conv_bias": fields.flag("use_conv_bias", True),
        "used_vocab": vocab,
        "eos": fields.tokens("eos_token_id"),
    }
    if kind == "mamba":
        rank = None if fields.entries.get("time_step_rank") == "auto" else fields.count("time_step_rank", 0) or None
        return ModelConfig(
            **shared,
            d_inner=fields.count("intermediate_size", fields.count("expand", 2) * d_model),
            d_state=fields.count("state_size", 16),
            dt_rank=rank or math.ceil(d_model / 16),
            tied=fields.flag("tie_word_embeddings", True),
        )
    heads = fields.count("num_heads")
    return ModelConfig(
        **shared,
        d_inner=heads * fields.count("head_dim", 64),
        d_state=fields.count("state_size", 128),
        heads=heads,
        groups=fields.count("n_groups", 8),
        delta_limits=fields.limits("time_step_limit"),
        tied=fields.flag("tie_word_embeddings", False),
    )


def _of_mamba_ssm(fields: Fields) -> ModelConfig:
    fields.only("d_intermediate", 0, "layers have no MLP")
    fields.only("attn_layer_idx", [], "layers have no attention")
    fields.only("rms_norm", True, "norms are RMS norms")
    options = fields.entries.get("ssm_cfg") or {}
    if not isinstance(options, dict):
        msg = f"{fields.source}: ssm_cfg is {options!r}, expected a JSON object"
        raise ValueError(msg)
    layer = options.get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise unsupported(layer, fields.source)
    ssm = Fields(options, f"{fields.source}, ssm_cfg")
    d_model, used = fields.count("d_model"), fields.count("vocab_size")
    multiple = fields.count("pad_vocab_size_multiple", PADDED_TO)
    d_inner = ssm.count("expand", 2) * d_model
    shared: dict[str, Any] = {
        "d_model": d_model,
        "n_layers": fields.count("n_layer"),
        "vocab_size": -(-used // multiple) * multiple,
        "d_inner": d_inner,
        "d_conv": ssm.count("d_conv", 4),
        "bias": ssm.flag("bias", False),
        "conv_bias": ssm.flag("conv_bias", True),
        "tied": fields.flag("tie_embeddings", True),
        "used_vocab": used,
        "eos": fields.tokens("eos_token_id"),
    }
    if layer == "Mamba1":
        rank = None if options.get("dt_rank", "auto") == "auto" else ssm.count("dt_rank")
        rank = rank or math.ceil(d_model / 16)
        return ModelConfig(kind="mamba", **shared, d_state=ssm.count("d_state", 16), dt_rank=rank)
    ssm.only("d_ssm", d_inner, "the scan takes all inner channels")
    head = ssm.count("headdim", 64)
    if d_inner % head:
        msg = f"{ssm.source}: headdim is {head}, expected a divisor of the {d_inner} inner channels"
        raise ValueError(msg)
    return ModelConfig(
        kind="mamba2",
        **shared,
        d_state=ssm.count("d_state", 128),
        heads=d_inner // head,
        groups=ssm.count("ngroups", 1),
        delta_limits=ssm.limits("dt_limit"),
        norm_before_gate=ssm.flag("norm_before_gate", False),
        gated_norm=ssm.flag("rmsnorm", True),
        D_has_hdim=ssm.flag("D_has_hdim", False),
    )
