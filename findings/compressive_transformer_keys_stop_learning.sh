#!/usr/bin/env bash
# compressive-transformer-pytorch 0.4.0, torch 2.13.0: training CompressiveTransformer over several segments.
# Expected: the loss that compares attention over the memory with attention over its compression trains the compression alone, so the
#   projections of keys and values are cut out of that loss, and go on being trained by the loss of the language model.
# Instead: they are cut out by detaching the weight itself in place, which makes a parameter stop requiring gradients for good. From the first
#   segment that compresses a memory on (the second one of the first text) no layer's keys and values are trained any more: the optimiser
#   skips them without a word, that step included, and only queries, gates and feed-forward layers learn. requires_grad is not saved, so each
#   run, and each run continued from a checkpoint, trains them for one segment.
# Seen when run (two layers, five segments; largest change of a weight by each step of Adam with a rate of 0.01):
#   to_q: segment 1 1e-02 1e-02; segment 2 1e-02 1e-02; segment 3 1e-02 1e-02; segment 4 1e-02 1e-02; segment 5 1e-02 1e-02
#   to_kv: segment 1 1e-02 1e-02; segment 2 0e+00 0e+00; segment 3 0e+00 0e+00; segment 4 0e+00 0e+00; segment 5 0e+00 0e+00
#   requires_grad of to_kv afterwards: [False, False]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile compressive-transformer-pytorch==0.4.0 mogrifier==0.0.5 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from compressive_transformer_pytorch import CompressiveTransformer

torch.manual_seed(0)
model = CompressiveTransformer(num_tokens=50, dim=32, seq_len=16, depth=2, heads=4, mem_len=16, cmem_len=8, cmem_ratio=4)
parameters = dict(model.named_parameters())
optimiser = torch.optim.Adam(parameters.values(), lr=0.01)
memories, changes = None, []
for _ in range(5):
    before = {name: p.detach().clone() for name, p in parameters.items()}
    tokens = torch.randint(0, 50, (2, 17))
    logits, memories, auxiliary = model(tokens[:, :-1], memories=memories)
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:]) + auxiliary
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    with torch.no_grad():
        changes.append({
            kind: [(p - before[name]).abs().max().item() for name, p in parameters.items() if f"{kind}.weight" in name]
            for kind in ("to_q", "to_kv")
        })
for kind in ("to_q", "to_kv"):
    print(f"{kind}:", "; ".join(f"segment {i} " + " ".join(f"{x:.0e}" for x in change[kind]) for i, change in enumerate(changes, 1)))
asked = [p.requires_grad for name, p in parameters.items() if "to_kv.weight" in name]
print(f"requires_grad of to_kv afterwards: {asked}")
assert all(x > 1e-3 for change in changes for x in change["to_q"]) and min(changes[0]["to_kv"]) > 1e-3
assert all(x == 0 for change in changes[1:] for x in change["to_kv"]) and not any(asked)
PY
env/bin/python check.py
