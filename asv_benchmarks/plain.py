"""`python -m asv_benchmarks.plain`: the time of small calls beside that of the same formulas, written in plain calls.

A user's ten lines of NumPy or PyTorch have no checks, no choice and no layouts to care for, so they measure what stands
around the arithmetic of a short call. Both sides run in one process, in turn; a ratio is that of the medians.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import subquad
from asv_benchmarks.harness import interleave

Run = Callable[[], Any]
HEADS, N, D, FEATURES, LANDMARKS = 4, 64, 32, 256, 16
NEAR = 16  # keys of a window on each side, rows of a block, of a bucket and of a projection
STEPS = ("selective_scan_step", "Favor.step by omega", "Favor.step by seed")  # of NumPy
INNER, PAIRS = 20, 41  # calls of a sample; samples of each side


class Pair(NamedTuple):
    """A small call, and the same formula in plain calls of the library."""

    ours: Run
    plain: Run


def pairs(library: str) -> dict[str, Pair]:
    """The small calls of a library, "numpy" or "torch", by name."""
    if library == "numpy":
        return _attention(np, np.asarray, lambda x: x.max(-1, keepdims=True)) | _steps()
    import torch

    found = _attention(torch, torch.tensor, lambda x: x.amax(-1, keepdims=True))
    q, k, v = (torch.tensor(x) for x in _rows(HEADS, N, D))
    fused = torch.nn.functional.scaled_dot_product_attention
    return found | {"exact": Pair(lambda: subquad.attention(q, k, v, "exact"), lambda: fused(q, k, v))}


def ratio(pair: Pair) -> float:
    """The time of our call over that of the formula."""
    for run in (*pair, *pair, *pair):
        run()

    def sample(run: Run) -> Run:
        def several() -> None:
            for _ in range(INNER):
                run()  # drops what it returns: a program that decodes replaces one state by the next

        return several

    times = interleave({"ours": sample(pair.ours), "plain": sample(pair.plain)}, PAIRS)
    return statistics.median(times["ours"]) / statistics.median(times["plain"])


def _rows(heads: int, n: int, d: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((3, 1, heads, n, d), dtype=np.float32)


def _attention(xp: ModuleType, asarray: Callable[[Any], Any], largest: Callable[[Any], Any]) -> dict[str, Pair]:
    """Attention of (1, 4, 64, 32), float32, in functions that NumPy and PyTorch have alike."""
    q, k, v = map(asarray, _rows(HEADS, N, D))
    rng = np.random.default_rng(1)
    omega = asarray(rng.standard_normal((FEATURES, D), np.float32))
    omega_t, eye, root = omega.T, xp.eye(LANDMARKS, dtype=xp.float32), D**-0.25

    def softmax(x: Any) -> Any:
        x = xp.exp(x - largest(x))
        return x / x.sum(-1, keepdims=True)

    def read(a: Any, b: Any) -> Any:
        b_t = b.swapaxes(-1, -2)
        return (a @ (b_t @ v)) / (a @ b_t.sum(-1)[..., None])

    def exact() -> Any:
        return softmax((q * D**-0.5) @ k.swapaxes(-1, -2)) @ v

    def positive(x: Any) -> Any:
        x = x * root
        x = x @ omega_t - 0.5 * (x * x).sum(-1, keepdims=True)
        return xp.exp(x - x.max())

    def elu(x: Any) -> Any:
        return xp.where(x > 0, x + 1, xp.exp(x.clip(max=0)))

    def nystrom() -> Any:
        scaled = q * D**-0.5
        q_land, k_land = (x.reshape(1, HEADS, LANDMARKS, -1, D).mean(-2) for x in (scaled, k))
        k_land_t = k_land.swapaxes(-1, -2)
        a, b = softmax(q_land @ k_land_t), softmax(q_land @ k.swapaxes(-1, -2))
        z = a.swapaxes(-1, -2) / (a.sum(-1).max() * a.sum(-2).max())
        for _ in range(6):
            az = a @ z
            z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
        return softmax(scaled @ k_land_t) @ (z @ (b @ v))

    place = np.arange(N)
    near = asarray(abs(place[:, None] - place) <= NEAR)
    every, rotation = asarray(np.ones((N, N), np.bool_)), asarray(rng.standard_normal((1, D, 2), np.float32))
    E, F = (asarray(rng.standard_normal((NEAR, N), np.float32)) for _ in range(2))

    def masked(seen: Any) -> Any:
        return softmax(xp.where(seen, (q * D**-0.5) @ k.swapaxes(-1, -2), -np.inf)) @ v

    def chunks(x: Any) -> Any:  # of rows in the order of their buckets
        x = x @ rotation[0]
        order = xp.stack([x, -x], -1).reshape(*x.shape[:-1], 4).argmax(-1).argsort(-1)
        return order.argsort(-1) // NEAR

    def met() -> Any:
        behind = chunks(q)[..., :, None] - chunks(k)[..., None, :]
        return (behind == 0) | (behind == 1)

    methods = {
        "exact": (subquad.Exact(), exact),
        "favor": (subquad.Favor(omega=omega), lambda: read(positive(q), positive(k))),
        "linear": (subquad.Linear(), lambda: read(elu(q), elu(k))),
        "nystrom": (subquad.Nystrom(num_landmarks=LANDMARKS), nystrom),
        "window": (subquad.Window(left=NEAR), lambda: masked(near)),
        # of four blocks, the first and the last are global and the others near: every row sees all keys
        "bigbird": (subquad.BigBird(block_size=NEAR), lambda: masked(every)),
        "lsh": (subquad.LSH(bucket_size=NEAR, num_rounds=1, rotations=rotation), lambda: masked(met())),
        "linformer": (
            subquad.Linformer(projection=(E, F)),
            lambda: softmax((q * D**-0.5) @ (E @ k).swapaxes(-1, -2)) @ (F @ v),
        ),
    }
    return {
        name: Pair(lambda method=method: subquad.attention(q, k, v, method), plain)  # type: ignore[misc]
        for name, (method, plain) in methods.items()
    }


def _steps() -> dict[str, Pair]:
    """A step of a Mamba layer of 1536 channels and 16 states; a token of FAVOR+ with 8 heads and 256 features."""
    rng, channels, states, heads, d = np.random.default_rng(0), 1536, 16, 8, 64
    u = rng.standard_normal((1, channels), dtype=np.float32)
    delta, A = np.abs(u), -np.tile(np.arange(1, states + 1, dtype=np.float32), (channels, 1))
    B, C = rng.standard_normal((2, 1, states), dtype=np.float32)
    h = np.zeros((1, channels, states), np.float32)

    def scan() -> Any:
        after = np.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None]
        return (after * C[:, None]).sum(-1), after

    q, k, v = _rows(heads, 1, d)
    omega = rng.standard_normal((FEATURES, d)).astype(np.float32)
    kv, k_sum = np.zeros((1, heads, FEATURES, d), np.float32), np.zeros((1, heads, 1, FEATURES), np.float32)
    shift = np.full((1, heads, 1, 1), -1e3, np.float32)

    def token() -> Any:
        a, b = (x @ omega.T - 0.5 * (x * x).sum(-1, keepdims=True) for x in (q * d**-0.25, k * d**-0.25))
        largest = np.maximum(shift, b.max(-1, keepdims=True))
        fade, a, b = np.exp(shift - largest), np.exp(a - a.max(-1, keepdims=True)), np.exp(b - largest)
        sums, numerator = k_sum * fade + b, kv * fade + b.swapaxes(-1, -2) * v
        return (a @ numerator) / (a * sums).sum(-1, keepdims=True), numerator, sums, largest

    found = {"selective_scan_step": Pair(lambda: subquad.selective_scan_step(h, u, delta, A, B, C), scan)}
    for name, method in (("omega", subquad.Favor(omega=omega)), ("seed", subquad.Favor(num_features=FEATURES))):
        _, state = method.step(q, k, v)
        step = lambda method=method, state=state: method.step(q, k, v, state)  # noqa: E731
        found[f"Favor.step by {name}"] = Pair(step, token)
    return found


if __name__ == "__main__":
    for library in sys.argv[1:] or ["numpy", "torch"]:
        for name, pair in pairs(library).items():
            print(f"{library:6} {name:24} {ratio(pair):.2f}")
