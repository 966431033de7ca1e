#!/usr/bin/env bash
# transformers 5.24.0: rope_type="dynamic" (dynamic NTK scaling), beyond the length that the model was trained for.
# Expected: the rotation follows from the length of the call, so that the same model gives the same logits for the same tokens, whatever it
#   computed before; and a cache gives the logits of one pass.
# Instead: the frequencies are stored in the module and only grow: a call that is longer than the trained length, but shorter than the longest
#   one before, is rotated as that one was. The answer depends on the requests that the process has served, until a call within the
#   trained length sets it back. And keys that are in the cache stay rotated as they were when the sequence was shorter, so each token
#   past the trained length compares keys of several rotations: generate() writes another text than without a cache, without a word.
# Seen when run (trained for 32 tokens, relative difference of logits):
#   default: 40 tokens after 96 against 40 at first 0.0e+00, after 30 more tokens again 0.0e+00; cached step 41 against a pass 1.3e-06
#   dynamic: 40 tokens after 96 against 40 at first 4.3e-01, after 30 more tokens again 0.0e+00; cached step 41 against a pass 8.0e-01
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
small = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=32, attn_implementation="eager",
)
kinds = {"default": {"rope_type": "default"}, "dynamic": {"rope_type": "dynamic", "factor": 4.0}}
torch.manual_seed(3)
ids = torch.randint(3, 50, (1, 96))
for kind, rope in kinds.items():
    def fresh():
        model = LlamaForCausalLM(LlamaConfig(**small, rope_parameters={"rope_theta": 10000.0, **rope})).eval()
        torch.manual_seed(0)
        for p in model.parameters():  # weights large enough that every part of the model matters
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.3)
        return model

    model = fresh()
    at_first = model(ids[:, :40]).logits
    model(ids)
    after = rel(model(ids[:, :40]).logits, at_first)
    model(ids[:, :30])
    again = rel(model(ids[:, :40]).logits, at_first)
    model, cache = fresh(), DynamicCache()
    for t in range(41):
        step = model(ids[:, t : t + 1], use_cache=True, past_key_values=cache).logits[:, -1]
    cached = rel(step, fresh()(ids[:, :41]).logits[:, -1])
    print(f"{kind}: 40 tokens after 96 against 40 at first {after:.1e}, after 30 more tokens again {again:.1e}; "
          f"cached step 41 against a pass {cached:.1e}")
    assert again < 1e-5
    assert after > 0.1 and cached > 0.1 if kind == "dynamic" else max(after, cached) < 1e-4
PY
env/bin/python -W ignore check.py
