#!/usr/bin/env bash
# transformers 5.24.0: BambaForCausalLM continued from a cache without position_ids.
# Expected: positions go on from the length of the cache where none are given, as in Llama, GraniteMoeHybrid, Falcon-H1 and other
#   decoders with a cache; the cache knows that length.
# Instead: Bamba counts from 0 at each call. The rotary embedding of every token decoded by a hand-written loop, and of the second half of
#   a prompt, is that of the first tokens, while mask and state are right, so the text is plausible and wrong. generate()
#   passes positions and hides it.
# Seen when run (relative difference from one pass):
#   GraniteMoeHybridForCausalLM: second half of a prompt, without position_ids 3.7e-07, with them 3.7e-07
#   BambaForCausalLM: second half of a prompt, without position_ids 1.5e-01, with them 3.5e-07
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import BambaConfig, BambaForCausalLM, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
small = dict(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8, mamba_n_groups=1,
)
models = [
    GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **small, layer_types=["mamba", "attention"], position_embedding_type="rope", num_local_experts=2,
            num_experts_per_tok=1, shared_intermediate_size=32,
        )
    ),
    BambaForCausalLM(BambaConfig(**small, attn_layer_indices=[1])),
]
for model in models:
    torch.manual_seed(0)
    for name, p in model.eval().named_parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1 and not name.endswith("A_log"):
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(3, 50, (1, 24))
    want = model(ids, use_cache=False).logits[:, 12:]
    off = []
    for positions in (None, torch.arange(12, 24)[None]):
        cache = model(ids[:, :12], use_cache=True).cache
        assert cache.get_seq_length() == 12
        off.append(rel(model(ids[:, 12:], cache=cache, position_ids=positions, use_cache=True).logits, want))
    print(f"{type(model).__name__}: second half of a prompt, without position_ids {off[0]:.1e}, with them {off[1]:.1e}")
    assert off[1] < 1e-4 and (off[0] < 1e-4 if model is models[0] else off[0] > 0.05)
PY
env/bin/python check.py
