"""The table of compiled kernels, a row each. LLVM is loaded at the first call of a kernel, not with this module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from subquad.backend import Accepts
from subquad_numpy.block_attention import calls as block_attention
from subquad_numpy.block_attention import hashed
from subquad_numpy.block_attention import launch as of_block_attention
from subquad_numpy.causal_conv1d import calls as causal_conv1d
from subquad_numpy.causal_conv1d import launch as of_causal_conv1d
from subquad_numpy.clustered import calls as clustered
from subquad_numpy.clustered import launch as of_clustered
from subquad_numpy.compiled import Compiled
from subquad_numpy.conditions import (
    REAL,
    converted,
    few_to_project,
    few_to_step,
    fused_features,
    intervals,
    rows_to_hash,
    small_matrices,
    some_centre,
    some_cluster,
    some_cluster_of_rows,
    some_key,
    some_number,
    some_row,
    some_step,
    stored,
)
from subquad_numpy.delta_scan import calls as delta_scan
from subquad_numpy.delta_scan import launch as of_delta_scan
from subquad_numpy.features import gradient_launches as launches
from subquad_numpy.features import gradient_runs as gradients
from subquad_numpy.features import launch as of_features
from subquad_numpy.features import softmax_calls, state_calls, step_calls
from subquad_numpy.features.whole_calls import of_one_task, whole
from subquad_numpy.hashed_order import calls as hashed_order
from subquad_numpy.hashed_order import launch as of_hashed_order
from subquad_numpy.iterative_pinv import calls as iterative_pinv
from subquad_numpy.iterative_pinv import launch as of_pinv
from subquad_numpy.landmark_attention import launch as of_landmarks
from subquad_numpy.landmark_attention.calls import landmark_attention, segments_of_rows
from subquad_numpy.linear_scan import calls as linear_scan
from subquad_numpy.linear_scan import launch as of_linear_scan
from subquad_numpy.lti_scan import calls as lti_scan
from subquad_numpy.lti_scan import launch as of_lti_scan
from subquad_numpy.mamba_step import calls as mamba_step
from subquad_numpy.mamba_step import launch as of_mamba_step
from subquad_numpy.nearest import calls as nearest
from subquad_numpy.nearest import launch as of_nearest
from subquad_numpy.needs import NEEDS
from subquad_numpy.outer_scan import calls as outer_scan
from subquad_numpy.outer_scan import launch as of_outer_scan
from subquad_numpy.project import calls as project
from subquad_numpy.project import launch as of_project
from subquad_numpy.runtime.stored import in_float32
from subquad_numpy.sampled_errors import calls as sampled_errors
from subquad_numpy.sampled_errors import launch as of_sampled_errors
from subquad_numpy.selective_scan import calls as selective_scan
from subquad_numpy.selective_scan import launch as of_selective_scan

COMPLEX = (*REAL, "complex64", "complex128")
HALF = ("float16", "bfloat16")


def _first(count: int) -> Callable[[int], bool]:
    # whether a place is one of the first ones: what comes after rows, states and weights, is read in float32
    return range(count).__contains__


_MASK = frozenset({"key_mask"})

COMPILED: dict[str, Compiled] = {
    record.kernel: record
    for record in (
        Compiled(
            "feature_summarize",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK, needs=NEEDS, also=fused_features),
            state_calls.summarize,
            in_float32(gradients.summarize_backward),
            of_features.launch_summarize,
            launches.launch_summarize_backward,
            broadcasts=True,
            as_stored=_first(2),
            launches_half=False,
            unaided=frozenset({0}),
        ),
        Compiled(
            "feature_attend",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, needs=NEEDS, also=fused_features),
            state_calls.attend,
            in_float32(gradients.attend_backward),
            of_features.launch_attend,
            launches.launch_attend_backward,
            broadcasts=True,
            as_stored=_first(1),
            launches_half=False,
        ),
        Compiled(
            "feature_step",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK, needs=NEEDS, also=fused_features),
            step_calls.step,
            in_float32(gradients.step_backward),
            of_features.launch_step,
            launches.launch_step_backward,
            broadcasts=True,
            as_stored=_first(3),
            launches_half=False,
            unaided=frozenset({1}),
            saves=True,
        ),
        Compiled(
            "feature_whole",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK, needs=NEEDS, also=of_one_task),
            whole,
            as_stored=_first(3),
        ),
        Compiled(
            "softmax_attention",
            Accepts(
                dtypes=(*HALF, *REAL),
                one_dtype=False,
                options=_MASK | {"visible"},
                needs=NEEDS,
                also=some_key,
            ),
            softmax_calls.softmax,
            gradients.softmax_backward,
            of_features.launch_softmax,
            launches.launch_softmax_backward,
            broadcasts=True,
            as_stored=_first(3),
            launches_half=False,
            saves=True,
        ),
        Compiled(
            "landmark_attention",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, needs=NEEDS, also=segments_of_rows),
            landmark_attention,
            launch=of_landmarks.launch,
            broadcasts=True,
            as_stored=_first(3),
        ),
        Compiled(
            "block_attention",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK | {"wide"}, needs=NEEDS, also=intervals),
            block_attention.block_attention,
            block_attention.block_attention_backward,
            of_block_attention.launch,
            of_block_attention.launch_backward,
            as_stored=_first(3),
        ),
        Compiled(
            "sampled_attention",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK, needs=NEEDS, also=intervals),
            block_attention.sampled_attention,
            launch=of_block_attention.launch_sampled,
            as_stored=_first(3),
        ),
        Compiled(
            "sampled_errors",
            Accepts(dtypes=REAL, needs=NEEDS, also=some_row),
            sampled_errors.sampled_errors,
            launch=of_sampled_errors.launch,
        ),
        Compiled(
            "hashed_attention",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK, needs=NEEDS, also=intervals),
            hashed.hashed_attention,
            hashed.hashed_attention_backward,
            of_block_attention.launch_hashed,
            of_block_attention.launch_hashed_backward,
            as_stored=_first(3),
        ),
        Compiled(
            "hashed_order",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK, needs=NEEDS, also=rows_to_hash),
            hashed_order.hashed_order,
            launch=of_hashed_order.launch,
            constant=True,
            as_stored=_first(1),
        ),
        Compiled(
            "nearest",
            Accepts(dtypes=REAL, options=_MASK, needs=NEEDS, also=some_centre),
            nearest.nearest,
            nearest.nearest_backward,
            of_nearest.launch,
            of_nearest.launch_backward,
            unaided=frozenset({0, 1}),
        ),
        Compiled(
            "balanced_tree",
            Accepts(dtypes=REAL, options=_MASK, needs=NEEDS, also=some_row),
            clustered.balanced_tree,
            launch=of_clustered.launch_tree,
            constant=True,
        ),
        *(
            Compiled(
                name,
                Accepts(
                    dtypes=(*HALF, *REAL), one_dtype=False, options=options, needs=NEEDS, also=some_cluster_of_rows
                ),
                forward,
                launch=partial(of_clustered.launch_summary, name),
                launches_half=False,
                as_stored=_first(1),
            )
            for name, forward, options in (
                ("cluster_members", clustered.cluster_members, frozenset({"turned"})),
                ("cluster_spread", clustered.cluster_spread, frozenset()),
            )
        ),
        Compiled(
            "clustered_attention",
            Accepts(
                dtypes=(*HALF, *REAL),
                one_dtype=False,
                options=frozenset({"always", "reach", "group", "expanded", "share"}),
                needs=NEEDS,
                also=some_cluster,
            ),
            clustered.clustered_attention,
            launch=of_clustered.launch,
            launches_half=False,
            as_stored=_first(1),
        ),
        Compiled(
            "selective_scan",
            Accepts(dtypes=("float16", "bfloat16", *COMPLEX), one_dtype=False, needs=NEEDS, also=converted),
            selective_scan.scan,
            in_float32(selective_scan.scan_backward),
            of_selective_scan.launch,
            of_selective_scan.launch_backward,
            saves=True,
            unread=frozenset({10, 11}),
            as_stored=frozenset({0, 1, 3, 4, 6}).__contains__,
        ),
        Compiled(
            "linear_scan",
            Accepts(dtypes=(*HALF, *COMPLEX), one_dtype=False, needs=NEEDS, also=stored),
            linear_scan.scan,
            linear_scan.scan_backward,
            of_linear_scan.launch,
            of_linear_scan.launch_backward,
            unread=frozenset({1}),
            as_stored=_first(2),
        ),
        Compiled(
            "delta_scan",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, needs=NEEDS, also=some_number),
            delta_scan.scan,
            delta_scan.scan_backward,
            of_delta_scan.launch,
            of_delta_scan.launch_backward,
            unread=frozenset({9, 10}),
            as_stored=_first(7),
        ),
        Compiled(
            "outer_scan",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, needs=NEEDS, also=some_step),
            outer_scan.scan,
            outer_scan.scan_backward,
            of_outer_scan.launch,
            of_outer_scan.launch_backward,
            unread=frozenset({9, 10}),
            as_stored=_first(5),
        ),
        Compiled(
            "gated_outer_scan",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, needs=NEEDS, also=some_step),
            outer_scan.scan,
            as_stored=frozenset({0, 1, 2, 3, 4, 9}).__contains__,
        ),
        Compiled(
            "project",
            Accepts(dtypes=("float16", "bfloat16", *REAL), one_dtype=False, needs=NEEDS, also=few_to_project),
            project.project,
            project.project_backward,
            of_project.launch,
            of_project.launch_backward,
            unread=frozenset({3}),
            as_stored=frozenset({1}).__contains__,
        ),
        Compiled(
            "mamba_step",
            Accepts(dtypes=("float16", "bfloat16", *REAL), one_dtype=False, needs=NEEDS, also=few_to_step),
            mamba_step.step,
            launch=of_mamba_step.launch,
            as_stored=mamba_step.is_matrix,
        ),
        Compiled(
            "causal_conv1d",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, needs=NEEDS, also=stored),
            causal_conv1d.conv,
            causal_conv1d.conv_backward,
            of_causal_conv1d.launch,
            of_causal_conv1d.launch_backward,
            unread=frozenset({5, 6}),
            as_stored=_first(1),
        ),
        Compiled(
            "lti_scan",
            Accepts(dtypes=(*HALF, *COMPLEX), one_dtype=False, needs=NEEDS, also=stored),
            lti_scan.scan,
            lti_scan.scan_backward,
            of_lti_scan.launch,
            of_lti_scan.launch_backward,
            unread=frozenset({8, 9}),
            as_stored=_first(1),
        ),
        Compiled(
            "iterative_pinv",
            Accepts(dtypes=REAL, needs=NEEDS, also=small_matrices),
            iterative_pinv.iterative_pinv,
            iterative_pinv.pinv_backward,
            of_pinv.launch,
            of_pinv.launch_backward,
            broadcasts=True,
            unread=frozenset({1}),
        ),
    )
}
"""Every compiled kernel by the name of its kernel."""
