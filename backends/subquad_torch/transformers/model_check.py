"""Models whose attention never asks the registry: they would take a name and run something else."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch.nn import Module
from transformers import PreTrainedModel
from transformers.utils import logging

from subquad_torch.transformers.options import PREFIX

ASKS = "ALL_ATTENTION_FUNCTIONS"
WHOLE = r"scaled_dot_product_attention|multi_head_attention_forward|(?<![.\w])(?<!def )\w+_attention\("  # in one call
PRODUCTS = re.compile(rf"matmul|einsum|bmm|baddbmm| @ |fft|natten|{WHOLE}")
WEIGHTS = re.compile(rf"softmax|logsumexp|{WHOLE}", re.IGNORECASE)  # functions, modules and subclasses of Function
logger = logging.get_logger(__name__)


@functools.cache
def asks_registry(cls: type[Module]) -> bool:
    """Whether modules of this class take their attention function from transformers' registry, as their code says."""
    return ASKS in _code(cls)


@functools.cache
def computes_attention(cls: type[Module]) -> bool:
    """Whether modules of this class compute attention themselves."""
    if "Attention" not in cls.__name__ or ASKS in _code(cls):
        return False
    code = _code(cls)
    return WEIGHTS.search(code) is not None and PRODUCTS.search(code) is not None


def attention_modules(model: Module) -> Iterator[tuple[str, Module]]:
    """(name, module) of those that take their attention function from the registry."""
    return ((name, module) for name, module in model.named_modules() if asks_registry(type(module)))


def check_model(model: PreTrainedModel, implementation: Any) -> None:
    """ValueError if attention of the model never asks for this implementation of ours; a warning if some of it does."""
    if not isinstance(implementation, str) or not implementation.startswith(PREFIX):
        return
    own = sorted({type(module).__name__ for module in model.modules() if computes_attention(type(module))})
    if not own:
        return
    if next(attention_modules(model), None) is None:
        msg = (
            f"{type(model).__name__} cannot run {implementation!r}: its attention ({', '.join(own)}) is code of its "
            f"own, which never asks transformers' registry. Use attn_implementation='eager', or name the parts of the "
            f"model that can, as in attn_implementation={{'text_config': {implementation!r}}}, or "
            f"subquad_torch.transformers.accelerate(model) where it knows the model"
        )
        raise ValueError(msg)
    logger.warning_once(
        f"{type(model).__name__}: {', '.join(own)} keep their own attention, which never asks transformers' registry"
    )


def watch_models() -> None:
    """Check models when they are built and when their implementation is set; only names of ours are looked at."""
    if hasattr(PreTrainedModel.post_init, "subquad"):
        return
    build, change = PreTrainedModel.post_init, PreTrainedModel.set_attn_implementation

    @functools.wraps(build)
    def post_init(self: Any) -> None:
        check_model(self, self.config._attn_implementation)
        build(self)

    @functools.wraps(change)
    def set_attn_implementation(self: Any, attn_implementation: Any, *args: Any, **keywords: Any) -> Any:
        for part, requested in _requested(self, attn_implementation):
            check_model(part, requested)
        return change(self, attn_implementation, *args, **keywords)

    post_init.subquad = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init
    PreTrainedModel.set_attn_implementation = set_attn_implementation


def _requested(model: PreTrainedModel, implementation: Any) -> Iterator[tuple[PreTrainedModel, Any]]:
    """(part, implementation that is asked for it) of each model within a model, from a name or a dict by sub-config."""
    by_config = {id(model.config): implementation.get("") if isinstance(implementation, dict) else implementation}
    waiting = [(model.config, implementation)]
    while waiting:
        config, asked = waiting.pop()
        for key in config.sub_configs:
            part = getattr(config, key, None)
            own = asked.get(key) if isinstance(asked, dict) else asked
            if part is not None:
                by_config[id(part)] = own.get("") if isinstance(own, dict) else own
                waiting.append((part, own))
    default = by_config[id(model.config)]
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield module, by_config.get(id(module.config), default)


def _code(cls: type[Module]) -> str:
    """The source of a class and its bases among models; "" where it cannot be read."""
    parts = []
    for base in cls.__mro__:
        if base is Module or not issubclass(base, Module) or issubclass(base, PreTrainedModel):
            continue
        try:
            parts.append(inspect.getsource(base))
        except (OSError, TypeError):
            continue
    return "\n".join(parts)
