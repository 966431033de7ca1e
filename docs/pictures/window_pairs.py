"""What sliding-window attention sees, and its error on the sample, with and without the first tokens as global keys."""

import matplotlib.pyplot as plt
import numpy as np
from seen import show_errors, show_pairs

import subquad

N = 64
first = np.isin(np.arange(N), (0, 1, 40))

figure, (plain, with_global, errors) = plt.subplots(1, 3, figsize=(7.5, 2.2), layout="constrained")
show_pairs(plain, subquad.Window(left=8), N, "left = 8")
show_pairs(with_global, subquad.Window(left=8, global_mask=first), N, "and global keys")
plain.set_ylabel("query i")
show_errors(
    errors,
    {
        "left = 64": lambda n: subquad.Window(left=64),
        "left = 256": lambda n: subquad.Window(left=256),
        "64, 4 global": lambda n: subquad.Window(left=64, global_mask=np.arange(n) < 4),
        "256, 4 global": lambda n: subquad.Window(left=256, global_mask=np.arange(n) < 4),
    },
)
