"""The fixed scan and its gradient as launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.kernels import lti_scan
from subquad_numpy.lti_scan.calls import SMALL, SMALL_GRADIENT, cut_gradient, cut_work, kind_of
from subquad_numpy.runtime.launch import Launch, Rows, Run
from subquad_numpy.runtime.stored import computed, stored_word

NAMES = ("u", "rate", "B", "C", "D", "initial_state", "resets", "mask")


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `lti_scan`, by one launch."""
    from subquad_numpy.lti_scan.forward import FORWARD_RECORD, forward_kernel

    u, rate = arrays[:2]
    if 0 in (*u.shape, *rate.shape):
        return tuple(lti_scan.generic(*arrays, **static))
    threads = _threads(arrays, SMALL)
    sizes, tasks = cut_work(arrays, static, threads)
    sizes["stored"] = stored_word((u, u))
    results = {"y": Like(u.shape, u.dtype), "state": Like((u.shape[0], *rate.shape), rate.dtype)}
    made = Launch(forward_kernel, kind_of(arrays), FORWARD_RECORD, results, sizes, tasks=tasks, threads=threads)
    found = run(made, dict(zip(NAMES, arrays, strict=True)))
    return found["y"], found["state"]


def launch_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], outputs: Sequence[Array], grads: Sequence[Array], run: Run
) -> tuple[Array | None, ...]:
    """The gradients by all inputs, by one launch; the outputs are not read."""
    from subquad_numpy.lti_scan.backward import BACKWARD_RECORD, RESULTS, backward_kernel

    u, rate, B, C, D, initial_state, *_ = arrays
    xp, batch = array_namespace(u), u.shape[0]
    if 0 in (*u.shape, *rate.shape):
        zeros = [None if x is None else xp.zeros_like(x) for x in (u, rate, B, C, D)]
        return *zeros, None if initial_state is None else grads[1], None, None
    sizes, tasks = cut_gradient(arrays, static)
    sizes["stored"] = stored_word((u, grads[0], u))
    results = {
        "grad_u": Like(u.shape, u.dtype), "grad_D": Like((u.shape[2],), computed(u.dtype)),
        "grad_initial_state": Like((batch, *rate.shape), rate.dtype),
    }  # fmt: skip
    summed = {"grad_D": Rows(batch, wide=True)}
    for name in ("grad_rate", "grad_B", "grad_C"):
        results[name], summed[name] = Like(rate.shape, rate.dtype), Rows(batch, wide=True)
    made = Launch(
        backward_kernel, kind_of(arrays), BACKWARD_RECORD, {name: results[name] for name in RESULTS}, sizes,
        tasks=tasks, threads=_threads(arrays, SMALL_GRADIENT), summed=summed,
    )  # fmt: skip
    found = run(made, dict(zip(NAMES, arrays, strict=True)) | {"grad_y": grads[0], "grad_state": grads[1]})
    by_model = [found[name] for name in ("grad_rate", "grad_B", "grad_C")]
    by_state = None if initial_state is None else found["grad_initial_state"]
    return found["grad_u"], *by_model, None if D is None else found["grad_D"], by_state, None, None


def _threads(arrays: Sequence[Any], small: int) -> int:
    from subquad_numpy.runtime.threads import thread_count

    batch, n, d = arrays[0].shape
    return 1 if batch * n * d * arrays[1].shape[1] < small else thread_count()
