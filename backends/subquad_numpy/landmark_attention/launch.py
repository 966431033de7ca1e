"""Nyström attention as launches: those of `long`, but for the small matrices between, which are plain operations.

A program may be kept and run by another process, so that no kernel is given the address of another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from array_api_compat import array_namespace

from subquad.backend import Array
from subquad.core.dtypes import cast, compute_dtype
from subquad.kernels.landmark_attention import landmark_weights
from subquad_numpy.block_attention import launch as block_attention
from subquad_numpy.block_attention.whole import launch_joined
from subquad_numpy.features.launch import launch_softmax
from subquad_numpy.iterative_pinv import launch as iterative_pinv
from subquad_numpy.landmark_attention.long import by_segments
from subquad_numpy.runtime.launch import Run
from subquad_numpy.segment_means.launch import launch_means


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The output of the kernel `landmark_attention`, by four launches, or five if keys are in chunks.

    Half precision is converted to float32.
    """
    scale, xp = static["scale"], array_namespace(arrays[0])
    compute = compute_dtype(xp, *arrays)
    q, k, v = (cast(xp, x, compute) for x in arrays)
    q_land = launch_means(q, static["m"], run, finite=True)
    given, options, chunks = by_segments(q_land, k, v, scale)
    at_landmarks, levels, k_land = block_attention.launch(given, options, run)
    if chunks > 1:
        at_landmarks, _ = launch_joined(at_landmarks, levels, run)
    a = landmark_weights(xp, q_land, k_land, scale)
    (inverse,) = iterative_pinv.launch((a,), static, run)
    (out,) = launch_softmax((q, k_land, inverse @ at_landmarks, None), {"scale": scale}, run)
    return (cast(xp, out, arrays[0].dtype),)
