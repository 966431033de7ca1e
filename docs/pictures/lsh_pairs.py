"""What attention by locality-sensitive hashing sees in one round and in four, and its error on the sample."""

import matplotlib.pyplot as plt
from seen import show_errors, show_pairs

import subquad

N = 96

figure, (one, four, errors) = plt.subplots(1, 3, figsize=(7.5, 2.2), layout="constrained")
show_pairs(one, subquad.LSH(bucket_size=8, num_rounds=1), N, "1 round")
show_pairs(four, subquad.LSH(bucket_size=8, num_rounds=4), N, "4 rounds")
one.set_ylabel("query i")
show_errors(
    errors,
    {
        f"{rounds} round{'s' * (rounds > 1)}": lambda n, rounds=rounds: subquad.LSH(num_rounds=rounds)
        for rounds in (1, 2, 4, 8)
    },
)
