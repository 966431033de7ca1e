"""How far a model is from itself: a cache from one pass, a padded batch from prompts alone; gradients of two models.

Errors are norms of differences by norms of what is expected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asv_benchmarks.accelerate.families import PURE

CHUNKS = (10, 5, 1)


def relative(x: Tensor, expected: Tensor) -> float:
    """‖x − expected‖ / ‖expected‖."""
    return ((x - expected).norm() / expected.norm()).item()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens, none of which is a special one."""
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


def of_gradients(model: Any, other: Any, ids: Tensor) -> float:
    """The largest error of the gradient of a parameter of `model`, beside those of `other`."""
    found, expected = gradients(model, ids), gradients(other, ids)
    least = 1e-5 * max(x.norm() for x in expected.values())  # a gradient that is 0 but for rounding has no error
    return max(relative(found[name], x) for name, x in expected.items() if x.norm() > least)


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The gradients of the language-model loss by all parameters that it depends on."""
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def of_chunks(model: Any, ids: Tensor) -> float:
    """The error of 10, 5 and 1 tokens with a cache, beside 16 at once."""
    cache, parts, start = None, [], 0
    for count in CHUNKS:
        out = model(ids[:, start : start + count], cache=cache, use_cache=True)
        cache, start = out.cache, start + count
        parts.append(out.logits)
    return relative(torch.cat(parts, dim=1), model(ids).logits)


def of_padding(model: Any, family: str, side: str) -> tuple[float, float]:
    """Errors of a prompt padded by 4 on a side, beside a longer one: of its logits, and of those of the next token."""
    prompt, longer, new = tokens(1, 12), tokens(1, 16, seed=1), torch.tensor([[7]])
    pad, count = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 12, dtype=torch.long)
    order = (lambda x, y: torch.cat([x, y], dim=1)) if side == "right" else (lambda x, y: torch.cat([y, x], dim=1))
    mask = torch.cat([order(count, torch.zeros_like(pad)), torch.ones(1, 16, dtype=torch.long)])
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    batch = torch.cat([order(prompt, pad), longer])
    out = model(batch, attention_mask=mask, position_ids=places, use_cache=True)
    more = {} if family in PURE else {"attention_mask": torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)}
    step = model(new.expand(2, 1), cache=out.cache, position_ids=places[:, -1:] + 1, use_cache=True, **more).logits
    alone = model(torch.cat([prompt, new], dim=1)).logits[0]
    rows = slice(0, 12) if side == "right" else slice(4, 16)
    return relative(out.logits[0, rows], alone[:12]), relative(step[0, 0], alone[12])
