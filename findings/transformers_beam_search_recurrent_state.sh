#!/usr/bin/env bash
# transformers 5.24.0: beam search with MiniMaxForCausalLM and RecurrentGemmaForCausalLM.
# Expected: when beams change places, all that a beam remembers moves with it, so that a score returned (length_penalty=0) is the sum of the
#   log probabilities of the tokens returned; or an error, as RWKV and xLSTM give ("the cache cannot be reordered").
# Instead: only keys and values are moved. The sums of linear attention (MiniMax) and the states of the recurrence (RecurrentGemma) stay
#   where they were, so a beam goes on with another beam's past: the scores are those of no sequence, and other
#   sequences win than with use_cache=False. Nothing is raised.
# Seen when run:
#   LlamaForCausalLM: score against log probability, off by 0.0000 with cache, 0.0000 without
#   MiniMaxForCausalLM: score against log probability, off by 2.5062 with cache, 0.0000 without
#   RecurrentGemmaForCausalLM: score against log probability, off by 0.5730 with cache, 0.0000 without
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, MiniMaxConfig, MiniMaxForCausalLM
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
small = dict(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
models = [
    LlamaForCausalLM(LlamaConfig(**small)),
    MiniMaxForCausalLM(MiniMaxConfig(**small, block_size=8, num_local_experts=2, num_experts_per_tok=1)),
    RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**small, attention_window_size=64, block_types=["recurrent", "attention"], lru_width=32)
    ),
]
for model in models:
    torch.manual_seed(0)
    for p in model.eval().parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(3, 50, (4, 16))
    off = []
    for use_cache in (True, False):
        found = model.generate(
            ids, max_new_tokens=16, num_beams=4, do_sample=False, eos_token_id=None, length_penalty=0.0, use_cache=use_cache,
            output_scores=True, return_dict_in_generate=True,
        )
        logs = model(found.sequences, use_cache=False).logits.log_softmax(-1)[:, 15:-1]
        true = logs.gather(-1, found.sequences[:, 16:, None])[..., 0].sum(1)
        off.append((found.sequences_scores - true).abs().max().item())
    print(f"{type(model).__name__}: score against log probability, off by {off[0]:.4f} with cache, {off[1]:.4f} without")
    assert off[1] < 1e-3 and (off[0] < 1e-3 if model is models[0] else off[0] > 0.1)
PY
env/bin/python check.py
