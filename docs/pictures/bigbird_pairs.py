"""What BigBird attention sees, causal or not, and its error on the sample."""

import matplotlib.pyplot as plt
from seen import show_errors, show_pairs

import subquad

N = 96
method = subquad.BigBird(block_size=6, num_random_blocks=2)

figure, (both, causal, errors) = plt.subplots(1, 3, figsize=(7.5, 2.2), layout="constrained")
show_pairs(both, method, N, "both sides")
show_pairs(causal, method, N, "causal", causal=True)
both.set_ylabel("query i")
show_errors(
    errors,
    {
        "blocks of 16": lambda n: subquad.BigBird(block_size=16),
        "blocks of 32": lambda n: subquad.BigBird(block_size=32),
        "blocks of 64": lambda n: subquad.BigBird(block_size=64),
        "64, none random": lambda n: subquad.BigBird(block_size=64, num_random_blocks=0),
    },
)
