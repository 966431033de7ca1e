"""The three factors of Nyström attention, their product, and the exact matrix."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import PowerNorm
from sample import load

import subquad
from subquad.kernels.iterative_pinv import iterative_pinv

N, M = 96, 24
q, k, v = (x[0] for x in load(N))
nystrom = subquad.Nystrom(num_landmarks=M).with_landmarks(q, k)
q_land, k_land = nystrom.landmarks


def matrix(method, q, k):
    """With v = 1, the output of a method is its matrix of weights."""
    return subquad.attention(q, k, np.eye(len(k)), method)


exact = matrix("exact", q, k)
F, A, B = matrix("exact", q, k_land), matrix("exact", q_land, k_land), matrix("exact", q_land, k)
A_inverse = iterative_pinv(A, iterations=6)
product = matrix(nystrom, q, k)
assert np.allclose(product, F @ A_inverse @ B)
error = np.linalg.norm((product - exact) @ v) / np.linalg.norm(exact @ v)

weights = {"norm": PowerNorm(0.5, 0, np.quantile(exact, 0.995)), "cmap": "magma_r"}
spread = np.abs(A_inverse).max()
signed = {"vmin": -spread, "vmax": spread, "cmap": "RdBu"}
segments = np.arange(M + 1) * (N / M) - 0.5

figure, axes = plt.subplots(
    1, 5, figsize=(7.5, 2.2), width_ratios=[M, M, N, N, N], layout="constrained", gridspec_kw={"wspace": 0.08}
)
pictures = [
    (F, "F", weights),
    (A_inverse, "A⁺", signed),
    (B, "B", weights),
    (product, f"F A⁺ B: {100 * error:.0f} %", weights),
    (exact, "exact", weights),
]
for axis, (x, title, style) in zip(axes, pictures, strict=True):
    axis.imshow(x, **style)
    axis.set(title=title, xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
marked = {"length": 4, "width": 0.8, "color": "tab:blue"}
axes[0].set_yticks(segments, [""] * len(segments))
axes[0].tick_params(axis="y", **marked)
axes[2].set_xticks(segments, [""] * len(segments))
axes[2].tick_params(axis="x", **marked)
labels = [("query i", "k̃"), ("k̃", "q̃"), ("q̃", "key j"), ("query i", "key j"), ("query i", "key j")]
for axis, (down, across) in zip(axes, labels, strict=True):
    axis.set_xlabel(across)
    axis.set_ylabel(down, labelpad=2)
