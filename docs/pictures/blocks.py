"""A Mamba block at initialisation: its steps and rates, and how far back its output reads the input."""

import matplotlib.pyplot as plt
import numpy as np

import subquad

figure, (times, reach) = plt.subplots(1, 2, figsize=(7.5, 2.6), layout="constrained")

d_model, n = 32, 400
params = subquad.init_mamba(d_model, like=np.ones(1))
steps = np.log1p(np.exp(params["dt_proj.bias"]))
memory = 1 / (steps[:, None] * np.exp(params["A_log"]))
for s, color in [(0, "tab:blue"), (3, "tab:green"), (15, "tab:orange")]:
    times.hist(memory[:, s], bins=np.geomspace(0.5, 1000, 30), color=color, alpha=0.6, label=f"A = −{s + 1}")
times.set(xscale="log", xlabel="memory 1 / (Δ |A|), steps", ylabel="channels", title="time scales")
times.legend()

rng = np.random.default_rng(0)
x = rng.standard_normal((n, d_model))
for name, changed in [("as initialised", params), ("dt_proj.bias = 0", params | {"dt_proj.bias": 0 * steps})]:
    moved = x.copy()
    moved[100] += 1e-3 * rng.standard_normal(d_model)
    change = np.linalg.norm(subquad.mamba(moved, changed) - subquad.mamba(x, changed), axis=-1)
    reach.plot(np.arange(n) - 100, change / change.max(), label=name)
reach.set(
    xlim=(-5, 150), yscale="log", ylim=(1e-6, 2), xlabel="steps after a change of x", title="change of the output"
)
reach.legend()
