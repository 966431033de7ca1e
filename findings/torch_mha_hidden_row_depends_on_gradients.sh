#!/usr/bin/env bash
# torch 2.13.0 (CPU): nn.MultiheadAttention and nn.TransformerEncoderLayer with a row that may see no key, as an empty or wholly padded item has.
# Expected: one answer of one layer for one input, be it NaN or zeros.
# Instead: need_weights=True (the default) gives NaN; need_weights=False gives zeros in training, and in eval() as long as gradients are
#   recorded; under no_grad() the same call gives NaN, since another path is taken. So does the encoder layer: an
#   empty item trains well, evaluates well with gradients and turns to NaN in a validation loop. A TransformerEncoder around the
#   same layer gives a third answer there, zeros (nested tensors), unless enable_nested_tensor=False.
# Seen when run (row of the empty item):
#   attention, need_weights=True: train nan, eval nan, eval under no_grad nan
#   attention, need_weights=False: train 0.0, eval 0.0, eval under no_grad nan
#   encoder layer: train -0.8, eval -0.8, eval under no_grad nan
#   encoder of two: train -0.8, eval -0.8, eval under no_grad 0.0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import warnings

import torch
from torch import nn

warnings.simplefilter("ignore")
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
encoder = nn.TransformerEncoder(layer, 2)
attention = layer.self_attn
x = torch.randn(2, 4, 8)
empty = torch.tensor([False, True])[:, None].expand(2, 4)  # all of the second item is padding


def answers(module, call):
    out = []
    for training, gradients in ((True, True), (False, True), (False, False)):
        module.train(training)
        with torch.set_grad_enabled(gradients):
            y = call()
        assert y[0].isfinite().all()
        out.append(round(y[1, 0, 0].item(), 1))
    return out


def show(name, out):
    print(f"{name}: train {out[0]}, eval {out[1]}, eval under no_grad {out[2]}")
    return [x != x for x in out], out[2]


for weights, nan in ((True, [True, True, True]), (False, [False, False, True])):
    out = answers(attention, lambda: attention(x, x, x, key_padding_mask=empty, need_weights=weights)[0])
    assert show(f"attention, need_weights={weights}", out)[0] == nan
out = answers(layer, lambda: layer(x, src_key_padding_mask=empty))
assert show("encoder layer", out)[0] == [False, False, True]
out = answers(encoder, lambda: encoder(x, src_key_padding_mask=empty))
assert show("encoder of two", out) == ([False, False, False], 0)
assert out[1] != 0
PY
env/bin/python check.py
