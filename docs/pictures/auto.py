"""Errors of the rungs of "auto" on three trained heads: of the whole output, and estimated; what is chosen."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
from sample import load

import subquad

N, TOLERANCE = 1024, 0.1
q, k, v = load(N)
rungs = subquad.Auto().rungs[:-1]
if not rungs:  # there is no method "clustered"
    rungs = tuple(subquad.Window(left=2**i, right=2**i) for i in range(3, 10))
exact = subquad.attention(q, k, v, "exact")
errors, estimates = [], []
warnings.simplefilter("ignore", subquad.PoorApproximation)  # the first rungs are as poor as they look
for method in rungs:
    out = method(q, k, v)
    errors.append(np.linalg.norm(out - exact, axis=(-2, -1)) / np.linalg.norm(exact, axis=(-2, -1)))
    estimates.append(subquad.estimate_error(method, q, k, v, rows=256))
errors = np.array(errors)
middle, spread = (np.array([getattr(found, name) for found in estimates]) for name in ("error", "spread"))
auto = subquad.Auto(ladder=rungs, tolerance=TOLERANCE, crossover=1).with_choice(q, k, v)
choice = auto.choice  # one number, since the heads share keys

figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.75), sharey=True, layout="constrained")
place = np.arange(len(rungs))
name = "opened" if hasattr(rungs[0], "opened") else "left"
for head, axis in enumerate(axes):
    axis.axhline(TOLERANCE, color="0.6", linestyle="--", linewidth=1)
    axis.plot(place, errors[:, head], color="0.3", label="error of the whole output")
    axis.errorbar(place, middle[:, head], spread[:, head], fmt="o", markersize=4, label="estimate, 256 rows")
    if choice < len(rungs):  # else exact attention
        axis.axvline(choice, color="0.6", linewidth=6, alpha=0.3)
    axis.set(title=f"head {head + 1}", xlabel=name, yscale="log")
    axis.set_xticks(place, [getattr(method, name) for method in rungs])
axes[0].set_ylabel("relative error")
axes[0].legend(frameon=False, fontsize="small")
