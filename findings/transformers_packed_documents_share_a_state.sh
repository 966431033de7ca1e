#!/usr/bin/env bash
# transformers 5.24.0: packed documents in models with convolutions or recurrences (LFM2, Qwen3-Next, Bamba, GraniteMoeHybrid, Falcon-H1, Jamba).
# Expected: position_ids that start anew, 0 1 2 … 0 1 2 …, without mask and cache, say where documents begin, as
#   DataCollatorWithFlattening makes them: Llama and the attention layers of these very models then keep documents apart.
# Instead: only the masks of attention layers are made from the positions. The short convolution runs over the border and the recurrent
#   state of the first document goes on into the second, for its whole length. Half of the model trains on documents, the
#   other half on their concatenation.
# Seen when run (second of two packed documents of 12 tokens, relative difference from it alone):
#   Llama: 2.8e-07
#   LFM2, attention layers alone: 4.3e-07
#   Qwen3-Next, attention layers alone: 2.8e-07
#   LFM2: 4.0e-01
#   Qwen3-Next: 7.4e-01
#   Bamba: 6.8e-01
#   GraniteMoeHybrid: 8.7e-01
#   Falcon-H1: 4.5e-01
#   Jamba: 7.3e-01
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import logging

import torch
import transformers
from transformers import AutoModelForCausalLM as Model
from transformers import (
    BambaConfig, FalconH1Config, GraniteMoeHybridConfig, JambaConfig, Lfm2Config, LlamaConfig, Qwen3NextConfig,
)

logging.disable(logging.WARNING)
transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
small = dict(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
)
mamba2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
delta = dict(
    head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2,
    num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
)
shared = dict(num_local_experts=0, shared_intermediate_size=32, position_embedding_type="rope")
full = ["full_attention"] * 2
apart = [
    ("Llama", LlamaConfig(**small)),
    ("LFM2, attention layers alone", Lfm2Config(**small, layer_types=full)),
    ("Qwen3-Next, attention layers alone", Qwen3NextConfig(**small, **delta, layer_types=full)),
]
together = [
    ("LFM2", Lfm2Config(**small, layer_types=["conv", "full_attention"])),
    ("Qwen3-Next", Qwen3NextConfig(**small, **delta, layer_types=["linear_attention", "full_attention"])),
    ("Bamba", BambaConfig(**small, **mamba2, attn_layer_indices=[1])),
    ("GraniteMoeHybrid", GraniteMoeHybridConfig(**small, **mamba2, **shared, layer_types=["mamba", "attention"])),
    ("Falcon-H1", FalconH1Config(**small, **mamba2, mamba_d_ssm=64)),
    ("Jamba", JambaConfig(**small, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1)),
]
torch.manual_seed(0)
both = torch.randint(1, 50, (1, 24))
places = torch.cat([torch.arange(12), torch.arange(12)])[None]
for name, config in apart + together:
    torch.manual_seed(0)
    model = Model.from_config(config).eval()
    for p in model.parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    alone = model(both[:, 12:], use_cache=False).logits
    packed = model(both, position_ids=places, use_cache=False).logits[:, 12:]
    error = ((packed - alone).norm() / alone.norm()).item()
    print(f"{name}: {error:.1e}")
    assert error < 1e-5 if (name, config) in apart else error > 0.1
PY
env/bin/python check.py
