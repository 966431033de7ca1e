"""Clusters of the keys of a trained head, one row of weights with two of them opened, and errors on the sample."""

import matplotlib.pyplot as plt
import numpy as np
from sample import load
from seen import show_errors

import subquad
from subquad.kernels import balanced_tree

N, SIZE = 128, 16
q, k, v = (x[0] for x in load(N))
q, k, v = q, k[4:], v[4:]  # without the sinks, which lie far from all others
count = len(k)

figure, (plane, row, errors) = plt.subplots(1, 3, figsize=(7.5, 2.2), layout="constrained")

order = balanced_tree(k, np.random.default_rng(0).standard_normal((k.shape[1], 32)), size=SIZE)[:count]
x, y = np.linalg.svd(k - k.mean(axis=0), full_matrices=False)[2][:2] @ (k - k.mean(axis=0)).T
for c in range(0, count, SIZE):
    own = order[c : c + SIZE]
    (dots,) = plane.plot(x[own], y[own], ".", markersize=3)
    plane.plot(x[own].mean(), y[own].mean(), "o", markersize=7, fillstyle="none", color=dots.get_color())
plane.set(title="keys, by cluster", xticks=[], yticks=[], xlabel="first two components")

method = subquad.Clustered(cluster_size=SIZE, opened=2, window=0, sinks=0)
exact, found = (subquad.attention(q[-1:], k, np.eye(count), name)[0] for name in ("exact", method))
place = np.argsort(-exact)
row.plot(exact[place], color="0.6", linewidth=3, label="exact")
row.plot(found[place], ".", color="#D55E00", markersize=3, label="2 opened")
row.set(title="weights of a row", xlabel="key, by weight", yscale="log")
row.legend(fontsize=7)

show_errors(
    errors, {f"{opened} opened": lambda n, opened=opened: subquad.Clustered(opened=opened, chunk=64)
             for opened in (0, 4, 16)},
)  # fmt: skip
errors.set(yscale="log", ylim=(1e-3, 2))
