"""The method "auto": the cheapest method whose estimated error is within a tolerance; exact attention if none is.

    choice = the first rung, by cost, with U ≤ tolerance,    U² = R² + 8 max_i (w[i] − 1) e[i] / Σ_i w[i] ‖o[i]‖²,
    R² = Σ_i w[i] e[i] / Σ_i w[i] ‖o[i]‖²,    e[i] = ‖ô[i] − o[i]‖²,    sampled i, each of which stands for w[i] rows

Of rungs that differ in the number of opened clusters alone, U falls no faster than that number grows. Why, and which
rows are sampled, is said in `error_bounds`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from subquad.attention.call import AttentionCall, enter
from subquad.attention.choosing import Found, Rule, check_bytes, choose
from subquad.attention.crossover import Crossover
from subquad.attention.exact import Exact
from subquad.attention.grouped_heads import Heads
from subquad.attention.method import Method
from subquad.backend import Array
from subquad.core.checks import check_count, check_positive, check_seed
from subquad.core.dtypes import cast
from subquad.core.kernel import computing_for_real, is_listening, note
from subquad.registry import METHODS, register

OPENED = (0, 2, 4, 8, 16, 32, 64)  # clusters of the rungs of the default ladder
EXACT = Exact()
Host = np.ndarray[Any, Any]
# the number of a rung, or an axis, counted from the end of (..., n), and its parts: (start, stop, plan of the part)
Plan = Any


@register("auto", cost="that of its choice, at most n n_kv (d + d_v)")
@dataclass(frozen=True, repr=False, eq=False)
class Auto(Method):
    """The cheapest method whose estimated error is within a tolerance, for each item and head; else exact attention.

    Parameters
    ----------
    tolerance : float, default 0.05
        The relative error ‖out − exact‖ / ‖exact‖ of a head that is accepted.
    max_bytes : int, optional
        The most memory that a call may take beyond its inputs and its output. Methods of which it is not known how much
        they take are left out; ValueError if none is left.
    max_time : float, optional
        The most seconds that a call may take, by the times of the crossover. If no method that is fast enough meets the
        tolerance, the most accurate of them is taken, and `subquad.explain` says so; ValueError if none is.
    rows : int, default 256
        How many rows are compared with exact attention; up to a quarter of them are rows of which a method of the
        ladder knows that its error is large there ("clustered": the first rows of causal chunks).
    seed : int, default 0
        Seed of these rows.
    ladder : tuple of method objects, optional
        The methods to choose from besides exact attention; those with arrays among their options cannot be. Default:
        "clustered" with 0, 2, 4, 8, 16, 32 and 64 opened clusters.
    crossover : Crossover, tuple of Crossover, or int, optional
        Times of the methods and of exact attention by the length, as `subquad.measure_crossover` measures them, one
        table for causal calls or not, or both. Methods are tried in the order of their times, and not where they are
        slower than exact attention. A number is the length from which on all of the ladder, which then is in the order
        of costs, is faster. Default: exact attention if there are fewer than 2048 queries or keys; else a table that is
        measured at the first such call on a machine, in about two seconds, and kept in a file.
    choice : int or nested tuple of int, optional
        The choice, made before: for each item and head, as an array (..., heads), the number of the method in `rungs`;
        −1 is exact attention. `with_choice` sets it. Of the other options, only `ladder` and `max_bytes` then matter:
        ValueError for a call that may take more memory.

    Notes
    -----
    The methods are tried from the cheapest on, each on the whole input (a method with a function `on_rows` on the
    sampled rows alone), until for every head one has the bound of its error within the tolerance. The bound leaves room
    for rows that carry the error and were not sampled. The choice depends on q, k, v, `seed` and the crossover, and on
    nothing else. That of an item does not depend on the rest of its batch, unless `max_bytes` or `max_time` is given,
    which are budgets of the whole call. Heads that share keys share the choice, since they share clusters: each of them
    meets the tolerance. Neighbouring heads of one choice are computed together.

    Choosing reads values: under a tracer such as ``jax.jit``, and where calls must not differ in their choice, use
    `with_choice`. The estimates look at the whole input. So in causal calls, a later token may change the choice and
    with it earlier rows; after `with_choice` it does not. The estimate is of this input, and no guarantee.

    References
    ----------
    .. [1] C. J. Clopper, E. S. Pearson, "The Use of Confidence or Fiducial Limits Illustrated in the Case of the
       Binomial", 1934.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 300, 8))
    >>> q[0] = 0  # the first head looks at all keys alike
    >>> auto = subquad.Auto(ladder=(subquad.Nystrom(num_landmarks=4),), crossover=300)
    >>> auto.with_choice(q, k, v).choice  # Nyström attention for the first head, exact attention for the second
    (0, 1)
    """

    tolerance: float = 0.05
    max_bytes: int | None = None
    max_time: float | None = None
    rows: int = 256
    seed: int = 0
    ladder: tuple[Method, ...] | None = None
    crossover: Crossover | tuple[Crossover, ...] | int | None = None
    choice: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tolerance", self.tolerance)
        check_count("rows", self.rows)
        check_seed(self.seed)
        if self.max_bytes is not None:
            check_count("max_bytes", self.max_bytes)
        if self.max_time is not None:
            check_positive("max_time", self.max_time)
        if self.ladder is not None:
            _check_ladder(self.ladder)
        _check_crossover(self.crossover)
        if self.max_time is not None and isinstance(self.crossover, int):
            msg = "max_time needs times, and crossover is a number; pass what measure_crossover returns"
            raise ValueError(msg)
        if self.choice is not None:
            _check_choice(self.choice, len(self.rungs))

    @property
    def rungs(self) -> tuple[Method, ...]:
        """The methods to choose from; exact attention is the last."""
        return (*(_default_ladder() if self.ladder is None else self.ladder), EXACT)

    def with_choice(
        self,
        q: Array,
        k: Array,
        v: Array,
        /,
        *,
        causal: bool = False,
        key_mask: Array | None = None,
        scale: float | None = None,
    ) -> Auto:
        """Choose by these arrays, once, and return a method that keeps to the choice.

        Parameters
        ----------
        q, k, v : array, shape (..., n, d), (..., n_kv, d) and (..., n_kv, d_v)
            Example arrays. Later calls have the same number of heads; with a batch, the same batch: pass one item for
            calls of any batch.
        causal, key_mask, scale : optional
            As in `subquad.attention`.

        Returns
        -------
        Auto
            This method with `choice`, an integer if it is the same for all heads. It works under any tracer.

        Raises
        ------
        TypeError, ValueError
            As `subquad.attention`; ValueError also for arrays whose values cannot be read, or if no method keeps within
            `max_bytes` or `max_time`.
        """
        call = enter(None, {"q": q, "k": k, "v": v}, key_mask=key_mask, causal=causal, scale=scale, owner=self)
        with call.computing():
            chosen = self._choose(call).chosen
        heads = call.arrangement.heads
        chosen = chosen if heads.groups == 1 else heads.unfold(chosen[..., None, None])[..., 0, 0]
        kinds = np.unique(chosen)
        if kinds.size < 2:
            return replace(self, choice=int(kinds[0]) if kinds.size else len(self.rungs) - 1)
        return replace(self, choice=_tuples(chosen.tolist()))

    def _evaluate(self, call: AttentionCall) -> Array:
        if self.choice is None:
            found = self._choose(call)
            note(f"auto: {found.why}")
            return self._run(call, split(found.chosen))
        heads = call.arrangement.heads
        sizes = heads.keys, heads.groups, *call.batch()
        if is_listening():
            counts = Counter(_spread(self.choice, len(self.rungs), *sizes).reshape(-1).tolist())
            told = ", ".join(f"{self.rungs[i]!r} for {count} heads" for i, count in sorted(counts.items()))
            note(f"auto: as was chosen before, {told}")
        plan = call.arrangement.backend.on_host(_planned, self.choice, len(self.rungs), *sizes)
        if self.max_bytes is not None:
            check_bytes(call, self._rule(), numbers_in(plan))
        return self._run(call, plan)

    def _reads_half(self, *, streaming: bool = False) -> bool:
        return True

    def _rule(self) -> Rule:
        return Rule(self.rungs, self.tolerance, self.rows, self.seed, self.max_bytes, self.max_time, self.crossover)

    def _choose(self, call: AttentionCall) -> Found:
        """The choice by the values of a call."""
        with computing_for_real():
            return choose(call, self._rule())

    def _run(self, call: AttentionCall, plan: Plan) -> Array:
        """The output of a call, each part by its method."""
        if isinstance(plan, int):
            method = self.rungs[plan]
            if call.causal and method.causal is not True:
                raise NotImplementedError(method.causal)
            given = call if method._reads_half() else call.widened()
            out = cast(call.xp, method._evaluate(given), call.arrangement.out_dtype)
            return call.leave_rows(out, call.q.shape[-2])
        axis, parts = plan
        outs = [self._run(call.items(axis, start, stop), part) for start, stop, part in parts]
        return call.xp.concat(outs, axis=axis - 1)

    def _in_force(self) -> dict[str, Any]:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = {name: getattr(self, name) for name in defaults}
        return {name: x for name, x in given.items() if name == "tolerance" or x is not defaults[name]}


def split(chosen: Host) -> Plan:
    """The plan for the numbers of rungs of all items; neighbours with one choice are one part."""
    if chosen.size == 0:
        return -1
    if np.all(chosen == chosen.reshape(-1)[0]):
        return int(chosen.reshape(-1)[0])
    axis = next(a for a in range(chosen.ndim) if np.any(np.diff(chosen, axis=a)))
    others = tuple(a for a in range(chosen.ndim) if a != axis)
    cuts = np.flatnonzero(np.any(np.diff(chosen, axis=axis), axis=others)) + 1
    edges = itertools.pairwise([0, *cuts.tolist(), chosen.shape[axis]])
    parts = tuple((a, b, split(np.take(chosen, range(a, b), axis=axis))) for a, b in edges)
    return axis - chosen.ndim - 1, parts


def numbers_in(plan: Plan) -> list[int]:
    """The numbers of the rungs that a plan uses."""
    return [plan] if isinstance(plan, int) else [i for *_, part in plan[1] for i in numbers_in(part)]


def _planned(choice: Any, count: int, keys: int, groups: int, *batch: int) -> Plan:
    return split(_spread(choice, count, keys, groups, *batch))


def _spread(choice: Any, count: int, keys: int, groups: int, *batch: int) -> Host:
    # A choice among `count` rungs for each item of a batch with grouped heads folded
    given = np.asarray(choice) % count
    folded = Heads(np, keys, groups).fold(given[..., None], tail=1)[..., 0] if given.ndim else given
    try:
        return np.broadcast_to(folded, batch)
    except ValueError:
        msg = (
            f"choice is an array {given.shape}, which does not fit the batch {list(batch)} of the call, heads "
            f"included; make one by with_choice for such a call"
        )
        raise ValueError(msg) from None


@functools.cache
def _ladder_of(cls: Callable[..., Method]) -> tuple[Method, ...]:
    return tuple(cls(opened=opened) for opened in OPENED)


def _default_ladder() -> tuple[Method, ...]:
    # The default ladder; empty if there is no method "clustered"
    cls: Any = METHODS.get("clustered")
    return () if cls is None else _ladder_of(cls)


def _check_ladder(ladder: Any) -> None:
    # Raise TypeError unless a ladder is a tuple of methods, ValueError for methods that cannot be in one
    if not isinstance(ladder, tuple) or not all(isinstance(x, Method) for x in ladder):
        msg = f"ladder is {ladder!r}, expected a tuple of method objects, such as (subquad.Window(left=64),)"
        raise TypeError(msg)
    for x in ladder:
        if isinstance(x, Auto):
            msg = "ladder holds an Auto object; put the methods themselves into it"
            raise ValueError(msg)
        for field in dataclasses.fields(x):
            value = getattr(x, field.name)
            if any(hasattr(y, "dtype") for y in (value if isinstance(value, tuple) else (value,))):
                msg = f"ladder holds {x!r}, whose {field.name} are arrays for all heads of a call; choices are by head"
                raise ValueError(msg)
    if len(set(ladder)) != len(ladder):
        msg = f"ladder is {ladder!r}, in which a method stands twice"
        raise ValueError(msg)


def _check_crossover(crossover: Any) -> None:
    # Raise TypeError or ValueError unless it is None, a number of keys, a table or a tuple of tables
    if crossover is None or isinstance(crossover, Crossover):
        return
    if isinstance(crossover, tuple):
        if not crossover or not all(isinstance(x, Crossover) for x in crossover):
            msg = f"crossover is {crossover!r}, expected Crossover objects in the tuple"
            raise TypeError(msg)
        return
    check_count("crossover", crossover, why="; expected a Crossover, a tuple of them, or a number of keys")


def _check_choice(choice: Any, count: int) -> None:
    # Raise TypeError or ValueError unless a choice is an integer or a nested tuple of them, −1 … count − 1
    if not isinstance(choice, tuple):
        check_count("choice", choice, least=-1, most=count - 1, why="; expected an integer, or a nested tuple of them")
        return
    for part in choice:
        _check_choice(part, count)
    if len({np.shape(part) for part in choice}) != 1:
        msg = f"choice is {choice!r}, expected a tuple of equally long parts, one for each item or head"
        raise ValueError(msg)


def _tuples(nested: Any) -> Any:
    return tuple(map(_tuples, nested)) if isinstance(nested, list) else nested
