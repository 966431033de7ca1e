"""Calls on sequences whose length a program leaves open: loops of the program over blocks of a known length.

The last block is filled up, and what fills it is masked. A block is an ordinary call on tensors of known sizes, so that
nothing else in subquad knows of open lengths. An open first axis is computed item by item.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from subquad.kernels.block_attention import join
from subquad_tensorflow import array_api

SIZE = 256  # rows of a block
Arrays = dict[str, Any]


class Blocks:
    """The blocks of arrays of one sequence, along the axis of each; `keep(i)` tells which rows of block i are there."""

    def __init__(self, arrays: Mapping[str, Any], axes: Mapping[str, int]) -> None:
        first = next(iter(arrays))
        self.length = tf.shape(arrays[first])[axes[first]]
        self.count = (self.length + SIZE - 1) // SIZE
        self.axes, self.cut = axes, {name: self._cut(x, axes[name]) for name, x in arrays.items()}

    def _cut(self, x: Any, axis: int) -> Any:
        at, filling = x.shape.rank + axis, self.count * SIZE - self.length
        full = tf.pad(x, [[0, filling if i == at else 0] for i in range(x.shape.rank)])
        return tf.reshape(full, (*x.shape[:at], -1, SIZE, *x.shape[at + 1 :]))

    def __call__(self, i: Any) -> Arrays:
        """The arrays of block number i."""
        return {name: tf.gather(x, i, axis=x.shape.rank - 1 + self.axes[name]) for name, x in self.cut.items()}

    def keep(self, i: Any, mask: Any) -> Any:
        """Which rows of block i count, with its part of a mask."""
        there = tf.range(SIZE) + i * SIZE < self.length
        return there if mask is None else there & mask

    def joined(self, outs: Any) -> Any:
        """Outputs (blocks, ..., SIZE, d) as one array (..., n, d)."""
        x = array_api.moveaxis(outs, 0, -3)
        return tf.reshape(x, (*x.shape[:-3], -1, x.shape[-1]))[..., : self.length, :]


def loop(count: Any, state: Any, step: Callable[[Any, Any], tuple[Any, Any]], *, reverse: bool = False) -> Any:
    """(the last state, the outputs of all steps, stacked) of ``state, outs = step(i, state)``; outs is a tuple."""

    def number(i: Any) -> Any:
        return count - 1 - i if reverse else i

    state, outs = step(number(tf.constant(0)), state)  # the first step tells the shapes of all
    kept = tuple(
        tf.TensorArray(x.dtype, size=count, element_shape=x.shape).write(number(tf.constant(0)), x) for x in outs
    )

    def body(i: Any, state: Any, kept: Any) -> Any:
        state, outs = step(number(i), state)
        return i + 1, state, tuple(array.write(number(i), x) for array, x in zip(kept, outs, strict=True))

    _, state, kept = tf.while_loop(lambda i, *_: i < count, body, (tf.constant(1), state, kept))
    return state, tuple(array.stack() for array in kept)


def by_item(function: Callable[[Arrays], tuple[Any, ...]], arrays: Arrays) -> tuple[Any, ...]:
    """The outputs of a function of arrays; where their first axis is open, of each item of it, one after the other."""
    least = {"start": 1, "mask": 2, "key_mask": 2}  # axes, with one of items; 3 for the others
    many = {name: x for name, x in arrays.items() if x.shape.rank >= least.get(name, 3) and x.shape[0] is None}
    if not many:
        return function(arrays)
    count = tf.shape(next(iter(many.values())))[0]
    return loop(count, (), lambda i, _: ((), function(arrays | {name: x[i] for name, x in many.items()})))[1]


def attention(method: Any, arrays: Arrays, options: Arrays) -> Any:
    """Attention block by block: by states if the method is one of features, by log-sum-exps if it is exact."""
    causal, scale = options["causal"], options["scale"]
    given = arrays if options["key_mask"] is None else {**arrays, "key_mask": options["key_mask"]}

    def call(x: Arrays) -> tuple[Any, ...]:
        queries = Blocks({"q": x.pop("q")}, {"q": -2})
        keys = Blocks(x, {"k": -2, "v": -2, "key_mask": -1})

        def block(i: Any) -> tuple[Any, Any, Any]:
            of = keys(i)
            return of["k"], of["v"], keys.keep(i, of.get("key_mask"))

        if method.state is None:
            return (_by_lse(method, queries, keys, block, causal, scale),)
        if causal:
            check = tf.debugging.assert_equal(queries.length, keys.length, "causal calls of open lengths need n = n_kv")

            def taken(i: Any, state: Any) -> Any:
                k, v, keep = block(i)
                out, state = method.step(queries(i)["q"], k, v, state, key_mask=keep, scale=scale)
                return state, (out,)

            with tf.control_dependencies([] if check is None else [check]):
                outs = loop(keys.count, None, taken)[1]
        else:

            def summed(i: Any, state: Any) -> Any:
                k, v, keep = block(i)
                return method.merge(state, method.summarize(k, v, key_mask=keep, scale=scale)), ()

            state, _ = loop(keys.count, None, summed)
            outs = loop(queries.count, (), lambda i, _: ((), (method.attend(queries(i)["q"], state, scale=scale),)))[1]
        return (queries.joined(outs[0]),)

    (out,) = by_item(call, dict(given))
    return tf.ensure_shape(out, (*[None] * (out.shape.rank - 2), arrays["q"].shape[-2], arrays["v"].shape[-1]))


def _by_lse(method: Any, queries: Blocks, keys: Blocks, block: Any, causal: bool, scale: Any) -> Any:
    """Exact attention of each block of queries, to one block of keys after the other."""
    rows = tf.range(SIZE)

    def of_queries(i: Any, _: Any) -> Any:
        q = queries(i)["q"]
        place = rows + i * SIZE + keys.length - queries.length  # the last key that each row sees, if causal

        def more(j: Any, state: Any) -> Any:
            k, v, keep = block(j)
            sees = rows + j * SIZE <= place[:, None] if causal else None
            found = method(q, k, v, key_mask=keep, mask=sees, scale=scale, return_lse=True)
            return (found if state is None else join(array_api, state, found)), ()

        return (), (loop(keys.count, None, more)[0][0],)

    return queries.joined(loop(queries.count, (), of_queries)[1][0])


def scan(function: Callable[..., Any], arrays: Arrays, options: Arrays) -> Any:
    """A scan block by block, each from the state that the one before leaves; a filled-up step leaves it as it is."""
    with_state, reverse, start = (options.pop(name) for name in ("return_state", "reverse", "initial_state"))
    mask = options.pop("mask")
    given = {name: x for name, x in {**arrays, **options}.items() if tf.is_tensor(x)}
    axes = {name: axis for name, x in given.items() if (axis := _time(x)) is not None}
    given |= {name: x for name, x in (("mask", mask), ("start", start)) if x is not None}
    fixed = {name: x for name, x in options.items() if name not in given}

    def call(x: Arrays) -> tuple[Any, ...]:
        x = dict(x)
        state, mask = x.pop("start", None), x.pop("mask", None)
        of_steps = {name: x.pop(name) for name in axes}
        blocks = Blocks(of_steps | ({} if mask is None else {"mask": mask}), {**axes, "mask": -1})

        def step(i: Any, state: Any) -> Any:
            own = {**x, **blocks(i)}
            keep = blocks.keep(i, own.pop("mask", None))
            by_position = [own.pop(name, None) for name in arrays]
            out, state = function(
                *by_position, **fixed, **own, mask=keep, initial_state=state, return_state=True, reverse=reverse
            )
            return state, (out,)

        state, (outs,) = loop(blocks.count, state, step, reverse=reverse)
        return blocks.joined(outs), state

    out, state = by_item(call, given)
    return (out, state) if with_state else out


def _time(x: Any) -> int | None:
    """The axis of time of an argument of a scan, counted from the end: the last open one that is no batch."""
    rank = x.shape.rank
    last = max([axis - rank for axis, size in enumerate(x.shape) if size is None], default=-rank)
    return None if last == -rank and (rank != 2 or x.shape[0] is not None) else last


KNOWN = {  # the options that have a form for open lengths
    "attention": {"causal", "key_mask", "scale"},
    "linear_scan": {"initial_state", "return_state", "reverse", "mask"},
}
KNOWN["selective_scan"] = KNOWN["linear_scan"] | {"z", "delta_bias", "delta_softplus", "delta_limits"}


def whole_call(name: str, function: Any, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The result of a call on tensors of open lengths; NotImplemented if there is no form for it."""
    used = {key for key, x in options.items() if x is not None and x is not False and not isinstance(x, str)}
    if name not in KNOWN or not used <= KNOWN[name] or next(iter(arrays.values())).shape.rank is None:
        return NotImplemented
    if name != "attention":
        own = {key: x for key, x in options.items() if key in KNOWN[name]}
        return scan(
            function, dict(arrays), {**own, "implementation": options["implementation"], "mask": options["mask"]}
        )
    by_state = function.state is not None and "denominator" in function.state.fields
    if not by_state and "mask" not in function.restrictions:
        return NotImplemented
    return attention(function, dict(arrays), dict(options))
