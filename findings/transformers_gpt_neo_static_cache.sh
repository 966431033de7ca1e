#!/usr/bin/env bash
# transformers 5.24.0: GPTNeoForCausalLM with a StaticCache, and generate(cache_implementation="static").
# Expected: a cache of fixed length gives the logits of one pass and the text of generate() without it, as in GPT-2, GPT-J and others; a model that
#   cannot use it refuses, as MiniMax does.
# Instead: the causal mask is a slice of a table, chosen by the number of keys, as if the queries were the last of them. A static cache
#   always hands out all its places, so queries are taken for tokens at its end: the local layers look at a window beside the
#   sequence, the more of them the longer the cache. Only a cache that is exactly full is right. Nothing is raised.
# Seen when run (12 tokens, window of 8; generate() of 12 more):
#   GPT2LMHeadModel: logits off by 0.0e+00 with 12 places, 0.0e+00 with 16 places, 0.0e+00 with 32 places; tokens equal to
#     generate() 12 of 12 without a cache, 12 of 12 with a static one
#   GPTNeoForCausalLM: logits off by 0.0e+00 with 12 places, 2.4e-01 with 16 places, 5.3e-01 with 32 places; tokens equal to
#     generate() 12 of 12 without a cache, 1 of 12 with a static one
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM, StaticCache

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
common = dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=None)
models = [
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **common)),
    GPTNeoForCausalLM(GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8,
        intermediate_size=64, max_position_embeddings=128, **common,
    )),
]
for model in models:
    torch.manual_seed(0)
    for p in model.eval().parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(5, 50, (1, 12))
    alone = model(ids).logits
    off = {}
    for length in (12, 16, 32):
        logits = model(ids, cache=StaticCache(config=model.config, max_cache_len=length)).logits
        off[length] = ((logits - alone).norm() / alone.norm()).item()
    write = lambda **kw: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **kw)[0, 12:]
    text = write()
    equal = [(write(**kw) == text).sum().item() for kw in (dict(use_cache=False), dict(cache_implementation="static", disable_compile=True))]
    print(f"{type(model).__name__}: logits off by", ", ".join(f"{x:.1e} with {n} places" for n, x in off.items()) + ";",
          f"tokens equal to generate() {equal[0]} of 12 without a cache, {equal[1]} of 12 with a static one")
    assert off[12] < 1e-5 and equal[0] == 12
    assert min(off[16], off[32]) > 0.1 and equal[1] < 8 if isinstance(model, GPTNeoForCausalLM) else off[32] < 1e-5 and equal[1] == 12
PY
env/bin/python check.py
