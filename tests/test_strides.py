"""Arrays of any strides: compiled kernels read them in place or through a copy, and it makes no difference to a bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows import kernels
from rows.kernels import Example
from rows.libraries import NumPy

pytest.importorskip("llvmlite")

from subquad_numpy.table import COMPILED

EXAMPLES: dict[str, Example] = {
    "hashed_attention": kernels.hashed_attention("causal avoid", (2, 40), (2, 50)),
    "block_attention": kernels.block_attention("lists items", (2, 40), (2, 50)),
    "sampled_attention": kernels.sampled_attention("items", (2, 40), (2, 150)),
    "sampled_errors": kernels.sampled_errors("rows", (2, 40), (2, 40)),
    "clustered_attention": kernels.clustered_attention("prefix groups near before", (2, 40), (2, 64)),
    "cluster_members": kernels.cluster_members(2, 40, size=8),
    "cluster_spread": kernels.cluster_spread(2, 40, size=8),
    "nearest": kernels.nearest("values", (2, 40), (2, 7), values=(2, 40)),
    "balanced_tree": kernels.balanced_tree(2, 40, size=8),
    "hashed_order": kernels.hashed_order("two", (2, 40), second=4),
    "softmax_attention": kernels.softmax_attention("plain", (2, 40), (2, 550)),
    "feature_attend": kernels.features("feature_attend", "exponential", ((2, 40),), (2,)),
    "feature_step": kernels.features("feature_step", "exponential", 3 * ((2, 40),), (2,)),
    "feature_summarize": kernels.features("feature_summarize", "exponential", 2 * ((2, 40),), (2,)),
    "feature_whole": kernels.features("feature_whole", "exponential", 3 * ((2, 40),), None),
    "landmark_attention": kernels.landmark_attention("plain", (2, 40), (2, 50), 7),
}


def strided(x: Any) -> Any:
    """The same numbers, of which those of a row are not side by side."""
    return x if x is None or x.ndim < 2 else np.ascontiguousarray(np.swapaxes(x, -1, -2)).swapaxes(-1, -2)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("saves", [False, True])
def test_arrays_of_any_strides_are_read(name: str, saves: bool) -> None:
    """Planned for such arrays, a call of several items gives the bits of contiguous ones."""
    example = EXAMPLES[name]
    arrays, static = example.given(NumPy(), "float32")
    arrays = [*arrays, None] if "key_mask" in example.options else arrays
    forward = COMPILED[name].forward
    expected, _ = forward(arrays, static, save=saves)
    found, _ = forward([strided(x) for x in arrays], static, save=saves)
    one_by_one = [forward([strided(x) if i == j else x for j, x in enumerate(arrays)], static, save=saves)[0]
                  for i, x in enumerate(arrays) if x is not None]  # fmt: skip
    for outputs in (found, *one_by_one):
        assert all(np.array_equal(x, y, equal_nan=True) for x, y in zip(outputs, expected, strict=True))


STRAIGHT: dict[str, tuple[Example, tuple[int, ...]]] = {  # and the places of arrays that are copied if they are strided
    "feature_attend": (EXAMPLES["feature_attend"], (0, 2)),
    "feature_step": (EXAMPLES["feature_step"], (0, 1, 2, 4)),
    "feature_summarize": (kernels.features("feature_summarize", "exponential", 2 * ((2, 40),), None), (0, 1)),
    "feature_whole": (EXAMPLES["feature_whole"], (0, 1, 2)),
    "landmark_attention": (EXAMPLES["landmark_attention"], (0, 1, 2)),
    "softmax_attention": (kernels.softmax_attention("few keys", (2, 40), (2, 20)), (0, 2)),
    "linear_scan": (kernels.linear_scan("plain", 40), (0, 1)),
}


@pytest.mark.parametrize("name", STRAIGHT)
def test_memory_of_other_libraries_is_read_straight_where_nothing_is_copied(name: str) -> None:
    example, copied = STRAIGHT[name]
    arrays, static = example.given(NumPy(), "float32")
    arrays = [None if x is None else np.ascontiguousarray(x) for x in arrays]
    arrays = [*arrays, None] if "key_mask" in example.options else arrays

    def is_straight(arrays: list[Any]) -> bool:
        forward: Any = COMPILED[name].forward
        return getattr(forward.planned(arrays, static, False), "is_straight", False)

    assert is_straight(arrays)
    for place in copied:
        assert not is_straight([strided(x) if i == place else x for i, x in enumerate(arrays)])
