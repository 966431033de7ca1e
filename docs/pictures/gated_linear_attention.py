"""The weights of tokens in the outputs of four layers that gated linear attention covers."""

import matplotlib.pyplot as plt
import numpy as np

import subquad

figure, axes = plt.subplots(1, 4, figsize=(7.5, 2.4), sharey=True, layout="constrained")

n = 40
one = np.ones((n, 1))
rng = np.random.default_rng(1)
gates = -0.04 * np.exp(rng.standard_normal((n, 1)))
gates[[15, 28]] = -2.0
constant = np.full((n, 1), np.log(0.9))
cases = {
    "no decay": {},
    "RetNet, 0.9": {"g": constant},
    "GLA, gates": {"g": gates},
    "RWKV-6, bonus 2": {"g": constant, "bonus": np.asarray([2.0])},
}
for axis, (title, given) in zip(axes, cases.items(), strict=True):
    # v = the unit matrix: o[t, s] is the weight of token s in output t
    weights = subquad.gated_linear_attention(one, one, np.eye(n), given.pop("g", None), scale=1.0, **given)
    axis.imshow(weights, cmap="Blues", vmin=0, vmax=2 if "bonus" in title else 1)
    axis.set(title=title, xlabel="token s")
axes[0].set(ylabel="output t")
