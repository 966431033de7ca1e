"""Calls on tensors whose sizes a ``tf.function`` leaves open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

OPEN = (
    "a tensor of shape {}, of which a size is open: a program is recorded for known sizes. Call with tensors of known "
    "sizes (tf.function makes a program for each signature, unless told input_signature or reduce_retracing), or give "
    "the call to subquad_tensorflow.at_any_length"
)


def at_any_length(function: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    """Make a function that can be recorded where sizes are open: it runs outside of the program, anew at each call.

    Parameters
    ----------
    function : callable
        A function of tensors, such as a call of `subquad.attention`.
    signature : tf.TensorSpec, or a list of tf.TensorSpec
        Shape and dtype of what it returns, None for sizes that are open.

    Returns
    -------
    callable
        A function of the same arguments. Gradients flow through it. A program that has it can neither be saved nor be
        compiled by XLA, since it calls Python.

    Examples
    --------
    >>> import tensorflow as tf, subquad
    >>> from subquad_tensorflow import at_any_length
    >>> mix = at_any_length(lambda x: subquad.attention(x, x, x, "favor", causal=True), tf.TensorSpec([None, None, 8]))
    >>> program = tf.function(mix, input_signature=[tf.TensorSpec([None, None, 8])])
    >>> program(tf.zeros([2, 30, 8])).shape, program(tf.zeros([2, 40, 8])).shape
    (TensorShape([2, 30, 8]), TensorShape([2, 40, 8]))
    """
    specs = tf.nest.flatten(signature)

    def call(*args: Any) -> Any:
        if tf.executing_eagerly():
            return function(*args)
        found = tf.py_function(lambda *x: tf.nest.flatten(function(*x)), args, [spec.dtype for spec in specs])
        shaped = [tf.ensure_shape(x, spec.shape) for x, spec in zip(found, specs, strict=True)]
        return tf.nest.pack_sequence_as(signature, shaped)

    return call
