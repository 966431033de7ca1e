#!/usr/bin/env bash
# xlstm 2.0.6: xLSTMLMModel.step(tokens, state), two continuations of one prompt.
# Expected: a step takes a state and returns the next one, as its signature says, and leaves the one it was given: from the state of a prompt
#   each of several answers can be scored, or a beam, or a guess be taken back.
# Instead: the dictionary handed in is filled with the new state, so the old one is gone. A copy of the dictionary is worse, since half of it is
#   kept: the matrices of the memory are new tensors, but the inputs of the short convolution are shifted in place, and
#   the second continuation has the memory of the prompt and the last tokens of the first continuation. Only a deep copy helps. Nothing is
#   raised; one continuation alone is right.
# Seen when run (second continuation after a prompt of 12 tokens, relative difference from one pass):
#   state handed in again: 1.1e+00
#   shallow copy of it: 8.6e-01
#   deep copy of it: 5.8e-07
#   changed in the old tensors of each block: conv_state
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 packaging==26.4 2>pip.log || { cat pip.log >&2; exit 1; }
env/bin/pip install -q --no-compile --no-deps xlstm==2.0.6 2>pip.log || { cat pip.log >&2; exit 1; }  # its kernels are for GPUs
cat > check.py <<'PY'
import copy

import torch
from xlstm import mLSTMBlockConfig, mLSTMLayerConfig, xLSTMLMModel, xLSTMLMModelConfig

torch.set_grad_enabled(False)
torch.manual_seed(0)
layer = mLSTMLayerConfig(num_heads=2)
config = xLSTMLMModelConfig(mlstm_block=mLSTMBlockConfig(mlstm=layer), vocab_size=50, context_length=32, num_blocks=2, embedding_dim=32)
model = xLSTMLMModel(config)
model.reset_parameters()
model.eval()
ids = torch.randint(0, 50, (1, 13))
whole = model(ids)[:, 12]
other = (ids[:, 12:] + 1) % 50
rel = lambda a, b: ((a - b).norm() / b.norm()).item()


def prompt():
    state = None
    for i in range(12):
        logits, state = model.step(ids[:, i : i + 1], state=state)
    return state


copies = {"state handed in again": lambda s: s, "shallow copy of it": dict, "deep copy of it": copy.deepcopy}
for name, keep in copies.items():
    state = prompt()
    kept = keep(state)
    model.step(other, state=state)  # the first continuation
    logits, _ = model.step(ids[:, 12:], state=kept)  # the second one
    error = rel(logits[:, 0], whole)
    print(f"{name}: {error:.1e}")
    assert error < 1e-5 if name.startswith("deep") else error > 0.1
state = prompt()
old, saved = dict(state), copy.deepcopy(state)
model.step(other, state=state)
changed = {
    part for block in old for part in old[block] if any(not torch.equal(a, b) for a, b in zip(old[block][part], saved[block][part]))
}
print("changed in the old tensors of each block:", *sorted(changed))
assert changed == {"conv_state"}
PY
env/bin/python check.py
