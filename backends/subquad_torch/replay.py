"""What a function finds around it besides its arguments: random generators and the state of `torch.autocast`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

CPU = torch.device("cpu")


def random_states(devices: Iterable[torch.device]) -> dict[torch.device, Tensor]:
    """The states of the default generators of the CPU and of these devices."""
    states = {CPU: torch.get_rng_state()}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            states[device] = torch.get_device_module(device).get_rng_state(*_of(device))
    return states


@contextlib.contextmanager
def replaying(states: Mapping[torch.device, Tensor]) -> Iterator[None]:
    """The generators in these states; afterwards, in those that they had."""
    if not states:
        yield
        return
    now = random_states(states)
    _set_random_states(states)
    try:
        yield
    finally:
        _set_random_states({device: now[device] for device in states})


def _set_random_states(states: Mapping[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device == CPU:
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, *_of(device))


def _of(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one of it, and its functions take no device


def autocast_states(device: torch.device) -> dict[str, tuple[bool, torch.dtype]]:
    """Whether autocast is on, and to which dtype, on the CPU and on this device."""
    kinds = sorted({"cpu", device.type})
    return {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in kinds
        if torch.amp.is_autocast_available(kind)
    }


@contextlib.contextmanager
def autocasting(states: Mapping[str, tuple[bool, torch.dtype]]) -> Iterator[None]:
    """Autocast in these states, without its cache of weights.

    The copies of all layers' weights would live in it until the user's context ends. Older versions of PyTorch also
    took from it copies made where nothing was recorded, through which no gradient flows.
    """
    with contextlib.ExitStack() as stack:
        for kind, (enabled, dtype) in states.items():
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        yield
