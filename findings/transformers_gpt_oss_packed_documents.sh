#!/usr/bin/env bash
# transformers 5.24.0: packed documents in GptOssForCausalLM.
# Expected: position_ids that start anew, 0 1 2 … 0 1 2 …, say where documents begin where there is no cache and no mask;
#   Llama, Mistral, Qwen and others then hide documents from each other, so training on packed batches is training on documents.
# Instead: GptOssModel makes its masks without position_ids. The positions are rotated right, but each document attends to those
#   before it, without a word.
# Seen when run:
#   MistralForCausalLM: second of two packed documents beside it alone: 2.5e-07
#   GptOssForCausalLM: second of two packed documents beside it alone: 1.3e+00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import GptOssConfig, GptOssForCausalLM, MistralConfig, MistralForCausalLM

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
torch.manual_seed(0)
small = dict(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    attn_implementation="eager",
)
models = [
    MistralForCausalLM(MistralConfig(**small, sliding_window=8)),
    GptOssForCausalLM(GptOssConfig(**small, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)),
]
first, second = torch.randint(3, 50, (2, 1, 6))
both = torch.cat([first, second], 1)
places = torch.cat([torch.arange(6), torch.arange(6)])[None]
for model in models:
    model.eval()
    alone = model(second).logits
    packed = model(both, position_ids=places, use_cache=False).logits[:, 6:]
    error = ((packed - alone).norm() / alone.norm()).item()
    print(f"{type(model).__name__}: second of two packed documents beside it alone: {error:.1e}")
    assert error > 0.1 if "GptOss" in type(model).__name__ else error < 1e-5
PY
env/bin/python check.py
