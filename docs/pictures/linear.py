"""The feature map of linear attention, and its matrix of weights beside that of the softmax."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from sample import load

import subquad

N = 96
q, k, _ = (x[0] for x in load(N))
one = np.eye(N)  # with v = 1 the output is the matrix of weights

figure, (curve, *images) = plt.subplots(1, 3, figsize=(7.5, 2.6), layout="constrained")
x = np.linspace(-4, 2.2, 200)
curve.plot(x, np.where(x > 0, x + 1, np.exp(x)), label="elu(x) + 1")
curve.plot(x, np.exp(x), ":", color="0.5", label="exp(x)")
curve.set(xlabel="x, one channel of a query or key", title="feature map φ", ylim=(0, 5), box_aspect=1)
curve.legend()
for axis, method, title in zip(images, ["linear", "exact"], ["linear", "exact: another layer"], strict=True):
    shown = axis.imshow(subquad.attention(q, k, one, method), norm=LogNorm(1e-3, 0.3), cmap="magma_r")
    axis.set(title=title, xlabel="key j")
    axis.spines[:].set_visible(False)
images[0].set_ylabel("query i")
figure.colorbar(shown, ax=images, label="weight", extend="both", pad=0.01, shrink=0.8)
