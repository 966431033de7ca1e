"""The convolution and its gradient as launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad_numpy.causal_conv1d.calls import ROWS, SMALL, SMALL_GRADIENT, cut_gradient, sizes_of, taps_of
from subquad_numpy.runtime.launch import Launch, Rows, Run
from subquad_numpy.runtime.stored import computed, stored_word

NAMES = ("x", "weight", "bias", "initial_state", "resets")


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `causal_conv1d`, by one launch."""
    from subquad_numpy.causal_conv1d.forward import FORWARD_RECORD, forward_kernel

    x, weight, *_ = arrays
    if 0 in x.shape:
        return x, _no_step(arrays)
    (batch, n, d), width = x.shape, weight.shape[1]
    dtype = computed(x.dtype)
    results = {"y": Like(x.shape, x.dtype), "state": Like((batch, width - 1, d), dtype)}
    made = Launch(
        forward_kernel, (dtype.name,), FORWARD_RECORD, results,
        sizes_of(x, weight, static) | {"block": ROWS, "stored": stored_word((x, x))},
        tasks=batch * -(-n // ROWS), threads=_threads(x, SMALL),
    )  # fmt: skip
    found = run(made, dict(zip(NAMES, arrays, strict=True)))
    return found["y"], found["state"]


def launch_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], outputs: Sequence[Array], grads: Sequence[Array], run: Run
) -> tuple[Array | None, ...]:
    """The gradients by all inputs, by one launch; the outputs are not read."""
    from subquad_numpy.causal_conv1d.backward import BACKWARD_RECORD, backward_kernel

    x, weight, bias, initial_state, _ = arrays
    xp, (batch, _, d), width = array_namespace(x), x.shape, weight.shape[1]
    if 0 in x.shape:
        by_state = None if initial_state is None else grads[1]
        return x, xp.zeros_like(weight), None if bias is None else xp.zeros_like(bias), by_state, None
    block, tasks = cut_gradient(x)
    of_state, dtype = (batch, width - 1, d), computed(x.dtype)
    results = {
        "grad_x": Like(x.shape, x.dtype), "grad_initial_state": Like(of_state, dtype),
        "grad_weight": Like((width, d), dtype), "grad_bias": Like((d,), dtype),
    }  # fmt: skip
    made = Launch(
        backward_kernel, (dtype.name,), BACKWARD_RECORD, results,
        sizes_of(x, weight, static) | {"block": block, "stored": stored_word((x, grads[0], x))},
        tasks=tasks, threads=_threads(x, SMALL_GRADIENT),
        summed={name: Rows(batch, wide=True) for name in ("grad_weight", "grad_bias")},
    )  # fmt: skip
    operands = dict(zip(NAMES, arrays, strict=True)) | {"weight": taps_of(xp, weight)}
    found = run(made, operands | {"grad_y": grads[0], "grad_state": grads[1]})
    return (
        found["grad_x"],
        xp.flip(xp.matrix_transpose(found["grad_weight"]), axis=1),
        None if bias is None else found["grad_bias"],
        None if initial_state is None else found["grad_initial_state"],
        None,
    )


def _no_step(arrays: Sequence[Any]) -> Array:
    """The last state of a call without steps, or without anything."""
    x, weight, _, initial_state, _ = arrays
    shape = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    return array_namespace(x).zeros(shape, dtype=weight.dtype) if initial_state is None else initial_state


def _threads(x: Any, small: int) -> int:
    from subquad_numpy.runtime.threads import thread_count

    return 1 if x.shape[0] * x.shape[1] * x.shape[2] < small else thread_count()
