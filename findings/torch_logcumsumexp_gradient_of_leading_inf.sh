#!/usr/bin/env bash
# torch 2.13.0 and jax 0.10.2: gradients of logcumsumexp (cumlogsumexp) where the first inputs are -inf, as log-gates that are shut at first are.
# Expected: prefixes of zero weight have the gradient 0, as logsumexp gives it: the forward values, -inf and then finite ones, are right.
# Instead: torch gives NaN for the rows that are -inf from the beginning on, already for one of them, although the loss takes finite outputs alone.
#   jax's cumlogsumexp is right with one leading -inf, and NaN from the second on.
# Seen when run:
#   torch: logsumexp gradient [0.0, 0.0, 0.269, 0.731]
#   torch: logcumsumexp, -inf first 1: nan in 1 of 4; first 2: nan in 2 of 4
#   jax: cumlogsumexp, -inf first 1: nan in 0 of 4; first 2: nan in 2 of 4
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv env
env/bin/pip install -q --no-compile torch==2.13.0 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 2>pip.log || { cat pip.log >&2; exit 1; }
cat > check.py <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
import torch


def row(leading):
    x = np.array([-1.0, 0.5, 1.0, 2.0], np.float32)
    x[:leading] = -np.inf
    return x


def of_torch(function, x):
    t = torch.tensor(x, requires_grad=True)
    function(t).backward()
    return t.grad.numpy()


def nans(grad):
    return int(np.isnan(grad).sum())


print("torch: logsumexp gradient", [round(float(x), 3) for x in of_torch(lambda t: t.logsumexp(0), row(2))])
assert np.isfinite(of_torch(lambda t: t.logsumexp(0), row(2))).all()
last = lambda t: torch.logcumsumexp(t, 0)[-1]
found = [nans(of_torch(last, row(i))) for i in (1, 2)]
print(f"torch: logcumsumexp, -inf first 1: nan in {found[0]} of 4; first 2: nan in {found[1]} of 4")
assert all(found)
own = [nans(np.asarray(jax.grad(lambda x: jax.lax.cumlogsumexp(x)[-1])(jnp.asarray(row(i))))) for i in (1, 2)]
print(f"jax: cumlogsumexp, -inf first 1: nan in {own[0]} of 4; first 2: nan in {own[1]} of 4")
assert own[0] == 0 and own[1] > 0
PY
env/bin/python check.py
