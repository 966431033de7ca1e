#!/usr/bin/env bash
# minimamba 1.0.1: S6, the layer of its Mamba models, with the parameters and names of Mamba (in_proj, conv1d, x_proj, dt_proj, A_log, D, out_proj).
# Expected: Mamba: the step is softplus(W dt + b), begins between dt_min and dt_max, and the output is gated by silu(z), so that weights of other
#   implementations, which load by name, give their outputs.
# Instead: the bias of dt_proj is added by the linear layer and once more before the softplus, and the gate is z itself. As b
#   is about log(step), steps begin at their squares, between 1e-6 and 1e-2 where 1e-3 to 1e-1 is asked for: next to nothing is written to the
#   state. Nothing is raised, and training goes on from there.
# Seen when run:
#   steps at first: meant 1.2e-03 to 9.7e-02, median 1.0e-02
#   steps at first: made 1.4e-06 to 1.0e-02, median 1.1e-04
#   the layer: Mamba's formula is off by 1.1e+00, gate z is off by 4.1e-03, gate z and the bias twice is off by 4.0e-09
#   what comes from the state (D = 0): Mamba's formula is off by 8.5e-01, gate z is off by 9.0e-01, gate z and the bias twice is off by 1.6e-07
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile minimamba==1.0.1 torch==2.13.0 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import torch
from minimamba import MambaConfig, S6
from torch.nn import functional as F

torch.set_grad_enabled(False)
torch.manual_seed(0)
config = MambaConfig(d_model=32, n_layer=1, d_state=8, vocab_size=50, device="cpu")
layer = S6(config)
x = torch.randn(1, 24, 32)
rel = lambda a, b: ((a - b).norm() / b.norm()).item()

run, seen = layer._selective_scan_forward, []
layer._selective_scan_forward = lambda u, delta, *rest: (seen.append(delta), run(u, delta, *rest))[1]
layer(0 * x)  # what the bias alone gives; the convolution's is small
steps = seen[0]
meant = F.softplus(layer.dt_proj.bias)
print(f"steps at first: meant {meant.min():.1e} to {meant.max():.1e}, median {meant.median():.1e}")
print(f"steps at first: made {steps.min():.1e} to {steps.max():.1e}, median {steps.median():.1e}")


def mamba(biases, gate):
    u, z = layer.in_proj(x).chunk(2, -1)
    u = F.silu(layer.conv1d(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
    dt, b, c = layer.x_proj(u).split([layer.dt_rank, 8, 8], -1)
    dt = F.softplus(F.linear(dt, layer.dt_proj.weight) + biases * layer.dt_proj.bias)
    decay = torch.exp(-dt[..., None] * layer.A_log.exp())
    state, outputs = 0, []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
        outputs.append((state * c[:, t, None]).sum(-1))
    return layer.out_proj((torch.stack(outputs, 1) + layer.D * u) * gate(z))


rows = [("Mamba's formula", 1, F.silu), ("gate z", 1, lambda z: z), ("gate z and the bias twice", 2, lambda z: z)]
for part in ("the layer", "what comes from the state (D = 0)"):
    y = layer(x)
    errors = [rel(y, mamba(biases, gate)) for _, biases, gate in rows]
    print(f"{part}:", ", ".join(f"{name} is off by {error:.1e}" for (name, *_), error in zip(rows, errors)))
    assert errors[0] > 0.5 and errors[2] < 1e-5
    layer.D.zero_()
assert errors[1] > 0.5 and meant.min() > 9e-4 and steps.median() < meant.median() / 30
PY
env/bin/python check.py
