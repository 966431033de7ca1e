"""What the step size does: how fast an impulse fades, and which samples of a noisy input the state takes in."""

import matplotlib.pyplot as plt
import numpy as np

import subquad

figure, (fading, choosing) = plt.subplots(1, 2, figsize=(7.5, 2.6), width_ratios=[2, 3], layout="constrained")

# one channel, one state variable, A = −1, B = C = 1
n = 60
one, A = np.ones((n, 1)), np.array([[-1.0]])
impulse = np.zeros((n, 1))
impulse[5] = 1
for delta in (1.0, 0.3, 0.1, 0.03):
    y = subquad.selective_scan(impulse / delta, delta * one, A, one, one)
    fading.plot(y, drawstyle="steps-post", label=f"Δ = {delta:g}")
fading.set(xlabel="t", ylabel="y[t]", title="an impulse at t = 5, Δ constant")
fading.legend()

rng = np.random.default_rng(1)
n = 120
one = np.ones((n, 1))
u = np.repeat([1.0, -1.0, 0.5], 40)[:, None] + 0.5 * rng.standard_normal((n, 1))
taken = np.arange(n) % 40 // 20 == 0
delta = np.where(taken, 0.2, 0.0)[:, None]
y = subquad.selective_scan(u, delta, A, one, one)
for start in (0, 40, 80):
    label = None if start else "Δ = 0.2, elsewhere 0"
    choosing.axvspan(start, start + 20, color="tab:orange", alpha=0.25, lw=0, label=label)
choosing.plot(u, ".", ms=3, color="0.6", label="u[t]")
choosing.plot(y, drawstyle="steps-post", label="y[t]")
choosing.set(xlabel="t", title="Δ chooses what is remembered", ylim=(-2.2, 3.4))
choosing.legend(loc="upper center", ncols=3)
