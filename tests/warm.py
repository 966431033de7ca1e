"""Compile the CPU kernels before the tests, each in one of the workers, instead of each in all of them."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np


def compile_share() -> None:
    """Compile this worker's share of the kernels that many tests use; they are kept on disk, where others find them.

    Without workers, or without LLVM, a kernel is compiled by the first test that needs it.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if count < 2:
        return
    with contextlib.suppress(ImportError):
        for make in kernels()[int(worker.removeprefix("gw")) :: count]:
            make()


def kernels() -> list[Callable[[], Any]]:
    """Functions that compile one kernel each, those that take longest first."""
    from subquad_numpy.block_attention.backward import block_attention_gradient_kernel
    from subquad_numpy.block_attention.forward import block_attention_kernel
    from subquad_numpy.block_attention.join import join_kernel
    from subquad_numpy.causal_conv1d.backward import backward_kernel as conv_gradient_kernel
    from subquad_numpy.causal_conv1d.forward import forward_kernel as conv_kernel
    from subquad_numpy.clustered.forward import clustered_attention_kernel
    from subquad_numpy.clustered.summaries import cluster_members_kernel, cluster_spread_kernel
    from subquad_numpy.clustered.tree import balanced_tree_kernel
    from subquad_numpy.delta_scan import backward as delta_gradient
    from subquad_numpy.delta_scan import forward as delta
    from subquad_numpy.features.attend import attend_kernel
    from subquad_numpy.features.attend_gradient import attend_gradient_kernel
    from subquad_numpy.features.step import step_kernel
    from subquad_numpy.features.step_gradient import step_gradient_kernel
    from subquad_numpy.features.summarize import summarize_kernel
    from subquad_numpy.features.summarize_gradient import summarize_gradient_kernel
    from subquad_numpy.features.token import token_kernel
    from subquad_numpy.hashed_order.kernel import order_kernel
    from subquad_numpy.iterative_pinv.gradient import pinv_gradient_kernel
    from subquad_numpy.iterative_pinv.kernel import pinv_kernel
    from subquad_numpy.landmark_attention.kernel import landmark_attention_kernel
    from subquad_numpy.landmark_attention.values import values_kernel
    from subquad_numpy.linear_scan.kernel import linear_scan_gradient_kernel, linear_scan_kernel
    from subquad_numpy.lti_scan.backward import backward_kernel as lti_gradient_kernel
    from subquad_numpy.lti_scan.forward import forward_kernel as lti_kernel
    from subquad_numpy.mamba_step import kernel as mamba_step
    from subquad_numpy.nearest.kernel import nearest_kernel
    from subquad_numpy.outer_scan.backward import backward_kernel as outer_backward_kernel
    from subquad_numpy.outer_scan.forward import forward_kernel as outer_forward_kernel
    from subquad_numpy.project.kernel import project_kernel
    from subquad_numpy.sampled_errors.kernel import errors_kernel
    from subquad_numpy.segment_means.kernel import means_kernel
    from subquad_numpy.selective_scan.backward import backward_kernel
    from subquad_numpy.selective_scan.forward import forward_kernel

    found: list[Callable[[], Any]] = []
    dtypes = ("float32", "float64")
    for make in (step_gradient_kernel, step_kernel, summarize_gradient_kernel, attend_gradient_kernel, summarize_kernel,
                 attend_kernel, token_kernel):  # fmt: skip
        found += [partial(make, np.dtype(dtype), phi) for dtype in dtypes for phi in ("exponential", "elu")]
    for make in (backward_kernel, forward_kernel):
        found += [partial(make, *kind) for kind in itertools.product(dtypes, *[(False, True)] * 3)]
    for make in (outer_backward_kernel, outer_forward_kernel):
        found += [partial(make, *kind) for kind in itertools.product(dtypes, (False, True))]
    found += [
        partial(make, *kind)
        for make in (lti_gradient_kernel, lti_kernel)
        for kind in itertools.product(dtypes, (False, True))
    ]
    found += [partial(make, dtype) for make in (conv_kernel, conv_gradient_kernel) for dtype in dtypes]
    found += [partial(make, *kind) for make in (delta_gradient.backward_kernel, delta.forward_kernel)
              for kind in itertools.product(dtypes, delta.GATES, (False, True))]  # fmt: skip
    found += [partial(make, dtype) for make in (linear_scan_kernel, linear_scan_gradient_kernel)
              for dtype in (*dtypes, "complex64", "complex128")]  # fmt: skip
    found += [partial(make, "float32", stored) for make in (project_kernel, mamba_step.step_kernel)
              for stored in ("float32", "bfloat16")]  # fmt: skip
    found += [partial(make, np.dtype(dtype)) for make in (
        block_attention_gradient_kernel, block_attention_kernel, clustered_attention_kernel, balanced_tree_kernel,
        cluster_members_kernel, cluster_spread_kernel, pinv_gradient_kernel, pinv_kernel, landmark_attention_kernel, values_kernel,
        join_kernel, means_kernel, nearest_kernel, order_kernel,
        errors_kernel) for dtype in dtypes]  # fmt: skip
    return found
