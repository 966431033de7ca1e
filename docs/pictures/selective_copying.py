"""Accuracy of selective copying by length."""

from accuracies import draw

draw("selective copying", 1 / 14)
