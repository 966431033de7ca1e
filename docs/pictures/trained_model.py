"""Shares of the likeliest kinds of text over the letters of a text, from the JSON beside the tutorial."""

import json

import matplotlib.pyplot as plt
from accuracies import FILE

facts = json.loads(FILE.with_name("trained_model.json").read_text())
figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
for kind, shares in facts["shares"].items():
    axes.plot(shares, label=kind, linewidth=1)
for place, letter in enumerate(facts["text"]):
    if letter == "\n":
        axes.axvline(place, color="0.85", linewidth=0.7, zorder=0)
axes.set(xlabel="letter", ylabel="share", ylim=(0, 1.03), xlim=(0, len(facts["text"])))
figure.legend(loc="outside right center", frameon=False)
