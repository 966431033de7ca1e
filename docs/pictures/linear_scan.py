"""The linear recurrence as a filter: smoothing, a fresh start, and the frequencies that three factors let through."""

import matplotlib.pyplot as plt
import numpy as np

import subquad

figure, (smoothing, response) = plt.subplots(1, 2, figsize=(7.5, 2.6), width_ratios=[3, 2], layout="constrained")

n = 200
x = np.where(np.arange(n) < 100, 0.0, 1.5) + 0.4 * np.random.default_rng(0).standard_normal(n)


def smooth(a):
    """h[t] = a[t] h[t−1] + (1 − a[t]) x[t], one channel."""
    return subquad.linear_scan(a[:, None], ((1 - a) * x)[:, None])[:, 0]


a = np.full(n, 0.95)
again = a.copy()
again[100] = 0
smoothing.plot(x, ".", ms=3, color="0.6", label="x[t]")
smoothing.plot(smooth(a), color="tab:blue", label="a = 0.95")
smoothing.plot(smooth(again), "--", color="tab:orange", label="and a[100] = 0")
smoothing.set(xlabel="t", ylabel="h[t]", title="b = (1 − a) x")
smoothing.legend()

impulse = np.zeros((4096, 1))
impulse[0] = 1
for a, label in [(0.8, "0.8"), (0.95, "0.95"), (0.95 * np.exp(0.25j * np.pi), r"0.95 $e^{i\pi/4}$")]:
    h = subquad.linear_scan(np.full_like(impulse, a, dtype=complex), (1 - abs(a)) * impulse)[:, 0]
    frequency = np.fft.fftshift(np.fft.fftfreq(len(h)))
    response.plot(frequency, np.abs(np.fft.fftshift(np.fft.fft(h))), label=f"a = {label}")
response.set(xlabel="frequency, cycles per step", ylabel="gain", title="constant a: what passes", ylim=(0, 1.45))
response.legend(ncols=1, loc="upper left")
