"""Which method, with which options, a layer runs: from its plan, the model's config, or what `configure` set."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from subquad.attention import METHODS, Method
from subquad.core.spelling import nearest
from subquad.registry import ALIASES, make_method

PREFIX = "subquad-"
PLAN = "subquad-plan"  # the attention implementation of models with a plan for each layer
_configured: dict[str, dict[str, Any]] = {}


def configure(name: str, **options: Any) -> None:
    """Set the options of a method for all models that run it by ``attn_implementation="subquad-<name>"``.

    Parameters
    ----------
    name : str
        Name of the method or of the attention implementation, such as "window" or "subquad-window".
    **options
        Options of the method, which take the place of what was set before. Without any, its defaults hold again.

    Raises
    ------
    ValueError
        For an unknown method, or a value that does not fit.
    TypeError
        For an option that the method does not have.

    See Also
    --------
    subquad_torch.transformers.apply : Another method, with other options, in each layer of a model.

    Notes
    -----
    The attribute ``subquad`` of a model's config is stronger: ``config.subquad = {"window": {"left": 128}}``. It is
    saved with the config. In a model of several parts it belongs to the config of the part, such as
    ``config.text_config``.

    Examples
    --------
    >>> from subquad_torch.transformers import configure
    >>> configure("window", left=128)
    >>> configure("window")  # the default again
    """
    method = method_name(name)
    make(method, options)
    _configured[method] = dict(options)


def method_name(name: str) -> str:
    """The method of a name, an alias, or an attention implementation; ValueError with the nearest names."""
    word = name.removeprefix(PREFIX)
    word = ALIASES.get(word, word)
    if word not in METHODS:
        msg = f"unknown method {name!r}; {nearest(word, [*METHODS, *ALIASES])}"
        raise ValueError(msg)
    return word


def make(method: str, options: Mapping[str, Any]) -> Method:
    """The method object, made once for options that have a hash."""
    if torch.compiler.is_compiling():  # which cannot see through a cache
        return make_method(method, dict(options))
    try:
        return _made(method, tuple(sorted(options.items())))
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return make_method(method, dict(options))


@lru_cache(maxsize=256, typed=True)
def _made(method: str, options: tuple[tuple[str, Any], ...]) -> Method:
    return make_method(method, dict(options))


def choice(module: Any, implementation: str) -> tuple[str, dict[str, Any]]:
    """(method, options) of an attention module under this implementation."""
    planned = getattr(module, "subquad_plan", None)
    if implementation == PLAN:
        if planned is None:
            msg = (
                f"{type(module).__name__} has no plan: 'subquad-plan' is set by subquad_torch.transformers.apply("
                f"model, plan), not as attn_implementation"
            )
            raise ValueError(msg)
        return planned
    method = method_name(implementation)
    own = getattr(getattr(module, "config", None), "subquad", None)
    return method, _configured.get(method, {}) | ({} if own is None else _of_config(own).get(method, {}))


def _of_config(own: Any) -> dict[str, dict[str, Any]]:
    """Method → options, of the attribute `subquad` of a config; TypeError unless it is a dict of dicts."""
    if not isinstance(own, Mapping) or not all(isinstance(x, Mapping) for x in own.values()):
        msg = f"config.subquad is {own!r}, expected options by method, such as {{'window': {{'left': 128}}}}"
        raise TypeError(msg)
    return {method_name(name): dict(options) for name, options in own.items()}
