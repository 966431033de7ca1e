#!/usr/bin/env bash
# transformers 5.24.0: attention_mask of ConvBertModel, CanineModel and MobileBertModel.
# Expected: what the mask hides has no influence: a padded row has the outputs it has alone, whatever stands in the padding, as in BertModel.
# Instead: the mask reaches the softmax alone, and padding comes in beside it: by the convolution over keys and values (ConvBERT), by the
#   strided convolutions over characters (CANINE), by the embedding of the next token that is joined to each token's own (MobileBERT).
#   From there attention carries it to all tokens. Nothing is warned.
#   Padding with zeros hides none of it: the embedding of the padding token, its position or the bias is not 0.
# Seen when run (two layers, 40 real tokens and 24 of padding, relative):
#   BertModel: padded against alone 2.4e-07, other content of the padding 0.0e+00
#   ConvBertModel: padded against alone 6.7e-02, other content of the padding 4.7e-02
#   CanineModel: padded against alone 1.3e-01, other content of the padding 8.9e-02
#   MobileBertModel: padded against alone 4.8e-02, other content of the padding 4.6e-02
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile transformers==5.24.0 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
import transformers
from transformers import (BertConfig, BertModel, CanineConfig, CanineModel, ConvBertConfig, ConvBertModel, MobileBertConfig, MobileBertModel)

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()
small = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=256)
characters = {key: value for key, value in small.items() if key != "vocab_size"}
models = {
    BertModel: BertConfig(**small),
    ConvBertModel: ConvBertConfig(**small, embedding_size=32),
    CanineModel: CanineConfig(**characters, local_transformer_stride=8, num_hash_buckets=64),
    MobileBertModel: MobileBertConfig(**small, embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32),
}
n, padding = 40, 24
for kind, config in models.items():
    model = kind(config).eval()
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else None
    ids = torch.randint(3, 60, (1, n))
    mask = (torch.arange(n + padding) < n).long()[None]
    encode = lambda fill: model(torch.cat([ids, fill.expand(1, padding)], 1), attention_mask=mask)[0][:, :n]
    padded, other = encode(torch.tensor([0])), encode(torch.randint(3, 60, (1, padding)))
    content = rel(other, padded)
    err = rel(padded, model(ids, attention_mask=torch.ones_like(ids))[0])
    print(f"{kind.__name__}: padded against alone {err:.1e}, other content of the padding {content:.1e}")
    assert err < 1e-5 if kind is BertModel else err > 0.01
    assert content < 1e-6 if kind is BertModel else content > 0.01
PY
env/bin/python check.py
