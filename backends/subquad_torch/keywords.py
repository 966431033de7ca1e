"""Keywords of a kernel as a text, since operators of PyTorch take no dataclass."""

from __future__ import annotations

import importlib
import json
from functools import cache
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar

from subquad_torch.native import Static

SYMBOLS = (torch.SymInt, torch.SymFloat)
NUMBERS = (int, float, *SYMBOLS)


def encode(static: Static) -> str:
    """Keywords as a JSON text; values are numbers, strings, None, and frozen dataclasses of these."""
    words: list[Any] = []
    for name, value in static.items():
        cls = type(value)
        fields = getattr(cls, "__dataclass_fields__", None)
        if fields is None:
            words.append((name, _number(value)))
        else:
            words.append((name, cls.__module__, cls.__name__, {x: _number(getattr(value, x)) for x in fields}))
    return _written(words)


def _number(value: Any) -> Any:
    """The value; a number that varies in a compiled program is fixed to its present value."""
    return guard_scalar(value) if isinstance(value, NUMBERS) else value


@torch.compiler.assume_constant_result
def _written(words: list[Any]) -> str:
    return json.dumps(words)


@cache
def decode(text: str) -> Static:
    """The keywords that `encode` made the text from."""
    static = {}
    for name, value, *rest in json.loads(text):
        if rest:
            cls = getattr(importlib.import_module(value), rest[0])
            static[name] = cls(**rest[1])
        else:
            static[name] = value
    return static
