"""Synthetic tasks that tell sequence operators apart: selective copying and induction heads, as NumPy arrays.

Both ask a model to choose by content what it remembers. An operator with a fixed kernel cannot choose.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from subquad.core.checks import check_count

Tokens = np.ndarray[Any, np.dtype[np.int64]]

NOISE, COPY, FIRST = 0, 1, 2  # of selective copying: the noise, the call for a copy, the first of the data tokens


def selective_copying(
    rng: np.random.Generator | int, /, *, batch: int = 1, n: int = 256, tokens: int = 16, vocabulary: int = 16
) -> tuple[Tokens, Tokens]:
    """Draw sequences whose data tokens stand at random places among noise and are to be repeated in order.

    Parameters
    ----------
    rng : numpy.random.Generator or int
        The generator to draw from, or a seed of a new one.
    batch : int, default 1
        Number of sequences.
    n : int, default 256
        Places among which the data tokens are spread, at least `tokens`.
    tokens : int, default 16
        Data tokens of a sequence.
    vocabulary : int, default 16
        Number of different tokens, at least 3: 0 is noise, 1 asks for a copy, the data tokens are 2 … vocabulary − 1.

    Returns
    -------
    inputs : numpy.ndarray, shape (batch, n + tokens), int64
        `n` places with the data tokens among noise, then `tokens` times the token 1.
    targets : numpy.ndarray, shape (batch, tokens), int64
        The data tokens in order, which a model should give at the last `tokens` places.

    Raises
    ------
    TypeError
        If `rng` is neither a generator nor an integer, or a size is no integer.
    ValueError
        If a size is too small.

    See Also
    --------
    induction_heads : Recall what followed a token.

    Notes
    -----
    A guess has an accuracy of 1 / (vocabulary − 2). The distances between data tokens vary, which a convolution with
    one kernel cannot follow [1]_. There, n = 4096 and 16 tokens are used.

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 4.1.1.

    Examples
    --------
    >>> import subquad.tasks
    >>> inputs, targets = subquad.tasks.selective_copying(0, n=8, tokens=3)
    >>> inputs.shape, targets.shape
    ((1, 11), (1, 3))
    >>> bool((inputs[inputs > 1] == targets[0]).all())
    True
    """
    generator = _generator(rng)
    batch, n, tokens = check_count("batch", batch), check_count("n", n), check_count("tokens", tokens)
    vocabulary = check_count("vocabulary", vocabulary)
    if vocabulary <= FIRST:
        msg = f"vocabulary is {vocabulary}, expected at least {FIRST + 1}: noise, the call for a copy, and data"
        raise ValueError(msg)
    if tokens > n:
        msg = f"tokens is {tokens}, expected at most n = {n}: each data token needs a place"
        raise ValueError(msg)
    targets = generator.integers(FIRST, vocabulary, (batch, tokens))
    places = np.sort(np.argsort(generator.random((batch, n)), axis=1)[:, :tokens], axis=1)
    inputs = np.full((batch, n + tokens), NOISE, np.int64)
    np.put_along_axis(inputs, places, targets, axis=1)
    inputs[:, n:] = COPY
    return inputs, targets


def induction_heads(
    rng: np.random.Generator | int, /, *, batch: int = 1, n: int = 256, vocabulary: int = 16
) -> tuple[Tokens, Tokens]:
    """Draw sequences that end with a special token, whose successor at its first occurrence is to be recalled.

    Parameters
    ----------
    rng : numpy.random.Generator or int
        The generator to draw from, or a seed of a new one.
    batch : int, default 1
        Number of sequences.
    n : int, default 256
        Length of a sequence, at least 3.
    vocabulary : int, default 16
        Number of different tokens, at least 2: 0 is the special token, all others are drawn evenly.

    Returns
    -------
    inputs : numpy.ndarray, shape (batch, n), int64
        Random tokens, with the special token at one random place before the last two, and at the last place.
    targets : numpy.ndarray, shape (batch,), int64
        The token after the first special token, which a model should give at the last place.

    Raises
    ------
    TypeError
        If `rng` is neither a generator nor an integer, or a size is no integer.
    ValueError
        If a size is too small.

    See Also
    --------
    selective_copying : Repeat the tokens that are no noise.

    Notes
    -----
    A guess has an accuracy of 1 / (vocabulary − 1). A model trained on one length may be asked at any other [1]_: n is
    256 in training there, and 64 to 1 048 576 in tests.

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 4.1.2.

    Examples
    --------
    >>> import subquad.tasks
    >>> inputs, targets = subquad.tasks.induction_heads(0, n=8)
    >>> first = int((inputs[0] == 0).argmax())
    >>> bool(inputs[0, first + 1] == targets[0]), int(inputs[0, -1])
    (True, 0)
    """
    generator = _generator(rng)
    batch, n, vocabulary = check_count("batch", batch), check_count("n", n), check_count("vocabulary", vocabulary)
    for name, size, least in (("n", n, 3), ("vocabulary", vocabulary, 2)):
        if size < least:
            msg = f"{name} is {size}, expected at least {least}"
            raise ValueError(msg)
    inputs = generator.integers(1, vocabulary, (batch, n))
    places = generator.integers(0, n - 2, (batch, 1))
    targets = np.take_along_axis(inputs, places + 1, axis=1)[:, 0]
    np.put_along_axis(inputs, places, 0, axis=1)
    inputs[:, -1] = 0
    return inputs, targets


def _generator(rng: Any) -> np.random.Generator:
    """`rng`, or a new generator of the seed `rng`."""
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, bool) or not isinstance(rng, int | np.integer):
        msg = f"rng is of type {type(rng).__name__}, expected a numpy.random.Generator or an integer seed"
        raise TypeError(msg)
    return np.random.default_rng(int(rng))
