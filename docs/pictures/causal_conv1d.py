"""Four taps over a signal: differences find edges, means smooth; and silu, which follows the sum."""

import matplotlib.pyplot as plt
import numpy as np

import subquad

figure, (signal, response) = plt.subplots(1, 2, figsize=(7.5, 2.6), width_ratios=[3, 2], layout="constrained")

n = 80
x = np.where((np.arange(n) > 20) & (np.arange(n) < 50), 1.0, 0.0) + 0.1 * np.random.default_rng(0).standard_normal(n)
weight = np.asarray([[0.25, 0.25, 0.25, 0.25], [-0.5, -0.5, 0.5, 0.5]])
y = subquad.causal_conv1d(np.stack([x, x], axis=1), weight)
signal.plot(x, ".", ms=3, color="0.6", label="x[t]")
signal.plot(y[:, 0], color="tab:blue", label="taps ¼, ¼, ¼, ¼")
signal.plot(y[:, 1], color="tab:orange", label="taps −½, −½, ½, ½")
signal.set(xlabel="t", title="two channels with taps of their own")
signal.legend()

s = np.linspace(-5, 5, 200)
for activation, label in [(None, "None"), ("silu", '"silu"')]:
    out = subquad.causal_conv1d(s[:, None], np.ones((1, 1)), activation=activation)
    response.plot(s, out[:, 0], label=f"activation={label}")
response.set(xlabel="bias + Σ taps · inputs", title="what follows the sum", ylim=(-2, 5))
response.legend()
