"""Random projections as values: drawn on the host by NumPy in float64, so that every library gets equal numbers.

    ω_r = ‖g_r‖ o_r,    o_r unit and orthogonal within blocks of d rows,    ‖g_r‖ ~ χ(d),    so E‖ω_r‖² = d

Two projections differ from this formula. "iid" is Gaussian. "hadamard" has blocks of p rows, where p is the smallest
power of two ≥ d, cut to d columns; if p > d, rows are neither orthogonal nor of length ‖g_r‖, but E‖ω_r‖² = d holds.

Block b of a projection comes from the seed sequence (seed, b) and a named bit generator, so that the first rows do not
change when m grows. The cache holds NumPy arrays, which are read-only.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from subquad.core.checks import check_choice, check_count, check_seed

Host = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

PROJECTIONS = ("orthogonal", "hadamard", "givens", "iid")


def draw_omega(projection: str, m: int, d: int, seed: int) -> Host:
    """Draw m random directions ω for d channels, as rows with E‖ω_r‖² = d.

        ω_r = ‖g_r‖ o_r,    ‖o_r‖ = 1,    ‖g_r‖ ~ χ(d)

    Parameters
    ----------
    projection : {"orthogonal", "hadamard", "givens", "iid"}
        How the directions o_r are drawn:

        - "orthogonal": Haar's distribution, from the QR decomposition of a Gaussian matrix with corrected signs;
          orthogonal within blocks of d rows;
        - "hadamard": H D₁ H D₂ H D₃, with random signs D. If d is not a power of two, blocks have the size of the next
          power of two and are cut to d columns; their rows are then not orthogonal;
        - "givens": d ⌈2 log₂ d⌉ / 2 random plane rotations; orthogonal within blocks of d rows;
        - "iid": Gaussian rows, which are not orthogonal.
    m, d : int
        Number of directions and number of channels, both at least 1.
    seed : int
        Seed, at least 0. The first rows do not change when m grows.

    Returns
    -------
    numpy.ndarray, shape (m, d), float64
        The directions ω_r as rows; the array is read-only.

    Raises
    ------
    TypeError
        If `m`, `d` or `seed` is not an integer.
    ValueError
        If `projection` is unknown, `m` or `d` is below 1, or `seed` is below 0.

    See Also
    --------
    subquad.Favor : The method that projects queries and keys on ω.

    References
    ----------
    .. [1] K. Choromanski et al., "Rethinking Attention with Performers", 2021, section 2.4.

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
    # ω of checked arguments, (m, d), read-only, as it is cached
    draw_block = {"orthogonal": _haar, "hadamard": _hadamard, "givens": _givens, "iid": _gaussian}[projection]
    blocks: list[Host] = []
    while sum(map(len, blocks)) < m:
        rng = generator(seed, len(blocks))
        blocks.append(draw_block(rng, d))
    omega = np.concatenate(blocks)[:m]
    omega.setflags(write=False)
    return omega


def draw_rows(first: int, stop: int, count: int, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """Numbers of `count` of the rows first … stop − 1, ascending, one of each of `count` equal strata; all if fewer."""
    return _draw_rows(int(first), int(stop), int(count), int(seed)).copy()


@functools.lru_cache(maxsize=16)
def _draw_rows(first: int, stop: int, count: int, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    # `draw_rows`, kept: to make a generator takes as long as all the rest of a short estimate
    edges = first + np.arange(min(count, stop - first) + 1) * (stop - first) // max(min(count, stop - first), 1)
    return generator(seed, first, stop).integers(edges[:-1], edges[1:]).astype(np.int32)


def generator(seed: int, *key: int) -> np.random.Generator:
    """The random generator of (seed, key); its bit generator is named, because NumPy's default may change."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def _gaussian(rng: np.random.Generator, d: int) -> Host:
    # A block of d Gaussian rows
    return rng.standard_normal((d, d))


def _chi_lengths(rng: np.random.Generator, count: int, d: int) -> Host:
    # `count` lengths with the χ distribution of d degrees of freedom, (count, 1)
    return np.linalg.norm(rng.standard_normal((count, d)), axis=-1, keepdims=True)


def _haar(rng: np.random.Generator, d: int) -> Host:
    # A block of d orthogonal rows with Haar's distribution, times χ(d) lengths
    q, r = np.linalg.qr(rng.standard_normal((d, d)))
    q *= np.where(np.diagonal(r) < 0, -1.0, 1.0)  # QR fixes the signs of r; without this the distribution is not Haar's
    return np.ascontiguousarray(q.T) * _chi_lengths(rng, d, d)


def _hadamard(rng: np.random.Generator, d: int) -> Host:
    # A block of p ≥ d rows of H D₁ H D₂ H D₃ times χ(p) lengths, cut to d columns
    p = 1 << max(d - 1, 0).bit_length()  # H exists for powers of two; of a cut row, E‖ω_r‖² = p · d / p = d
    h = np.ones((1, 1))
    while len(h) < p:
        h = np.block([[h, h], [h, -h]])
    h /= math.sqrt(p)
    product = np.eye(p)
    for _ in range(3):
        product = h @ (rng.choice([-1.0, 1.0], size=(p, 1)) * product)
    return product[:, :d] * _chi_lengths(rng, p, p)


def _givens(rng: np.random.Generator, d: int) -> Host:
    # A block of d orthogonal rows, the product of random plane rotations with random signs, times χ(d) lengths
    rotated = np.eye(d)
    for _ in range(math.ceil(2 * math.log2(d)) if d > 1 else 0):
        order = rng.permutation(d)
        first, second = order[: d // 2], order[d // 2 : 2 * (d // 2)]
        angle = rng.uniform(0, 2 * math.pi, size=(d // 2, 1))
        x, y = rotated[first], rotated[second]
        rotated[first] = np.cos(angle) * x - np.sin(angle) * y
        rotated[second] = np.sin(angle) * x + np.cos(angle) * y
    return rotated * rng.choice([-1.0, 1.0], size=(d, 1)) * _chi_lengths(rng, d, d)
