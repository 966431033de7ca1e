"""Random projections as values: drawn on the host in float64, the same on every backend.

    ω_r = ‖g_r‖ o_r,    o_r unit and orthogonal within blocks of d rows,    ‖g_r‖ ~ χ(d),    so E‖ω_r‖² = d

("iid" is Gaussian; "hadamard" has blocks of p rows, p the power of two from d on, cut to d columns where p > d: these
rows are neither of length ‖g_r‖ nor orthogonal one by one, but E‖ω_r‖² = d holds.)

Block b of a projection comes from the seed sequence (seed, b) and a named bit generator, so that the first rows
do not change when more are asked for. Only NumPy arrays are cached, and they are read-only.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from subquad.core.checks import check_choice, check_count, check_seed

Host = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

PROJECTIONS = ("orthogonal", "hadamard", "givens", "iid")


def draw_omega(projection: str, m: int, d: int, seed: int) -> Host:
    """Random directions ω: rows with E‖ω_r‖² = d, orthogonal in blocks of d, with exceptions named below.

    Parameters
    ----------
    projection : {"orthogonal", "hadamard", "givens", "iid"}
        "orthogonal": Haar, from the QR decomposition of a Gaussian matrix, signs corrected. "hadamard": H D₁ H D₂ H D₃
        with random signs; where d is not a power of two, blocks are of the next one's size, cut to d columns, and
        their rows not orthogonal. "givens": d ⌈2 log₂ d⌉ / 2 random plane rotations. "iid": Gaussian rows, not
        orthogonal.
    m, d : int
        Number of directions, and of channels.
    seed : int
        Not negative. The first rows do not change when m grows.

    Returns
    -------
    numpy.ndarray, shape (m, d), float64
        Read-only.

    Raises
    ------
    TypeError, ValueError
        For an unknown projection, sizes below 1, or a seed that is not an integer ≥ 0.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> omega = subquad.draw_omega("orthogonal", 3, 3, seed=0)
    >>> lengths = np.linalg.norm(omega, axis=1)
    >>> bool(np.allclose(omega @ omega.T, np.diag(lengths**2)))
    True
    """
    check_choice("projection", projection, PROJECTIONS)
    return _draw(projection, check_count("m", m), check_count("d", d), check_seed(seed))


@functools.lru_cache(maxsize=128)
def _draw(projection: str, m: int, d: int, seed: int) -> Host:
    draw_block = {"orthogonal": _haar, "hadamard": _hadamard, "givens": _givens, "iid": _gaussian}[projection]
    blocks: list[Host] = []
    while sum(map(len, blocks)) < m:
        rng = generator(seed, len(blocks))
        blocks.append(draw_block(rng, d))
    omega = np.concatenate(blocks)[:m]
    omega.setflags(write=False)
    return omega


def generator(seed: int, *key: int) -> np.random.Generator:
    """A generator of its own for every (seed, key); the bit generator is named because NumPy's default may change."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def _gaussian(rng: np.random.Generator, d: int) -> Host:
    return rng.standard_normal((d, d))


def _chi_lengths(rng: np.random.Generator, count: int, d: int) -> Host:
    return np.linalg.norm(rng.standard_normal((count, d)), axis=-1, keepdims=True)


def _haar(rng: np.random.Generator, d: int) -> Host:
    q, r = np.linalg.qr(rng.standard_normal((d, d)))
    q *= np.where(np.diagonal(r) < 0, -1.0, 1.0)  # without it the distribution is not Haar's
    return np.ascontiguousarray(q.T) * _chi_lengths(rng, d, d)


def _hadamard(rng: np.random.Generator, d: int) -> Host:
    p = 1 << max(d - 1, 0).bit_length()  # H exists for powers of two; a column cut keeps each ω_r Gaussian-like
    h = np.ones((1, 1))
    while len(h) < p:
        h = np.block([[h, h], [h, -h]])
    h /= math.sqrt(p)
    product = np.eye(p)
    for _ in range(3):
        product = h @ (rng.choice([-1.0, 1.0], size=(p, 1)) * product)
    return product[:, :d] * _chi_lengths(rng, p, p)


def _givens(rng: np.random.Generator, d: int) -> Host:
    rotated = np.eye(d)
    for _ in range(math.ceil(2 * math.log2(d)) if d > 1 else 0):
        order = rng.permutation(d)
        first, second = order[: d // 2], order[d // 2 : 2 * (d // 2)]
        angle = rng.uniform(0, 2 * math.pi, size=(d // 2, 1))
        x, y = rotated[first], rotated[second]
        rotated[first] = np.cos(angle) * x - np.sin(angle) * y
        rotated[second] = np.sin(angle) * x + np.cos(angle) * y
    return rotated * rng.choice([-1.0, 1.0], size=(d, 1)) * _chi_lengths(rng, d, d)
