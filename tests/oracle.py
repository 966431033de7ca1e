"""Arrays that the reference implementation of Mamba computed; data/oracle/README.md says how."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data" / "oracle"
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
SCANS = sorted(path.stem for path in DATA.glob("selective_scan_*.npz"))
UPDATES = sorted(path.stem for path in DATA.glob("selective_state_update_*.npz"))


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as stored:
        return dict(stored)


def channels_last(name: str, x: np.ndarray, given: dict[str, np.ndarray]) -> np.ndarray:
    """Move the last axis: (batch, …, length) to (batch, length, …); interleaved complex maps become complex."""
    if name in ("B", "C") and x.ndim == 3 and np.iscomplexobj(given["A"]):
        x = x[..., 0::2] + 1j * x[..., 1::2]
    return np.moveaxis(x, -1, 1) if x.ndim > 2 else x


def inputs_of(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: channels_last(name, given[name], given) for name in NAMES if name in given}


def expected_gradients(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: channels_last(name, given[f"grad_{name}"], given) for name in NAMES if name in given}
