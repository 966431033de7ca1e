"""Structured state-space duality: the scan of one head as a matrix, and how its heads forget."""

import matplotlib.pyplot as plt
import numpy as np

import subquad

figure, (matrix, decay) = plt.subplots(1, 2, figsize=(7.5, 2.9), width_ratios=[1, 1.2], layout="constrained")

n, d_state = 60, 16
rng = np.random.default_rng(0)
B, C = 1 + 0.5 * rng.standard_normal((2, n, 1, d_state))
delta = np.where(np.arange(n) < n // 2, 0.03, 0.12)[:, None]
# x = e_s in channel s: y[t, s] is the weight of step s in step t
weights = subquad.ssd(np.eye(n)[:, None, :] / delta[:, :, None], delta, np.asarray([-1.0]), B, C)[:, 0, :]
image = matrix.imshow(np.abs(weights), cmap="Blues")
matrix.set(xlabel="step s of x", ylabel="step t of y", title="the scan as a matrix")
figure.colorbar(image, ax=matrix, shrink=0.8)

impulse = np.zeros((150, 3, 1))
impulse[0] = 1
A = -np.asarray([1.0, 4.0, 16.0])
one = np.ones((150, 1, 1))
left = subquad.ssd(impulse / 0.02, np.full((150, 3), 0.02), A, one, one)[:, :, 0]
for rate, curve in zip(A, left.T, strict=True):
    decay.plot(curve, label=f"A = {rate:g}")
decay.set(xlabel="steps since the input, Δ = 0.02", ylabel="what is left", title="one rate for each head")
decay.legend()
