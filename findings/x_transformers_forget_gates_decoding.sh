#!/usr/bin/env bash
# x-transformers 2.31.10: Decoder(attn_data_dependent_alibi=True), the forgetting transformer, and Decoder(shift_tokens=1) in generate().
# Expected: generate() keeps keys and values by default (cache_kv=True) and gives the tokens it gives without a cache; modules that cannot be
#   cached say so by can_cache_kv, as selective attention does.
# Instead: beside a cache both see the new token alone. The forget gates are summed from that token on, so that nothing in the cache is
#   forgotten; the shift brings zeros where the token before belongs. Nothing is raised, and the text is another one.
# Seen when run:
#   alibi_pos_bias: cached step against a pass 1.0e-06; generate() with and without cache: 16 of 16 tokens equal
#   attn_data_dependent_alibi: cached step against a pass 2.2e-02; generate() with and without cache: 3 of 16 tokens equal
#   shift_tokens: cached step against a pass 1.2e+00; generate() with and without cache: 1 of 16 tokens equal
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile x-transformers==2.31.10 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
kinds = {
    "alibi_pos_bias": dict(alibi_pos_bias=True),
    "attn_data_dependent_alibi": dict(attn_data_dependent_alibi=True),
    "shift_tokens": dict(shift_tokens=1),
}
for name, options in kinds.items():
    torch.manual_seed(0)
    layers = Decoder(dim=64, depth=2, heads=4, attn_dim_head=16, **options)
    model = TransformerWrapper(num_tokens=50, max_seq_len=64, attn_layers=layers).eval()
    for p in model.parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(0, 50, (1, 24))
    _, cache = model(ids[:, :23], return_intermediates=True)
    step = rel(model(ids, return_intermediates=True, cache=cache)[0][:, -1], model(ids)[:, -1])
    generator = AutoregressiveWrapper(model)
    texts = [generator.generate(ids[:, :8], 16, temperature=0.0, cache_kv=cached) for cached in (True, False)]
    same = (texts[0] == texts[1]).sum().item()
    print(f"{name}: cached step against a pass {step:.1e}; generate() with and without cache: {same} of 16 tokens equal")
    assert step < 1e-4 and same == 16 if name == "alibi_pos_bias" else step > 0.01 and same < 16
PY
env/bin/python check.py
