"""The state of the delta rule as a memory: keys that share a state, and one key whose value changes."""

import matplotlib.pyplot as plt
import numpy as np

import subquad

figure, (recall, replace) = plt.subplots(1, 2, figsize=(7.5, 2.6), layout="constrained")

rng, d = np.random.default_rng(0), 32


def recalled(k, v, rounds):
    """Relative error of the values that the state tells for all its keys, and of a sum Σ k vᵀ."""
    many_k, many_v = (np.tile(x, (1, rounds, 1)) for x in (k, v))
    _, state = subquad.delta_rule(many_k, many_k, many_v, np.ones(many_k.shape[:-1]), return_state=True)
    sums = np.swapaxes(k, -1, -2) @ v
    return [np.sqrt(np.mean((k @ S - v) ** 2) / np.mean(v**2)) for S in (state, sums)]


counts = range(1, 65, 3)
errors = []
for n in counts:
    k, v = rng.standard_normal((2, 40, n, d))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    errors.append(recalled(k, v, 1) + recalled(k, v, 8)[:1])
once, sums, often = np.asarray(errors).T
recall.plot(counts, sums, color="0.5", label="sum Σ k vᵀ")
recall.plot(counts, once, color="tab:blue", label="delta rule")
recall.plot(counts, often, "--", color="tab:orange", label="delta rule, 8 passes")
recall.axvline(d, color="0.8", lw=0.8)
recall.set(xlabel="keys stored, d = 32", ylabel="error of their values", ylim=(0, 1.8))
recall.legend(fontsize="small", loc="upper left")

n = 40
values = np.sin(0.3 * np.arange(n))[:, None]
key = np.tile([[1.0, 0.0]], (n, 1))
for beta, color in [(1.0, "tab:blue"), (0.3, "tab:orange")]:
    told = subquad.delta_rule(key, key, values, np.full(n, beta), scale=1.0)[:, 0]
    replace.plot(told, color=color, label=f"delta rule, β = {beta:g}")
replace.plot(np.cumsum(values), color="0.5", label="sum Σ k vᵀ")
replace.plot(values, ".", ms=4, color="black", label="value stored")
replace.set(xlabel="t", ylabel="value told", ylim=(-1.5, 13))
replace.legend(ncols=2, fontsize="small", loc="upper center")
