"""The kernel of a fixed model: its states, their sum, and what the rules of discretisation make of one decay."""

import matplotlib.pyplot as plt
import numpy as np

import subquad

figure, (kernel, rules) = plt.subplots(1, 2, figsize=(7.5, 2.6), width_ratios=[3, 2], layout="constrained")

n, d_state = 150, 6
impulse = np.zeros((n, 1))
impulse[0] = 1
A = (-0.5 + 1j * np.pi * np.arange(d_state))[None, :]
B, C = np.ones_like(A), np.random.default_rng(2).standard_normal((1, d_state, 2)) @ np.asarray([1, 1j])
delta = np.full(1, 0.03)
for s in range(d_state):
    alone = subquad.lti_scan(impulse, A[:, s : s + 1], B[:, :1], C[:, s : s + 1], delta=delta)
    kernel.plot(alone[:, 0], color="0.75", lw=1, label="one state" if s == 0 else None)
kernel.plot(subquad.lti_scan(impulse, A, B, C, delta=delta)[:, 0], color="tab:blue", label="K[i], all states")
kernel.set(xlabel="i", title="A = −½ + πi s: damped waves")
kernel.legend()

steps = np.geomspace(0.05, 5, 200)
for rule in ("zoh", "bilinear", "euler"):
    A_bar, _ = subquad.discretize(-np.ones((200, 1)), np.ones((200, 1)), steps, rule)
    rules.plot(steps, A_bar[:, 0], label=f'"{rule}"')
rules.axhline(-1, color="0.6", lw=0.8, ls=":")
rules.set(xlabel="Δ", title="Ā for A = −1", xscale="log", ylim=(-2.2, 1.1))
rules.legend()
