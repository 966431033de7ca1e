"""Attention matrices of FAVOR+ beside the exact one, for the logits of a trained head and for smaller ones."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm
from sample import load

import subquad

N, SIZES = 128, (64, 256, 4096)
ROWS = [
    ("logits as trained", 1 / 8, False),
    ("logits divided by 4", 1 / 32, False),
    ("and center=True", 1 / 32, True),
]
q, k, v = (x[0] for x in load(N))
one = np.eye(N)  # with v = 1 the output is the matrix of weights

figure, axes = plt.subplots(3, 4, figsize=(7.5, 5.4), sharex=True, sharey=True, layout="constrained")
for row, (name, scale, center) in zip(axes, ROWS, strict=True):
    exact = subquad.attention(q, k, one, "exact", scale=scale)
    matrices = {"exact": exact}
    for m in SIZES:
        matrices[f"m = {m}"] = subquad.attention(q, k, one, "favor", num_features=m, center=center, scale=scale)
    norm = PowerNorm(0.5, 0, np.quantile(exact, 0.998))
    for axis, (title, matrix) in zip(row, matrices.items(), strict=True):
        error = np.linalg.norm(matrix @ v - exact @ v) / np.linalg.norm(exact @ v)
        axis.set_title(title if title == "exact" else f"{title}: {100 * error:.0f} %")
        shown = axis.imshow(matrix, norm=norm, cmap="magma_r")
        axis.set(xticks=[0, 50, 100], yticks=[0, 50, 100])
        axis.spines[:].set_visible(False)
    row[0].set_ylabel(f"{name}\n\nquery i")
    figure.colorbar(shown, ax=row, label="weight", extend="max", pad=0.01)
for axis in axes[-1]:
    axis.set_xlabel("key j")
