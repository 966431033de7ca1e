"""Directories of transformers, mlx-lm and mamba-ssm: a config.json beside one or several .safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from subquad.models.config import ModelConfig, read_config, read_json
from subquad.models.source import Host, Rule, Stored, match, needed

INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")
MOST_BYTES = 2**28  # of an index: one that is larger is something else
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # files of weights that run what they hold when loaded


def read_directory(folder: Path) -> tuple[ModelConfig, Any]:
    """(config, reader of parameters by name) of a directory; no weight is read yet."""
    path = folder / "config.json"
    if not path.is_file():
        msg = f"{folder} has no config.json, expected a directory of transformers or mamba-ssm, or a .gguf file"
        raise FileNotFoundError(msg)
    config = read_config(path)
    tensors = _tensors(folder)
    prefix = "backbone." if any(name.startswith("backbone.") for name in tensors) else ""
    ignored = ["lm_head.weight"] if config.tied else []  # some files hold the embedding twice
    return config, match(config, tensors, lambda name, shape: rule_of(name, shape, prefix), str(folder), ignored)


def rule_of(name: str, shape: tuple[int, ...], prefix: str = "backbone.") -> Rule:
    """How a parameter stands in a directory: plural or singular embedding, taps (C, 1, width) or (C, width, 1)."""
    if name == "lm_head.weight":
        return Rule((name,), (shape,), _same)
    if name == "embedding.weight":
        return Rule((f"{prefix}embeddings.weight", f"{prefix}embedding.weight"), (shape,), _same)
    if name.endswith("conv1d.weight"):
        channels, _, width = shape
        return Rule((prefix + name,), (shape, (channels, width, 1)), _same)  # in both, a channel's taps follow in order
    return Rule((prefix + name,), (shape,), _same)


def _same(x: Host) -> Host:
    return x


def _tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of all .safetensors files of a directory by name, from their headers."""
    if (folder / INDEX).is_file():
        return _sharded(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(x.name for x in folder.iterdir() if x.suffix in PICKLED)
        if pickled:
            msg = (
                f"{folder} has its weights in {pickled[0]}, a pickle, which runs whatever code it holds when it is "
                f"loaded, and is never read here; have it converted to .safetensors, by transformers' "
                f"save_pretrained or by the package safetensors, where its source is trusted"
            )
            raise ValueError(msg)
        msg = f"{folder} has no .safetensors file"
        raise FileNotFoundError(msg)
    whole = [x for x in files if x.name == "model.safetensors"] or files
    if len(whole) > 1:
        msg = f"{folder} has {len(whole)} .safetensors files and no {INDEX}, which tells what is in which"
        raise ValueError(msg)
    return _header(whole[0])


def _sharded(folder: Path) -> dict[str, Stored]:
    path = folder / INDEX
    places = read_json(path, MOST_BYTES).entries.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        msg = f"{path}: weight_map is no object from names of tensors to names of files"
        raise ValueError(msg)
    headers: dict[str, Mapping[str, Stored]] = {}
    for file in sorted(set(places.values())):
        if file != Path(file).name or not file.endswith(".safetensors"):
            msg = f"{path} names the file {file!r}, expected the name of a .safetensors file beside it"
            raise ValueError(msg)
        if not (folder / file).is_file():
            msg = f"{path} names the file {file!r}, which is not there"
            raise FileNotFoundError(msg)
        headers[file] = _header(folder / file)
    for name, file in places.items():
        if name not in headers[file]:
            msg = f"{folder / file} lacks the tensor {name!r}, which {INDEX} places there"
            raise ValueError(msg)
    return {name: headers[file][name] for name, file in places.items()}


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file; the package checks that the header and the length of the file fit."""
    safetensors = needed("safetensors", f"reading {path.name}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            found = {name: (tuple(view.get_shape()), str(view.get_dtype())) for name, view in views.items()}
    except (safetensors.SafetensorError, OSError) as error:
        msg = f"{path} is no whole .safetensors file: {error}"
        raise ValueError(msg) from None
    return {name: _stored(path, name, shape, dtype) for name, (shape, dtype) in found.items()}


def _stored(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> Stored:
    def read() -> Host:
        safetensors = needed("safetensors", f"reading {path.name}")
        if dtype not in DTYPES:
            msg = f"{path}: the tensor {name!r} has dtype {dtype}, expected one of {', '.join(DTYPES)}"
            raise ValueError(msg)
        if dtype == "BF16":
            needed("ml_dtypes", f"the bfloat16 of {path.name}")
        with safetensors.safe_open(path, framework="numpy") as file:
            return np.asarray(file.get_tensor(name))

    return Stored(str(path), name, shape, dtype, read)
