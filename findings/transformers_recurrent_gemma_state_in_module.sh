#!/usr/bin/env bash
# transformers 5.24.0: RecurrentGemmaForCausalLM with cache=DynamicCache(...), two sequences in turn.
# Expected: the cache handed in and out is the state of a sequence, so one model can serve several by turns, and a copy of a cache continues
#   from where it was taken, as in Llama, Mamba and other hybrids.
# Instead: the cache holds the keys and values of the attention layers alone. The states of the recurrence and of the convolution are
#   attributes of the model's modules, one for all: whatever the model does between two steps of a sequence, be it with another
#   cache or with use_cache=False, replaces them, and the next step goes on from the other's state without a word.
# Seen when run (next token of a sequence of 15, relative difference from one pass):
#   alone: 4.8e-07
#   another sequence begun with its own cache: 8.5e-01
#   another sequence scored without a cache: 7.2e-01
#   again, from a copy of the cache: 5.2e-01
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import copy

import torch
import transformers
from transformers import DynamicCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
torch.manual_seed(0)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
model = RecurrentGemmaForCausalLM(
    RecurrentGemmaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, attention_window_size=64, block_types=["recurrent", "attention"], lru_width=32,
    )
).eval()
for p in model.parameters():  # random weights large enough that every part of the model matters
    if p.ndim > 1:
        torch.nn.init.normal_(p, std=0.3)
one, two = torch.randint(3, 50, (2, 1, 16))
want = model(one, use_cache=False).logits[:, -1]


def begin(ids):
    cache = DynamicCache(config=model.config)
    model(ids[:, :15], cache=cache, use_cache=True)
    return cache


def last(cache):
    step = model(one[:, 15:], cache=cache, position_ids=torch.tensor([[15]]), use_cache=True)
    return rel(step.logits[:, -1], want)


seen = {"alone": last(begin(one))}
cache, _ = begin(one), begin(two)
seen["another sequence begun with its own cache"] = last(cache)
cache = begin(one)
model(two, use_cache=False)
seen["another sequence scored without a cache"] = last(cache)
cache = begin(one)
copied = copy.deepcopy(cache)
last(cache)
seen["again, from a copy of the cache"] = last(copied)
for name, error in seen.items():
    print(f"{name}: {error:.1e}")
assert seen.pop("alone") < 1e-4 and min(seen.values()) > 0.05
PY
env/bin/python check.py
