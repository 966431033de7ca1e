"""The times that `Auto` asks for by itself: measured in about two seconds, once on a machine, and kept in a file.

Two lengths are measured, the longer one first, and the shorter one unless the first took long, as where a program is
compiled for each length. The others are predicted from the nearest: exact attention grows with n², and a method with
n^g, where g is the median of what was measured of its class, 1 ≤ g ≤ 2. Classes share it since one exponent of two
short measurements is inexact.

Files of one machine and version stand in the folder that the environment variable SUBQUAD_CACHE names, by default
``subquad`` in the user's cache folder (XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from subquad.attention.crossover import LENGTHS, Crossover, seconds_for
from subquad.attention.method import Method
from subquad.backend import Array
from subquad.core.beside import namespace_of
from subquad.core.loading import backend_of, library_of
from subquad.core.notice import told_after
from subquad.core.override import dtype_name

HEADS, ROUNDS = 2, 2
ENOUGH = 2.0  # seconds after which nothing more is measured, and the user is told
GROWTH = 1.25  # of the time of a method with the length, where it was not measured: clustered attention on a CPU
VERSION = 2  # of the files
logger = logging.getLogger("subquad")
KEPT: dict[str, Crossover] = {}


def known_crossover(like: Array, methods: Sequence[Method], *, causal: bool) -> Crossover:
    """The table of this machine from memory, from its file, or measured now and stored."""
    xp = namespace_of(like)
    about = (
        VERSION, platform.node(), platform.machine(), os.cpu_count(), library_of(xp), backend_of(xp).device_kind(like),
        dtype_name(like), like.shape[-1], causal, *map(repr, methods),
    )  # fmt: skip
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    if key not in KEPT:
        path = cache_folder() / f"crossover-{key}.json"
        KEPT[key] = _read(path) or _measured(like, methods, path, causal=causal)
    return KEPT[key]


def cache_folder() -> Path:
    """The folder of the files."""
    own = os.environ.get("SUBQUAD_CACHE")
    if own:
        return Path(own)
    general = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return (Path(general) if general else Path.home() / ".cache") / "subquad"
    except RuntimeError:  # a user may have no home, as in a container: nothing can be kept here, which is told
        return Path(os.devnull, "subquad")


def predicted(
    seconds: Mapping[int, Sequence[float]], methods: Sequence[Method], *, causal: bool, channels: int
) -> Crossover:
    """The table of `LENGTHS` from the seconds of exact attention and of each method at one or two lengths."""
    growths = [2.0, *_growths(seconds, methods)]
    rows = []
    for n in LENGTHS:
        nearest = min(seconds, key=lambda m: abs(math.log(m / n)))
        rows.append([x * (n / nearest) ** g for x, g in zip(seconds[nearest], growths, strict=True)])
    exact, *others = zip(*rows, strict=True)
    ratios = [tuple(x / whole for x, whole in zip(row, exact, strict=True)) for row in others]
    return Crossover(
        causal, channels, LENGTHS, exact,
        tuple((repr(method), row) for method, row in zip(methods, ratios, strict=True)),
    )  # fmt: skip


def _growths(seconds: Mapping[int, Sequence[float]], methods: Sequence[Method]) -> list[float]:
    # The exponent of the time of each method in the length: the median of those of its class
    if len(seconds) < 2:
        return [GROWTH] * len(methods)
    (short, less), (long, more) = min(seconds.items()), max(seconds.items())
    of_class: dict[type[Method], list[float]] = {}
    for method, x, y in zip(methods, less[1:], more[1:], strict=True):
        of_class.setdefault(type(method), []).append(math.log(y / x) / math.log(long / short))
    return [min(max(statistics.median(of_class[type(method)]), 1.0), 2.0) for method in methods]


def _measured(like: Array, methods: Sequence[Method], path: Path, *, causal: bool) -> Crossover:
    text = (
        "subquad measures from which length on 'auto' is faster than exact attention on this machine, once for this "
        f"dtype, device and ladder; the times are kept in {path}. Pass crossover= to avoid it"
    )
    start = time.perf_counter()
    seconds: dict[int, list[float]] = {}
    with told_after(ENOUGH, text):
        for n in (LENGTHS[1], LENGTHS[0]):
            if not seconds or time.perf_counter() - start < ENOUGH:
                seconds[n] = seconds_for(like, methods, n, causal=causal, heads=HEADS, rounds=ROUNDS)
    table = predicted(seconds, methods, causal=causal, channels=like.shape[-1])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(asdict(table), indent=1), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        logger.warning("the times cannot be kept: %s; set SUBQUAD_CACHE to a folder that can be written to", error)
    return table


def _read(path: Path) -> Crossover | None:
    # The table of a file; None if there is none, or it cannot be understood
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        methods = tuple((name, tuple(row)) for name, row in read["methods"])
        return Crossover(read["causal"], read["channels"], tuple(read["lengths"]), tuple(read["seconds"]), methods)
    except (OSError, ValueError, KeyError, TypeError):
        return None
