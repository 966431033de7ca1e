"""Gradients of attention through features, and of softmax attention, as launches: see `gradients`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad_numpy.block_attention import whole
from subquad_numpy.features import gradients
from subquad_numpy.features.gradients import Arrays, ByKeys, ByQueries, ByStep, Gradients
from subquad_numpy.features.launch import Side, sides_of
from subquad_numpy.runtime.launch import GradientRun, Launch, threads_for


def launch_summarize_backward(
    arrays: Arrays, static: Mapping[str, Any], outputs: Arrays, grads: Arrays, run: GradientRun
) -> Gradients:
    """The gradients of the kernel `feature_summarize`."""
    return gradients.by_summarize(Launches(arrays[0], run), arrays, static, outputs, grads, run.need)


def launch_attend_backward(
    arrays: Arrays, static: Mapping[str, Any], outputs: Arrays, grads: Arrays, run: GradientRun
) -> Gradients:
    """The gradients of the kernel `feature_attend`."""
    return gradients.by_attend(Launches(arrays[0], run), arrays, static, outputs, grads, run.need)


def launch_step_backward(
    arrays: Arrays, static: Mapping[str, Any], outputs: Arrays, grads: Arrays, run: GradientRun
) -> Gradients | None:
    """The gradients of the kernel `feature_step`, or None: see `gradients.by_step`."""
    passes, (*outputs, level, shifts) = Launches(arrays[0], run), outputs

    def compiled() -> Gradients | None:
        saved = level[..., 0], shifts
        return gradients.by_step(passes, arrays, static, outputs, grads, run.need, saved)

    return run.unless(passes.xp.any(passes.xp.isnan(level)), compiled)


def launch_softmax_backward(
    arrays: Arrays, static: Mapping[str, Any], outputs: Arrays, grads: Arrays, run: GradientRun
) -> Gradients:
    """The gradients of the kernel `softmax_attention`."""
    if len(outputs) == 2:  # the log-sum-exp was saved
        return whole.launch_backward(arrays, static, outputs, grads, run)
    return gradients.by_softmax(Launches(arrays[0], run), arrays, static, outputs[:1], grads, outputs[1:])


class Launches:
    """The `gradients.Passes` of a library that runs launches; the arrays of a `Side` are (…, d, m) and (…, 1, d)."""

    def __init__(self, like: Array, run: GradientRun) -> None:
        self.xp: ModuleType = array_namespace(like)
        self.run = run

    def keys(self, phi: Any, weights: Arrays) -> Side:
        """The side of the keys of a feature map."""
        return sides_of(self.xp, phi, weights)[0]

    def queries(self, phi: Any, weights: Arrays) -> Side:
        """The side of the queries of a feature map."""
        return sides_of(self.xp, phi, weights)[1]

    def directions(self, rows: Array, scale: float) -> Side:
        """The side whose directions are rows."""
        return Side(rows, scale, turned=True)

    def by_queries(
        self, q: Array, side: Side, start: Array | None, kv: Array, k_sum: Array | None, out: Array, grad: Array, *,
        by_W: bool,
    ) -> ByQueries:  # fmt: skip
        """The gradients of queries that read sums."""
        from subquad_numpy.features.attend_gradient import ATTEND_GRADIENT_RECORD, attend_gradient_kernel

        batch, d_v, (n, d) = tuple(grad.shape[:-2]), kv.shape[-1], q.shape[-2:]
        sums = {"grad_kv": d_v, "grad_sum": 1} | ({"grad_W": d} if by_W else {})
        found = self._in_chunks(
            attend_gradient_kernel, ATTEND_GRADIENT_RECORD, q, side, batch, {"grad_q": (n, d)}, sums,
            {"d_v": d_v, "kv_row": d_v, "out_row": d_v, "grad_row": d_v},
            {"start": start, "kv": kv, "k_sum": k_sum, "out": out, "grad": grad},
        )  # fmt: skip
        return ByQueries(found["grad_q"], found["grad_kv"], found["grad_sum"], found.get("grad_W"))

    def by_keys(
        self, k: Array, v: Array, side: Side, mask: Array | None, shift: Array, grad_kv: Array, grad_sum: Array, *,
        by_W: bool,
    ) -> ByKeys:  # fmt: skip
        """The gradients of sums over keys."""
        from subquad_numpy.features.summarize_gradient import SUMMARIZE_GRADIENT_RECORD, summarize_gradient_kernel

        batch, d_v, (n, d) = tuple(shift.shape[:-2]), v.shape[-1], k.shape[-2:]
        found = self._in_chunks(
            summarize_gradient_kernel, SUMMARIZE_GRADIENT_RECORD, k, side, batch,
            {"grad_k": (n, d), "grad_v": (n, d_v)}, {"grad_W": d} if by_W else {}, {"d_v": d_v, "v_row": d_v},
            {"v": v, "mask": mask, "shift": shift, "grad_kv": grad_kv, "grad_sum": grad_sum},
            zeros=mask is not None,
        )  # fmt: skip
        return ByKeys(found["grad_k"], found["grad_v"], found.get("grad_W"))

    def _in_chunks(
        self, compile: Any, record: Mapping[str, int | None], x: Array, side: Side, batch: tuple[int, ...],  # noqa: A002
        rows: Mapping[str, tuple[int, ...]], sums: Mapping[str, int], sizes: Mapping[str, int],
        operands: Mapping[str, Any], *, zeros: bool = False,
    ) -> dict[str, Array]:  # fmt: skip
        """The results of a kernel over chunks of the rows x: those of each row, and sums (…, m, width) over rows."""
        from subquad_numpy.features.gradient_runs import chunks_of

        (n, d), dtype = x.shape[-2:], x.dtype
        m, items, (chunks, chunk) = side.width(d), math.prod(batch), chunks_of(n)
        results = {name: Like((*batch, *tail), dtype) for name, tail in rows.items()}
        results |= {name: Like((chunks, *batch, m, width), dtype) for name, width in sums.items()}
        numbers = {"n": n, "d": d, "m": m, "chunks": chunks, "chunk": chunk, "chunk_step": items * m}
        made = Launch(
            compile, (np.dtype(dtype), side.phi), record, results, {**numbers, **side.sizes(d), **sizes}, batch,
            chunks, threads_for(3 * items * n * d * m), frozenset(rows if zeros else ()),
        )  # fmt: skip
        found = self.run(made, {**side.operands(self.xp, x), **operands})
        for name in sums:
            found[name] = found[name][0, ...] if chunks == 1 else self.xp.sum(found[name], axis=0)
        return found

    def by_step(
        self, arrays: Arrays, phi: Any, outputs: Sequence[Any], grads: Sequence[Any], saved: Sequence[Any]
    ) -> ByStep:
        """The gradients of a causal step."""
        from subquad_numpy.features.step_gradient import STEP_GRADIENT_RECORD, step_gradient_kernel

        q, k, v, _, kv, k_sum, *weights, mask = arrays
        grad, _, after_kv, after_sum = grads
        keys, queries = sides_of(self.xp, phi, weights)
        batch, (n, d), d_v, dtype = tuple(outputs[0].shape[:-2]), q.shape[-2:], v.shape[-1], q.dtype
        m = keys.width(d)
        tails = {"q": (n, d), "k": (n, d), "v": (n, d_v), "kv": (m, d_v), "sum": (m, 1)}
        made = Launch(
            step_gradient_kernel, (np.dtype(dtype), keys.phi), STEP_GRADIENT_RECORD,
            {f"grad_{name}": Like((*batch, *tail), dtype) for name, tail in tails.items()},
            {
                "n": n, "d": d, "m": m, "d_v": d_v, "chunks": 1, "chunk": n, "v_row": d_v, "out_row": d_v,
                "grad_row": d_v, **keys.sizes(d), **{f"q_{name}": size for name, size in queries.sizes(d).items()},
            },
            batch, threads=threads_for(9 * math.prod(batch) * n * d * m),
        )  # fmt: skip
        found = self.run(
            made,
            {
                **keys.operands(self.xp, k), **{f"q_{name}": x for name, x in queries.operands(self.xp, q).items()},
                "v": v, "mask": mask, "kv": kv, "k_sum": k_sum, "level": saved[0], "shifts": saved[1],
                "out": outputs[0], "grad": grad,
                "new_shift": outputs[1], "grad_new_kv": after_kv, "grad_new_sum": after_sum,
            },
        )  # fmt: skip
        return ByStep(*(found[f"grad_{name}"] for name in tails))
