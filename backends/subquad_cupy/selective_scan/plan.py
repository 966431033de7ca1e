"""The launch geometry of the scan: a pure function of shapes, data type and the number of multiprocessors.

A block of 128 threads covers `128 / lanes * channels` channels of one group and one chunk of the sequence. The states
of each channel are spread over `lanes` lanes, `states` on each lane. A small number of channels leaves the device
idle: the sequence is then split into chunks, at the price of a first pass over the tails of the chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

THREADS = 128
MAX_BLOCKS = 2**31 - 1  # gridDim.x
THREADS_PER_MULTIPROCESSOR = 384  # threads that hide the latency; with fewer, the sequence is split
MIN_CHUNK = 256  # steps; shorter chunks cost more in first passes than they gain
MAX_CHUNK = 2**30  # steps; the kernel counts steps in 32 bits
CHUNK_MULTIPLE = 16  # steps of the longest tile: tiles and checkpoints then never straddle two chunks
MAX_STATES = 256

# d_state rounded up to a power of two -> (states per lane, lanes per channel)
_FORWARD = {
    1: (1, 1),
    2: (2, 1),
    4: (4, 1),
    8: (4, 2),
    16: (4, 4),
    32: (8, 4),
    64: (8, 8),
    128: (8, 16),
    256: (8, 32),
}
_BACKWARD = {
    **_FORWARD,
    32: (4, 8),
    64: (4, 16),
    128: (4, 32),
}  # fewer states on each lane, since the backward pass keeps a whole tile of states in registers


@dataclass(frozen=True)
class Plan:
    """The launch geometry of one pass over the sequence."""

    states: int  # per lane and channel
    lanes: int  # per channel
    channels: int  # per lane
    blocks: int  # per batch item and chunk
    chunk: int  # steps
    chunks: int
    grid: int

    def kernel(self, name: str, storage: str, *flags: bool) -> str:
        """The C++ name of the instantiation, such as ``scan_backward<float, 4, 4, 2, false, false>``."""
        arguments = [storage, self.states, self.lanes, self.channels, *(str(flag).lower() for flag in flags)]
        return f"{name}<{', '.join(map(str, arguments))}>"


def padded_states(d_state: int) -> int:
    """`d_state` rounded up to a power of two, which the kernel computes with."""
    return 1 << (d_state - 1).bit_length()


def plan_forward(batch: int, n: int, d: int, d_state: int, *, groups: int, itemsize: int, multiprocessors: int) -> Plan:
    """The plan of `scan_forward` and of its first pass; `itemsize` is the accumulator's, 4 or 8."""
    states, lanes = _FORWARD[padded_states(d_state)]
    if itemsize == 4:  # two channels share each read of B and C; float64 has no registers for it
        plan = _plan(batch, n, d, groups, states, lanes, 2, multiprocessors)
        if plan.chunks > 1 or plan.grid * THREADS >= THREADS_PER_MULTIPROCESSOR * multiprocessors:
            return plan
    return _plan(batch, n, d, groups, states, lanes, 1, multiprocessors)  # twice as many blocks


def plan_backward(
    batch: int, n: int, d: int, d_state: int, *, groups: int, itemsize: int, multiprocessors: int, constant: bool
) -> Plan:
    """The plan of `scan_backward` and of its first pass; `constant` says that B or C does not depend on time."""
    states, lanes = _BACKWARD[padded_states(d_state)]
    # two channels share the sums that make dB and dC, where registers allow
    channels = 2 if itemsize == 4 and states == 4 and lanes > 1 and not constant else 1
    return _plan(batch, n, d, groups, states, lanes, channels, multiprocessors)


def checkpoint_interval(d_state: int, itemsize: int) -> int:
    """The steps between states that `scan_backward` restarts from: the length of a tile, `backward_steps` in CUDA."""
    return min(8 if itemsize == 4 else 4, 2048 // (padded_states(d_state) * itemsize))


def _plan(
    batch: int, n: int, d: int, groups: int, states: int, lanes: int, channels: int, multiprocessors: int
) -> Plan:
    # split only if at most half of the wanted threads would run, since the first pass adds work
    blocks = groups * -(-(d // groups) // (THREADS // lanes * channels))
    wanted = THREADS_PER_MULTIPROCESSOR * multiprocessors
    running = batch * min(blocks * THREADS, -(-d * lanes // channels))
    chunks = max(1, min(-(-wanted // running), n // MIN_CHUNK)) if 2 * running <= wanted else 1
    chunks = max(chunks, -(-n // MAX_CHUNK))
    chunk = -(-n // (chunks * CHUNK_MULTIPLE)) * CHUNK_MULTIPLE
    chunks = -(-n // chunk)
    return Plan(states, lanes, channels, blocks, chunk, chunks, batch * chunks * blocks)
