"""A method for each layer of a model, from a dict or a JSON file."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch.nn import Module

from subquad.core.spelling import nearest
from subquad_torch.transformers.model_check import attention_modules
from subquad_torch.transformers.options import PLAN, make, method_name
from subquad_torch.transformers.registration import register

Model = TypeVar("Model", bound=Module)
Entry = tuple[str, dict[str, Any]]


def apply(model: Model, plan: Mapping[str, Any] | str | os.PathLike[str]) -> Model:
    """Set a method for each attention layer of a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, which is changed.
    plan : dict, or path of a JSON file
        ``{"default": entry, "layers": {key: entry, …}}``. An entry is ``{"method": name, option: value, …}``. A key is
        the number of a layer ("3"), a range of numbers with both ends ("4-7"), or a pattern of names of modules
        ("model.encoder.layers.*.self_attn"), where ``*`` stands for anything. Later keys win. The default of "default"
        is ``{"method": "exact"}``.

    Returns
    -------
    transformers.PreTrainedModel
        `model`, with ``attn_implementation="subquad-plan"``.

    Raises
    ------
    TypeError
        If the plan or an entry is no dict, or a method has no such option.
    ValueError
        For an unknown key, method or layer, a number that stands for attention in several parts of the model, or a
        model whose attention is not in transformers' registry. The model is then as it was.

    See Also
    --------
    subquad_torch.transformers.explain : What each layer runs.

    Notes
    -----
    The plan belongs to the modules, not to the config: apply it again to a model that was saved and loaded.
    ``model.set_attn_implementation("sdpa")`` undoes it.

    Examples
    --------
    >>> import transformers
    >>> from subquad_torch.transformers import apply, explain
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    >>> model = transformers.AutoModelForCausalLM.from_config(config)
    >>> model = apply(model, {"layers": {"1-2": {"method": "window", "left": 128}}})
    >>> print(explain(model))
    model.layers.0.self_attn  LlamaAttention  subquad: exact
    model.layers.1.self_attn  LlamaAttention  subquad: window, left=128
    model.layers.2.self_attn  LlamaAttention  subquad: window, left=128
    """
    default, keys = _read(plan)
    modules = dict(attention_modules(model))
    if not modules:
        msg = f"{type(model).__name__} has no attention that asks transformers' registry, so no plan can reach it"
        raise ValueError(msg)
    entries = dict.fromkeys(modules, default)
    for key, entry in keys.items():
        entries.update(dict.fromkeys(_named(key, modules), entry))
    register()
    model.set_attn_implementation(PLAN)
    for name, module in modules.items():
        module.subquad_plan = entries[name]
    return model


def _read(plan: Any) -> tuple[Entry, dict[str, Entry]]:
    """(default, key → entry) of a plan, checked."""
    if isinstance(plan, str | os.PathLike):
        plan = json.loads(Path(plan).read_text(encoding="utf-8"))
    for name, part in (("plan", plan), ("plan['layers']", plan.get("layers", {}) if isinstance(plan, Mapping) else {})):
        if not isinstance(part, Mapping):
            msg = f"{name} is a {type(part).__name__}, expected a dict, or for plan the path of a JSON file"
            raise TypeError(msg)
    for name in plan:
        if name not in ("default", "layers"):
            msg = f"plan has the key {name!r}; {nearest(name, ['default', 'layers'])}"
            raise ValueError(msg)
    layers = {str(key): _entry(f"plan['layers'][{key!r}]", entry) for key, entry in plan.get("layers", {}).items()}
    return _entry("plan['default']", plan.get("default", {"method": "exact"})), layers


def _entry(where: str, entry: Any) -> Entry:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
        msg = f"{where} is {entry!r}, expected a method and its options, such as {{'method': 'window', 'left': 128}}"
        raise TypeError(msg)
    options = {name: x for name, x in entry.items() if name != "method"}
    try:
        method = method_name(entry["method"])
        make(method, options)
    except (TypeError, ValueError) as error:
        msg = f"{where}: {error}"
        raise type(error)(msg) from error
    return method, options


def _named(key: str, modules: Mapping[str, Any]) -> list[str]:
    """The names of the modules that a key of the plan stands for; ValueError if there are none, or too many."""
    first, dash, last = key.partition("-")
    if not (first.isdecimal() and (not dash or last.isdecimal())):
        names = [name for name in modules if fnmatch.fnmatchcase(name, key)]
        if not names:
            msg = f"plan: no attention module has a name like {key!r}; names: {', '.join(modules)}"
            raise ValueError(msg)
        return names
    names = []
    for number in range(int(first), int(last or first) + 1):
        found = [name for name in modules if number in [int(part) for part in name.split(".") if part.isdecimal()]]
        if len(found) != 1:
            stand = f"none of the {len(modules)} attention modules" if not found else " and ".join(found)
            msg = f"plan: the number {number} of {key!r} stands for {stand}; names: {', '.join(modules)}"
            raise ValueError(msg)
        names += found
    if not names:
        msg = f"plan: the range {key!r} is empty"
        raise ValueError(msg)
    return names
