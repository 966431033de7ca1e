#!/usr/bin/env bash
# transformers 5.24.0: the cache of MiniMaxForCausalLM whose first layer is lightning (linear) attention.
# Expected: the cache knows how many tokens it has seen, whatever the order of layers; the published model begins with seven linear layers,
#   then one of softmax. A padded row of a batch gets the tokens it gets alone, and a prompt in two halves the logits of one pass.
# Instead: the length is read from the keys of layer 0, which has none: it is 0 for ever. Positions start anew and the causal mask of
#   the softmax layers is laid from position 0, so from the second new token on a left-padded row hides its own past, and the
#   second half of a prompt is as wrong as random logits. Unpadded generate() needs no mask and is right, which hides it, and so
#   does the default order of MiniMaxConfig, which begins with softmax.
# Seen when run:
#   first layer full_attention: length of the cache after 12 tokens 12, second half against one pass 1.6e-06,
#     generate() of the padded row and of the row alone: 12 of 12 tokens equal
#   first layer linear_attention: length of the cache after 12 tokens 0, second half against one pass 9.0e-01,
#     generate() of the padded row and of the row alone: 2 of 12 tokens equal
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import MiniMaxConfig, MiniMaxForCausalLM

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
small = dict(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, block_size=8, num_local_experts=2, num_experts_per_tok=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
for first, last in (("full_attention", "linear_attention"), ("linear_attention", "full_attention")):
    torch.manual_seed(0)
    order = [first, "linear_attention", "linear_attention", last]
    model = MiniMaxForCausalLM(MiniMaxConfig(**small, layer_types=order)).eval()
    for p in model.parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)

    ids = torch.randint(3, 50, (1, 24))
    cache = model(ids[:, :12], use_cache=True).cache
    length = cache.get_seq_length()
    halves = rel(model(ids[:, 12:], cache=cache, use_cache=True).logits, model(ids, use_cache=False).logits[:, 12:])

    both = torch.cat([torch.randint(3, 50, (1, 29)), torch.nn.functional.pad(ids, (5, 0))])
    keywords = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    batch = model.generate(both, attention_mask=(both > 0).long(), **keywords)
    same = (batch[1, 29:] == model.generate(ids, **keywords)[0, 24:]).sum().item()
    print(f"first layer {first}: length of the cache after 12 tokens {length}, second half against one pass {halves:.1e},")
    print(f"  generate() of the padded row and of the row alone: {same} of 12 tokens equal")
    if first == "full_attention":
        assert length == 12 and halves < 1e-4 and same == 12
    else:
        assert length == 0 and halves > 0.1 and same < 12
PY
env/bin/python check.py
