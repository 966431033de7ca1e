#!/usr/bin/env bash
# transformers 5.24.0: rope_type="longrope", as in Phi-3 of long context, here in a Llama: two rows of a batch.
# Expected: a row of a padded batch has the logits that it has alone, as with every other kind of rotation but the dynamic one; and in
#   a causal model the first tokens do not depend on what follows them.
# Instead: one number, the largest position of the whole call, chooses between the short and the long factors for all rows and tokens. A
#   short row beside one row that exceeds the trained length is rotated by the factors for long texts, and so is the beginning of a
#   text as soon as its end is given too: scores of a prompt change with the company it is evaluated in.
# Seen when run (trained for 32 tokens, a row of 24, relative difference of logits from it alone):
#   yarn: beside a row of 30 tokens 0.0e+00, beside a row of 40 tokens 2.8e-07; as the beginning of 40 tokens 2.8e-07
#   longrope: beside a row of 30 tokens 0.0e+00, beside a row of 40 tokens 9.5e-01; as the beginning of 40 tokens 9.5e-01
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
small = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=128,
)
shared = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
kinds = {
    "yarn": {"rope_type": "yarn"},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 8.0]},
}
torch.manual_seed(3)
ids = torch.randint(3, 50, (1, 40))
short = ids[:, :24]
for kind, rope in kinds.items():
    model = LlamaForCausalLM(LlamaConfig(**small, rope_parameters={**shared, **rope})).eval()
    torch.manual_seed(0)
    for p in model.parameters():  # weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    alone = model(short).logits

    def beside(n):
        rows = torch.cat([torch.nn.functional.pad(short, (0, n - 24)), ids[:, :n]])
        mask = torch.ones_like(rows)
        mask[0, 24:] = 0
        return rel(model(rows, attention_mask=mask).logits[:1, :24], alone)

    off = beside(30), beside(40), rel(model(ids).logits[:, :24], alone)
    print(f"{kind}: beside a row of 30 tokens {off[0]:.1e}, beside a row of 40 tokens {off[1]:.1e}; "
          f"as the beginning of 40 tokens {off[2]:.1e}")
    assert off[0] < 1e-5
    assert min(off[1:]) > 0.1 if kind == "longrope" else max(off) < 1e-5
PY
env/bin/python -W ignore check.py
