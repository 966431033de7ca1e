"""A few states of one vector of channels, held in registers: four vectors, or one that stands for all four."""

from typing import Any

from subquad_numpy.codegen import add_up, inline, load, product, spread, store, zeros
from subquad_numpy.codegen.turn import quarters

Four = tuple[Any, Any, Any, Any]
AT_ONCE = 4  # states that go through a tile of time together: more would not fit into sixteen registers
ENOUGH = 4 * AT_ONCE  # states whose rounds through a tile prefetch all rows of the next one


@inline
def times(x: Any, y: Four) -> Four:
    return x * y[0], x * y[1], x * y[2], x * y[3]


@inline
def driven(x: Any, y: Four) -> Four:
    """`times`, rounded: a few states and one of them then are the same to the bit."""
    return product(x, y[0]), product(x, y[1]), product(x, y[2]), product(x, y[3])


@inline
def plus(x: Four, y: Four) -> Four:
    return x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3]


@inline
def along(total: Any, x: Four, y: Four, few: bool) -> Any:
    """total + x · y."""
    total = total + x[0] * y[0]
    if few:
        total = total + x[1] * y[1] + x[2] * y[2] + x[3] * y[3]
    return total


@inline
def loaded(memory: Any, at: int, lanes: int, few: bool) -> Four:
    """Four vectors, or the same one four times: what is computed of it is computed once."""
    j, k, m = (lanes, 2 * lanes, 3 * lanes) if few else (0, 0, 0)
    return load(memory, at), load(memory, at + j), load(memory, at + k), load(memory, at + m)


@inline
def mapped(maps: Any, now: int, at: int, lanes: int, few: bool, constant: bool) -> Four:
    """What B or C has for the states: other vectors for other channels, if it is constant."""
    if constant:
        return loaded(maps, at, lanes, few)
    j, k, m = (1, 2, 3) if few else (0, 0, 0)
    return spread(maps, now), spread(maps, now + j), spread(maps, now + k), spread(maps, now + m)


@inline
def keep(memory: Any, at: int, x: Four, lanes: int, few: bool) -> None:
    store(memory, at, x[0])
    if few:
        store(memory, at + lanes, x[1])
        store(memory, at + 2 * lanes, x[2])
        store(memory, at + 3 * lanes, x[3])


@inline
def add(sums: Any, at: int, x: Four, lanes: int, few: bool) -> None:
    """`add_up_four`, where a product and its sum may fuse."""
    keep(sums, at, plus(loaded(sums, at, lanes, few), x), lanes, few)


@inline
def add_up_four(sums: Any, at: int, x: Four, lanes: int, few: bool) -> None:
    add_up(sums, at, x[0])
    if few:
        add_up(sums, at + lanes, x[1])
        add_up(sums, at + 2 * lanes, x[2])
        add_up(sums, at + 3 * lanes, x[3])


@inline
def add_over_channels(sums: Any, at: int, x: Four, few: bool) -> None:
    """Add up over the lanes, for which `quarters` have a place in `sums` for each state."""
    if few:
        add_up(sums, at, quarters(x[0], x[1], x[2], x[3]))
    else:  # the state's place is the first one from `at` on, and every fourth
        none = zeros(sums)
        add_up(sums, at, quarters(x[0], none, none, none))
