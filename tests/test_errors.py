"""What does not fit is refused at the door, with a message that names the argument, what came and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rows.libraries import Library, Torch
from rows.methods import FITTED, METHODS, Case, D, Row, named, rows, seeing
from rows.scans import Scan

import subquad

x = np.zeros((6, 4))
wrong: dict[str, Any] = {
    "list": x.tolist(),
    "scalar": 1.0,
    "integers": x.astype(np.int64),
    "booleans": x.astype(bool),
    "objects": x.astype(object),
    "complex": x.astype(complex),
    "masked": np.ma.masked_array(x),
    "matrix": np.matrix(x),
}


def attention(*args: Any, **kwargs: Any) -> Any:
    return subquad.attention(*args, **kwargs)


# id → (error, parts of the message, call)
ATTENTION: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "list": (TypeError, r"k is a list, not an array.*numpy\.asarray\(k", lambda: attention(x, wrong["list"], x, "exact")),
    "scalar": (TypeError, "v is a float, not an array", lambda: attention(x, x, 1.0, "exact")),
    "none": (TypeError, "q is a NoneType", lambda: attention(None, x, x, "exact")),
    "integers": (TypeError, "q has dtype int64, expected a real floating", lambda: attention(wrong["integers"], x, x, "exact")),
    "booleans": (TypeError, "q has dtype bool", lambda: attention(wrong["booleans"], x, x, "exact")),
    "objects": (TypeError, "v has dtype object", lambda: attention(x, x, wrong["objects"], "exact")),
    "complex": (TypeError, "k has dtype complex128", lambda: attention(x, wrong["complex"], x, "exact")),
    "masked": (TypeError, "q is a numpy MaskedArray.*key_mask", lambda: attention(wrong["masked"], x, x, "exact")),
    "matrix": (TypeError, "v is a numpy matrix", lambda: attention(x, x, wrong["matrix"], "exact")),
    "one-axis": (ValueError, r"q has shape \(4,\).*at least two axes", lambda: attention(x[0], x, x, "exact")),
    "widths": (ValueError, "q has 4 channels.*k has 3", lambda: attention(x, x[:, :3], x, "exact")),
    "no-channels": (ValueError, "q has no channels", lambda: attention(x[:, :0], x[:, :0], x, "exact")),
    "keys-and-values": (ValueError, "k has 6 rows.*v has 5", lambda: attention(x, x, x[:5], "exact")),
    "batch": (ValueError, r"do not broadcast: q \[2, 1\], k \[3, 1\]", lambda: attention(
        np.zeros((2, 1, 6, 4)), np.zeros((3, 1, 6, 4)), np.zeros((3, 1, 6, 4)), "exact")),
    "heads": (ValueError, "q has 5 heads.*k, v have 2.*must divide", lambda: attention(
        np.zeros((1, 5, 6, 4)), np.zeros((1, 2, 6, 4)), np.zeros((1, 2, 6, 4)), "exact")),
    "mask-dtype": (TypeError, "key_mask has dtype float64, expected bool.*mask == 0",
                   lambda: attention(x, x, x, "exact", key_mask=np.zeros(6))),
    "mask-integers": (TypeError, "key_mask has dtype int64, expected bool.*mask == 1",
                      lambda: attention(x, x, x, "exact", key_mask=np.ones(6, dtype=int))),
    "mask-length": (ValueError, r"key_mask has shape \(5,\), expected \(\.\.\., 6\)",
                    lambda: attention(x, x, x, "exact", key_mask=np.ones(5, dtype=bool))),
    "mask-scalar": (ValueError, r"key_mask has shape \(\)", lambda: attention(x, x, x, "exact", key_mask=np.array(True))),
    "mask-list": (TypeError, r"key_mask is a list.*numpy\.asarray\(key_mask, dtype=bool\)", lambda: attention(x, x, x, "exact", key_mask=[True] * 6)),
    "mask-batch": (ValueError, r"do not broadcast.*key_mask \[3\]", lambda: attention(
        np.zeros((2, 6, 4)), np.zeros((2, 6, 4)), np.zeros((2, 6, 4)), "exact", key_mask=np.ones((3, 6), dtype=bool))),
    "causal-integer": (TypeError, "causal must be True or False, got 1", lambda: attention(x, x, x, "exact", causal=1)),
    "causal-zero": (TypeError, "causal must be True or False, got 0", lambda: [attention(x, x, x, "exact", causal=c) for c in (False, 0)]),
    "scale-array": (TypeError, "scale must be a number.*multiply q", lambda: attention(x, x, x, "exact", scale=np.ones(6))),
    "scale-inf": (ValueError, "scale must be finite, got inf", lambda: attention(x, x, x, "exact", scale=np.inf)),
    "scale-text": (TypeError, "scale must be a number, got '1' of type str", lambda: attention(x, x, x, "exact", scale="1")),
    "method-unknown": (ValueError, "unknown method 'nystrm'; did you mean 'nystrom'", lambda: attention(x, x, x, "nystrm")),
    "method-alias": (ValueError, "did you mean 'performer'", lambda: attention(x, x, x, "perfomer")),
    "method-far": (ValueError, "unknown method 'zzz'; Known: exact, auto, bigbird, window, clustered, favor, linear, linformer, lsh, nystrom", lambda: attention(x, x, x, "zzz")),
    "method-type": (TypeError, "method must be a name or a method object, got int", lambda: attention(x, x, x, 3)),
    "method-class": (TypeError, "method must be a name or a method object", lambda: attention(x, x, x, subquad.Favor)),
    "option-unknown": (TypeError, "'favor' has no option 'num_feature'; did you mean 'num_features'",
                       lambda: attention(x, x, x, "favor", num_feature=3)),
    "option-elsewhere": (TypeError, "'exact' has no option 'num_features'", lambda: attention(x, x, x, "exact", num_features=3)),
    "option-with-object": (TypeError, r"options \['seed'\] were given with a Favor object",
                           lambda: attention(x, x, x, subquad.Favor(), seed=3)),
    "implementation": (ValueError, "implementation is 'fast'.*generic", lambda: attention(x, x, x, "exact", implementation="fast")),
    "implementation-array": (ValueError, r"implementation is array\(.*generic",
                             lambda: attention(x, x, x, "exact", implementation=np.array(["auto", "generic"]))),
    "nystrom-causal": (NotImplementedError, "no causal form: a landmark.*use 'favor'",
                       lambda: attention(x, x, x, "nystrom", num_landmarks=2, causal=True)),
    "nystrom-causal-short": (NotImplementedError, "no causal form", lambda: attention(x, x, x, "nystrom", causal=True)),
    "center-causal": (NotImplementedError, "center=True.*pass center=", lambda: attention(x, x, x, "favor", center=True, causal=True)),
    "conv-cross": (ValueError, "conv_weights needs one value per query, got n = 3 and n_kv = 6",
                   lambda: attention(x[:3], x, x, "nystrom", conv_weights=np.ones(3))),
    "conv-even": (ValueError, r"conv_weights has shape \(4,\).*odd", lambda: attention(x, x, x, "nystrom", conv_weights=np.ones(4))),
    "conv-integers": (TypeError, "conv_weights has dtype int64", lambda: attention(x, x, x, "nystrom", conv_weights=np.ones(3, int))),
    "landmarks-shape": (ValueError, r"landmarks for k have shape \(3, 5\), expected \(\.\.\., m, 4\)",
                        lambda: attention(x, x, x, "nystrom", landmarks=(np.ones((3, 4)), np.ones((3, 5))))),
    "landmarks-count": (ValueError, r"expected \(\.\.\., 4, 4\)",
                        lambda: attention(x, x, x, "nystrom", num_landmarks=4, landmarks=(x[:3], x[:3]))),
    "query-mask-shape": (ValueError, r"query_mask has shape \(5,\), expected \(\.\.\., 6\): its last axis runs over the queries",
                         lambda: attention(x, x, x, "nystrom", num_landmarks=2, query_mask=np.ones(5, bool))),
    "query-mask-dtype": (TypeError, "query_mask has dtype float64, expected bool.*mask == 0",
                         lambda: attention(x, x, x, "nystrom", num_landmarks=2, query_mask=np.ones(6))),
    "query-mask-unused": (TypeError, "query_mask has dtype float64", lambda: attention(x, x, x, "nystrom", query_mask=np.ones(6))),
    "omega-nan": (ValueError, "omega holds NaN", lambda: attention(x, x, x, "favor", omega=np.full((3, 4), np.nan))),
    "omega-inf": (ValueError, "omega holds NaN or infinite", lambda: attention(x, x, x, "favor", omega=np.full((3, 4), np.inf))),
    "omega-shape": (ValueError, r"omega has shape \(3, 5\), expected \(m, 4\)", lambda: attention(x, x, x, "favor", omega=np.ones((3, 5)))),
    "omega-empty": (ValueError, r"omega has shape \(0, 4\)", lambda: attention(x, x, x, "favor", omega=np.ones((0, 4)))),
    "omega-integers": (TypeError, "omega has dtype int64", lambda: attention(x, x, x, "favor", omega=np.ones((3, 4), int))),
    "omega-list": (TypeError, "omega is a list", lambda: attention(x, x, x, "favor", omega=[[1.0] * 4])),
    "center-shape": (ValueError, r"q_mean has shape \(3,\)", lambda: attention(x, x, x, "favor", center=(np.ones(3), np.ones(4)))),
    "center-batch": (ValueError, r"do not broadcast: q \[2\].*q_mean \[3\], k_mean \[\]",
                     lambda: attention(*3 * [np.zeros((2, 6, 4))], "favor", center=(np.ones((3, 4)), np.ones(4)))),
    "center-pair": (ValueError, r"do not broadcast.*q_mean \[3\], k_mean \[2\]",
                    lambda: attention(x, x, x, "favor", center=(np.ones((3, 4)), np.ones((2, 4))))),
    "landmarks-batch": (ValueError, r"do not broadcast: q \[2\].*landmarks_q \[3\], landmarks_k \[\]",
                        lambda: attention(*3 * [np.zeros((2, 6, 4))], "nystrom", landmarks=(np.ones((3, 5, 4)), np.ones((5, 4))))),
    "conv-batch": (ValueError, r"do not broadcast: q \[2\].*conv_weights \[3\]",
                   lambda: attention(*3 * [np.zeros((2, 6, 4))], "nystrom", conv_weights=np.ones((3, 5)))),
    "conv-and-landmarks": (ValueError, r"do not broadcast: .*output \[2\], conv_weights \[3\]", lambda: attention(
        x, x, x, "nystrom", landmarks=2 * (np.ones((2, 5, 4)),), conv_weights=np.ones((3, 5)))),
    "query-mask-batch": (ValueError, r"do not broadcast: q \[2\].*query_mask \[3\]",
                         lambda: attention(*3 * [np.zeros((2, 6, 4))], "nystrom", query_mask=np.ones((3, 6), bool))),
    "features-shape": (ValueError, "features must map elementwise",
                       lambda: attention(x, x, x, "favor", features=lambda y: y[..., :1])),
    "feature-map-shape": (ValueError, "feature_map must return one row per row",
                          lambda: attention(x, x, x, "linear", feature_map=lambda y: y[..., 0])),
}  # fmt: skip

OPTIONS: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "num-features-zero": (ValueError, "num_features must be at least 1, got 0", lambda: subquad.Favor(num_features=0)),
    "num-features-negative": (ValueError, "num_features must be at least 1, got -3", lambda: subquad.Favor(num_features=-3)),
    "num-features-float": (TypeError, "num_features must be an integer, got 2.0", lambda: subquad.Favor(num_features=2.0)),
    "num-features-bool": (TypeError, "num_features must be an integer, got True", lambda: subquad.Favor(num_features=True)),
    "seed-none-array": (TypeError, "seed must be an integer.*every library", lambda: subquad.Favor(seed=np.arange(2))),
    "seed-generator": (TypeError, "seed must be an integer, got Generator",
                       lambda: subquad.Favor(seed=np.random.default_rng(0))),
    "seed-negative": (ValueError, "seed must be at least 0, got -1", lambda: subquad.Favor(seed=-1)),
    "features": (ValueError, "features is 'exp', expected one of 'positive'", lambda: subquad.Favor(features="exp")),
    "projection": (ValueError, "projection is 'qr', expected one of 'orthogonal'", lambda: subquad.Favor(projection="qr")),
    "features-array": (ValueError, r"features is array\(\[0., 0., 0.\]\), expected one of", lambda: subquad.Favor(features=np.zeros(3))),
    "projection-array": (ValueError, r"projection is array\(\['a', 'b'\].*expected one of",
                         lambda: subquad.Favor(projection=np.array(["a", "b"]))),
    "pinv-array": (ValueError, r"pinv is array\(.*expected one of", lambda: subquad.Nystrom(pinv=np.array(["a", "b"]))),
    "omega-and-seed": (ValueError, "omega is given, so seed=1 would have no effect", lambda: subquad.Favor(omega=x, seed=1)),
    "omega-and-count": (ValueError, "num_features=6 would have no effect", lambda: subquad.Favor(omega=x, num_features=6)),
    "omega-and-projection": (ValueError, "projection='iid' would have no effect", lambda: subquad.Favor(omega=x, projection="iid")),
    "derf-causal": (NotImplementedError, r"derf.*earlier ones; fix them: method.with_statistics\(q, k\)",
                    lambda: attention(x, x, x, "favor", features="derf", causal=True)),
    "derf-visible": (NotImplementedError, "derf.*with_statistics",
                     lambda: attention(x, x, x, "favor", features="derf", visible=np.full(len(x), 2))),
    "center-visible": (NotImplementedError, "center=True.*pass center=",
                       lambda: attention(x, x, x, "favor", center=True, visible=np.full(len(x), 2))),
    "derf-center": (ValueError, "centred by its statistics; leave center out", lambda: subquad.Favor(features="derf", center=True)),
    "statistics-kernel": (ValueError, 'belong to features="derf"', lambda: subquad.Favor(statistics=5 * (x,))),
    "statistics-type": (TypeError, r"tuple of five arrays \(q_mean, k_mean", lambda: subquad.Favor(features="derf", statistics=(x, x))),
    "statistics-element": (TypeError, r"statistics\[2\] \(q_map\)", lambda: subquad.Favor(features="derf", statistics=(x, x, None, x, x))),
    "statistics-shape": (ValueError, r"q_map has shape \(6, 4\), expected \(..., 4, 4\)",
                         lambda: attention(x, x, x, "favor", features="derf", statistics=(x[0], x[0], x, x[:4], x[:4]))),
    "no-statistics": (ValueError, "without center has no statistics", lambda: subquad.Favor().with_statistics(x, x)),
    "center-type": (TypeError, "center must be True, False or a pair", lambda: subquad.Favor(center=x)),
    "center-triple": (TypeError, "center must be True, False or a pair", lambda: subquad.Favor(center=(x, x, x))),
    "center-kernel": (ValueError, "center leaves only the softmax kernel unchanged", lambda: subquad.Favor(center=True, features="relu")),
    "epsilon-softmax": (ValueError, "kernel_epsilon belongs to generalised kernels", lambda: subquad.Favor(kernel_epsilon=0.1)),
    "epsilon-negative": (ValueError, "kernel_epsilon must be positive", lambda: subquad.Favor(features="relu", kernel_epsilon=-1.0)),
    "epsilon-array": (TypeError, "kernel_epsilon must be a number", lambda: subquad.Favor(features="relu", kernel_epsilon=np.ones(3))),
    "feature-map": (ValueError, 'feature_map must be "elu" or a function', lambda: subquad.Linear(feature_map="relu")),
    "feature-map-array": (ValueError, r'feature_map must be "elu" or a function of an array, got array\(',
                          lambda: subquad.Linear(feature_map=np.zeros(3))),
    "num-landmarks": (ValueError, "num_landmarks must be at least 1, got 0", lambda: subquad.Nystrom(num_landmarks=0)),
    "landmarks": (ValueError, "landmarks is 'k-means', expected one of 'segment-means'", lambda: subquad.Nystrom(landmarks="k-means")),
    "landmarks-array": (TypeError, "landmarks must be one of .* or a pair", lambda: subquad.Nystrom(landmarks=x)),
    "pinv": (ValueError, "pinv is 'svd', expected one of 'iterative', 'exact', 'ridge', 'ridge-fit'", lambda: subquad.Nystrom(pinv="svd")),
    "iterations-zero": (ValueError, "iterations must be at least 1", lambda: subquad.Nystrom(iterations=0)),
    "iterations-unused": (ValueError, "iterations=3 would have no effect with pinv='exact'",
                          lambda: subquad.Nystrom(iterations=3, pinv="exact")),
    "rcond-unused": (ValueError, "rcond=0.1 would have no effect.*pinv='exact'", lambda: subquad.Nystrom(rcond=0.1)),
    "ridge-negative": (ValueError, "ridge must be positive, got -1", lambda: subquad.Nystrom(ridge=-1.0, pinv="ridge")),
    "kmeans-iterations": (ValueError, "kmeans_iterations must be at least 1, got 0",
                          lambda: subquad.Nystrom(landmarks="kmeans", kmeans_iterations=0)),
    "kmeans-iterations-unused": (ValueError, 'kmeans_iterations=3 would have no effect without landmarks="kmeans"',
                                 lambda: subquad.Nystrom(kmeans_iterations=3)),
    "ridge-fit-of-others": (ValueError, 'pinv="ridge-fit" needs landmarks="kmeans", got segment-means',
                            lambda: subquad.Nystrom(pinv="ridge-fit")),
    "ridge-fit-of-arrays": (ValueError, "needs landmarks=.*, got arrays", lambda: subquad.Nystrom(landmarks=(x, x), pinv="ridge-fit")),
    "ridge-fit-and-iterations": (ValueError, "iterations=3 would have no effect with pinv='ridge-fit'.*pinv='iterative'",
                                 lambda: subquad.Nystrom(landmarks="kmeans", pinv="ridge-fit", iterations=3)),
    "ridge-elsewhere": (ValueError, "ridge=0.1 would have no effect with pinv='iterative'; it belongs to pinv='ridge' and 'ridge-fit'",
                        lambda: subquad.Nystrom(ridge=0.1)),
    "ridge-fit-state": (NotImplementedError, 'no summarize with pinv="ridge-fit".*pinv="ridge"',
                        lambda: subquad.Nystrom(landmarks="kmeans", pinv="ridge-fit").summarize(x, x)),
    "ridge-fit-landmarks": (NotImplementedError, 'no with_landmarks with pinv="ridge-fit"',
                            lambda: subquad.Nystrom(landmarks="kmeans", pinv="ridge-fit").with_landmarks(x, x)),
    "kmeans-state": (ValueError, "with_landmarks", lambda: subquad.Nystrom(landmarks="kmeans").summarize(x, x)),
    "seed-unused": (ValueError, "seed=3 would have no effect: only landmarks", lambda: subquad.Nystrom(seed=3)),
    "query-mask-and-landmarks": (ValueError, "query_mask chooses the rows of landmarks, which are given",
                                 lambda: subquad.Nystrom(landmarks=(x, x), query_mask=np.ones(6, bool))),
    "state-without-landmarks": (ValueError, "with_landmarks", lambda: subquad.Nystrom().summarize(x, x)),
    "state-with-derf": (ValueError, "same statistics for every chunk.*with_statistics", lambda: subquad.Favor(features="derf").summarize(x, x)),
    "state-with-center": (ValueError, "same center for every chunk", lambda: subquad.Favor(center=True).summarize(x, x)),
    "state-convolution": (NotImplementedError, "convolution of conv_weights", lambda: read_with_convolution()),
    "landmarks-of-nothing": (ValueError, "at least one visible query and one key, got none",
                             lambda: subquad.Nystrom().with_landmarks(x[:0], x)),
    "landmarks-of-few-rows": (ValueError, "num_landmarks is 5.*key_mask leaves between 2 and 6.*num_landmarks=2", lambda: few_rows()),
    "landmarks-of-few-queries": (ValueError, "query_mask leaves between 2 and 6", lambda: few_queries()),
    "landmarks-of-no-queries": (ValueError, "at least one visible query", lambda: few_queries(0, 0)),
    "step-lengths": (ValueError, "one key per query, got 5 queries and 6 keys", lambda: subquad.Favor().step(x[:5], x, x)),
    "explain": (ValueError, "explain knows these functions and calls of methods, got 'softmax'; Known: attention, ", lambda: subquad.explain("softmax", x)),
    "draw-omega": (ValueError, "projection", lambda: subquad.draw_omega("qr", 3, 4, 0)),
}  # fmt: skip


def few_rows() -> Any:
    return subquad.Nystrom(num_landmarks=5).with_landmarks(x, x, key_mask=np.arange(6) < np.array([[2], [6]]))


def few_queries(*left: int) -> Any:
    mask = np.arange(6) < np.array(left or (2, 6))[:, None]
    return subquad.Nystrom(num_landmarks=5, query_mask=mask).with_landmarks(x, x)


def read_with_convolution() -> Any:
    method = subquad.Nystrom(landmarks=(x[:3], x[:3]), conv_weights=np.ones(3))
    return method.attend(x, method.summarize(x, x))


def of_heads(*batch: int) -> Any:
    """A state with these batch axes."""
    return favor.summarize(*2 * [np.zeros((*batch, 6, 4))])


def wide_landmarks(batch: int) -> Any:
    return subquad.Nystrom(landmarks=2 * (np.ones((batch, 1, 5, 4)),))


favor, other = subquad.Favor(num_features=5), subquad.Favor(num_features=7)
nystrom = subquad.Nystrom(landmarks=(x[:3], x[:3]))
state = favor.summarize(x, x)
integers = state | {"numerator": state["numerator"].astype(int)}
STATES: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "summarize-none": (TypeError, "v is a NoneType, not an array", lambda: favor.summarize(x, None)),
    "summarize-list": (TypeError, r"k is a list, not an array.*numpy\.asarray\(k", lambda: nystrom.summarize(wrong["list"], x)),
    "summarize-one-axis": (ValueError, r"k has shape \(4,\).*at least two axes", lambda: favor.summarize(x[0], x)),
    "summarize-values": (ValueError, r"v has shape \(4,\).*at least two axes", lambda: nystrom.summarize(x, x[0])),
    "summarize-no-channels": (ValueError, "k has no channels", lambda: favor.summarize(x[:, :0], x)),
    "summarize-mask": (ValueError, "key_mask has shape", lambda: favor.summarize(x, x, key_mask=np.ones(5, bool))),
    "summarize-heads": (ValueError, "key_mask or an option has 3 heads.*k, v have 2.*must divide",
                        lambda: favor.summarize(*2 * [np.zeros((2, 6, 4))], key_mask=np.ones((3, 6), bool))),
    "attend-none": (TypeError, "q is a NoneType, not an array", lambda: favor.attend(None, state)),
    "attend-list": (TypeError, "q is a list, not an array", lambda: nystrom.attend(wrong["list"], nystrom.summarize(x, x))),
    "attend-one-axis": (ValueError, r"q has shape \(4,\).*at least two axes", lambda: favor.attend(x[0], state)),
    "attend-no-channels": (ValueError, "q has no channels", lambda: favor.attend(x[:, :0], state)),
    "attend-no-state": (TypeError, "state is a NoneType, expected the dict that summarize", lambda: favor.attend(x, None)),
    "attend-array": (TypeError, "state is a ndarray, expected the dict", lambda: nystrom.attend(x, x)),
    "attend-other-method": (ValueError, r"state\['shift'\] ends in \(5, 1\), expected \(3, 1\)", lambda: nystrom.attend(x, state)),
    "attend-method-of-others": (ValueError, r"state\['shift'\] ends in \(3, 1\), expected \(5, 1\)",
                                lambda: favor.attend(x, nystrom.summarize(x, x))),
    "attend-scan": (ValueError, "state holds 'decay', 'state', expected 'denominator', 'numerator', 'shift': a state belongs to",
                    lambda: favor.attend(x, subquad.summarize_scan("linear_scan", x, x))),
    "attend-other-m": (ValueError, r"state\['shift'\] ends in \(5, 1\), expected \(7, 1\).*options", lambda: other.attend(x, state)),
    "attend-other-landmarks": (ValueError, r"state\['shift'\] ends in \(3, 1\), expected \(4, 1\)",
                               lambda: subquad.Nystrom(landmarks=(x[:4], x[:4])).attend(x, nystrom.summarize(x, x))),
    "attend-batch": (ValueError, r"do not broadcast: q \[3, 1\], state \[2, 1\]",
                     lambda: favor.attend(np.zeros((3, 1, 6, 4)), favor.summarize(*2 * [np.zeros((2, 1, 6, 4))]))),
    "attend-list-in-state": (TypeError, r"state\['numerator'\] is a list", lambda: favor.attend(x, state | {"numerator": [1.0]})),
    "attend-none-in-state": (TypeError, r"state\['numerator'\] is a NoneType", lambda: favor.attend(x, state | {"numerator": None})),
    "attend-integers": (TypeError, r"state\['numerator'\] has dtype int64, expected a real floating", lambda: favor.attend(x, integers)),
    "merge-integers": (TypeError, r"right\['numerator'\] has dtype int64", lambda: favor.merge(state, integers)),
    "merge-integers-alone": (TypeError, r"left\['numerator'\] has dtype int64", lambda: favor.merge(integers, None)),
    "merge-batch": (ValueError, r"do not broadcast: left \[3, 1\], right \[2, 1\]",
                    lambda: favor.merge(of_heads(3, 1), of_heads(2, 1))),
    "attend-options": (ValueError, "q, the state or an option has 5 heads.*the state and its options have 3",
                       lambda: subquad.Favor(num_features=5, center=(np.ones((3, 4)), x[0])).attend(x, of_heads(5))),
    "attend-landmarks": (ValueError, r"do not broadcast: q \[\], state \[2, 1\], landmarks_q \[3, 1\]",
                         lambda: wide_landmarks(3).attend(x, wide_landmarks(2).summarize(x, x))),
    "step-center": (ValueError, r"do not broadcast: q \[2\].*q_mean \[3\]", lambda: subquad.Favor(
        center=(np.ones((3, 4)), x[0])).step(*3 * [np.zeros((2, 6, 4))])),
    "merge-heads": (ValueError, "left has 5 heads.*the arrays of right have 2.*must divide", lambda: favor.merge(*map(of_heads, (5, 2)))),
    "merge-heads-right": (ValueError, "right has 5 heads.*the arrays of left have 2.*must divide",
                          lambda: favor.merge(*map(of_heads, (2, 5)))),
    "merge-list": (TypeError, "left is a list, expected the dict", lambda: favor.merge([state], state)),
    "merge-other-m": (ValueError, r"right\['shift'\] ends in \(7, 1\), expected \(5, 1\)", lambda: favor.merge(state, other.summarize(x, x))),
    "merge-other-method": (ValueError, r"right\['shift'\] ends in \(3, 1\), expected \(5, 1\)", lambda: favor.merge(state, nystrom.summarize(x, x))),
    "merge-other-values": (ValueError, r"right\['numerator'\] ends in \(5, 3\), expected \(5, 4\)",
                           lambda: favor.merge(state, favor.summarize(x, x[:, :3]))),
    "step-integers": (TypeError, r"state\['numerator'\] has dtype int64", lambda: favor.step(x, x, x, integers)),
    "step-none": (TypeError, "k is a NoneType, not an array", lambda: favor.step(x, None, x)),
    "step-list": (TypeError, "q is a list, not an array", lambda: favor.step(wrong["list"], x, x)),
    "step-one-axis": (ValueError, r"q has shape \(4,\).*at least two axes", lambda: favor.step(x[0], x[0], x[0])),
    "step-other-m": (ValueError, r"state\['shift'\] ends in \(5, 1\), expected \(7, 1\)", lambda: other.step(x, x, x, state)),
    "step-other-values": (ValueError, r"state\['numerator'\] ends in \(5, 4\), expected \(5, 3\)", lambda: favor.step(x, x, x[:, :3], state)),
    "step-batch": (ValueError, r"do not broadcast: q \[3\], k \[3\], v \[3\], state \[2\]",
                   lambda: favor.step(*3 * [np.zeros((3, 6, 4))], favor.summarize(*2 * [np.zeros((2, 6, 4))]))),
    "step-other-method": (ValueError, r"state\['shift'\] ends in \(3, 1\), expected \(5, 1\)", lambda: favor.step(x, x, x, nystrom.summarize(x, x))),
}  # fmt: skip


def scan(**changes: Any) -> Callable[[], Any]:
    """A scan of three channels and two states over five steps, with some inputs replaced."""
    given = {"u": np.ones((2, 5, 3)), "delta": np.ones((2, 5, 3)), "A": -np.ones((3, 2)), "B": np.ones((2, 5, 2)),
             "C": np.ones((2, 5, 2)), "D": None}  # fmt: skip
    positional = [changes.pop(name, value) for name, value in given.items()]
    return lambda: subquad.selective_scan(*positional, **changes)


def step(**changes: Any) -> Callable[[], Any]:
    """One step of two items of three channels and two states, with some inputs replaced."""
    given = {"state": None, "u": np.ones((2, 3)), "delta": np.ones((2, 3)), "A": -np.ones((3, 2)),
             "B": np.ones((2, 2)), "C": np.ones((2, 2))}  # fmt: skip
    positional = [changes.pop(name, value) for name, value in given.items()]
    return lambda: subquad.selective_scan_step(*positional, **changes)


ones = np.ones
SCAN: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "list": (TypeError, "u is a list, not an array", scan(u=[[1.0]])),
    "integers": (TypeError, "delta has dtype int64", scan(delta=ones((2, 5, 3), int))),
    "masked": (TypeError, "u is a numpy MaskedArray", scan(u=np.ma.masked_array(ones((2, 5, 3))))),
    "complex-u": (TypeError, "u has dtype complex128, expected a real floating", scan(u=ones((2, 5, 3), complex))),
    "complex-B": (TypeError, "B is complex .* but A is real", scan(B=ones((2, 5, 2), complex))),
    "complex-state": (TypeError, "initial_state is complex", scan(initial_state=ones((2, 3, 2), complex))),
    "one-axis": (ValueError, r"u has shape \(3,\).*at least two axes", scan(u=ones(3))),
    "delta": (ValueError, r"delta has shape \(2, 4, 3\), expected \(\.\.\., 5, 3\)", scan(delta=ones((2, 4, 3)))),
    "A": (ValueError, r"A has shape \(4, 2\), expected \(3, d_state\)", scan(A=ones((4, 2)))),
    "A-axes": (ValueError, r"A has shape \(3,\)", scan(A=ones(3))),
    "A-no-states": (ValueError, r"A has shape \(3, 0\), expected \(3, d_state\)", scan(A=ones((3, 0)), B=ones((2, 5, 0)), C=ones((2, 5, 0)))),
    "B-states": (ValueError, r"B has shape \(2, 5, 4\), expected .*5, 2", scan(B=ones((2, 5, 4)))),
    "C-length": (ValueError, r"C has shape \(2, 4, 2\)", scan(C=ones((2, 4, 2)))),
    "groups": (ValueError, "groups must divide d = 3", scan(B=ones((2, 5, 2, 2)))),
    "constant": (ValueError, r"B has shape \(4, 2\), expected", scan(B=ones((4, 2)))),
    "ambiguous": (ValueError, r"B of shape \(3, 2\) could be \(d, d_state\) or \(n, d_state\)",
                  lambda: subquad.selective_scan(*2 * [ones((3, 3))], ones((3, 2)), ones((3, 2)), ones((3, 2)))),
    "D": (ValueError, r"D has shape \(2,\), expected \(3,\)", scan(D=ones(2))),
    "delta-bias": (ValueError, r"delta_bias has shape \(5, 3\)", scan(delta_bias=ones((5, 3)))),
    "z": (ValueError, r"z has shape \(2, 5, 2\)", scan(z=ones((2, 5, 2)))),
    "state": (ValueError, r"initial_state has shape \(2, 2, 3\), expected \(\.\.\., 3, 2\)", scan(initial_state=ones((2, 2, 3)))),
    "batch": (ValueError, r"do not broadcast: u \[2\].*initial_state \[3\]", scan(initial_state=ones((3, 3, 2)))),
    "softplus": (TypeError, "delta_softplus must be True or False, got 1", scan(delta_softplus=1)),
    "reverse": (TypeError, "reverse must be True or False", scan(reverse="yes")),
    "return-state": (TypeError, "return_state must be True or False", scan(return_state=None)),
    "implementation": (ValueError, "implementation is 'cuda'; selective_scan on numpy has", scan(implementation="cuda")),
    "step-scalar": (ValueError, r"u has shape \(\), expected \(\.\.\., d\)",
                    lambda: subquad.selective_scan_step(None, np.array(1.0), np.array(1.0), ones((1, 1)), ones(1), ones(1))),
    "step-delta": (ValueError, r"delta has shape \(2, 4\), expected \(\.\.\., 3\)$", step(delta=ones((2, 4)))),
    "step-delta-scalar": (ValueError, r"delta has shape \(\), expected \(\.\.\., 3\)$", step(delta=np.array(1.0))),
    "step-z-scalar": (ValueError, r"z has shape \(\), expected \(\.\.\., 3\)$", step(z=np.array(1.0))),
    "step-A": (ValueError, r"A has shape \(4, 2\), expected \(3, d_state\).*u \(2, 3\)", step(A=ones((4, 2)))),
    "step-B-scalar": (ValueError, r"B has shape \(\), expected \(\.\.\., 2\), \(\.\.\., groups, 2\) or \(3, 2\)", step(B=np.array(1.0))),
    "step-B-states": (ValueError, r"B has shape \(4,\), expected \(\.\.\., 2\), ", step(B=ones(4))),
    "step-B-axes": (ValueError, r"B has shape \(2,\), expected \(\.\.\., 2\), .*for u with 2 axes", step(B=ones(2))),
    "step-C-constant": (ValueError, r"C has shape \(4, 2\), expected \(\.\.\., 2\), ", step(C=ones((4, 2)))),
    "step-C-groups": (ValueError, r"C has shape \(2, 2, 2\), expected .*groups must divide d = 3", step(C=ones((2, 2, 2)))),
    "step-ambiguous": (ValueError, r"B of shape \(3, 2\) could be \(d, d_state\) or \(batch, d_state\)",
                       step(u=ones((3, 3)), delta=ones((3, 3)), B=ones((3, 2)))),
    "step-ambiguous-state": (ValueError, r"C of shape \(3, 2\) could be \(d, d_state\) or \(batch, d_state\)",
                             step(u=ones((1, 3)), delta=ones((1, 3)), B=ones((1, 2)), C=ones((3, 2)), state=ones((3, 3, 2)))),
    "step-ambiguous-delta": (ValueError, r"B of shape \(3, 2\) could be", step(u=ones((1, 3)), delta=ones((3, 3)), B=ones((3, 2)))),
    "step-groups-or-batch": (ValueError, r"C of shape \(2, 2\) could have 2 groups, or the batch axes \[2\] of other inputs",
                             step(u=ones(4), delta=ones(4), A=-ones((4, 2)), B=ones(2), state=ones((2, 4, 2)))),
    "step-constant-or-batch": (ValueError, r"B of shape \(3, 2\) could have 3 groups, or .* u \(3,\) lacks",
                               step(u=ones(3), delta=ones((3, 3)), B=ones((3, 2)), C=ones(2))),
    "step-groups-or-batches": (ValueError, r"B of shape \(3, 3, 2\) could have 3 groups, or the batch axes \[3, 3\]",
                               step(u=ones((1, 3)), delta=ones((3, 3, 3)), B=ones((3, 3, 2)), C=ones((1, 2)))),
    "groups-or-batch": (ValueError, r"C of shape \(3, 3, 2\) could have 3 groups, or the batch axes \[3, 3\] of",
                        scan(u=ones((3, 3)), delta=ones((3, 3, 3)), B=ones((3, 1, 2)), C=ones((3, 3, 2)))),
    "step-state": (ValueError, r"^state has shape \(2, 2, 3\), expected \(\.\.\., 3, 2\)$", step(state=ones((2, 2, 3)))),
    "step-state-batch": (ValueError, r"do not broadcast: u \[2\].* state \[4\]", step(state=ones((4, 3, 2)))),
    "step-state-integers": (TypeError, "^state has dtype int64", step(state=ones((2, 3, 2), int))),
    "step-state-complex": (TypeError, "^state is complex", step(state=ones((2, 3, 2), complex))),
    "step-list": (TypeError, "state is a list", lambda: subquad.selective_scan_step([0.0], *2 * [ones(1)], ones((1, 1)), *2 * [ones(1)])),
}  # fmt: skip


def linear_scan(*changed: Any, **options: Any) -> Callable[[], Any]:
    """A linear scan of three channels over five steps; a and b replaced by what is given."""
    return lambda: subquad.linear_scan(*(*changed, *2 * [np.ones((2, 5, 3))])[:2], **options)


LINEAR_SCAN: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "list": (TypeError, r"a is a list, not an array.*numpy\.asarray\(a", linear_scan([[1.0]])),
    "none": (TypeError, "b is a NoneType, not an array", linear_scan(ones((5, 3)), None)),
    "integers": (TypeError, "a has dtype int64, expected a real or complex floating", linear_scan(ones((2, 5, 3), int))),
    "state-integers": (TypeError, "initial_state has dtype int64", linear_scan(initial_state=ones((2, 3), int))),
    "masked": (TypeError, "a is a numpy MaskedArray", linear_scan(np.ma.masked_array(ones((2, 5, 3))))),
    "one-axis": (ValueError, r"a has shape \(3,\), expected \(\.\.\., n, d\) with at least two axes", linear_scan(ones(3))),
    "lengths": (ValueError, r"b has shape \(2, 5, 3\), expected \(\.\.\., 4, 3\)", linear_scan(ones((2, 4, 3)))),
    "widths": (ValueError, r"b has shape \(5, 2\), expected \(\.\.\., 5, 3\)", linear_scan(ones((5, 3)), ones((5, 2)))),
    "b-one-axis": (ValueError, r"b has shape \(3,\), expected \(\.\.\., 5, 3\)", linear_scan(ones((5, 3)), ones(3))),
    "state": (ValueError, r"initial_state has shape \(2, 5\), expected \(\.\.\., 3\)", linear_scan(initial_state=ones((2, 5)))),
    "state-scalar": (ValueError, r"initial_state has shape \(\), expected", linear_scan(initial_state=np.array(1.0))),
    "batch": (ValueError, r"do not broadcast: a \[2\], b \[2\], initial_state \[3\]", linear_scan(initial_state=ones((3, 3)))),
    "reverse": (TypeError, "reverse must be True or False, got 1", linear_scan(reverse=1)),
    "return-state": (TypeError, "return_state must be True or False", linear_scan(return_state=None)),
    "implementation": (ValueError, "implementation is 'cuda'; linear_scan on numpy has", linear_scan(implementation="cuda")),
}  # fmt: skip


def gla(*changed: Any, **options: Any) -> Callable[[], Any]:
    """Gated linear attention of two heads over five steps; q, k, v and g replaced by what is given."""
    given = [ones((2, 5, 3)), ones((2, 5, 3)), ones((2, 5, 4)), ones((2, 5, 3))]
    return lambda: subquad.gated_linear_attention(*(*changed, *given[len(changed) :]), **options)


GLA: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "list": (TypeError, r"q is a list, not an array", gla([[1.0]])),
    "none": (TypeError, "k is a NoneType, not an array", gla(ones((2, 5, 3)), None)),
    "integers": (TypeError, "q has dtype int64, expected a real floating", gla(ones((2, 5, 3), int))),
    "complex": (TypeError, "q has dtype complex128, expected a real floating", gla(ones((2, 5, 3), complex))),
    "one-axis": (ValueError, r"q has shape \(3,\), expected \(\.\.\., n, d\) with at least two axes", gla(ones(3))),
    "k": (ValueError, r"k has shape \(2, 4, 3\), expected \(\.\.\., 5, 3\)", gla(ones((2, 5, 3)), ones((2, 4, 3)))),
    "v": (ValueError, r"v has shape \(2, 4, 4\), expected \(\.\.\., 5, d_v\)", gla(*2 * [ones((2, 5, 3))], ones((2, 4, 4)))),
    "g": (ValueError, r"g has shape \(2, 5\), expected \(\.\.\., 5, 3\) or \(\.\.\., 5, 1\)",
          gla(*2 * [ones((2, 5, 3))], ones((2, 5, 4)), ones((2, 5)))),
    "bonus": (ValueError, r"bonus has shape \(2, 4\), expected \(\.\.\., 3\)", gla(bonus=ones((2, 4)))),
    "state": (ValueError, r"initial_state has shape \(2, 4, 3\), expected \(\.\.\., 3, 4\)", gla(initial_state=ones((2, 4, 3)))),
    "state-normalize": (ValueError, r"expected \(\.\.\., 3, 5\), with the sums of the keys as its last column",
                        gla(initial_state=ones((2, 3, 4)), normalize=True)),
    "batch": (ValueError, r"do not broadcast: q \[2\].*initial_state \[3\]", gla(initial_state=ones((3, 3, 4)))),
    "scale": (TypeError, "scale must be a number", gla(scale="1")),
    "flags": (TypeError, "normalize must be True or False, got 1", gla(normalize=1)),
    "reverse": (TypeError, "reverse must be True or False", gla(reverse="no")),
    "return-state": (TypeError, "return_state must be True or False", gla(return_state=None)),
    "implementation": (ValueError, "implementation is 'cuda'; outer_scan on numpy has", gla(implementation="cuda")),
    "step": (ValueError, r"state has shape \(3, 5\), expected \(\.\.\., 3, 4\)",
             lambda: subquad.gated_linear_attention_step(ones((3, 5)), *2 * [ones(3)], ones(4))),
    "step-axes": (ValueError, r"q has shape \(\), expected \(\.\.\., d\)",
                  lambda: subquad.gated_linear_attention_step(None, *3 * [np.array(1.0)])),
}  # fmt: skip


def ssd(**changes: Any) -> Callable[[], Any]:
    """Mamba-2's scan of four heads of three channels and two states over five steps, with some inputs replaced."""
    given = {
        "x": ones((2, 5, 4, 3)),
        "delta": ones((2, 5, 4)),
        "A": ones(4),
        "B": ones((2, 5, 2, 2)),
        "C": ones((2, 5, 2, 2)),
    }
    positional = [changes.pop(name, x) for name, x in given.items()] + [changes.pop("D", None)]
    return lambda: subquad.ssd(*positional, **changes)


SSD: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "none": (TypeError, "B is a NoneType, not an array", ssd(B=None)),
    "integers": (TypeError, "delta has dtype int64", ssd(delta=ones((2, 5, 4), int))),
    "two-axes": (ValueError, r"x has shape \(4, 3\), expected \(\.\.\., n, heads, p\) with at least three axes", ssd(x=ones((4, 3)))),
    "delta": (ValueError, r"delta has shape \(2, 5, 3\), expected \(\.\.\., 5, 4\)", ssd(delta=ones((2, 5, 3)))),
    "A": (ValueError, r"A has shape \(4, 2\), expected \(4,\): x has 4 heads", ssd(A=ones((4, 2)))),
    "groups": (ValueError, "groups must divide heads = 4", ssd(B=ones((2, 5, 3, 2)))),
    "B": (ValueError, r"B has shape \(2, 5, 2\), expected \(\.\.\., 5, groups, d_state\)", ssd(B=ones((2, 5, 2)))),
    "C": (ValueError, r"C has shape \(2, 5, 1, 2\), expected \(\.\.\., 5, 2, 2\)", ssd(C=ones((2, 5, 1, 2)))),
    "D": (ValueError, r"D has shape \(3,\), expected \(4,\) or \(4, 3\)", ssd(D=ones(3))),
    "D-axes": (ValueError, r"D has shape \(3, 4\), expected \(4,\) or \(4, 3\)", ssd(D=ones((3, 4)))),
    "bias-of-channels": (ValueError, r"delta_bias has shape \(4, 3\), expected \(4,\): ", ssd(delta_bias=ones((4, 3)))),
    "z": (ValueError, r"z has shape \(2, 5, 4\), expected \(\.\.\., 5, 4, 3\)", ssd(z=ones((2, 5, 4)))),
    "bias": (ValueError, r"delta_bias has shape \(2, 4\)", ssd(delta_bias=ones((2, 4)))),
    "state": (ValueError, r"initial_state has shape \(2, 4, 2, 3\), expected \(\.\.\., 4, 3, 2\)", ssd(initial_state=ones((2, 4, 2, 3)))),
    "batch": (ValueError, r"do not broadcast: x \[2\].*z \[3\]", ssd(z=ones((3, 5, 4, 3)))),
    "softplus": (TypeError, "delta_softplus must be True or False, got 1", ssd(delta_softplus=1)),
    "limits": (TypeError, "delta_limits is .*expected two numbers", ssd(delta_limits=0.1)),
    "limits-three": (TypeError, "delta_limits is .*expected two numbers", ssd(delta_limits=(0, 1, 2))),
    "limits-order": (ValueError, "expected low ≤ high", ssd(delta_limits=(1.0, 0.5))),
    "implementation": (ValueError, "implementation is 'cuda'; outer_scan on numpy has", ssd(implementation="cuda")),
    "step": (ValueError, r"state has shape \(4, 2, 3\), expected \(\.\.\., 4, 3, 2\)",
             lambda: subquad.ssd_step(ones((4, 2, 3)), ones((4, 3)), ones(4), ones(4), ones((1, 2)), ones((1, 2)))),
    "step-axes": (ValueError, r"x has shape \(3,\), expected \(\.\.\., heads, p\) with at least two axes",
                  lambda: subquad.ssd_step(None, ones(3), ones(1), ones(1), ones((1, 2)), ones((1, 2)))),
}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        pytest.param(*case, id=f"{group}-{name}")
        for group, table in (
            ("attention", ATTENTION),
            ("options", OPTIONS),
            ("states", STATES),
            ("scan", SCAN),
            ("linear-scan", LINEAR_SCAN),
            ("gated-linear-attention", GLA),
            ("ssd", SSD),
        )
        for name, case in table.items()
    ],
)
def test_error_names_what_came_and_what_to_do(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("method", sorted(subquad.METHODS))
def test_mixed_libraries(method: str) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"q is an array of numpy but v is an array of torch; convert one"):
        subquad.attention(x, x, torch.zeros(6, 4), method)
    t = torch.zeros(6, 4)
    with pytest.raises(TypeError, match=r"q is an array of torch but key_mask is an array of numpy"):
        subquad.attention(t, t, t, method, key_mask=np.ones(6, dtype=bool))


def test_mixed_libraries_elsewhere() -> None:
    torch = pytest.importorskip("torch")
    t = torch.zeros(6, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"u is an array of numpy but A is an array of torch"):
        subquad.selective_scan(x, x, torch.ones(4, 2), x[:, :2], x[:, :2])
    with pytest.raises(TypeError, match=r"a is an array of numpy but b is an array of torch"):
        subquad.linear_scan(x, t)
    with pytest.raises(TypeError, match=r"numpy.*torch"):
        subquad.Favor(omega=torch.ones(3, 4))(x, x, x)
    state = subquad.Favor().summarize(t, t)
    with pytest.raises(TypeError, match=r"q is an array of numpy but .* is an array of torch"):
        subquad.Favor().attend(x, state)
    with pytest.raises(TypeError, match=r"numpy.*torch|torch.*numpy"):
        subquad.Favor().merge(subquad.Favor().summarize(x, x), state)


@pytest.mark.parametrize("kind", ["integers", "booleans", "objects", "complex", "masked", "matrix"])
@pytest.mark.parametrize("name", ["omega", "q_mean", "k_mean"])
def test_options_from_the_host_are_checked_before_they_are_cast(name: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    t = torch.zeros(6, 4)
    given = wrong[kind] if name == "omega" else wrong[kind][0]
    options = {"omega": {"omega": given}, "q_mean": {"center": (given, x[0])}, "k_mean": {"center": (x[0], given)}}
    with pytest.raises(TypeError, match=rf"^{name} (has dtype|is a numpy)"):
        subquad.Favor(**options[name])(t, t, t)


@pytest.mark.parametrize("method", sorted(subquad.METHODS))
def test_mixed_devices(method: str) -> None:
    strict = pytest.importorskip("array_api_strict")
    here, there = (strict.asarray(x, device=strict.Device(name)) for name in ("CPU_DEVICE", "device1"))
    with pytest.raises(
        ValueError, match=r"q is on device .*CPU_DEVICE.* but k is on .*device1.*move them to one device"
    ):
        subquad.attention(here, there, there, method)


def test_mixed_devices_torch() -> None:
    torch = pytest.importorskip("torch")
    t = torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"q is on device cpu but v is on meta"):
        subquad.attention(t, t, t.to("meta"), "exact")
    with pytest.raises(ValueError, match=r"u is on device cpu but delta is on meta"):
        subquad.selective_scan(t, t.to("meta"), -torch.ones(4, 2), t[:, :2], t[:, :2])
    with pytest.raises(ValueError, match=r"a is on device cpu but initial_state is on meta"):
        subquad.linear_scan(t, t, initial_state=t[0].to("meta"))
    with pytest.raises(ValueError, match=r"cpu.*meta"):
        subquad.Favor(omega=torch.ones(3, 4, device="meta"))(t, t, t)


def test_traced_seed_is_explained(jax_library: Library) -> None:
    import jax

    q = jax.numpy.ones((4, 2))
    with pytest.raises(TypeError, match=r"seed must be an integer.*on the host"):
        jax.jit(lambda seed: subquad.attention(q, q, q, "favor", seed=seed))(3)


N = 20
SEEN = Case((2, N, D), (2, N, D), (2, N, 3))
# the pseudo-inverse of a matrix with a NaN is a NaN, whatever LAPACK says
REACHED = [row for row in METHODS if row.name not in ("nystrom-default",)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("causal", [False, True])
@rows(seeing(REACHED, "nothing", "place", "places"))
def test_query_that_is_not_finite_spoils_its_row_alone(row: Row, causal: bool, value: float) -> None:
    if causal and not row.causal:
        return
    if value == np.inf and row.by != "nothing":
        return  # all of a few keys may have a logit of −∞, which is as if they were hidden
    check_reach(Library(), row, causal, "q", value)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "value"), [("k", np.nan), ("v", np.nan), ("v", np.inf)])
@rows(seeing(REACHED, "nothing"))
def test_key_that_is_not_finite_reaches_the_rows_that_see_it(row: Row, name: str, value: float, causal: bool) -> None:
    if causal and not row.causal:
        return
    check_reach(Library(), row, causal, name, value)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@rows(named("exact", "favor-seed", "favor-relu", "linear", "nystrom", "nystrom-exact", "nystrom-ridge"))
def test_reach_elsewhere(row: Row, name: str) -> None:
    pytest.importorskip("torch")
    check_reach(Torch(), row, row.causal, name, np.nan)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_kv", [1, 2, 3, 4, 7, 8, 9, 15, 16, 17])
def test_query_that_is_not_finite_spoils_its_row_however_few_keys_there_are(
    n_kv: int, dtype: str, value: float
) -> None:
    """Fewer than a vector holds, also causal ones; not the rows that see no key."""
    torch = pytest.importorskip("torch")
    q, k = torch.rand(2, 40, D, dtype=getattr(torch, dtype), generator=torch.Generator().manual_seed(0))
    q[n_kv // 2, 0] = value
    k, row = k[:n_kv] - 0.5, n_kv // 2
    for rows_of_q, causal in ((q, False), (q[:n_kv], True), (q, True), (q[row : row + 1], True)):
        out = subquad.attention(rows_of_q, k, k, "exact", causal=causal, implementation="sdpa")
        want = subquad.attention(rows_of_q, k, k, "exact", causal=causal, implementation="generic")
        assert torch.equal(out.isnan(), want.isnan())
        sees = not causal or row >= len(rows_of_q) - n_kv
        assert bool(out.isnan().any()) is sees


def test_query_that_is_not_finite_spoils_its_row_beside_few_landmarks() -> None:
    torch = pytest.importorskip("torch")
    q = torch.rand(70, D, generator=torch.Generator().manual_seed(0))
    spoilt = q.clone()
    spoilt[33] = torch.nan
    landmarks = {"landmarks": (q[::10], q[::10])}
    out = subquad.attention(spoilt, q, q, "nystrom", **landmarks)
    assert bool(out[33].isnan().all())
    assert bool(torch.cat([out[:33], out[34:]]).isfinite().all())


def check_reach(library: Library, row: Row, causal: bool, name: str, value: float) -> None:
    """One entry of item 0, row 7 is not finite: rows that see it are not finite, all others are as before."""
    inputs, arrays = SEEN.draw(), row.arrays(SEEN)
    attend = row.call(causal=causal)
    given = [inputs[key] for key in ("q", "k", "v")]
    clean = library.numpy(library.call(attend, *given, None, arrays, dtype="float64"))
    inputs[name][0, 7, 1] = value
    with np.errstate(all="ignore"):
        dirty = library.numpy(library.call(attend, *given, None, arrays, dtype="float64"))
    reached = np.zeros((2, N), dtype=bool)
    if name == "q":
        reached[0, 7] = True
    else:
        reached[0, 7 if causal else 0 :] = True
    finite = np.all(np.isfinite(dirty), axis=-1)
    assert np.array_equal(~finite, reached)
    if name != "q" or not (row.method in ("nystrom", "clustered") or row.name in FITTED):  # a mean forgets the query
        assert np.max(np.abs(dirty - clean)[finite], initial=0) <= 1e-12 * np.max(np.abs(clean))


@pytest.mark.parametrize("implementation", ["auto", "generic"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_scan_state_that_is_not_finite_stays_so(value: float, implementation: str) -> None:
    """In its channel, in slow decays and in fast ones."""
    drawn = Scan("plain", extras=("initial_state",)).draw(70)
    *given, state = drawn.values()

    def call(state: np.ndarray) -> list[np.ndarray]:
        with np.errstate(all="ignore"):
            found = subquad.selective_scan(
                *given, initial_state=state, return_state=True, implementation=implementation
            )
        return list(found)

    clean, spoilt = call(state), state.copy()
    spoilt[0, 2] = value
    reached = np.arange(state.shape[1]) == 2
    for dirty, before, axis in zip(call(spoilt), clean, (-1, -2), strict=True):
        dirty, before = (np.moveaxis(x, axis, -1) for x in (dirty, before))
        assert np.array_equal(~np.isfinite(dirty[0]), np.broadcast_to(reached, dirty[0].shape))
        assert np.array_equal(dirty[..., ~reached], before[..., ~reached])
        assert np.array_equal(dirty[1:], before[1:])


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_input_that_is_not_finite_reaches_later_steps_of_its_channel(reverse: bool) -> None:
    form = Scan("plain", extras=("D",), reverse=reverse)
    drawn = form.draw(70)
    clean = form.call(return_state=False)(drawn)
    drawn["u"][0, 40, 2] = np.nan
    dirty = form.call(return_state=False)(drawn)
    reached = np.zeros(clean.shape, dtype=bool)
    reached[0, slice(None, 41) if reverse else slice(40, None), 2] = True
    assert np.array_equal(np.isnan(dirty), reached)
    assert np.array_equal(dirty[~reached], clean[~reached])
