"""How `Auto` chooses: which methods may be used, what their errors are, and the first of them that suffices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from subquad.attention.call import AttentionCall
from subquad.attention.crossover import Crossover
from subquad.attention.error_bounds import bounded, carried, draw, family
from subquad.attention.estimate import errors_of, warn_if_poor
from subquad.attention.machine_times import known_crossover
from subquad.attention.method import Method
from subquad.attention.sampled_rows import Sample, sample
from subquad.backend import Array
from subquad.core.dtypes import is_half
from subquad.core.loading import backend_of

LEAST = 2048  # queries or keys below which no method is tried, and no time is measured
COPIES = 8  # of the sampled rows' outputs that are held at once
Host = np.ndarray[Any, Any]


class Rung(NamedTuple):
    """A method that may be chosen, its place among the rungs, and its time."""

    place: int
    method: Method
    ratio: float  # a multiple of that of exact attention; NaN if it is not known


@dataclass(frozen=True)
class Rule:
    """What a choice follows. The last of the rungs is exact attention."""

    rungs: tuple[Method, ...]
    tolerance: float
    rows: int
    seed: int
    max_bytes: int | None
    max_time: float | None
    crossover: Crossover | tuple[Crossover, ...] | int | None


class Found(NamedTuple):
    """A choice: numbers of the rungs, of the shape of the call's batch, folded; and the reasons as text."""

    chosen: Host
    why: str


def choose(call: AttentionCall, rule: Rule) -> Found:
    """The choice for a call; ValueError if values cannot be read, or no method keeps within a budget."""
    batch, exact = call.batch(), len(rule.rungs) - 1
    table, ladder, why = _faster(call, rule)
    ladder, exact_fits = _affordable(call, rule, table, ladder)
    chosen = np.full(batch, exact)
    if not ladder or 0 in batch:
        return Found(chosen, f"{rule.rungs[exact]!r} for all heads: {why or 'no method keeps within the budget'}")
    numbers, weights = draw(call, _usable(call, rule), rule.rows, rule.seed)
    known = sample(call, rule.rows, rule.seed, numbers)
    # of the rung that is chosen so far, or else of the one with the least bound: its place, estimated error and bound
    best, error, bound = np.full(batch, -1), np.full(batch, math.inf), np.full(batch, math.inf)
    is_open = np.ones(batch, dtype=bool)
    before: list[tuple[Method, Host]] = []
    estimates = {}
    for rung, out in _outputs_in_turn(call, known, ladder):
        its_error, its_bound = (_of_group(call, x) for x in bounded(known, weights, out))
        its_bound = carried(rung.method, its_bound, before)
        before.append((rung.method, its_bound))
        if not exact_fits:
            estimates[rung.place] = errors_of(known, out, rule.tolerance)
        meets = is_open & (its_bound <= rule.tolerance)
        is_better = is_open & (its_bound < bound)
        best, error = np.where(is_better, rung.place, best), np.where(is_better, its_error, error)
        bound, chosen = np.where(is_better, its_bound, bound), np.where(meets, rung.place, chosen)
        is_open = is_open & ~meets
        if not is_open.any():
            break
    if not exact_fits:
        last = np.where(best < 0, ladder[-1].place, best)  # where no error is known, the most expensive
        chosen = np.where(is_open, last, chosen)
        for index in np.unique(last[is_open]).tolist():
            warn_if_poor(rule.rungs[index], estimates[index], stacklevel=7)
    return Found(chosen, _told(rule, ladder, chosen, error, bound, is_open))


def _faster(call: AttentionCall, rule: Rule) -> tuple[Crossover | None, list[Rung], str]:
    """(the table of times if there is one, the rungs that are faster than exact attention by cost, why none is)."""
    n = min(call.q.shape[-2], call.k.shape[-2])
    usable = _usable(call, rule)
    if not usable:
        return None, [], "the ladder has no method for this call"
    table = rule.crossover
    if isinstance(table, tuple):
        table = next((x for x in table if x.causal == call.causal), None)
    is_other = isinstance(table, Crossover) and table.causal != call.causal
    if is_other or (table is None and rule.crossover is not None):
        kind = "causal calls" if call.causal else "calls that are not causal"
        msg = f"crossover has no times of {kind}; measure_crossover(..., causal={call.causal}) makes them"
        raise ValueError(msg)
    least = LEAST if table is None else table if isinstance(table, int) else table.lengths[0]
    if n < least:
        return None, [], f"n = {n} is below {least}, from which on another may be faster"
    if not backend_of(call.xp).is_concrete(call.q, call.k, call.v, call.key_mask):
        msg = (
            "'auto' chooses by the values of q, k and v, which a program that is traced does not have: choose before, "
            "on example arrays, method = subquad.Auto(...).with_choice(q, k, v, causal=...), and use that method"
        )
        raise ValueError(msg)
    if isinstance(table, int):
        return None, [Rung(rule.rungs.index(x), x, math.nan) for x in usable], ""
    if table is None:
        table = known_crossover(call.like, usable, causal=call.causal)
    timed = [Rung(rule.rungs.index(x), x, table.ratio(x, n)) for x in usable]
    ladder = sorted((rung for rung in timed if rung.ratio < 1), key=lambda rung: rung.ratio)
    return table, ladder, "" if ladder else f"at n = {n}, no other method is faster on this machine"


def _usable(call: AttentionCall, rule: Rule) -> list[Method]:
    """The methods besides exact attention that have a form for the call."""
    return [x for x in rule.rungs[:-1] if not call.causal or x.causal is True]


def _affordable(
    call: AttentionCall, rule: Rule, table: Crossover | None, ladder: list[Rung]
) -> tuple[list[Rung], bool]:
    """(the rungs within the budgets, whether exact attention is); ValueError if none is."""
    exact = rule.rungs[-1]
    exact_fits = True
    if rule.max_bytes is not None:
        needs = {rung: _bytes(call, rule, rung.method, chosen_from=len(ladder)) for rung in ladder}
        ladder = [rung for rung in ladder if needs[rung] <= rule.max_bytes]
        least = _bytes(call, rule, exact, chosen_from=len(ladder))
        exact_fits = least <= rule.max_bytes
        if not exact_fits and not ladder:
            smallest = min([least, *needs.values()])
            msg = f"max_bytes is {rule.max_bytes}, and the method that needs least takes up to {smallest:.0f} bytes"
            raise ValueError(msg)
    if rule.max_time is not None:
        n, heads = min(call.q.shape[-2], call.k.shape[-2]), max(1, math.prod(call.batch()))
        if table is None:
            table = known_crossover(call.like, _usable(call, rule), causal=call.causal)
        seconds = heads * table.exact_seconds(n, call.q.shape[-1], call.v.shape[-1])
        is_fast = seconds <= rule.max_time
        fast = [rung for rung in ladder if seconds * rung.ratio <= rule.max_time]
        if not fast and not (exact_fits and is_fast):
            fastest = seconds * min([1.0, *(rung.ratio for rung in ladder)])
            msg = f"max_time is {rule.max_time:g} s, and the fastest method takes about {fastest:.2g} s"
            raise ValueError(msg)
        ladder, exact_fits = fast, exact_fits and is_fast
    return ladder, exact_fits


def check_bytes(call: AttentionCall, rule: Rule, numbers: Sequence[int]) -> None:
    """Raise ValueError if a call with these rungs, which were chosen before, may take more memory than `max_bytes`."""
    assert rule.max_bytes is not None
    needs = max(_bytes(call, rule, rule.rungs[number], chosen_from=0) for number in numbers)
    if len(set(numbers)) > 1:  # parts of the output are joined
        width = call.xp.finfo(call.arrangement.compute).bits // 8
        needs += width * math.prod(call.batch()) * call.q.shape[-2] * call.v.shape[-1]
    if needs > rule.max_bytes:
        told = f"takes up to {needs:.0f} bytes" if math.isfinite(needs) else "does not say how much it takes"
        msg = f"max_bytes is {rule.max_bytes}, and the method that was chosen before {told}; choose for such a call"
        raise ValueError(msg)


def _bytes(call: AttentionCall, rule: Rule, method: Method, *, chosen_from: int) -> float:
    """The most memory of a call that takes this method, beyond inputs and output, with what choosing takes."""
    own = method._extra_bytes(call)
    if own is None:
        return math.inf
    heads, n, (n_kv, d), d_v = max(1, math.prod(call.batch())), call.q.shape[-2], call.k.shape[-2:], call.v.shape[-1]
    width = call.xp.finfo(call.arrangement.compute).bits // 8
    if is_half(call.xp, call.arrangement.out_dtype):  # computed in copies
        own += width * heads * (n * (d + d_v) + n_kv * (d + d_v))
    if not chosen_from:
        return own
    exact = rule.rungs[-1]._extra_bytes(call) or 0  # of the sampled rows
    tried = chosen_from if hasattr(method, "on_rows") else 1
    rows = COPIES * heads * (d + d_v + 4) * min(rule.rows, n) * tried
    output = heads * n * d_v  # of a method that is tried, or of heads with another choice
    return max(own, exact) + width * (rows + output)


def _outputs_in_turn(call: AttentionCall, known: Sample, ladder: Sequence[Rung]) -> Iterator[tuple[Rung, Array]]:
    """The outputs (..., heads, r, d_v) of the rungs in turn; rungs of one family are computed together."""
    done: dict[int, Array] = {}
    for rung in ladder:
        if rung.place not in done:
            done |= _outputs(call, known, rung, ladder)
        out = done.pop(rung.place)
        whole = call.xp.broadcast_to(out, (*call.batch(), *out.shape[-2:]))
        yield rung, call.arrangement.heads.unfold(whole)


def _outputs(call: AttentionCall, known: Sample, rung: Rung, ladder: Sequence[Rung]) -> dict[int, Array]:
    """The outputs at the sampled rows of a rung, and of all others that differ in `opened` alone."""
    on_rows = getattr(rung.method, "on_rows", None)
    if on_rows is None:
        return {rung.place: call.xp.take(rung.method._evaluate(call.widened()), known.numbers, axis=-2)}
    kin = [other for other in ladder if family(other.method) == family(rung.method)]
    out = on_rows(
        call.q, call.k, call.v, known.numbers, causal=call.causal, key_mask=call.key_mask, scale=call.scale,
        opened=tuple(other.method.opened for other in kin),  # type: ignore[attr-defined]
    )  # fmt: skip
    return {other.place: out[..., i, :, :] for i, other in enumerate(kin)}


def _of_group(call: AttentionCall, numbers: Host) -> Host:
    """Numbers of heads (..., heads), folded, each the largest of the heads that share keys."""
    folded = np.broadcast_to(fold(call, numbers), call.batch())
    if folded.ndim and (call.k.ndim < 3 or call.k.shape[-3] == 1):
        folded = np.broadcast_to(folded.max(axis=-1, keepdims=True), folded.shape)
    return folded


def fold(call: AttentionCall, numbers: Host) -> Host:
    """Numbers (..., heads) with grouped heads folded as in the call."""
    return replace(call.arrangement.heads, xp=np).fold(numbers[..., None], tail=1)[..., 0]


def _told(rule: Rule, ladder: Sequence[Rung], chosen: Host, error: Host, bound: Host, is_open: Host) -> str:
    """The choice as text."""
    ratios = {rung.place: rung.ratio for rung in ladder}
    lines = []
    for index in np.unique(chosen).tolist():
        here = chosen == index
        heads = f"{rule.rungs[index]!r} for {here.sum()} of {here.size} heads"
        known = f"{_range(error[here])}, bound {_range(bound[here])}"
        if index not in ratios:
            lines.append(f"{heads}: the best of the others has an estimated error of {known}")
            continue
        ratio = "" if math.isnan(ratios[index]) else f", {ratios[index]:.2g} of the time of exact attention"
        missed = ", the least within the budget, and above the tolerance" if is_open[here].any() else ""
        lines.append(f"{heads}: estimated error {known}{ratio}{missed}")
    return f"tolerance {rule.tolerance:g} ≥ bound of the error; " + "; ".join(lines)


def _range(numbers: Host) -> str:
    low, high = f"{numbers.min():.2g}", f"{numbers.max():.2g}"
    return low if low == high else f"{low} to {high}"
