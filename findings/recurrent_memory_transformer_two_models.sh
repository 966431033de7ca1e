#!/usr/bin/env bash
# recurrent-memory-transformer-pytorch 0.7.0: RecurrentMemoryTransformerWrapper with the default use_xl_memories=True.
# Expected: training, scoring and generate() run one model: beside the memory tokens each segment attends to the keys and values of the
#   segment before it.
# Instead: the forward pass of the wrapper, for the loss and for logits, collects the keys and values of each segment and never hands
#   them to the next one; generate() hands them on. A model is trained without them and generates with keys that it never saw.
#   memory_replay_backprop=True computes its loss with them, from memory tokens that were made without them: a third one. The first
#   segment is right, and nothing is raised. With use_xl_memories=False all three agree.
# Seen when run (segments of 8 tokens, 24 tokens, relative difference of logits by segment):
#   use_xl_memories=False: generate() against scoring 0.0e+00, 0.0e+00, 0.0e+00; loss 5.356, with memory replay 5.356
#   use_xl_memories=True: generate() against scoring 0.0e+00, 1.2e+00, 1.2e+00; loss 5.356, with memory replay 5.492
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile recurrent-memory-transformer-pytorch==0.7.0 hyper-connections==0.4.11 einops==0.8.2 packaging==26.4 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer, RecurrentMemoryTransformerWrapper

rel = lambda a, b: ((a - b).norm() / b.norm()).item()
for xl in (False, True):
    torch.manual_seed(0)
    model = RecurrentMemoryTransformer(
        32, num_tokens=50, depth=2, num_memory_tokens=2, seq_len=8, dim_head=16, heads=2, use_xl_memories=xl,
    ).eval()
    with torch.no_grad():
        for p in model.parameters():  # random weights large enough that every part of the model matters
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.3)
    wrapper = RecurrentMemoryTransformerWrapper(model).eval()
    tokens = torch.randint(0, 50, (1, 24))
    with torch.no_grad():
        scored = wrapper(tokens)[0].split(8, 1)
    seen = []
    hook = model.register_forward_hook(lambda module, args, result: seen.append(result[0]))
    wrapper.generate(tokens, length=25)
    hook.remove()
    off = [rel(a, b) for a, b in zip(seen, scored)]
    losses = wrapper(tokens, return_loss=True)[0].item(), wrapper(tokens, memory_replay_backprop=True).item()
    print(f"use_xl_memories={xl}: generate() against scoring", ", ".join(f"{x:.1e}" for x in off) + f"; loss {losses[0]:.3f}, with memory replay {losses[1]:.3f}")
    assert len(off) == 3 and off[0] < 1e-5
    if xl:
        assert min(off[1:]) > 0.1 and abs(losses[0] - losses[1]) > 0.01
    else:
        assert max(off) < 1e-5 and abs(losses[0] - losses[1]) < 1e-4
PY
env/bin/python check.py
