"""Tensors in files, of any format: what is known before a tensor is read, and the checks that come before reading."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from subquad.models.config import ModelConfig
from subquad.models.parameters import shapes_of

Host = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not read yet.

    Attributes
    ----------
    file : str
        The file, for errors.
    name : str
        Its name there.
    shape : tuple of int
        Its shape there.
    dtype : str
        Its dtype, in the words of the format.
    read : callable
        Reads the numbers, in the shape above.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Host]


@dataclass(frozen=True)
class Rule:
    """How a parameter stands in a format.

    Attributes
    ----------
    names : tuple of str
        The names that it may have there, of which one is expected.
    shapes : tuple of tuple of int
        The shapes that it may have there.
    restore : callable
        Makes the parameter, in its own shape, of the numbers of the file.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    restore: Callable[[Host], Host]


def match(
    config: ModelConfig,
    tensors: Mapping[str, Stored],
    rule_of: Callable[[str, tuple[int, ...]], Rule],
    where: str,
    ignored: Iterable[str] = (),
) -> Callable[[str], Host]:
    """The reader of parameters by name, after a check that the tensors are those of the config, each of its shape.

    Nothing is read here, and nothing is made whose size the config alone tells. ValueError names the tensor that is
    missing, unknown or of another shape.
    """
    if config.n_layers > len(tensors):
        msg = f"{where} has {len(tensors)} tensors, too few for the {config.n_layers} layers of its config"
        raise ValueError(msg)
    found: dict[str, tuple[Stored, Rule, tuple[int, ...]]] = {}
    for name, shape in shapes_of(config).items():
        rule = rule_of(name, shape)
        present = [stored for stored in rule.names if stored in tensors]
        if not present:
            msg = f"{where} lacks the tensor {rule.names[0]!r}, expected of shape {rule.shapes[0]}"
            raise ValueError(msg)
        stored = tensors[present[0]]
        if stored.shape not in rule.shapes:
            expected = " or ".join(map(str, rule.shapes))
            msg = f"{stored.file}: the tensor {stored.name!r} has shape {stored.shape}, the config expects {expected}"
            raise ValueError(msg)
        found[name] = stored, rule, shape
    known = {stored.name for stored, _, _ in found.values()}.union(ignored)
    unknown = [name for name in tensors if name not in known]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        msg = f"{where} has the tensor {unknown[0]!r}{more}, which the model of its config does not have"
        raise ValueError(msg)

    def read(name: str) -> Host:
        stored, rule, shape = found[name]
        x = stored.read()
        if tuple(x.shape) != stored.shape:
            msg = f"{stored.file}: the tensor {stored.name!r} holds shape {x.shape}, its header says {stored.shape}"
            raise ValueError(msg)
        try:
            return np.reshape(rule.restore(x), shape)
        except ValueError as error:
            msg = f"{stored.file}: the tensor {stored.name!r}: {error}"
            raise ValueError(msg) from None

    return read


def needed(package: str, what: str) -> ModuleType:
    """A package of the extra ``models``; ModuleNotFoundError, with the remedy, where it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        msg = f'{what} needs {package}, which is not installed: pip install "subquad[models]"'
        raise ModuleNotFoundError(msg, name=package) from None
