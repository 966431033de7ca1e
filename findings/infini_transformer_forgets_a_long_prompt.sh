#!/usr/bin/env bash
# infini-transformer-pytorch 0.2.1: InfiniTransformerWrapper.generate after a prompt longer than one segment.
# Expected: full segments of the prompt are written to the compressive memory, as in training, and the first new token depends on all of the
#   prompt: an unbounded context is what the model is for.
# Instead: only the last segment of the prompt is read. Those before it are neither attended to nor written to the memory, which is empty
#   then, so that all of them may be replaced and not one logit changes. Only what is generated later enters the memory. Prompts within one
#   segment are right. And with learned_delta_update=True a segment that was decoded token by token is written with the strength of
#   its last token for all its tokens, where a pass gives each its own.
# Seen when run (segments of 8 tokens, gates of the memory at a half):
#   prompt of 6: first new logits 0.0e+00 from those of training; other first 0 tokens move them by 0.0e+00, in training by 0.0e+00
#   prompt of 20: first new logits 5.5e-01 from those of training; other first 16 tokens move them by 0.0e+00, in training by 6.1e-01
#   learned_delta_update=False: memory of a decoded segment against that of a pass 1.3e-07
#   learned_delta_update=True: memory of a decoded segment against that of a pass 4.9e-01
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile infini-transformer-pytorch==0.2.1 rotary-embedding-torch==0.9.1 einops==0.8.2 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()


def make(**options):
    torch.manual_seed(0)
    model = InfiniTransformer(num_tokens=50, dim=32, depth=2, dim_head=16, heads=2, **options).eval()
    for p in model.parameters():  # random weights large enough that every part of the model matters
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    for attention, _ in model.layers:
        attention.fastweight_mem.head_gates.zero_()
    return model


def as_trained(model, tokens):
    memories = None
    for segment in tokens.split(8, 1):
        logits, _, memories = model(segment, past_memories=memories, return_new_memories=True)
    return logits[:, -1]


model = make()
wrapper = InfiniTransformerWrapper(model, segment_length=8).eval()
seen = []
model.register_forward_hook(lambda module, args, result: seen.append(result.logits[:, -1]))
for length in (6, 20):
    tokens = torch.randint(0, 50, (1, length))
    other = tokens.clone()
    first = length - 1 - (length - 1) % 8
    other[:, :first] = torch.randint(0, 50, (1, first))
    logits = []
    for prompt in (tokens, other):
        wrapper.generate(prompt=prompt, seq_len=length + 1)
        logits.append(seen[-1])
    off = rel(logits[0], as_trained(model, tokens))
    moved = rel(logits[1], logits[0])
    should = rel(as_trained(model, other), as_trained(model, tokens))
    print(f"prompt of {length}: first new logits {off:.1e} from those of training; other first {first} tokens move them by {moved:.1e}, in training by {should:.1e}")
    assert off < 1e-5 if length == 6 else off > 0.1 and moved == 0 and should > 0.1

for learned in (False, True):
    model = make(use_mem_delta_rule=True, learned_delta_update=learned)
    tokens = torch.randint(0, 50, (1, 8))
    right = model(tokens, return_new_memories=True).past_memories
    cache = model(tokens[:, :6]).cached_kvs
    cache = model(tokens[:, :7], cached_kv=cache).cached_kvs
    steps = model(tokens, cached_kv=cache, return_new_memories=True).past_memories
    off = rel(steps[0].kv_mem, right[0].kv_mem)
    print(f"learned_delta_update={learned}: memory of a decoded segment against that of a pass {off:.1e}")
    assert off > 0.1 if learned else off < 1e-5
PY
env/bin/python check.py 2>progress.log || { cat progress.log >&2; exit 1; }
