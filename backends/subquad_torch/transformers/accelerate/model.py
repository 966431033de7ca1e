"""`accelerate` and `restore`: all modules of a model whose classes stand in the table."""

from __future__ import annotations

from typing import Any, TypeVar

from torch.nn import Module

from subquad_torch.transformers.accelerate.families import FAMILIES
from subquad_torch.transformers.accelerate.swap import Swapped, refuses, swap, unswap

Model = TypeVar("Model", bound=Module)
LISTED = 12  # classes that an error names at most


def accelerate(model: Model) -> Model:
    """Let subquad compute the state-space layers of a model of transformers.

    Each module of a class that is listed in :doc:`/accelerate` gets another ``forward``, in the same model: its outputs
    and gradients are those of the original up to rounding, its cache is the original's. Parameters, names and the
    state_dict stay as they are, and no other model is touched.

    Parameters
    ----------
    model : torch.nn.Module
        A model of transformers, or any module that holds layers of one. It is changed in place.

    Returns
    -------
    torch.nn.Module
        The model itself. A second call finds nothing left to do and returns it too.

    Raises
    ------
    TypeError
        If `model` is not a module.
    ValueError
        If no module of it belongs to a family that is listed, or one that does cannot be swapped: its activation is
        another one, or another package has replaced its ``forward``. Nothing has been changed then.

    See Also
    --------
    restore : The way back.

    Notes
    -----
    Beyond the original: several new tokens after a cache continue its state in every family, padded tokens on either
    side have no influence on outputs of others or on the cache, and limits of the step size hold while decoding too.

    Examples
    --------
    >>> import torch, transformers
    >>> from subquad_torch.transformers import accelerate
    >>> config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    >>> model = transformers.MambaForCausalLM(config).eval()
    >>> ids = torch.arange(10)[None]
    >>> with torch.no_grad():
    ...     before = model(ids).logits
    ...     after = accelerate(model)(ids).logits
    >>> torch.allclose(before, after, atol=1e-5)
    True
    >>> model.backbone.layers[0].mixer.subquad_runs
    'causal_conv1d (compiled), selective_scan (compiled)'
    """
    _check(model)
    found = {name: (module, mixin) for name, module in model.named_modules() if (mixin := family_of(module))}
    reasons = {name: why for name, (module, mixin) in found.items() if (why := refuses(module, mixin))}
    if reasons:
        lines = "; ".join(f"{name} ({type(found[name][0]).__name__}): {why}" for name, why in reasons.items())
        msg = f"model has modules that cannot be accelerated, nothing has been changed: {lines}"
        raise ValueError(msg)
    if not found and not any(isinstance(module, Swapped) for module in model.modules()):
        classes = sorted({type(x).__name__ for x in model.modules() if not type(x).__module__.startswith("torch.")})
        shown = ", ".join(classes[:LISTED]) + (", …" if len(classes) > LISTED else "")
        msg = (
            f"model is {type(model).__name__}, and none of its modules can be accelerated; "
            f"found {shown or 'modules of torch alone'}, expected one of {', '.join(sorted(FAMILIES))}"
        )
        raise ValueError(msg)
    for module, mixin in found.values():
        swap(module, mixin)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: the modules compute as transformers wrote them.

    Parameters
    ----------
    model : torch.nn.Module
        A model, changed in place.

    Returns
    -------
    torch.nn.Module
        The model itself; also if there was nothing to undo.

    Raises
    ------
    TypeError
        If `model` is not a module.

    See Also
    --------
    accelerate : What is undone.

    Examples
    --------
    >>> import transformers
    >>> from subquad_torch.transformers import accelerate, restore
    >>> config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    >>> model = accelerate(transformers.MambaForCausalLM(config))
    >>> hasattr(restore(model).backbone.layers[0].mixer, "subquad_runs")
    False
    """
    _check(model)
    for module in model.modules():
        if isinstance(module, Swapped):
            unswap(module)
    return model


def family_of(module: Any) -> type[Swapped] | None:
    """What computes for a module; None if it is swapped, of no family, or of a class that has a forward of its own."""
    if isinstance(module, Swapped):
        return None
    own: Any = type(module)
    for cls in own.__mro__:
        if cls.__name__ in FAMILIES and cls.__module__.startswith("transformers."):
            return FAMILIES[cls.__name__] if own.forward is cls.forward else None
    return None


def _check(model: Any) -> None:
    if not isinstance(model, Module):
        msg = f"model is {type(model).__name__}, expected a torch.nn.Module such as transformers.MambaForCausalLM"
        raise TypeError(msg)
