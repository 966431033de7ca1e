"""Matrices of weights of Linformer attention with means; a "linformer.py" would hide the package of that name."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm
from sample import load

import subquad

N = 96
q, k, v = (x[0] for x in load(N))
one = np.eye(N)  # with v = 1 the output is the matrix of weights
exact = subquad.attention(q, k, one, "exact")
norm = PowerNorm(0.5, 0, np.quantile(exact, 0.995))

figure, axes = plt.subplots(1, 4, figsize=(7.5, 2.2), layout="constrained")
axes[0].imshow(exact, norm=norm, cmap="magma_r")
axes[0].set(title="exact", ylabel="query i")
for axis, rank in zip(axes[1:], (48, 24, 8), strict=True):
    weights = subquad.attention(q, k, one, "linformer", rank=rank)
    error = np.linalg.norm((weights - exact) @ v) / np.linalg.norm(exact @ v)
    axis.imshow(weights, norm=norm, cmap="magma_r")
    axis.set(title=f"m = {rank}: {100 * error:.0f} %")
for axis in axes:
    axis.set(xlabel="key j", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
