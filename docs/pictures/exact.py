"""The attention matrix of three trained heads. v = 1, the identity, makes the output of any method its matrix."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from sample import load

import subquad

N = 96
q, k, _ = load(N)
weights = subquad.attention(q, k, np.eye(N), "exact", causal=True)

figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.75), sharey=True, layout="constrained")
for head, (axis, matrix) in enumerate(zip(axes, weights, strict=True)):
    shown = axis.imshow(np.where(matrix > 0, matrix, np.nan), norm=LogNorm(1e-4, 1), cmap="magma_r")
    axis.set(title=f"head {head + 1}", xlabel="key j")
    axis.spines[:].set_visible(False)
axes[0].set_ylabel("query i")
figure.colorbar(shown, ax=axes, label="weight of key j", extend="min", pad=0.01)
