"""RWKV: how long a token keeps its weight, and what a state recalls of a key whose value changes."""

import matplotlib.pyplot as plt
import numpy as np

import subquad

figure, (weights, recall) = plt.subplots(1, 2, figsize=(7.5, 2.6), layout="constrained")

n = 100
impulse = np.zeros((1, n, 1))
impulse[0, 10] = 1
one, u = np.ones((1, n, 1)), np.ones((1, 1))
for rate in (0.01, 0.05):
    k = np.zeros((n, 1))
    o = subquad.wkv(np.full((n, 1), 100.0), k, impulse[0], np.full(1, -rate), version=4, u=np.zeros(1))
    weights.plot(o[:, 0], color="tab:blue", alpha=0.4 + 8 * rate, label=f"4, w = −{rate}")
w = np.full((1, n, 1), -0.01)
w[0, 60] = -np.inf
weights.plot(subquad.wkv(one, one, impulse, w, version=6, u=u)[0, :, 0] / 10, color="tab:orange", label="6, w chosen")
weights.set(xlabel="t", ylabel="weight of token 10", title="what is forgotten")
weights.set_ylim(0, 0.12)
weights.legend()

d = 8
rng = np.random.default_rng(0)
keys = np.linalg.qr(rng.standard_normal((d, d)))[0]
k = keys[rng.integers(1, d, n)][None]
v = rng.standard_normal((1, n, 1))
k[0, ::20], v[0, ::20, 0] = keys[0], 1 + np.arange(n // 20)
r = np.broadcast_to(keys[0], k.shape)
still = np.zeros_like(k)
added = subquad.wkv(r, k, v, still, version=6, u=np.ones((1, d)))
replaced = subquad.wkv(r, k, v, still, version=7, a=-k, b=k)
recall.step(np.arange(n), added[0, :, 0], where="post", color="tab:orange", label="6")
recall.step(np.arange(n), replaced[0, :, 0], where="post", color="tab:green", label="7, removal key k")
recall.set(xlabel="t", ylabel="value recalled", title="a key with a new value every 20 steps")
recall.legend()
