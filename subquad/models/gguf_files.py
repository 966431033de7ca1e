"""GGUF files of Mamba and Mamba-2: names and transforms of llama.cpp undone, quantised numbers made float32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from subquad.models.config import Fields, ModelConfig, checked, unsupported
from subquad.models.gguf_header import Header, Place, read_header
from subquad.models.source import Host, Rule, Stored, match, needed

PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
OUTER = {
    "embedding.weight": "token_embd.weight",
    "norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}


def read_gguf(path: Path) -> tuple[ModelConfig, Any, Header]:
    """(config, reader of parameters by name, header) of a GGUF file; no weight is read yet."""
    header = read_header(path)
    size = path.stat().st_size
    tensors = {place.name: _stored(path, place, size) for place in header.places}
    config = _config(header, tensors, str(path))
    return config, match(config, tensors, lambda name, shape: rule_of(config, name, shape), str(path)), header


def rule_of(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Rule:
    """How a parameter stands in a GGUF file."""
    if name in OUTER:
        return Rule((OUTER[name],), (shape,), _same)
    _, layer, inner = name.split(".", 2)
    stored = f"blk.{layer}.{INNER[inner]}"
    if inner == "mixer.A_log":
        return Rule((stored,), (shape if config.kind == "mamba" else (*shape, 1),), _log_of_rates)
    if inner == "mixer.D" and config.kind == "mamba2":
        return Rule((stored,), ((*shape, 1),), _same)
    if inner == "mixer.conv1d.weight":
        channels, _, width = shape
        return Rule((stored,), ((channels, width),), _same)
    if inner == "mixer.norm.weight":
        return Rule((stored,), ((config.groups, shape[0] // config.groups),), _same)
    return Rule((stored,), (shape,), _same)


def _same(x: Host) -> Host:
    return x


def _log_of_rates(a: Host) -> Host:
    """A_log of A = −exp(A_log)."""
    if not (a < 0).all():
        msg = "it holds numbers of 0 or more, expected A = −exp(A_log), which is negative"
        raise ValueError(msg)
    return np.log(-a)


def _config(header: Header, tensors: dict[str, Stored], source: str) -> ModelConfig:
    kind = header.entries.get("general.architecture")
    if kind not in ("mamba", "mamba2"):
        raise unsupported(kind, source)
    entries = {key.removeprefix(f"{kind}."): value for key, value in header.entries.items()}
    fields = Fields(entries, source)
    fields.only("ssm.dt_b_c_rms", False, "it normalises the step sizes, B and C of a block, as FalconMamba does")
    fields.only("split.count", 1, "the model is in several files, which llama-gguf-split --merge joins")
    table = tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        msg = f"{source} lacks the tensor 'token_embd.weight' of two axes"
        raise ValueError(msg)
    rank = fields.count("ssm.time_step_rank")
    return checked(
        ModelConfig(
            kind=kind,
            d_model=fields.count("embedding_length"),
            n_layers=fields.count("block_count"),
            vocab_size=fields.count("vocab_size", table.shape[0]),
            d_inner=fields.count("ssm.inner_size"),
            d_state=fields.count("ssm.state_size"),
            d_conv=fields.count("ssm.conv_kernel"),
            dt_rank=rank if kind == "mamba" else 0,
            heads=rank if kind == "mamba2" else 0,
            groups=fields.count("ssm.group_count", 1) if kind == "mamba2" else 0,
            norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-5),
            conv_bias="blk.0.ssm_conv1d.bias" in tensors,
            gated_norm=kind == "mamba" or "blk.0.ssm_norm.weight" in tensors,
            tied="output.weight" not in tensors,
            used_vocab=fields.count("vocab_size", table.shape[0]),
            eos=fields.tokens("tokenizer.ggml.eos_token_id"),
        ),
        source,
    )


def _stored(path: Path, place: Place, size: int) -> Stored:
    """A tensor that is within its file."""
    gguf = needed("gguf", f"reading {path.name}")
    try:
        kind = gguf.GGMLQuantizationType(place.kind)
        block, width = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        msg = f"{path}: the tensor {place.name!r} has the type {place.kind}, which the package gguf does not know"
        raise ValueError(msg) from None
    if place.shape[-1] % block:
        msg = f"{path}: the tensor {place.name!r} has rows of {place.shape[-1]}, expected a multiple of {block}"
        raise ValueError(msg)
    count = math.prod(place.shape) // block * width
    if place.start + count > size:
        msg = (
            f"{path}: the tensor {place.name!r} of shape {place.shape} should have {count} bytes from byte "
            f"{place.start} on, and the file has {size}: it is cut off, or its header is false"
        )
        raise ValueError(msg)

    def read() -> Host:
        raw = np.fromfile(path, np.uint8, count, offset=place.start)
        if kind.name in PLAIN:
            return raw.view(PLAIN[kind.name]).reshape(place.shape)
        if kind.name == "BF16":
            needed("ml_dtypes", f"the bfloat16 of {path.name}")
            return raw.view(np.dtype("bfloat16")).reshape(place.shape)
        rows = raw.reshape(*place.shape[:-1], place.shape[-1] // block * width)
        try:
            return gguf.quants.dequantize(rows, kind)
        except NotImplementedError as error:
            msg = f"{path}: the tensor {place.name!r} is of type {kind.name}: {error}"
            raise ValueError(msg) from None

    return Stored(str(path), place.name, place.shape, kind.name, read)
