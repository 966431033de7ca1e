"""The two kinds of panels of the pictures of sparse methods: the pairs that a method sees, and its error against n."""

import numpy as np
from sample import load

import subquad
from subquad.cli.definitions import mean_of_values, relative_error

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
LENGTHS = (64, 128, 256, 512, 1024)


def show_pairs(axis, method, n, title, *, causal=False):
    """Weights above 0 of a trained head: v = 1, the identity, makes the output of any method its matrix."""
    q, k, _ = (x[0] for x in load(n))
    seen = subquad.attention(q, k, np.eye(n), method, causal=causal) > 0
    axis.imshow(seen, cmap="Blues", vmin=0, vmax=1.3)
    share = 100 * seen.sum() / (n * (n + 1) / 2 if causal else n * n)
    axis.set(title=f"{title}: {share:.0f} %", xlabel="key j", xticks=[], yticks=[])
    axis.spines[:].set_color("0.8")
    axis.spines[:].set_visible(True)


def show_errors(axis, methods):
    """Relative errors in causal use, of all three heads together; `methods` maps a label to a method of n tokens."""
    found, means = {label: [] for label in methods}, []
    for n in LENGTHS:
        q, k, v = load(n)
        exact = subquad.attention(q, k, v, "exact", causal=True)
        means.append(relative_error(mean_of_values(q, v, causal=True), exact))
        for label, method in methods.items():
            found[label].append(relative_error(subquad.attention(q, k, v, method(n), causal=True), exact))
    axis.plot(LENGTHS, means, ":", color="0.4", label="mean of v")
    for (label, errors), colour in zip(found.items(), COLOURS, strict=False):
        errors = [error if error > 1e-9 else np.nan for error in errors]  # what sees all keys is exact
        axis.plot(LENGTHS, errors, "o-", color=colour, markersize=3.5, linewidth=1.2, label=label)
    axis.set(xscale="log", ylim=(0, 1.3), xlabel="n", title="error, causal")
    axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    axis.minorticks_off()
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0.2)
