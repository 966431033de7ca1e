"""Checkpoints in local directories: config.json, and weights as safetensors, in one file or in several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["load_config_hf", "load_state_dict_hf", "save_model"]


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """The contents of config.json of a local directory."""
    path = _folder(model_name) / "config.json"
    if not path.is_file():
        msg = f"{path} is missing, expected the configuration beside the weights"
        raise FileNotFoundError(msg)
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        msg = f"{path} holds a {type(config).__name__}, expected an object of names and values"
        raise ValueError(msg)
    return config


def load_state_dict_hf(
    model_name: str | Path, device: Any = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The weights of a local directory, by their names.

    Parameters
    ----------
    model_name : str or Path
        The directory, with model.safetensors, or with model.safetensors.index.json and the files that it names.
    device, dtype : optional
        Where to put them, and as what; by default the CPU, as they are.

    Returns
    -------
    dict of Tensor
        The weights.

    Raises
    ------
    FileNotFoundError
        If there is no such directory, or no weights in it.
    ValueError
        If the only weights are a pickle (pytorch_model.bin), which could run code: it is not loaded.
    """
    folder = _folder(model_name)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            msg = f"{index} names {outside[0]!r}, expected files of this folder"
            raise ValueError(msg)
        files = [folder / name for name in names]
    elif single.is_file():
        files = [single]
    else:
        _refuse(folder)
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= load_file(file)
    return {name: x.to(device=device, dtype=dtype) for name, x in weights.items()}


def save_model(folder: str | Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")


def _folder(model_name: str | Path) -> Path:
    path = Path(model_name).expanduser()
    if not path.is_dir():
        msg = (
            f"pretrained_model_name is {str(model_name)!r}, expected a local directory: nothing is downloaded; "
            f"huggingface_hub.snapshot_download gives one"
        )
        raise FileNotFoundError(msg)
    return path


def _refuse(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        msg = (
            f"{folder} has {pickles[0]}, expected model.safetensors: a pickle could run code, and is not loaded. If it "
            f"is yours, convert it once: safetensors.torch.save_file(weights, 'model.safetensors') of "
            f"weights = torch.load('{pickles[0]}', weights_only=True), without lm_head.weight where it is tied"
        )
        raise ValueError(msg)
    msg = f"{folder} has no model.safetensors, expected the weights beside config.json"
    raise FileNotFoundError(msg)
