"""Accuracy of induction heads by length."""

from accuracies import draw

draw("induction heads", 1 / 15)
