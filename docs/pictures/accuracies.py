"""What the pictures of the synthetic tasks share: accuracy by length, from the JSON beside the tutorial."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

FILE = Path(__file__).parents[1] / "tutorials" / "synthetic_tasks.json"
STYLES = {
    "selective scan": ("tab:blue", "o-"),
    "gated linear attention": ("tab:green", "s-"),
    "exact": ("0.3", "^-"),
    "fixed scan": ("tab:red", "x-"),
}


def draw(task, chance):
    """One line for each operator."""
    facts = json.loads(FILE.read_text())
    figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
    for row in facts["results"]:
        if row["task"] == task:
            colour, style = STYLES[row["operator"]]
            lengths = [int(n) for n in row["accuracy"]]
            axes.plot(lengths, list(row["accuracy"].values()), style, color=colour, label=row["operator"])
    axes.axvline(facts["trained"], color="0.7", linestyle=":", label="length in training")
    axes.axhline(chance, color="0.7", linestyle="--", label="a guess")
    axes.set(xscale="log", xlabel="n", ylabel="accuracy", title=task, ylim=(0, 1.03))
    axes.set_xticks(lengths, map(str, lengths), minor=False)
    axes.minorticks_off()
    figure.legend(loc="outside right center", frameon=False)
    return figure
